package equivalence

import (
	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/kafka/authz"
)

// question is a request, asked at every version of the table's row, or those given.
type question struct {
	what     string
	req      kmsg.Request
	from, to int16
	newest   bool // older brokers do not know what it is about
}

func questions(known ids) []question {
	str := kmsg.StringPtr
	unknown := authz.TopicID{15: 1}
	return []question{
		{what: "all topics", req: &kmsg.MetadataRequest{IncludeTopicAuthorizedOperations: true,
			IncludeClusterAuthorizedOperations: true}},
		{what: "no topics", req: &kmsg.MetadataRequest{Topics: []kmsg.MetadataRequestTopic{}}},
		{what: "named topics", req: &kmsg.MetadataRequest{IncludeTopicAuthorizedOperations: true,
			Topics: named("orders", "secret", "logs", "nowhere")}},
		{what: "refused topics", req: &kmsg.MetadataRequest{Topics: named("secret", "nowhere")}},
		{what: "a missing topic that may not be created", req: &kmsg.MetadataRequest{AllowAutoTopicCreation: true,
			Topics: named("orders", "missing")}},
		{what: "a missing topic without auto-creation", req: &kmsg.MetadataRequest{Topics: named("orders",
			"missing")}, from: 4},
		{what: "topic ids", req: &kmsg.MetadataRequest{IncludeTopicAuthorizedOperations: true,
			Topics: []kmsg.MetadataRequestTopic{
				{TopicID: known.of("orders")}, {TopicID: known.of("secret")}, {TopicID: unknown}}}, from: 12},
		{what: "topic ids beside names", req: &kmsg.MetadataRequest{Topics: []kmsg.MetadataRequestTopic{
			{TopicID: known.of("orders")}, {Topic: str("secret")}, {Topic: str("logs")}}}, from: 12},
		{what: "topic ids too early",
			req: &kmsg.MetadataRequest{Topics: []kmsg.MetadataRequestTopic{{TopicID: known.of("orders"),
				Topic: str("orders")}}}, from: 10, to: 11},

		{what: "topics", req: produce(-1, nil, 0, named0("orders", "secret", "logs")...), to: 12},
		{what: "refused topics", req: produce(1, nil, 0, named0("secret")...), to: 12},
		{what: "topic ids", req: produce(-1, nil, 0, byID(known.of("orders"), known.of("secret"), unknown)...),
			from: 13},
		{what: "a refused transactional id", req: produce(-1, str("other"), 0x10, named0("orders", "secret")...),
			to: 12},
		{what: "a transaction without a name", req: produce(-1, nil, 0x10, named0("orders")...), to: 12},
		{what: "a refused transactional id that nothing is transactional about", req: produce(-1, str("other"), 0,
			named0("orders")...), to: 12},

		{what: "new topics", req: &kmsg.CreateTopicsRequest{TimeoutMillis: 5000, ValidateOnly: true,
			Topics: []kmsg.CreateTopicsRequestTopic{
				{Topic: "new", NumPartitions: 1, ReplicationFactor: 1}, {Topic: "new-open", NumPartitions: 1,
					ReplicationFactor: 1},
				{Topic: "secret.2", NumPartitions: 1, ReplicationFactor: 1}}}},
		{what: "topics that fail", req: &kmsg.CreateTopicsRequest{TimeoutMillis: 5000, ValidateOnly: true,
			Topics: []kmsg.CreateTopicsRequestTopic{
				{Topic: "new", NumPartitions: 1, ReplicationFactor: 9}, {Topic: "new-open", NumPartitions: 1,
					ReplicationFactor: 9}}}},
		{what: "refused topics", req: &kmsg.CreateTopicsRequest{TimeoutMillis: 5000,
			Topics: []kmsg.CreateTopicsRequestTopic{
				{Topic: "secret.2", NumPartitions: 1, ReplicationFactor: 1}}}},

		{what: "names", req: &kmsg.DeleteTopicsRequest{TimeoutMillis: 5000, TopicNames: []string{"secret", "gone",
			"orders"}}, to: 5},
		{what: "refused names", req: &kmsg.DeleteTopicsRequest{TimeoutMillis: 5000, TopicNames: []string{"secret",
			"orders"}}, to: 5},
		{what: "names and ids", req: &kmsg.DeleteTopicsRequest{TimeoutMillis: 5000,
			Topics: []kmsg.DeleteTopicsRequestTopic{
				{Topic: str("gone")}, {Topic: str("secret")}, {TopicID: known.of("logs")}, {TopicID: known.of("secret")},
				{TopicID: unknown}}}, from: 6},
		{what: "what is invalid", req: &kmsg.DeleteTopicsRequest{TimeoutMillis: 5000,
			Topics: []kmsg.DeleteTopicsRequestTopic{
				{Topic: str("gone"), TopicID: unknown}, {}}}, from: 6},

		{what: "topics", req: &kmsg.CreatePartitionsRequest{TimeoutMillis: 5000, ValidateOnly: true,
			Topics: []kmsg.CreatePartitionsRequestTopic{
				{Topic: "orders", Count: 3}, {Topic: "secret", Count: 3}}}},
		{what: "refused topics", req: &kmsg.CreatePartitionsRequest{TimeoutMillis: 5000,
			Topics: []kmsg.CreatePartitionsRequestTopic{
				{Topic: "secret", Count: 3}, {Topic: "nowhere", Count: 3}}}},

		{what: "without a transactional id", req: &kmsg.InitProducerIDRequest{TransactionTimeoutMillis: 1000,
			ProducerID: -1, ProducerEpoch: -1}},
		{what: "a refused transactional id", req: &kmsg.InitProducerIDRequest{TransactionalID: str("other"),
			TransactionTimeoutMillis: 1000, ProducerID: -1, ProducerEpoch: -1}},
		{what: "one refused topic", req: &kmsg.AddPartitionsToTxnRequest{TransactionalID: "tx",
			Topics: []kmsg.AddPartitionsToTxnRequestTopic{
				{Topic: "orders", Partitions: []int32{0, 1}}, {Topic: "secret", Partitions: []int32{0}}}}},
		{what: "a refused transactional id", req: &kmsg.AddPartitionsToTxnRequest{TransactionalID: "other",
			Topics: []kmsg.AddPartitionsToTxnRequestTopic{
				{Topic: "orders", Partitions: []int32{0, 1}}, {Topic: "secret", Partitions: []int32{0}}}}},
		{what: "a refused transactional id", req: &kmsg.AddOffsetsToTxnRequest{TransactionalID: "other",
			Group: "readers"}},
		{what: "a refused group", req: &kmsg.AddOffsetsToTxnRequest{TransactionalID: "tx", Group: "others"}},
		{what: "a refused transactional id", req: &kmsg.EndTxnRequest{TransactionalID: "other"}},
		{what: "a refused transactional id", req: txnCommit("other", "readers", commits("orders", "secret")...),
			to: 5},
		{what: "a refused group", req: txnCommit("tx", "others", commits("orders", "secret")...), to: 5},
		{what: "refused topics", req: txnCommit("tx", "readers", commits("secret", "logs")...), to: 5},
		{what: "topics", req: txnCommit("tx", "readers", commits("orders", "secret")...), to: 5},
		{what: "topic ids", req: txnCommit("tx", "readers", commitsByID(known.of("orders"), known.of("secret"),
			unknown)...), from: 6},

		{what: "the cluster", req: &kmsg.DescribeClusterRequest{IncludeClusterAuthorizedOperations: true,
			EndpointType: 1}},
		{what: "resources", req: &kmsg.DescribeConfigsRequest{Resources: []kmsg.DescribeConfigsRequestResource{
			{ResourceType: 2, ResourceName: "orders", ConfigNames: []string{"retention.ms"}}, {ResourceType: 2,
				ResourceName: "secret"},
			{ResourceType: 4, ResourceName: "1"}, {ResourceType: 8, ResourceName: "1"}, {ResourceType: 16,
				ResourceName: "m"}}}},
		{what: "a group as a resource", newest: true,
			req: &kmsg.DescribeConfigsRequest{Resources: []kmsg.DescribeConfigsRequestResource{
				{ResourceType: 32, ResourceName: "readers"}, {ResourceType: 2, ResourceName: "secret"}}}},
		{what: "an unknown kind of resource",
			req: &kmsg.DescribeConfigsRequest{Resources: []kmsg.DescribeConfigsRequestResource{
				{ResourceType: 2, ResourceName: "orders"}, {ResourceType: 7, ResourceName: "x"}}}},
		{what: "all topics", req: &kmsg.DescribeTopicPartitionsRequest{ResponsePartitionLimit: 2000}},
		{what: "topics", req: &kmsg.DescribeTopicPartitionsRequest{ResponsePartitionLimit: 2000,
			Topics: partitionsOf("orders", "secret", "missing")}},
		{what: "the first page", req: &kmsg.DescribeTopicPartitionsRequest{ResponsePartitionLimit: 1,
			Topics: partitionsOf("a", "orders", "secret", "logs")}},
		{what: "a page that starts at a refused topic",
			req: &kmsg.DescribeTopicPartitionsRequest{ResponsePartitionLimit: 1,
				Topics: partitionsOf("a", "m", "orders", "secret"),
				Cursor: &kmsg.DescribeTopicPartitionsRequestCursor{Topic: "m"}}},
		{what: "a cursor nobody named", req: &kmsg.DescribeTopicPartitionsRequest{ResponsePartitionLimit: 1,
			Topics: partitionsOf("orders"), Cursor: &kmsg.DescribeTopicPartitionsRequestCursor{Topic: "m"}}},

		{what: "a full fetch", req: fetch(kmsg.FetchRequestTopic{Topic: "orders"},
			kmsg.FetchRequestTopic{Topic: "secret"}, kmsg.FetchRequestTopic{Topic: "logs"}), to: 12},
		{what: "a refused fetch", req: fetch(kmsg.FetchRequestTopic{Topic: "secret"}), to: 12},
		{what: "a full fetch by id", req: fetch(kmsg.FetchRequestTopic{TopicID: known.of("orders")},
			kmsg.FetchRequestTopic{TopicID: known.of("secret")},
			kmsg.FetchRequestTopic{TopicID: unknown}), from: 13},
		{what: "topics", req: &kmsg.ListOffsetsRequest{ReplicaID: -1, Topics: []kmsg.ListOffsetsRequestTopic{
			{Topic: "orders", Partitions: []kmsg.ListOffsetsRequestTopicPartition{{Timestamp: -1,
				CurrentLeaderEpoch: -1}}},
			{Topic: "secret", Partitions: []kmsg.ListOffsetsRequestTopicPartition{{Timestamp: -1,
				CurrentLeaderEpoch: -1}}}}}},
		{what: "topics", req: &kmsg.OffsetForLeaderEpochRequest{ReplicaID: -1,
			Topics: []kmsg.OffsetForLeaderEpochRequestTopic{
				{Topic: "orders", Partitions: []kmsg.OffsetForLeaderEpochRequestTopicPartition{{CurrentLeaderEpoch: -1}}},
				{Topic: "secret",
					Partitions: []kmsg.OffsetForLeaderEpochRequestTopicPartition{{CurrentLeaderEpoch: -1}}}}}},
		{what: "topics", req: commit("readers", offsets("orders", "secret")...), to: 9},
		{what: "a refused group", req: commit("others", offsets("orders", "secret")...), to: 9},
		{what: "topic ids", req: commit("readers", offsetsByID(known.of("orders"), known.of("secret"), unknown)...),
			from: 10},
		{what: "named topics", req: &kmsg.OffsetFetchRequest{Group: "readers", Topics: []kmsg.OffsetFetchRequestTopic{
			{Topic: "orders", Partitions: []int32{0}}, {Topic: "secret", Partitions: []int32{0}}}}, to: 7},
		{what: "all topics", req: &kmsg.OffsetFetchRequest{Group: "readers"}, from: 2, to: 7},
		{what: "a refused group", req: &kmsg.OffsetFetchRequest{Group: "others",
			Topics: []kmsg.OffsetFetchRequestTopic{
				{Topic: "orders", Partitions: []int32{0}}}}, to: 7},
		{what: "several groups", req: &kmsg.OffsetFetchRequest{Groups: []kmsg.OffsetFetchRequestGroup{
			{Group: "readers", MemberEpoch: -1, Topics: []kmsg.OffsetFetchRequestGroupTopic{
				{Topic: "orders", Partitions: []int32{0}}, {Topic: "secret", Partitions: []int32{0}}}},
			{Group: "others", MemberEpoch: -1}}}, from: 8, to: 9},
		{what: "topic ids", req: &kmsg.OffsetFetchRequest{Groups: []kmsg.OffsetFetchRequestGroup{
			{Group: "readers", MemberEpoch: -1, Topics: []kmsg.OffsetFetchRequestGroupTopic{
				{TopicID: known.of("orders"), Partitions: []int32{0}}, {TopicID: known.of("secret"),
					Partitions: []int32{0}},
				{TopicID: unknown, Partitions: []int32{0}}}}}}, from: 10},
		{what: "a group", req: &kmsg.FindCoordinatorRequest{CoordinatorKey: "readers"}, to: 3},
		{what: "a refused group", req: &kmsg.FindCoordinatorRequest{CoordinatorKey: "others"}, to: 3},
		{what: "a refused transactional id", req: &kmsg.FindCoordinatorRequest{CoordinatorType: 1,
			CoordinatorKey: "other"}, from: 1, to: 3},
		{what: "groups", req: &kmsg.FindCoordinatorRequest{CoordinatorKeys: []string{"others", "readers"}}, from: 4},
		{what: "transactional ids", req: &kmsg.FindCoordinatorRequest{CoordinatorType: 1,
			CoordinatorKeys: []string{"other", "tx"}}, from: 4},
		{what: "an unknown type", req: &kmsg.FindCoordinatorRequest{CoordinatorType: 7,
			CoordinatorKeys: []string{"other", "tx"}}, from: 4},
		{what: "a refused group", req: &kmsg.JoinGroupRequest{Group: "others", SessionTimeoutMillis: 10000,
			RebalanceTimeoutMillis: 10000,
			ProtocolType:           "consumer", Protocols: []kmsg.JoinGroupRequestProtocol{{Name: "range"}}}},
		{what: "a refused group", req: &kmsg.SyncGroupRequest{Group: "others", ProtocolType: str("consumer"),
			Protocol: str("range")}},
		{what: "a refused group", req: &kmsg.HeartbeatRequest{Group: "others"}},
		{what: "a refused group", req: &kmsg.LeaveGroupRequest{Group: "others",
			Members: []kmsg.LeaveGroupRequestMember{{MemberID: "m"}}}},
		{what: "groups", req: &kmsg.DescribeGroupsRequest{Groups: []string{"others", "readers"},
			IncludeAuthorizedOperations: true}},
		{what: "all groups", req: &kmsg.ListGroupsRequest{}},
		{what: "groups", req: &kmsg.DeleteGroupsRequest{Groups: []string{"others", "readers"}}},
		{what: "groups", newest: true, req: &kmsg.ConsumerGroupDescribeRequest{Groups: []string{"others", "readers"},
			IncludeAuthorizedOperations: true}},
		{what: "a refused group", newest: true, req: &kmsg.ConsumerGroupHeartbeatRequest{Group: "others",
			MemberID:               "m",
			RebalanceTimeoutMillis: 1000, SubscribedTopicNames: []string{"orders"},
			Topics: []kmsg.ConsumerGroupHeartbeatRequestTopic{}}},
		{what: "a refused topic", newest: true, req: &kmsg.ConsumerGroupHeartbeatRequest{Group: "readers",
			MemberID:               "m",
			RebalanceTimeoutMillis: 1000, SubscribedTopicNames: []string{"orders", "secret"},
			Topics: []kmsg.ConsumerGroupHeartbeatRequestTopic{}}},
	}
}

