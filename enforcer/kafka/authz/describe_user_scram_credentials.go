package authz

import (
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// describeUserSCRAMCredentials: Cluster Describe. The refusal has a result for each user, without the name. To a list
// of users that is null a broker owes its refusal for ever: it fails when it makes the answer. We give one.
func describeUserSCRAMCredentials(c *Ctx, req *kmsg.DescribeUserSCRAMCredentialsRequest) Verdict {
	if c.AllowCluster(kmsg.ACLOperationDescribe) {
		return Verdict{}
	}
	answer := as[*kmsg.DescribeUserSCRAMCredentialsResponse](Refuse(req, kerr.ClusterAuthorizationFailed, ""))
	for range req.Users {
		answer.Results = append(answer.Results,
			kmsg.DescribeUserSCRAMCredentialsResponseResult{ErrorCode: kerr.ClusterAuthorizationFailed.Code})
	}
	return Verdict{Answer: answer}
}
