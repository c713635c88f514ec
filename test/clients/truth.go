package main

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// What is in the cluster, asked past the node.

const (
	partitions  = 3
	readTimeout = 30 * time.Second
)

// createTopics returns the ids of the topics by name.
func (r *rig) createTopics(ctx context.Context, names []string) (map[string][16]byte, error) {
	request := kmsg.NewPtrCreateTopicsRequest()
	for _, name := range names {
		topic := kmsg.NewCreateTopicsRequestTopic()
		topic.Topic, topic.NumPartitions, topic.ReplicationFactor = name, partitions, -1
		request.Topics = append(request.Topics, topic)
	}
	answer, err := request.RequestWith(ctx, r.admin)
	if err != nil {
		return nil, fmt.Errorf("create topics: %w", err)
	}
	ids := map[string][16]byte{}
	for _, topic := range answer.Topics {
		if err := kerr.ErrorForCode(topic.ErrorCode); err != nil {
			return nil, fmt.Errorf("create topic %s: %w", topic.Topic, err)
		}
		ids[topic.Topic] = topic.TopicID
	}
	return ids, nil
}

// commit commits an offset of partition 0 for a group without members.
func (r *rig) commit(ctx context.Context, group, topic string, id [16]byte, offset int64) error {
	request := kmsg.NewPtrOffsetCommitRequest()
	request.Group, request.Generation = group, -1
	partition := kmsg.NewOffsetCommitRequestTopicPartition()
	partition.Offset = offset
	request.Topics = []kmsg.OffsetCommitRequestTopic{{
		Topic: topic, TopicID: id, Partitions: []kmsg.OffsetCommitRequestTopicPartition{partition},
	}}
	answer, err := request.RequestWith(ctx, r.admin)
	if err != nil {
		return err
	}
	return kerr.ErrorForCode(answer.Topics[0].Partitions[0].ErrorCode)
}

// read returns the values of all committed records of a topic.
func (r *rig) read(ctx context.Context, topic string) ([]string, error) {
	all, err := r.records(ctx, topic)
	var values []string
	for _, record := range all {
		values = append(values, string(record.Value))
	}
	return values, err
}

// records returns all committed records of a topic, those of each partition in order.
func (r *rig) records(ctx context.Context, topic string) ([]*kgo.Record, error) {
	ctx, cancel := context.WithTimeout(ctx, readTimeout)
	defer cancel()
	ends, err := r.offsets(ctx, topic, latest)
	if err != nil {
		return nil, fmt.Errorf("find the end of %s: %w", topic, err)
	}
	reader, err := r.cluster.Admin(kgo.ConsumeTopics(topic), kgo.FetchIsolationLevel(kgo.ReadCommitted()),
		kgo.KeepControlRecords(), kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()))
	if err != nil {
		return nil, err
	}
	defer reader.Close()
	var all []*kgo.Record
	for slices.ContainsFunc(ends, func(left int64) bool { return left > 0 }) {
		fetches := reader.PollFetches(ctx)
		if err := ctx.Err(); err != nil {
			return nil, fmt.Errorf("read %s: %w", topic, err)
		}
		fetches.EachRecord(func(record *kgo.Record) {
			if record.Offset+1 >= ends[record.Partition] {
				ends[record.Partition] = 0
			}
			if !record.Attrs.IsControl() {
				all = append(all, record)
			}
		})
	}
	return all, nil
}

// Timestamps of ListOffsets that stand for the ends of a partition.
const (
	latest   = -1
	earliest = -2
)

// offsets returns an offset of each partition; the latest includes open transactions: a producer is told of its commit
// before the partitions are (KIP-98), so the records may become readable only a moment later.
func (r *rig) offsets(ctx context.Context, topic string, timestamp int64) ([]int64, error) {
	request := kmsg.NewPtrListOffsetsRequest()
	wanted := kmsg.NewListOffsetsRequestTopic()
	wanted.Topic = topic
	for i := range int32(partitions) {
		partition := kmsg.NewListOffsetsRequestTopicPartition()
		partition.Partition, partition.Timestamp = i, timestamp
		wanted.Partitions = append(wanted.Partitions, partition)
	}
	request.Topics = append(request.Topics, wanted)
	found := make([]int64, partitions)
	for _, shard := range r.admin.RequestSharded(ctx, request) {
		if shard.Err != nil {
			return nil, shard.Err
		}
		answer, ok := shard.Resp.(*kmsg.ListOffsetsResponse)
		if !ok {
			return nil, fmt.Errorf("unexpected answer %T", shard.Resp)
		}
		for _, topic := range answer.Topics {
			for _, partition := range topic.Partitions {
				if err := kerr.ErrorForCode(partition.ErrorCode); err != nil {
					return nil, err
				}
				found[partition.Partition] = partition.Offset
			}
		}
	}
	return found, nil
}
