package authz

import "github.com/twmb/franz-go/pkg/kmsg"

// addRaftVoter: Cluster Alter (KIP-853).
func addRaftVoter(c *Ctx, req *kmsg.AddRaftVoterRequest) Verdict {
	return c.onCluster(req, kmsg.ACLOperationAlter, clusterAuthorizationFailed)
}
