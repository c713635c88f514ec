package authz

import (
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// shareGroupHeartbeat (KIP-932): Group Read, and Topic Describe on every topic subscribed to; one refused topic refuses
// the heartbeat. The assignment in the answer is the member's own: reading from it takes a ShareFetch.
func shareGroupHeartbeat(c *Ctx, req *kmsg.ShareGroupHeartbeatRequest) Verdict {
	if err := c.judgeGroup(req.GroupID, kmsg.ACLOperationRead); err != nil {
		return Verdict{Answer: Refuse(req, err, "")}
	}
	if !validShareMember(&req.MemberID) {
		return Verdict{Answer: Refuse(req, kerr.InvalidRequest, "")}
	}
	if _, out := sift(req.SubscribedTopicNames, func(topic *string) *kerr.Error {
		return c.judgeTopic(false, *topic, TopicID{}, kmsg.ACLOperationDescribe)
	}); len(out) > 0 {
		return Verdict{Answer: Refuse(req, out[0].err, "")}
	}
	return Verdict{}
}

// validShareMember is KafkaApis.isMemberIdValid: a broker looks at the member id before it looks at topics.
func validShareMember(id *string) bool {
	const longest = 36 // a UUID as text
	return id != nil && *id != "" && len(*id) <= longest
}