func fetch(topics ...kmsg.FetchRequestTopic) kmsg.Request {
	for i := range topics {
		p := kmsg.NewFetchRequestTopicPartition()
		p.PartitionMaxBytes = 1000
		topics[i].Partitions = []kmsg.FetchRequestTopicPartition{p}
	}
	req := kmsg.NewPtrFetchRequest()
	req.MaxWaitMillis, req.MaxBytes, req.SessionEpoch, req.Topics = 10, 1000, -1, topics
	return req
}

func commit(group string, topics ...kmsg.OffsetCommitRequestTopic) kmsg.Request {
	return &kmsg.OffsetCommitRequest{Group: group, Generation: -1, RetentionTimeMillis: -1, Topics: topics}
}

func offsets(names ...string) (topics []kmsg.OffsetCommitRequestTopic) {
	for _, name := range names {
		topics = append(topics, kmsg.OffsetCommitRequestTopic{Topic: name,
			Partitions: []kmsg.OffsetCommitRequestTopicPartition{{Partition: 0, LeaderEpoch: -1}}})
	}
	return topics
}

func offsetsByID(ids ...authz.TopicID) (topics []kmsg.OffsetCommitRequestTopic) {
	for _, id := range ids {
		topics = append(topics, kmsg.OffsetCommitRequestTopic{TopicID: id,
			Partitions: []kmsg.OffsetCommitRequestTopicPartition{{Partition: 0, LeaderEpoch: -1}}})
	}
	return topics
}

