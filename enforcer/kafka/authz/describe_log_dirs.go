package authz

import "github.com/twmb/franz-go/pkg/kmsg"

// describeLogDirs: Cluster Describe. Until version 3 the refusal is an answer without directories.
func describeLogDirs(c *Ctx, req *kmsg.DescribeLogDirsRequest) Verdict {
	return c.onCluster(req, kmsg.ACLOperationDescribe, "")
}
