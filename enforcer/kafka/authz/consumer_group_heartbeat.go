package authz

import (
	"regexp/syntax"
	"slices"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// consumerGroupHeartbeat (KIP-848): Group Read, and Topic Describe on every topic subscribed to by name, as Kafka does
// from 4.0; one refused topic refuses the heartbeat. The assignment in the answer is the member's own and stays as it
// is: reading from it takes a Fetch.
//
// A regular expression (v1) the broker would match against whatever our principal may describe. Only where the subject
// may Describe all topics there may be, the broker gets it. Else it is matched here, and the topics it stands for go to
// the broker by name beside those the client named: with the heartbeat after the one that brought the expression, as a
// broker does, which matches it aside, and with any later one when the topics, or the rights, have changed.
func consumerGroupHeartbeat(c *Ctx, req *kmsg.ConsumerGroupHeartbeatRequest) Verdict {
	if err := c.judgeGroup(req.Group, kmsg.ACLOperationRead); err != nil {
		return Verdict{Answer: Refuse(req, err, "")}
	}
	if _, out := sift(req.SubscribedTopicNames, func(topic *string) *kerr.Error {
		return c.judgeTopic(false, *topic, TopicID{}, kmsg.ACLOperationDescribe)
	}); len(out) > 0 {
		return Verdict{Answer: Refuse(req, out[0].err, "")}
	}
	switch {
	case req.Version < 1:
		return Verdict{}
	case req.MemberEpoch < 0: // it leaves
		c.setMember(req.Group, req.MemberID, nil)
		return Verdict{}
	}
	return c.subscribe(req)
}

// subscribe follows a member's subscription.
func (c *Ctx) subscribe(req *kmsg.ConsumerGroupHeartbeatRequest) Verdict {
	was := c.member(req.Group, req.MemberID)
	// A member without an instance id is new when it joins. Any other the group may know already.
	if was == nil && (req.MemberEpoch > 0 || req.InstanceID != nil) {
		c.Unmet = &MemberName{req.Group, req.MemberID}
		if req.SubscribedTopicRegex == nil {
			return Verdict{}
		}
	}
	s := subscription{req: req}
	if was != nil {
		s.Subscription = was.Subscription
	}
	s.hadInert = s.regex != "" && !s.native
	if req.SubscribedTopicNames != nil {
		s.topics, s.changed = req.SubscribedTopicNames, true
	}
	if req.SubscribedTopicRegex != nil {
		s.fresh = *req.SubscribedTopicRegex != s.regex
		s.regex, s.changed = *req.SubscribedTopicRegex, true
	}
	if s.fresh {
		s.matched, s.edition = nil, 0
		if s.regex != "" {
			if _, err := compileTopics(s.regex); err != nil {
				return s.invalid(err)
			}
		}
	}
	switch {
	case s.regex == "":
		return s.byName()
	case (s.fresh || s.native) && c.allowEveryTopic(kmsg.ACLOperationDescribe):
		s.native = true
		return s.remember(nil)
	default:
		return s.byRegex(c)
	}
}

// subscription is what a heartbeat makes of a member's subscription.
type subscription struct {
	Subscription
	req      *kmsg.ConsumerGroupHeartbeatRequest
	changed  bool // the request has something to say of it
	fresh    bool // another regular expression
	hadInert bool // the broker has an inert expression, and names that the client did not give
}

// byName is a subscription without a regular expression.
func (s *subscription) byName() Verdict {
	s.native, s.told, s.matched = false, nil, nil
	if s.hadInert && s.req.SubscribedTopicNames == nil {
		forward := *s.req
		forward.SubscribedTopicNames = append([]string{}, s.topics...)
		return s.remember(&forward)
	}
	return s.remember(nil)
}

// byRegex is a subscription by a regular expression that we match.
func (s *subscription) byRegex(c *Ctx) Verdict {
	inert := s.inert()
	if len(inert) > maxString {
		return s.invalid(&regexError{syntax.ErrLarge.String(), s.regex})
	}
	// The name is none that a member can have: what is kept under it is that the group has matched the expression.
	mark := "\x00" + s.regex
	if !s.fresh || c.member(s.req.Group, mark) != nil {
		if s.match(c); s.edition > 0 {
			c.setMember(s.req.Group, mark, &Member{})
		}
	}
	names := s.names(c)
	if !s.changed && !s.native && slices.Equal(names, s.told) {
		c.setMember(s.req.Group, s.req.MemberID, &Member{Subscription: s.Subscription})
		return Verdict{}
	}
	s.native, s.told = false, names
	forward := *s.req
	forward.SubscribedTopicNames, forward.SubscribedTopicRegex = names, &inert
	return s.remember(&forward)
}

// remember keeps the subscription when the broker has taken it.
func (s *subscription) remember(forward kmsg.Request) Verdict {
	if !s.changed && forward == nil {
		return Verdict{}
	}
	return Verdict{Forward: forward, Edit: edit(func(c *Ctx, resp *kmsg.ConsumerGroupHeartbeatResponse) {
		if resp.ErrorCode == 0 {
			c.setMember(s.req.Group, s.req.MemberID, &Member{Subscription: s.Subscription})
		}
	})}
}

// noRegex no broker takes.
const noRegex = "("

// invalid refuses a regular expression. The broker is asked all the same, with one that it takes no more: what else is
// wrong comes first.
func (s *subscription) invalid(err *regexError) Verdict {
	forward, expr := *s.req, noRegex
	forward.SubscribedTopicRegex = &expr
	return Verdict{Forward: &forward, Edit: edit(func(_ *Ctx, resp *kmsg.ConsumerGroupHeartbeatResponse) {
		if resp.ErrorCode == 0 || resp.ErrorCode == kerr.InvalidRegularExpression.Code {
			*resp = *as[*kmsg.ConsumerGroupHeartbeatResponse](Refuse(s.req, kerr.InvalidRegularExpression, err.Error()))
		}
	})}
}

// reveals decides about something the client did not name. That it does not see it is no refusal; that it does goes on
// record.
func (c *Ctx) reveals(t kmsg.ACLResourceType, name string, op kmsg.ACLOperation) bool {
	return c.Visible(t, name, op) && c.Allow(t, name, op)
}

// allowEveryTopic decides and records an access that may be to any topic.
func (c *Ctx) allowEveryTopic(op kmsg.ACLOperation) bool {
	d := c.View.DecideAll(kmsg.ACLResourceTypeTopic, op)
	if d.Allowed {
		c.Checks = append(c.Checks, Check{kmsg.ACLResourceTypeTopic, "*", op, d})
	}
	return d.Allowed
}
