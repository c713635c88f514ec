package authz

import "github.com/twmb/franz-go/pkg/kmsg"

// unregisterBroker: Cluster Alter.
func unregisterBroker(c *Ctx, req *kmsg.UnregisterBrokerRequest) Verdict {
	return c.onCluster(req, kmsg.ACLOperationAlter, clusterAuthorizationFailed)
}
