package kafka

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
	"github.com/twmb/franz-go/pkg/kversion"

	"klamm/enforcer/kafka/authz"
)

// generations are brokers from those of 2021 to the newest.
var generations = []struct {
	name     string
	versions *kversion.Versions
}{
	{"2.8", kversion.V2_8_0()}, {"3.0", kversion.V3_0_0()}, {"3.1", kversion.V3_1_0()}, {"3.2", kversion.V3_2_0()},
	{"3.3", kversion.V3_3_0()}, {"3.4", kversion.V3_4_0()}, {"3.5", kversion.V3_5_0()}, {"3.6", kversion.V3_6_0()},
	{"3.7", kversion.V3_7_0()}, {"3.8", kversion.V3_8_0()}, {"3.9", kversion.V3_9_0()}, {"4.0", kversion.V4_0_0()},
	{"4.1", kversion.V4_1_0()}, {"4.2", kversion.V4_2_0()}, {"4.3", kversion.V4_3_0()}, {"4.4", kversion.V4_4_0()},
}

// through are the options of a client whose connections go through sessions.
func (r *rig) through(t *testing.T, cluster *kfake.Cluster, opts ...kgo.Opt) []kgo.Opt {
	t.Helper()
	dial := func(ctx context.Context, _, address string) (net.Conn, error) {
		var d net.Dialer
		broker, err := d.DialContext(ctx, "tcp", address)
		if err != nil {
			return nil, err
		}
		client, served := loopback(t)
		go func() { _ = Serve(context.Background(), r.shared, r.conn(served, broker)) }() // however it ends
		return client, nil
	}
	return append([]kgo.Opt{kgo.SeedBrokers(cluster.ListenAddrs()...), kgo.Dialer(dial), kgo.UnknownTopicRetries(0),
		kgo.DisableClientMetrics(), kgo.FetchMaxWait(100 * time.Millisecond),
		kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()), kgo.FetchIsolationLevel(kgo.ReadCommitted())}, opts...)
}

