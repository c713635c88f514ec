package authz

import (
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// endpointControllers asks DescribeCluster for the controllers (KIP-919), which only controllers answer.
const endpointControllers = 2

// describeCluster: anyone may see the brokers. Cluster Describe is for the authorized operations only; to see the
// controllers takes Cluster Alter. Whom of them it shows, if any, is said first by who is asked.
func describeCluster(c *Ctx, req *kmsg.DescribeClusterRequest) Verdict {
	if req.EndpointType == endpointControllers && !c.AllowCluster(kmsg.ACLOperationAlter) {
		return Verdict{Edit: edit(func(_ *Ctx, resp *kmsg.DescribeClusterResponse) {
			if resp.ErrorCode == 0 {
				*resp = *as[*kmsg.DescribeClusterResponse](Refuse(req, kerr.ClusterAuthorizationFailed,
					clusterAuthorizationFailed))
			}
		})}
	}
	if !req.IncludeClusterAuthorizedOperations {
		return Verdict{}
	}
	return Verdict{Edit: edit(func(c *Ctx, resp *kmsg.DescribeClusterResponse) {
		c.limitClusterOperations(&resp.ClusterAuthorizedOperations)
	})}
}
