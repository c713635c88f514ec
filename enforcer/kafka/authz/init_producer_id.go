package authz

import (
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// initProducerID: TransactionalId Write; without a transactional id Cluster IdempotentWrite, or Topic Write on
// any topic (KIP-679).
func initProducerID(c *Ctx, req *kmsg.InitProducerIDRequest) Verdict {
	if req.TransactionalID != nil {
		if !c.AllowTxn(*req.TransactionalID, kmsg.ACLOperationWrite) {
			return Verdict{Answer: Refuse(req, kerr.TransactionalIDAuthorizationFailed, "")}
		}
		return Verdict{}
	}
	anyTopic := c.View.DecideAny(kmsg.ACLResourceTypeTopic, kmsg.ACLOperationWrite)
	if !c.either(Check{kmsg.ACLResourceTypeTopic, "*", kmsg.ACLOperationWrite, anyTopic},
		c.check(kmsg.ACLResourceTypeCluster, clusterName, kmsg.ACLOperationIdempotentWrite)) {
		return Verdict{Answer: Refuse(req, kerr.ClusterAuthorizationFailed, "")}
	}
	return Verdict{}
}
