package authz

import (
	"fmt"
	"slices"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// clusterName is the one resource name of the type Cluster.
const clusterName = "kafka-cluster"

// Kafka's own texts, where an answer has a message beside the code.
const (
	topicAuthorizationFailed   = "Topic authorization failed."
	groupAuthorizationFailed   = "Group authorization failed."
	clusterAuthorizationFailed = "Cluster authorization failed."
	invalidRequest             = "This most likely occurs because of a request being malformed by the client library or " +
		"the message was sent to an incompatible broker. See the broker logs for more details."
	unknownTopicID       = "This server does not host this topic ID."
	groupHasHiddenTopics = "The group has described topic(s) that the client is not authorized to describe."
)

// as is the message as the type kmsg has for its key and direction; any other is a mistake in the table.
func as[M any](message any) M {
	m, ok := message.(M)
	if !ok {
		panic(fmt.Sprintf("authz: a %T where a %T belongs", message, m))
	}
	return m
}

// either answers for what two rights give alike, and records the one that decided: a clean allow before one that only
// observe mode lets pass, and the second when both refuse.
func (c *Ctx) either(first, second Check) bool {
	if first.Allowed && (!first.WouldDeny || !second.Allowed) {
		second = first
	}
	c.Checks = append(c.Checks, second)
	return second.Allowed
}

func (c *Ctx) check(t kmsg.ACLResourceType, name string, op kmsg.ACLOperation) Check {
	return Check{t, name, op, c.View.Decide(t, name, op)}
}

// allowTopicOrCluster is for operations that a right on the whole cluster gives for each topic.
func (c *Ctx) allowTopicOrCluster(topic string, op kmsg.ACLOperation) bool {
	return c.either(c.check(kmsg.ACLResourceTypeCluster, clusterName, op), c.check(kmsg.ACLResourceTypeTopic, topic, op))
}

// judgeTopic tells how an entry for a topic is refused; nil when op is allowed. Where topics are named by id, one that
// nobody knows is UNKNOWN_TOPIC_ID.
func (c *Ctx) judgeTopic(byID bool, name string, id TopicID, op kmsg.ACLOperation) *kerr.Error {
	if byID {
		var known bool
		if name, known = c.Topic(id); !known {
			return kerr.UnknownTopicID
		}
	}
	if !c.AllowTopic(name, op) {
		if byID {
			c.doubt(id)
		}
		return kerr.TopicAuthorizationFailed
	}
	return nil
}

// refused are entries of a request that get the same error.
type refused[T any] struct {
	err     *kerr.Error
	entries []T
}

// sift parts the entries of a request by what judge says of each: nil is kept. What is kept is never a nil slice,
// because for Kafka null may mean "all" where an empty list means "none".
func sift[T any](entries []T, judge func(*T) *kerr.Error) (kept []T, out []refused[T]) {
	kept = make([]T, 0, len(entries))
	for i := range entries {
		err := judge(&entries[i])
		if err == nil {
			kept = append(kept, entries[i])
			continue
		}
		at := slices.IndexFunc(out, func(r refused[T]) bool { return r.err == err })
		if at < 0 {
			at = len(out)
			out = append(out, refused[T]{err: err})
		}
		out[at].entries = append(out[at].entries, entries[i])
	}
	return kept, out
}
