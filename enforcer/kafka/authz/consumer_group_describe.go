package authz

import (
	"slices"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// consumerGroupDescribe (KIP-848): Group Describe. Refused groups come before the broker's. A group with an assigned
// topic the subject may not describe is replaced by the error alone, as Kafka does from 4.0. Members are shown with the
// subscription they made, not with what the broker was told instead.
func consumerGroupDescribe(c *Ctx, req *kmsg.ConsumerGroupDescribeRequest) Verdict {
	kept, out := sift(req.Groups, func(group *string) *kerr.Error {
		return c.judgeGroup(*group, kmsg.ACLOperationDescribe)
	})
	forward, part := *req, *req
	forward.Groups = kept
	var refused []kmsg.ConsumerGroupDescribeResponseGroup
	for _, o := range out {
		part.Groups = o.entries
		refused = append(refused, as[*kmsg.ConsumerGroupDescribeResponse](Refuse(&part, o.err, "")).Groups...)
	}
	merge := func(c *Ctx, resp *kmsg.ConsumerGroupDescribeResponse) {
		described := make(map[string]bool)
		for i := range resp.Groups {
			group := &resp.Groups[i]
			if !c.describesAssigned(group, described) {
				part.Groups = []string{group.Group}
				*group = as[*kmsg.ConsumerGroupDescribeResponse](
					Refuse(&part, kerr.TopicAuthorizationFailed, groupHasHiddenTopics)).Groups[0]
			}
			showSubscriptions(group.Members)
			c.limitGroupOperations(group.Group, &group.AuthorizedOperations)
		}
		resp.Groups = slices.Concat(refused, resp.Groups)
	}
	if len(out) > 0 {
		return partly(c, &forward, len(kept), merge)
	}
	return Verdict{Edit: edit(merge)}
}

// showSubscriptions undoes what subscriptions by regular expression became on their way to the broker.
func showSubscriptions(members []kmsg.ConsumerGroupDescribeResponseGroupMember) {
	for i := range members {
		m := &members[i]
		if s := subscriptionOf(m.SubscribedTopics, m.SubscribedTopicRegex); s.regex != "" && !s.native {
			m.SubscribedTopics, m.SubscribedTopicRegex = s.topics, &s.regex
		}
	}
}

// describesAssigned tells whether the subject may describe every topic assigned in the group. decided keeps the
// outcomes, so that a topic is decided, and audited, once.
func (c *Ctx) describesAssigned(group *kmsg.ConsumerGroupDescribeResponseGroup, decided map[string]bool) bool {
	all := true
	for _, m := range group.Members {
		for _, t := range slices.Concat(m.Assignment.TopicPartitions, m.TargetAssignment.TopicPartitions) {
			all = c.describesOnce(t.Topic, decided) && all
		}
	}
	return all
}

// describesOnce decides Topic Describe, and remembers the outcome.
func (c *Ctx) describesOnce(topic string, decided map[string]bool) bool {
	allowed, known := decided[topic]
	if !known {
		allowed = c.AllowTopic(topic, kmsg.ACLOperationDescribe)
		decided[topic] = allowed
	}
	return allowed
}
