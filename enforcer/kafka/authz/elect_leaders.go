package authz

import "github.com/twmb/franz-go/pkg/kmsg"

// electLeaders: Cluster Alter.
func electLeaders(c *Ctx, req *kmsg.ElectLeadersRequest) Verdict {
	return c.onCluster(req, kmsg.ACLOperationAlter, clusterAuthorizationFailed)
}
