package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/test/host"
	"klamm/test/kafka"
)

const (
	topicCount = 10
	valueBytes = 1 << 10
)

func topicName(i int) string { return fmt.Sprintf("bench-%d", i) }

func topicNames() []string {
	names := make([]string, topicCount)
	for i := range names {
		names[i] = topicName(i)
	}
	return names
}

// runBroker is kfake in a process of its own, until standard input ends. It keeps nothing of what is produced and
// serves canned batches, so that it costs little and its memory does not grow: what is measured is the way to it.
func runBroker([]string) error {
	cluster, err := kfake.NewCluster(kfake.NumBrokers(1), kfake.SeedTopics(1, topicNames()...), kfake.BlackholeProduce(),
		kfake.SyntheticFetch(kfake.SyntheticBatch{Records: 64, RecordBytes: valueBytes, RandomFrac: 1}))
	if err != nil {
		return err
	}
	defer cluster.Close()
	fmt.Println(cluster.ListenAddrs()[0])
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// broker is the broker that is measured against.
type broker struct {
	name string
	addr string
	stop func() error
}

func startBroker(ctx context.Context, apache bool) (*broker, error) {
	if !apache {
		p, err := host.StartSelf(kafka.Place{}, "broker")
		if err != nil {
			return nil, err
		}
		addr, err := p.Line()
		if err != nil {
			return nil, errors.Join(fmt.Errorf("start kfake: %w", err), p.Stop())
		}
		return &broker{"kfake (in memory; keeps nothing, serves canned batches)", addr, p.Stop}, nil
	}
	cluster, err := kafka.New(ctx, kafka.Options{})
	if err != nil {
		return nil, err
	}
	b := &broker{"Apache Kafka " + kafka.Newest, cluster.Addrs()[0], cluster.Stop}
	if err := createTopics(ctx, b.addr); err != nil {
		return nil, errors.Join(err, b.stop())
	}
	return b, nil
}

// createTopics makes the topics with little retention: the disk is not what is measured.
func createTopics(ctx context.Context, addr string) error {
	client, err := kgo.NewClient(kgo.SeedBrokers(addr))
	if err != nil {
		return err
	}
	defer client.Close()
	req := kmsg.NewPtrCreateTopicsRequest()
	for i := range topicCount {
		t := kmsg.NewCreateTopicsRequestTopic()
		t.Topic, t.NumPartitions, t.ReplicationFactor = topicName(i), 1, 1
		for key, value := range map[string]string{"retention.bytes": "67108864", "segment.bytes": "33554432"} {
			c := kmsg.NewCreateTopicsRequestTopicConfig()
			c.Name, c.Value = key, kmsg.StringPtr(value)
			t.Configs = append(t.Configs, c)
		}
		req.Topics = append(req.Topics, t)
	}
	resp, err := req.RequestWith(ctx, client)
	if err != nil {
		return fmt.Errorf("create the topics: %w", err)
	}
	for _, t := range resp.Topics {
		if err := kerr.ErrorForCode(t.ErrorCode); err != nil {
			return fmt.Errorf("create topic %s: %w", t.Topic, err)
		}
	}
	return nil
}
