package authz

import "github.com/twmb/franz-go/pkg/kmsg"

// listConfigResources: Cluster DescribeConfigs. It shows every topic, group and client metric there is, whoever may see
// them: so does a broker. Version 0 is ListClientMetricsResources (KIP-1142 made more of it).
func listConfigResources(c *Ctx, req *kmsg.ListConfigResourcesRequest) Verdict {
	return c.onCluster(req, kmsg.ACLOperationDescribeConfigs, "")
}
