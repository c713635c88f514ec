package authz

import "github.com/twmb/franz-go/pkg/kmsg"

// alterReplicaLogDirs: Cluster Alter.
func alterReplicaLogDirs(c *Ctx, req *kmsg.AlterReplicaLogDirsRequest) Verdict {
	return c.onCluster(req, kmsg.ACLOperationAlter, "")
}
