package node

import (
	"slices"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// create makes a topic, as a client of its own.
func create(t *testing.T, k *kfake.Cluster, name string) {
	t.Helper()
	client, err := kgo.NewClient(kgo.SeedBrokers(k.ListenAddrs()...))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	topic := kmsg.NewCreateTopicsRequestTopic()
	topic.Topic, topic.NumPartitions, topic.ReplicationFactor = name, 1, 1
	req := kmsg.NewPtrCreateTopicsRequest()
	req.Topics = append(req.Topics, topic)
	if resp, err := req.RequestWith(t.Context(), client); err != nil || resp.Topics[0].ErrorCode != 0 {
		t.Fatal(resp, err)
	}
}

func TestTheListOfTopicsIsThatOfTheCluster(t *testing.T) {
	k := fake(t, kfake.NumBrokers(1), kfake.SeedTopics(1, "orders", "logs"))
	c := open(t, ClusterConfig{Bootstrap: k.ListenAddrs()}, ClusterOptions{})
	if err := c.Relist(t.Context()); err != nil {
		t.Fatal(err)
	}
	names, first := c.TopicNames()
	if !slices.Equal(names, []string{"logs", "orders"}) || first == 0 {
		t.Fatalf("edition %d has %q", first, names)
	}
	if err := c.Relist(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, again := c.TopicNames(); again != first {
		t.Errorf("the same topics are edition %d, then %d", first, again)
	}
	create(t, k, "paid")
	if err := c.Relist(t.Context()); err != nil {
		t.Fatal(err)
	}
	if names, then := c.TopicNames(); !slices.Equal(names, []string{"logs", "orders", "paid"}) || then == first {
		t.Errorf("edition %d has %q", then, names)
	}
}

func TestAListThatIsAskedForIsKeptFresh(t *testing.T) {
	k := fake(t, kfake.NumBrokers(1), kfake.SeedTopics(1, "orders"))
	c := open(t, ClusterConfig{Bootstrap: k.ListenAddrs()}, ClusterOptions{})
	await := func(want ...string) {
		t.Helper()
		for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
			names, _ := c.TopicNames()
			if slices.Equal(names, want) {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("the list is %q", names)
			}
		}
	}
	await("orders")
	create(t, k, "paid")
	await("orders", "paid")
}

func TestAListThatCannotBeHadIsAnError(t *testing.T) {
	k := fake(t, kfake.NumBrokers(1))
	c := open(t, ClusterConfig{Bootstrap: k.ListenAddrs()}, ClusterOptions{})
	k.Close()
	if err := c.Relist(t.Context()); err == nil {
		t.Error("there is a list")
	}
	if names, edition := c.TopicNames(); names != nil || edition != 0 {
		t.Errorf("edition %d has %q", edition, names)
	}
}
