package authz

import (
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// describeClientQuotas: Cluster DescribeConfigs. The refusal has null in place of entries.
func describeClientQuotas(c *Ctx, req *kmsg.DescribeClientQuotasRequest) Verdict {
	if c.AllowCluster(kmsg.ACLOperationDescribeConfigs) {
		return Verdict{}
	}
	answer := as[*kmsg.DescribeClientQuotasResponse](Refuse(req, kerr.ClusterAuthorizationFailed, ""))
	answer.Entries = nil
	return Verdict{Answer: answer}
}
