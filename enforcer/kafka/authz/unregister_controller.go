package authz

import "github.com/twmb/franz-go/pkg/kmsg"

// unregisterController: Cluster Alter.
func unregisterController(c *Ctx, req *kmsg.UnregisterControllerRequest) Verdict {
	return c.onCluster(req, kmsg.ACLOperationAlter, clusterAuthorizationFailed)
}
