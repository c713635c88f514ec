package authz

import "github.com/twmb/franz-go/pkg/kmsg"

// listPartitionReassignments: Cluster Describe.
func listPartitionReassignments(c *Ctx, req *kmsg.ListPartitionReassignmentsRequest) Verdict {
	return c.onCluster(req, kmsg.ACLOperationDescribe, clusterAuthorizationFailed)
}
