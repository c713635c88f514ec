package authz

import "github.com/twmb/franz-go/pkg/kmsg"

// deleteACLs: Cluster Alter. It changes the broker's own ACLs, never the policy.
func deleteACLs(c *Ctx, req *kmsg.DeleteACLsRequest) Verdict {
	return c.onCluster(req, kmsg.ACLOperationAlter, clusterAuthorizationFailed)
}