func (r *rig) client(t *testing.T, cluster *kfake.Cluster, opts ...kgo.Opt) *kgo.Client {
	t.Helper()
	client, err := kgo.NewClient(r.through(t, cluster, opts...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Close)
	return client
}

// poll reads so many values.
func poll(t *testing.T, n int, fetches func(context.Context) kgo.Fetches) (values []string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for len(values) < n {
		f := fetches(ctx)
		if err := f.Err(); err != nil {
			t.Fatalf("%d of %d records came: %v", len(values), n, err)
		}
		f.EachRecord(func(r *kgo.Record) { values = append(values, string(r.Value)) })
	}
	return values
}

// With brokers of every generation: idempotent produce, a group, an exactly-once copy, and refusals.
func TestClientsWorkWithBrokersOfEveryGeneration(t *testing.T) {
	const n = 20
	for _, g := range generations {
		t.Run(g.name, func(t *testing.T) {
			cluster, err := kfake.NewCluster(kfake.NumBrokers(1), kfake.MaxVersions(g.versions),
				kfake.SeedTopics(1, "orders", "orders.copy", "secret"))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(cluster.Close)
			rig := newRig(t, ordersOnly)

			producer := rig.client(t, cluster)
			for i := range n {
				record := &kgo.Record{Topic: "orders", Value: fmt.Append(nil, i)}
				if err := producer.ProduceSync(t.Context(), record).FirstErr(); err != nil {
					t.Fatal(err)
				}
			}
			refused := producer.ProduceSync(t.Context(), &kgo.Record{Topic: "secret", Value: []byte("x")}).FirstErr()
			if !errors.Is(refused, kerr.TopicAuthorizationFailed) {
				t.Errorf("a produce to a topic that is denied ends with %v", refused)
			}

			session, err := kgo.NewGroupTransactSession(rig.through(t, cluster, kgo.ConsumeTopics("orders"),
				kgo.ConsumerGroup("orders-copy"), kgo.TransactionalID("orders-copy"))...)
			if err != nil {
				t.Fatal(err)
			}
			defer session.Close()
			for copied := 0; copied < n; {
				values := poll(t, 1, session.PollFetches)
				if err := session.Begin(); err != nil {
					t.Fatal(err)
				}
				for _, v := range values {
					session.Produce(t.Context(), &kgo.Record{Topic: "orders.copy", Value: []byte(v)}, nil)
				}
				if ok, err := session.End(t.Context(), kgo.TryCommit); err != nil || !ok {
					t.Fatalf("a transaction is committed: %v, %v", ok, err)
				}
				copied += len(values)
			}

			consumer := rig.client(t, cluster, kgo.ConsumeTopics("orders.copy"), kgo.ConsumerGroup("orders"),
				kgo.DisableAutoCommit())
			for i, v := range poll(t, n, consumer.PollFetches) {
				if v != fmt.Sprint(i) {
					t.Fatalf("record %d is %q", i, v)
				}
			}
			if err := consumer.CommitUncommittedOffsets(t.Context()); err != nil {
				t.Error(err)
			}
			if lines := rig.log.find(t, func(l auditLine) bool { return l.Event == "refusal" }); len(lines) > 0 {
				t.Errorf("refused connections: %+v", lines)
			}
		})
	}
}

// A client that asks in a version too new for the broker, or for us, is told which to use, and goes on with that
// (KIP-511).
func TestAClientFallsBackToTheVersionItIsTold(t *testing.T) {
	for _, g := range generations {
		cluster, err := kfake.NewCluster(kfake.NumBrokers(1), kfake.MaxVersions(g.versions), kfake.SeedTopics(1, "orders"))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(cluster.Close)
		most, ok := g.versions.LookupMaxKeyVersion(int16(kmsg.ApiVersions))
		if !ok {
			t.Fatal("a broker without ApiVersions")
		}
		for version := int16(0); version <= kmsg.NewPtrApiVersionsRequest().MaxVersion()+2; version++ {
			t.Run(fmt.Sprintf("%s, asked in version %d", g.name, version), func(t *testing.T) {
				rig := newRig(t, ordersOnly)
				client, _ := rig.serve(t, cluster.ListenAddrs()[0])
				asked := []int16{version}
				for {
					resp := askVersion(t, client, asked[len(asked)-1])
					if resp.ErrorCode == 0 {
						wantClamped(t, resp)
						break
					}
					if resp.ErrorCode != kerr.UnsupportedVersion.Code || len(resp.ApiKeys) != 1 || resp.ApiKeys[0].ApiKey != 18 {
						t.Fatalf("version %d is answered with %+v", asked[len(asked)-1], resp)
					}
					next := resp.ApiKeys[0].MaxVersion
					if next >= asked[len(asked)-1] {
						t.Fatalf("version %d is refused, and %d offered", asked[len(asked)-1], next)
					}
					asked = append(asked, next)
				}
				if got := asked[len(asked)-1]; got != min(version, most) {
					t.Errorf("it ended with version %d, by way of %v; the broker has %d", got, asked, most)
				}
				if resp := client.ask(99, metadataRequestAt(1, "orders")).(*kmsg.MetadataResponse); len(resp.Topics) != 1 {
					t.Errorf("after it, metadata are %+v", resp)
				}
			})
		}
	}
}

func metadataRequestAt(version int16, topics ...string) kmsg.Request {
	req := metadataRequest(topics...)
	req.SetVersion(version)
	return req
}

// askVersion asks as a client does that finds the answer to be of version 0 if it is an error.
func askVersion(t *testing.T, client *peer, version int16) *kmsg.ApiVersionsResponse {
	t.Helper()
	req := kmsg.NewPtrApiVersionsRequest()
	req.Version, req.ClientSoftwareName, req.ClientSoftwareVersion = version, "test", "1"
	client.write(requestFrame(1, req))
	b := client.mustFrame()[4:] // never with tagged fields in the header
	resp := req.ResponseKind().(*kmsg.ApiVersionsResponse)
	if binary.BigEndian.Uint16(b) == uint16(kerr.UnsupportedVersion.Code) {
		resp.Version = 0
	}
	if err := resp.ReadFrom(b); err != nil {
		t.Fatal(err)
	}
	return resp
}

// wantClamped fails where more is offered than we decide.
func wantClamped(t *testing.T, resp *kmsg.ApiVersionsResponse) {
	t.Helper()
	if len(resp.ApiKeys) < 20 {
		t.Errorf("only %d keys are offered", len(resp.ApiKeys))
	}
	for _, k := range resp.ApiKeys {
		if row := authz.Table[k.ApiKey]; row.Decide == nil || k.MaxVersion > row.Max {
			t.Errorf("%s is offered up to version %d", apiName(k.ApiKey), k.MaxVersion)
		}
	}
}
