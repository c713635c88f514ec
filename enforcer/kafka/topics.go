package kafka

import (
	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/audit"
	"klamm/enforcer/kafka/authz"
	"klamm/enforcer/policy"
)

// maxTopics bounds a connection's memory of topics; past it the memory starts anew.
const maxTopics = 4096

// topic is what one loop of a connection remembers of a topic: its name as a string, and what the view says of it.
type topic struct {
	name        string
	view        *policy.View
	read, write policy.Decision
}

// topicCache keeps topics by name. It belongs to one goroutine.
type topicCache map[string]*topic

// get returns the topic as the view decides it, and whether that was decided only now.
func (c *topicCache) get(name []byte, view *policy.View) (t *topic, fresh bool) {
	t = (*c)[string(name)]
	if t == nil {
		if *c == nil || len(*c) >= maxTopics {
			*c = make(topicCache)
		}
		t = &topic{name: string(name)}
		(*c)[t.name] = t
	}
	if t.view == view && view != nil {
		return t, false
	}
	t.view = view
	t.read = view.Decide(kmsg.ACLResourceTypeTopic, t.name, kmsg.ACLOperationRead)
	t.write = view.Decide(kmsg.ACLResourceTypeTopic, t.name, kmsg.ACLOperationWrite)
	return t, true
}

// topicName is the name of a topic that a request or an answer names by name or, where id is not zero, by id.
func (s *session) topicName(name []byte, id authz.TopicID) ([]byte, bool) {
	if id == (authz.TopicID{}) {
		return name, name != nil
	}
	n, ok := s.conn.Cluster.Name(id)
	return []byte(n), ok
}

// mayRead decides a topic of a fetch. The first yes of a connection goes on record: the fetches that find nothing to
// read, of which there are many, do not.
func (s *session) mayRead(name []byte, id authz.TopicID) bool {
	name, known := s.topicName(name, id)
	if !known {
		return false
	}
	t, fresh := s.upTopics.get(name, s.ctx.View)
	if fresh && t.read.Allowed {
		s.upTrail.Line("operation", verdictOf(t.read)).Str("api", "Fetch").Str("client_id", s.clientID).
			Str("topic", t.name).Str("rule", t.read.Rule).Bool("first", true).Send()
	}
	return t.read.Allowed
}

func verdictOf(d policy.Decision) audit.Verdict {
	switch {
	case !d.Allowed:
		return audit.Deny
	case d.WouldDeny:
		return audit.WouldDeny
	}
	return audit.Allow
}
