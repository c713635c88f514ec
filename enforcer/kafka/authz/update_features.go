package authz

import "github.com/twmb/franz-go/pkg/kmsg"

// updateFeatures: Cluster Alter.
func updateFeatures(c *Ctx, req *kmsg.UpdateFeaturesRequest) Verdict {
	return c.onCluster(req, kmsg.ACLOperationAlter, clusterAuthorizationFailed)
}
