package main

// failsDirect are tests that fail or hang without the node too, by setting, and why, as far as known.
var failsDirect = map[string]map[string]string{
	"old": {
		"0052_msg_timestamps": "it subscribes to a topic that no broker knows yet",
		"0077_compaction":     "Kafka 4's tool does not create a topic with its segment.bytes (KIP-1030)",
		"0081_admin":          "its first CreateTopics is answered with NO_ERROR where it wants INVALID_CONFIG",
		"0092_mixed_msgver":   "its AlterConfigs names a key twice, which no broker since Kafka 3 takes",
	},
	"old-noautocreate": {
		"0107_topic_recreate": "closing a consumer hangs when its topic was deleted (librdkafka issue 4362)",
	},
}