func named(names ...string) (topics []kmsg.MetadataRequestTopic) {
	for _, name := range names {
		topics = append(topics, kmsg.MetadataRequestTopic{Topic: &name})
	}
	return topics
}

func named0(names ...string) (topics []kmsg.ProduceRequestTopic) {
	for _, name := range names {
		topics = append(topics, kmsg.ProduceRequestTopic{Topic: name})
	}
	return topics
}

func byID(ids ...authz.TopicID) (topics []kmsg.ProduceRequestTopic) {
	for _, id := range ids {
		topics = append(topics, kmsg.ProduceRequestTopic{TopicID: id})
	}
	return topics
}

// produce has one record batch per topic, which the broker would find corrupt.
func produce(acks int16, txn *string, attributes byte, topics ...kmsg.ProduceRequestTopic) kmsg.Request {
	batch := make([]byte, 70)
	batch[11], batch[16], batch[22] = 58, 2, attributes
	for i := range topics {
		topics[i].Partitions = []kmsg.ProduceRequestTopicPartition{{Partition: 0, Records: batch}, {Partition: 1,
			Records: batch}}
	}
	return &kmsg.ProduceRequest{Acks: acks, TransactionID: txn, TimeoutMillis: 1000, Topics: topics}
}

func txnCommit(txn, group string, topics ...kmsg.TxnOffsetCommitRequestTopic) kmsg.Request {
	return &kmsg.TxnOffsetCommitRequest{TransactionalID: txn, Group: group, Generation: -1, Topics: topics}
}

func commits(names ...string) (topics []kmsg.TxnOffsetCommitRequestTopic) {
	for _, name := range names {
		topics = append(topics, kmsg.TxnOffsetCommitRequestTopic{Topic: name,
			Partitions: []kmsg.TxnOffsetCommitRequestTopicPartition{{Partition: 0, LeaderEpoch: -1}}})
	}
	return topics
}

func commitsByID(ids ...authz.TopicID) (topics []kmsg.TxnOffsetCommitRequestTopic) {
	for _, id := range ids {
		topics = append(topics, kmsg.TxnOffsetCommitRequestTopic{TopicID: id,
			Partitions: []kmsg.TxnOffsetCommitRequestTopicPartition{{Partition: 0, LeaderEpoch: -1}}})
	}
	return topics
}

func partitionsOf(names ...string) (topics []kmsg.DescribeTopicPartitionsRequestTopic) {
	for _, name := range names {
		topics = append(topics, kmsg.DescribeTopicPartitionsRequestTopic{Topic: name})
	}
	return topics
}
