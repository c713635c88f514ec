package authz

import (
	"slices"

	"klamm/enforcer/policy"
)

// Groups is what the heartbeats of groups need to know of one cluster. It answers from memory and never blocks.
type Groups interface {
	// TopicNames are the names of all topics, sorted, and which edition of that list it is: it changes when the list
	// does. Edition 0 is none. A list that is asked for is kept fresh.
	TopicNames() (names []string, edition uint64)
	// Member is what was last kept of a member, nil when nothing was, or when it is forgotten: a node has not room for
	// all. SetMember keeps it, nil forgets it.
	Member(group, id string) *Member
	SetMember(group, id string, m *Member)
}

// Member is what is kept of a group's member between its heartbeats, since of what a heartbeat says once the next ones
// are silent. It does not change.
type Member struct {
	// Subscription is that of a consumer group.
	Subscription
	waiting *waiting // in a streams group
}

// Subscription is what a member of a consumer group subscribes to (KIP-848), and what the broker was told of it.
type Subscription struct {
	topics []string // by name
	regex  string   // and by regular expression; empty: none
	native bool     // the broker has the regular expression itself, and matches it

	told    []string // the names the broker has, sorted; nil until it has them
	matched []string // the topics regex stood for, by this list and view
	edition uint64
	view    *policy.View
}

// Size is about how many bytes the member takes.
func (m *Member) Size() int {
	const itself, name = 200, 16
	n := itself + len(m.regex) + name*(len(m.told)+len(m.matched)) // which are names of the list
	for _, topic := range m.topics {
		n += name + len(topic)
	}
	if m.waiting != nil {
		for _, topic := range slices.Concat(m.waiting.sources, m.waiting.internal) {
			n += name + len(topic)
		}
	}
	return n
}

// MemberName names a member.
type MemberName struct{ Group, ID string }

func (c *Ctx) member(group, id string) *Member {
	if c.Groups == nil {
		return nil
	}
	return c.Groups.Member(group, id)
}

func (c *Ctx) setMember(group, id string, m *Member) {
	if c.Groups != nil {
		c.Groups.SetMember(group, id, m)
	}
}

func (c *Ctx) topicNames() (names []string, edition uint64) {
	if c.Groups == nil {
		return nil, 0
	}
	return c.Groups.TopicNames()
}

// listed tells whether the cluster has a topic, as far as is known.
func (c *Ctx) listed(topic string) bool {
	names, _ := c.topicNames()
	_, found := slices.BinarySearch(names, topic)
	return found
}
