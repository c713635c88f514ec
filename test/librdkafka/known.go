package main

// failsDirect are tests that fail or hang without the node too, by setting, and why, as far as known.
var failsDirect = map[string]map[string]string{
	"old": {
		"0077_compaction":    tooSmall,
		"0081_admin":         "its first CreateTopics is answered with NO_ERROR where it wants INVALID_CONFIG",
		"0092_mixed_msgver":  "its AlterConfigs names a key twice, which no broker since Kafka 3 takes",
		"0115_producer_auth": "it writes before brokers obey the ACL it has made, in most runs",
	},
	"old-noautocreate": {
		"0107_topic_recreate": "closing a consumer hangs when its topic was deleted (librdkafka issue 4362)",
	},
	"new": {
		"0077_compaction":         tooSmall,
		"0129_fetch_aborted_msgs": tooSmall,
	},
	"new-consumer": {
		"0077_compaction":         tooSmall,
		"0129_fetch_aborted_msgs": tooSmall,
	},
}

// refused are tests that cannot pass through the node, by setting, and what klamm refuses on purpose.
var refused = map[string]map[string]string{
	"old": {"0052_msg_timestamps": "Produce below version 3, as brokers since 4.0 (KIP-896)"},
}

const tooSmall = "Kafka 4 and its tools create no topic with its segment.bytes, below 1 MiB (KIP-1030)"
