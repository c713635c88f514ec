package authz

import (
	"cmp"
	"slices"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// alterUserSCRAMCredentials: Cluster Alter. The refusal names each user once, in alphabetical order.
func alterUserSCRAMCredentials(c *Ctx, req *kmsg.AlterUserSCRAMCredentialsRequest) Verdict {
	if c.AllowCluster(kmsg.ACLOperationAlter) {
		return Verdict{}
	}
	answer := as[*kmsg.AlterUserSCRAMCredentialsResponse](
		Refuse(req, kerr.ClusterAuthorizationFailed, clusterAuthorizationFailed))
	type result = kmsg.AlterUserSCRAMCredentialsResponseResult
	slices.SortFunc(answer.Results, func(a, b result) int { return cmp.Compare(a.User, b.User) })
	answer.Results = slices.CompactFunc(answer.Results, func(a, b result) bool { return a.User == b.User })
	return Verdict{Answer: answer}
}
