package authz

import (
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// consumerGroupHeartbeat (KIP-848): Group Read, and Topic Describe on every topic subscribed to, as Kafka does from
// 4.0; one refused topic refuses the heartbeat. The assignment in the answer is the member's own and stays as it is:
// reading from it takes a Fetch. A subscription by regular expression is matched by the broker against whatever our
// principal may describe, so it takes Describe on every topic there may be.
func consumerGroupHeartbeat(c *Ctx, req *kmsg.ConsumerGroupHeartbeatRequest) Verdict {
	if err := c.judgeGroup(req.Group, kmsg.ACLOperationRead); err != nil {
		return Verdict{Answer: Refuse(req, err, "")}
	}
	if _, out := sift(req.SubscribedTopicNames, func(topic *string) *kerr.Error {
		return c.judgeTopic(false, *topic, TopicID{}, kmsg.ACLOperationDescribe)
	}); len(out) > 0 {
		return Verdict{Answer: Refuse(req, out[0].err, "")}
	}
	regex := req.SubscribedTopicRegex
	if regex != nil && *regex != "" && !c.allowEveryTopic(kmsg.ACLOperationDescribe) {
		return Verdict{Answer: Refuse(req, kerr.InvalidRegularExpression, "klamm admits subscriptions by regular "+
			"expression that the broker matches only with Describe on all topics: subscribe to topic names, or use "+
			"group.protocol=classic")}
	}
	return Verdict{}
}

// allowEveryTopic decides and records an access that may be to any topic.
func (c *Ctx) allowEveryTopic(op kmsg.ACLOperation) bool {
	d := c.View.DecideAll(kmsg.ACLResourceTypeTopic, op)
	c.Checks = append(c.Checks, Check{kmsg.ACLResourceTypeTopic, "*", op, d})
	return d.Allowed
}
