package authz

import "github.com/twmb/franz-go/pkg/kmsg"

// describeACLs: Cluster Describe. The ACLs shown are the broker's own; what the policy gives is not among them.
func describeACLs(c *Ctx, req *kmsg.DescribeACLsRequest) Verdict {
	return c.onCluster(req, kmsg.ACLOperationDescribe, clusterAuthorizationFailed)
}
