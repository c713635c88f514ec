package authz

import "github.com/twmb/franz-go/pkg/kmsg"

// removeRaftVoter: Cluster Alter (KIP-853).
func removeRaftVoter(c *Ctx, req *kmsg.RemoveRaftVoterRequest) Verdict {
	return c.onCluster(req, kmsg.ACLOperationAlter, clusterAuthorizationFailed)
}
