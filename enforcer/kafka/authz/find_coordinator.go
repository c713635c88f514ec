package authz

import (
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// Kinds of coordinators, as FindCoordinator names them from v1.
const (
	groupCoordinator int8 = iota
	txnCoordinator
	shareCoordinator // v6+ (KIP-932)
)

// findCoordinator: Group or TransactionalId Describe, by the kind of key. A share coordinator is for brokers alone:
// Cluster ClusterAction. One key until v3, several from v4 (KIP-699), answered in the order asked.
func findCoordinator(c *Ctx, req *kmsg.FindCoordinatorRequest) Verdict {
	if req.Version < 4 {
		if err := c.judgeCoordinator(req, req.CoordinatorKey); err != nil {
			return Verdict{Answer: Refuse(req, err, coordinatorErrors[err])}
		}
		return Verdict{}
	}
	forward := *req
	forward.CoordinatorKeys = make([]string, 0, len(req.CoordinatorKeys))
	ours := make([]*kmsg.FindCoordinatorResponseCoordinator, len(req.CoordinatorKeys))
	for i, key := range req.CoordinatorKeys {
		if err := c.judgeCoordinator(req, key); err != nil {
			ofAll := err == kerr.InvalidRequest && req.CoordinatorType != shareCoordinator
			if ofAll || err == kerr.ClusterAuthorizationFailed {
				return Verdict{Answer: Refuse(req, err, coordinatorErrors[err])}
			}
			ours[i] = &kmsg.FindCoordinatorResponseCoordinator{
				Key: key, NodeID: -1, Port: -1, ErrorCode: err.Code, ErrorMessage: new(string),
			}
		} else {
			forward.CoordinatorKeys = append(forward.CoordinatorKeys, key)
		}
	}
	if len(forward.CoordinatorKeys) == len(req.CoordinatorKeys) {
		return Verdict{}
	}
	return partly(c, &forward, len(forward.CoordinatorKeys), func(_ *Ctx, resp *kmsg.FindCoordinatorResponse) {
		resp.Coordinators = weave(resp.Coordinators, ours)
	})
}

// judgeCoordinator tells how the look-up of a key is refused, nil when it is allowed.
func (c *Ctx) judgeCoordinator(req *kmsg.FindCoordinatorRequest, key string) *kerr.Error {
	switch kind := req.CoordinatorType; {
	case kind == groupCoordinator:
		return c.judgeGroup(key, kmsg.ACLOperationDescribe)
	case kind == txnCoordinator:
		if !c.AllowTxn(key, kmsg.ACLOperationDescribe) {
			return kerr.TransactionalIDAuthorizationFailed
		}
	case kind == shareCoordinator && req.Version >= 6:
		if !c.AllowCluster(kmsg.ACLOperationClusterAction) {
			return kerr.ClusterAuthorizationFailed
		}
	default:
		return kerr.InvalidRequest
	}
	return nil
}

// coordinatorErrors are the broker's messages (Errors.java), which refusals of whole requests carry, and so all of
// versions 1 to 3.
var coordinatorErrors = map[*kerr.Error]string{
	kerr.GroupAuthorizationFailed:           groupAuthorizationFailed,
	kerr.TransactionalIDAuthorizationFailed: "Transactional Id authorization failed.",
	kerr.ClusterAuthorizationFailed:         clusterAuthorizationFailed,
	kerr.InvalidRequest:                     invalidRequest,
}
