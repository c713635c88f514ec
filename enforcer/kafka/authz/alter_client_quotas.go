package authz

import (
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// alterClientQuotas: Cluster AlterConfigs. The refusal names the entity of each entry.
func alterClientQuotas(c *Ctx, req *kmsg.AlterClientQuotasRequest) Verdict {
	if c.AllowCluster(kmsg.ACLOperationAlterConfigs) {
		return Verdict{}
	}
	answer := as[*kmsg.AlterClientQuotasResponse](
		Refuse(req, kerr.ClusterAuthorizationFailed, clusterAuthorizationFailed))
	for i := range answer.Entries {
		for _, e := range req.Entries[i].Entity {
			answer.Entries[i].Entity = append(answer.Entries[i].Entity,
				kmsg.AlterClientQuotasResponseEntryEntity{Type: e.Type, Name: e.Name})
		}
	}
	return Verdict{Answer: answer}
}
