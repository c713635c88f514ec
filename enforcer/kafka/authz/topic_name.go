package authz

import (
	"slices"
	"strings"
)

// Rules for topic names, of org.apache.kafka.common.internals.Topic.

const maxTopicName = 249

// internalTopics are those that Kafka keeps its own state in.
var internalTopics = []string{"__consumer_offsets", "__transaction_state", "__share_group_state"}

func internalTopic(name string) bool { return slices.Contains(internalTopics, name) }

// legalTopic tells whether a topic can have the name.
func legalTopic(name string) bool {
	return name != "" && name != "." && name != ".." && len(name) <= maxTopicName &&
		!strings.ContainsFunc(name, func(r rune) bool {
			return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '.' && r != '_' && r != '-'
		})
}
