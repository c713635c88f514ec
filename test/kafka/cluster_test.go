package kafka

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
	"github.com/twmb/franz-go/pkg/sasl/plain"
	"github.com/twmb/franz-go/pkg/sasl/scram"
)

func limit(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func client(t *testing.T, opts ...kgo.Opt) *kgo.Client {
	t.Helper()
	c, err := kgo.NewClient(opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func TestOneBrokerServesProducersAndConsumers(t *testing.T) {
	ctx := limit(t)
	began := time.Now()
	cluster := Start(t, Options{})
	t.Logf("Kafka %s, one broker: ready after %v", Newest, time.Since(began).Round(time.Millisecond))
	if err := cluster.CreateTopic(ctx, "orders", 3); err != nil {
		t.Fatal(err)
	}
	c := client(t, kgo.SeedBrokers(cluster.Addrs()...), kgo.ConsumeTopics("orders"), kgo.ConsumerGroup("readers"))
	const n = 100
	sent := map[string]bool{}
	for i := range n {
		value := fmt.Sprintf("order-%d", i)
		sent[value] = true
		if err := c.ProduceSync(ctx, &kgo.Record{Topic: "orders", Value: []byte(value)}).FirstErr(); err != nil {
			t.Fatal(err)
		}
	}
	for len(sent) > 0 {
		fetches := c.PollFetches(ctx)
		if err := fetches.Err0(); err != nil {
			t.Fatal(err)
		}
		fetches.EachRecord(func(r *kgo.Record) { delete(sent, string(r.Value)) })
	}
}

func TestAKilledBrokerComesBackWithItsData(t *testing.T) {
	ctx := limit(t)
	began := time.Now()
	cluster := Start(t, Options{Brokers: 3})
	t.Logf("Kafka %s, three brokers: ready after %v", Newest, time.Since(began).Round(time.Millisecond))
	if err := cluster.CreateTopic(ctx, "orders", 3); err != nil {
		t.Fatal(err)
	}
	c := client(t, kgo.SeedBrokers(cluster.Addrs()...), kgo.DefaultProduceTopic("orders"),
		kgo.ConsumeTopics("orders"), kgo.RecordPartitioner(kgo.RoundRobinPartitioner()))
	produce := func(values ...string) {
		for _, value := range values {
			if err := c.ProduceSync(ctx, kgo.StringRecord(value)).FirstErr(); err != nil {
				t.Fatalf("produce %q: %v", value, err)
			}
		}
	}
	produce("a", "b", "c")
	if err := cluster.StopBroker(1, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	produce("d", "e", "f")
	if err := cluster.Await(ctx); err != nil {
		t.Fatal(err)
	}
	if err := cluster.StartBroker(ctx, 1); err != nil {
		t.Fatal(err)
	}
	produce("g", "h", "i")
	missing := map[string]bool{}
	for _, value := range strings.Split("abcdefghi", "") {
		missing[value] = true
	}
	for len(missing) > 0 {
		fetches := c.PollFetches(ctx)
		if err := ctx.Err(); err != nil {
			t.Fatalf("%v; missing %v", err, missing)
		}
		fetches.EachRecord(func(r *kgo.Record) { delete(missing, string(r.Value)) })
	}
}

func TestTheAuthorizerRefusesWhatNoACLAllows(t *testing.T) {
	for _, version := range []string{Newest, Previous} {
		t.Run(version, func(t *testing.T) {
			ctx := limit(t)
			cluster := Start(t, Options{Version: version, Authorizer: true, Users: map[string]string{"alice": "wonder"}})
			if err := cluster.CreateTopic(ctx, "orders", 1); err != nil {
				t.Fatal(err)
			}
			write := func(opts ...kgo.Opt) error {
				c := client(t, append(opts, kgo.DefaultProduceTopic("orders"), kgo.DisableIdempotentWrite())...)
				return c.ProduceSync(ctx, kgo.StringRecord("x")).FirstErr()
			}
			anonymous := kgo.SeedBrokers(cluster.Addrs()...)
			if err := write(anonymous); !errors.Is(err, kerr.TopicAuthorizationFailed) {
				t.Errorf("write as anonymous: got %v, want TOPIC_AUTHORIZATION_FAILED", err)
			}
			if err := cluster.Allow(ctx, "User:alice", kmsg.ACLResourceTypeTopic, "orders",
				kmsg.ACLOperationWrite); err != nil {
				t.Fatal(err)
			}
			seeds := kgo.SeedBrokers(cluster.SASLAddrs()...)
			logins := map[string]kgo.Opt{
				"PLAIN":         kgo.SASL(plain.Auth{User: "alice", Pass: "wonder"}.AsMechanism()),
				"SCRAM-SHA-256": kgo.SASL(scram.Auth{User: "alice", Pass: "wonder"}.AsSha256Mechanism()),
				"SCRAM-SHA-512": kgo.SASL(scram.Auth{User: "alice", Pass: "wonder"}.AsSha512Mechanism()),
			}
			for name, login := range logins {
				if err := write(seeds, login); err != nil {
					t.Errorf("write as alice by %s: %v", name, err)
				}
			}
		})
	}
}

func TestKafkasOwnToolsRun(t *testing.T) {
	ctx := limit(t)
	cluster := Start(t, Options{})
	if err := cluster.CreateTopic(ctx, "orders", 1); err != nil {
		t.Fatal(err)
	}
	producer, err := Tool(ctx, ConsoleProducer, "--bootstrap-server", cluster.Addrs()[0], "--topic", "orders")
	if err != nil {
		t.Fatal(err)
	}
	producer.Stdin = strings.NewReader("one\ntwo\n")
	run(t, producer)
	consumer, err := Tool(ctx, ConsoleConsumer, "--bootstrap-server", cluster.Addrs()[0], "--topic", "orders",
		"--from-beginning", "--max-messages", "2", "--timeout-ms", "30000")
	if err != nil {
		t.Fatal(err)
	}
	if out := run(t, consumer); out != "one\ntwo\n" {
		t.Errorf("consumed %q, want the two lines that were produced", out)
	}
}

// run runs a command in its own process group and returns what it wrote to its standard output.
func run(t *testing.T, cmd *exec.Cmd) string {
	t.Helper()
	var out, log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &log
	if err := (Place{}).Start(cmd); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatalf("run %v: %v\n%s", cmd.Args, err, &log)
	}
	return out.String()
}
