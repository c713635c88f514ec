package authz

import (
	"errors"
	"fmt"
	"net/url"
	"regexp"
	"regexp/syntax"
	"strings"

	"github.com/twmb/franz-go/pkg/kmsg"
)

// Regular expressions of subscriptions (KIP-848). Kafka takes re2j's, whose syntax is Go's; all of a topic must match.

const (
	// maxRegexSize bounds what is made of an expression, in instructions, and with it the work and the memory of a match.
	maxRegexSize = 8192
	// maxString is the longest string of Kafka's protocol, in bytes.
	maxString = 1<<15 - 1
)

// topicRegex is an expression that tells whether a topic matches.
type topicRegex struct{ re *regexp.Regexp }

// compileTopics compiles an expression. The error is what Kafka says of one it cannot.
func compileTopics(expr string) (*topicRegex, *regexError) {
	if len(expr) > maxString {
		return nil, &regexError{syntax.ErrLarge.String(), expr}
	}
	tree, err := syntax.Parse(expr, syntax.Perl)
	if err == nil && regexSize(tree) > maxRegexSize {
		return nil, &regexError{syntax.ErrLarge.String(), expr}
	}
	re, err := regexp.Compile(expr)
	if err != nil {
		return nil, &regexError{re2jError(err), expr}
	}
	for i, name := range re.SubexpNames() {
		if name != "" && re.SubexpIndex(name) != i { // which Go allows
			return nil, &regexError{"duplicate capture group name", expr}
		}
	}
	re.Longest()
	return &topicRegex{re}, nil
}

// matches tells whether all of the name matches. The longest match that begins first begins at the start, and ends at
// the end, if any does.
func (r *topicRegex) matches(name string) bool {
	at := r.re.FindStringIndex(name)
	return at != nil && at[0] == 0 && at[1] == len(name)
}

// regexError is an expression that is none.
type regexError struct{ description, expr string }

// Error is Kafka's message. One too long for a string of the protocol leaves the expression out.
func (e *regexError) Error() string {
	const format = "SubscribedTopicRegex `%s` is not a valid regular expression: %s."
	if msg := fmt.Sprintf(format, e.expr, e.description); len(msg) <= maxString {
		return msg
	}
	return fmt.Sprintf(format, "…", e.description)
}

// re2jError is the description of a syntax error as re2j has it, which has one of Go's in other words.
func re2jError(err error) string {
	var e *syntax.Error
	switch {
	case !errors.As(err, &e):
		return err.Error()
	case e.Code == syntax.ErrUnexpectedParen:
		return "regexp/syntax: internal error"
	}
	return e.Code.String()
}

// regexSize is about how many instructions the expression has, repetitions written out.
func regexSize(re *syntax.Regexp) int {
	size := 1
	if re.Op == syntax.OpLiteral {
		size = len(re.Rune)
	}
	for _, sub := range re.Sub {
		size += regexSize(sub)
	}
	if re.Op == syntax.OpRepeat {
		size *= max(re.Min, re.Max, 1)
	}
	return size
}

// A subscription that we match goes to the broker as names. So that the broker has it all, and tells it to whom it
// describes the group, also to the next node, an expression that matches nothing goes with them: one for a topic that
// goes on after its end, with what the client said as the text that would follow.
const toldPrefix = `\zklamm:`

// inert is such an expression.
func (s *Subscription) inert() string {
	names := make([]string, len(s.topics))
	for i, name := range s.topics {
		names[i] = url.QueryEscape(name)
	}
	return toldPrefix + regexp.QuoteMeta(strings.Join(names, ",")+":"+s.regex)
}

// subscriptionOf reads what a broker says a member has subscribed to.
func subscriptionOf(topics []string, regex *string) Subscription {
	if regex == nil || *regex == "" {
		return Subscription{topics: topics}
	}
	text, ours := strings.CutPrefix(*regex, toldPrefix)
	if !ours {
		return Subscription{topics: topics, regex: *regex, native: true}
	}
	escaped, expr, _ := strings.Cut(unquote(text), ":")
	s := Subscription{topics: []string{}, regex: expr, told: sorted(topics)}
	for name := range strings.SplitSeq(escaped, ",") {
		if name, err := url.QueryUnescape(name); err == nil && name != "" {
			s.topics = append(s.topics, name)
		}
	}
	return s
}

// unquote undoes regexp.QuoteMeta.
func unquote(quoted string) string {
	var s strings.Builder
	for i := 0; i < len(quoted); i++ {
		if quoted[i] == '\\' && i+1 < len(quoted) {
			i++
		}
		s.WriteByte(quoted[i])
	}
	return s.String()
}

// match finds what the regular expression stands for: of the cluster's topics those that match and that the subject may
// Describe, Kafka's internal topics among them, as the broker's TopicRegexResolver does. It is found anew when the list
// of topics or the view is another one. Until there is a list, it is of those that the broker has.
func (s *Subscription) match(c *Ctx) {
	names, edition := c.topicNames()
	switch {
	case edition == 0 && s.edition == 0:
		names = s.told
	case edition == 0 || s.edition == edition && s.view == c.View:
		return
	}
	re, err := compileTopics(s.regex)
	if err != nil {
		return // it was compiled when it was subscribed to; one that a broker had may be too large for us
	}
	s.matched = keep(names, func(name string) bool { // the expression last: it may be slow
		return c.Visible(kmsg.ACLResourceTypeTopic, name, kmsg.ACLOperationDescribe) && re.matches(name) &&
			c.AllowTopic(name, kmsg.ACLOperationDescribe)
	})
	s.edition, s.view = edition, c.View
}

// MemberDescribed is what a description of its group by the broker tells of a member.
func MemberDescribed(m *kmsg.ConsumerGroupDescribeResponseGroupMember) *Member {
	return &Member{Subscription: subscriptionOf(m.SubscribedTopics, m.SubscribedTopicRegex)}
}

// names are all the names a broker is told: sorted, and never null. Those that a broker had are not known to have been
// decided.
func (s *Subscription) names(c *Ctx) []string {
	all := make([]string, 0, len(s.topics)+len(s.matched))
	for _, name := range s.topics {
		if c.Visible(kmsg.ACLResourceTypeTopic, name, kmsg.ACLOperationDescribe) {
			all = append(all, name)
		}
	}
	return sorted(append(all, s.matched...))
}
