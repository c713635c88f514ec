package authz

import "github.com/twmb/franz-go/pkg/kmsg"

// describeQuorum: Cluster Describe.
func describeQuorum(c *Ctx, req *kmsg.DescribeQuorumRequest) Verdict {
	return c.onCluster(req, kmsg.ACLOperationDescribe, clusterAuthorizationFailed)
}
