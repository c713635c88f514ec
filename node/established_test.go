package node_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/twmb/franz-go/pkg/kgo"
	"golang.org/x/sys/unix"

	"klamm/test/kafka"
	"klamm/test/stage"
)

// A producer that was connected to the broker when the node started writes on by way of the node, and loses nothing.
func TestAnIdempotentProducerIsTakenOverWithoutLoss(t *testing.T) {
	cluster := kafka.Start(t, kafka.Options{}) // a fake is no judge of what is written twice
	if err := cluster.CreateTopic(t.Context(), "orders", 1); err != nil {
		t.Fatal(err)
	}
	broker := cluster.Addrs()[0]
	const records = 300 // on each side of the take-over
	cgroup := stage.NewCgroup(t)
	w := stage.StartWorkload(t, kafka.Place{Cgroup: cgroup, UID: stage.OrdersUID, GID: stage.OrdersUID}, "")
	client, err := kgo.NewClient(kgo.SeedBrokers(broker), kgo.Dialer(w.DialContext), kgo.ClientID("workload"),
		kgo.DisableClientMetrics(), kgo.DefaultProduceTopic("orders"), kgo.MaxBufferedRecords(16))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()

	var acknowledged atomic.Int64
	ctx, stop := context.WithCancel(t.Context())
	written := make(chan int, 1)
	go func() {
		i := 0
		for ; ctx.Err() == nil; i++ {
			client.Produce(t.Context(), &kgo.Record{Value: []byte(strconv.Itoa(i))}, func(r *kgo.Record, err error) {
				if err != nil {
					t.Errorf("record %s: %v", r.Value, err)
				}
				acknowledged.Add(1)
			})
		}
		written <- i
	}()
	stage.Await(t, "records on the direct way", func() bool { return acknowledged.Load() >= records })
	n := stage.Start(t, broker, stage.OrdersOnly, stage.Config{
		"node": fmt.Sprintf("{name: node-1, cgroup: %s, pins: \"\", socket: \"\"}", cgroup)})
	audited := func() (count int) {
		for _, l := range n.Audit(produced) {
			count += l.Count
		}
		return count
	}
	stage.Await(t, "records by way of the node", func() bool { return audited() >= records })
	stop()
	want := <-written
	if err := client.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(n.Log.String(), `"action":"destroyed"`) {
		t.Errorf("the log tells of no connection that was ended:\n%s", n.Log)
	}

	got := values(t, broker)
	for i, value := range got {
		if value != strconv.Itoa(i) {
			t.Fatalf("record %d is %s", i, value)
		}
	}
	if len(got) != want {
		t.Errorf("%d records were acknowledged, %d are there", want, len(got))
	}
}

func TestOnlyWhatTheRedirectConcernsIsTakenOver(t *testing.T) {
	broker := stage.StartBroker(t)
	cgroup, elsewhere := stage.NewCgroup(t, "exempt", "below"), stage.NewCgroup(t)
	conns := map[string]net.Conn{}
	for name, dir := range map[string]string{"redirected": cgroup, "redirected below": filepath.Join(cgroup, "below"),
		"exempt": filepath.Join(cgroup, "exempt"), "elsewhere": elsewhere} {
		place := kafka.Place{Cgroup: dir, UID: stage.OrdersUID, GID: stage.OrdersUID}
		conns[name] = stage.StartWorkload(t, place, "").Dial(t, broker.Addr())
	}
	n := stage.Start(t, broker.Addr(), stage.OrdersOnly, stage.Config{
		"node": fmt.Sprintf("{name: node-1, cgroup: %s, pins: \"\", socket: \"\"}", cgroup),
		"intercept": fmt.Sprintf("{firewall: false, ports: [%d], exempt: [{cgroup: /%s/exempt}], established: {rate: 10000}}",
			broker.Port(), filepath.Base(cgroup))})
	stage.Await(t, "the end of the take-over", func() bool {
		return strings.Contains(n.Log.String(), `"destroyed":2,"exempt":2,`)
	})
	for name, conn := range conns {
		_, err := stage.Ask(conn, stage.Hello())
		taken := errors.Is(err, unix.ECONNABORTED)
		if taken != strings.HasPrefix(name, "redirected") || !taken && err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// values reads the topic orders at the broker itself, to its end.
func values(t *testing.T, broker string) (all []string) {
	t.Helper()
	reader, err := kgo.NewClient(kgo.SeedBrokers(broker), kgo.DisableClientMetrics(),
		kgo.ConsumeTopics("orders"), kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()))
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	ctx, cancel := context.WithTimeout(t.Context(), stage.Patience)
	defer cancel()
	for end := int64(1); int64(len(all)) < end; {
		fetched := reader.PollFetches(ctx)
		if err := errors.Join(fetched.Err(), ctx.Err()); err != nil {
			t.Fatalf("after %d of %d records: %v", len(all), end, err)
		}
		fetched.EachPartition(func(p kgo.FetchTopicPartition) {
			end = p.HighWatermark
			for _, r := range p.Records {
				all = append(all, string(r.Value))
			}
		})
	}
	return all
}
