package kafka

import (
	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/audit"
	"klamm/enforcer/kafka/authz"
	"klamm/enforcer/policy"
)

// maxTopics bounds a connection's memory of topics; past it the memory starts anew. What may not be read nor written
// is not remembered, nor what no topic can be called, for its length (Topic.MAX_NAME_LENGTH of Apache Kafka).
const (
	maxTopics    = 4096
	maxTopicName = 249
)

// topic is what one loop of a connection remembers of a topic: its name as a string, and what the view says of it.
type topic struct {
	name        string
	view        *policy.View
	read, write policy.Decision
}

// topicCache keeps topics by name. It belongs to one goroutine.
type topicCache struct {
	topics map[string]*topic
	name   []byte // what resolve returned last
}

// get returns the topic as the view decides it, and whether that was decided only now.
func (c *topicCache) get(name []byte, view *policy.View) (t *topic, fresh bool) {
	t = c.topics[string(name)]
	if t == nil {
		if c.topics == nil || len(c.topics) >= maxTopics {
			c.topics = make(map[string]*topic)
		}
		t = &topic{name: string(name)}
	}
	if t.view == view && view != nil {
		return t, false
	}
	t.view = view
	t.read = view.Decide(kmsg.ACLResourceTypeTopic, t.name, kmsg.ACLOperationRead)
	t.write = view.Decide(kmsg.ACLResourceTypeTopic, t.name, kmsg.ACLOperationWrite)
	if len(name) <= maxTopicName && (t.read.Allowed || t.write.Allowed) {
		c.topics[t.name] = t
	}
	return t, true
}

// resolve is the name of a topic that a request or an answer names by name or, where id is not zero, by id. It is valid
// until the next call.
func (c *topicCache) resolve(topics authz.Topics, name []byte, id authz.TopicID) ([]byte, bool) {
	if id == (authz.TopicID{}) {
		return name, name != nil
	}
	known, ok := topics.Name(id)
	c.name = append(c.name[:0], known...)
	return c.name, ok
}

// mayRead decides a topic of a Fetch or ShareFetch. The first yes of a connection goes on record: the fetches that find
// nothing to read, of which there are many, do not.
func (s *session) mayRead(api kmsg.Key, name []byte, id authz.TopicID) bool {
	name, known := s.upTopics.resolve(s.conn.Cluster, name, id)
	if !known {
		return false
	}
	t, fresh := s.upTopics.get(name, s.ctx.View)
	if fresh && t.read.Allowed {
		s.upTrail.Line("operation", verdictOf(t.read)).Str("api", apiName(int16(api))).Str("client_id", s.clientID).
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
