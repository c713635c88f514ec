package authz

import "github.com/twmb/franz-go/pkg/kmsg"

// alterPartitionAssignments: Cluster Alter. Kafka calls it AlterPartitionReassignments.
func alterPartitionAssignments(c *Ctx, req *kmsg.AlterPartitionAssignmentsRequest) Verdict {
	return c.onCluster(req, kmsg.ACLOperationAlter, clusterAuthorizationFailed)
}
