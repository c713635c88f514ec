package authz

import "github.com/twmb/franz-go/pkg/kmsg"

// createACLs: Cluster Alter. It changes the broker's own ACLs, never the policy.
func createACLs(c *Ctx, req *kmsg.CreateACLsRequest) Verdict {
	return c.onCluster(req, kmsg.ACLOperationAlter, clusterAuthorizationFailed)
}
