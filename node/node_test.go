package node_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/rs/zerolog"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
	"github.com/twmb/franz-go/pkg/sasl"
	"github.com/twmb/franz-go/pkg/sasl/plain"
	"github.com/twmb/franz-go/pkg/sasl/scram"
	"golang.org/x/sys/unix"

	"klamm/node"
	"klamm/test/kafka"
	"klamm/test/stage"
)

func TestMain(m *testing.M) {
	stage.Main()
	os.Exit(m.Run())
}

// write produces one record.
func write(t *testing.T, client *kgo.Client, topic string) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), stage.Patience)
	defer cancel()
	return client.ProduceSync(ctx, &kgo.Record{Topic: topic, Value: []byte("a record")}).FirstErr()
}

// topics are those that a client is shown.
func topics(t *testing.T, conn net.Conn) (names []string) {
	t.Helper()
	resp, err := stage.Ask(conn, stage.AllTopics())
	if err != nil {
		t.Fatal(err)
	}
	metadata, ok := resp.(*kmsg.MetadataResponse)
	if !ok {
		t.Fatalf("the answer is a %T", resp)
	}
	for _, topic := range metadata.Topics {
		names = append(names, *topic.Topic)
	}
	return names
}

// wantReset fails unless a connection is reset without a byte. The reset may come before connect(2) returns.
func wantReset(t *testing.T, w *stage.Workload, address string) {
	t.Helper()
	conn, err := w.DialContext(t.Context(), "tcp", address)
	if errors.Is(err, unix.ECONNRESET) {
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if got, err := stage.End(conn); !errors.Is(err, unix.ECONNRESET) || len(got) > 0 {
		t.Errorf("the client reads %q, %v, not a reset", got, err)
	}
}

func produced(l stage.Line) bool { return l.API == "Produce" && l.Topic != "" }

func TestThePolicyDecidesByTheUserWhoConnects(t *testing.T) {
	broker := stage.StartBroker(t)
	n := stage.Start(t, broker.Addr(), stage.OrdersOnly, nil)
	orders, report := n.Workload(stage.OrdersUID), n.Workload(stage.ReportUID)

	if err := write(t, orders.Client(t, broker.Addr()), "orders"); err != nil {
		t.Errorf("what is allowed: %v", err)
	}
	for topic, w := range map[string]*stage.Workload{"payroll": orders, "orders": report} {
		if err := write(t, w.Client(t, broker.Addr()), topic); !errors.Is(err, kerr.TopicAuthorizationFailed) {
			t.Errorf("what is not allowed: %v", err)
		}
	}
	if got := [...]int64{broker.Records("orders"), broker.Records("payroll")}; got != [...]int64{1, 0} {
		t.Errorf("orders and payroll have %d records, not 1 and 0", got)
	}
	l := n.AwaitAudit(1, "a produce", produced)[0]
	if l.Verdict != "allow" || l.SPIFFE != stage.Orders || l.UID != stage.OrdersUID || l.PID != uint32(orders.PID()) ||
		l.Cluster != "main" || l.Destination != broker.Addr() || l.Rule != "orders" || l.Outcome != "NONE" ||
		len(l.Batches) != 1 || len(l.Batches[0].SHA256) != 64 {
		t.Errorf("the audit says %+v", l)
	}
	refused := n.Audit(func(l stage.Line) bool { return l.Verdict == "deny" && l.SPIFFE == stage.Report })
	if len(refused) == 0 || refused[0].Resources[0].Name != "orders" {
		t.Errorf("the audit of what was refused says %+v", refused)
	}
}

func TestABrokerThatIsDownLooksLikeOne(t *testing.T) {
	down := stage.DownAddr(t)
	n := stage.Start(t, down, stage.OrdersOnly, nil)
	w := n.Workload(stage.OrdersUID)
	wantReset(t, w, down)
	if l := n.AwaitRefusals(1, "broker_unreachable")[0]; l.Destination != down || !strings.Contains(l.Error, "refused") {
		t.Errorf("the audit says %+v", l)
	}
	// What comes next is refused at connect(2), as where nobody listens; a second later the broker is tried again.
	stage.Await(t, "a refused connect", func() bool {
		conn, err := w.DialContext(t.Context(), "tcp", down)
		if err == nil {
			_ = conn.Close()
		}
		return errors.Is(err, unix.ECONNREFUSED) && n.Kernel("refused_down") > 0
	})
	tried := n.Refused("broker_unreachable")
	stage.Await(t, "the broker to be tried again", func() bool {
		conn, err := w.DialContext(t.Context(), "tcp", down)
		if err == nil {
			_ = conn.Close()
		}
		return n.Refused("broker_unreachable") > tried
	})
	stage.Await(t, "a word about the cluster", func() bool {
		return strings.Contains(n.Log.String(), "cluster not reached")
	})
	if code, text := n.Get("/readyz"); code != http.StatusServiceUnavailable || !strings.Contains(text, "cluster main") {
		t.Errorf("/readyz says %d %s", code, text)
	}
	if code, text := n.Get("/healthz"); code != http.StatusOK {
		t.Errorf("/healthz says %d %s", code, text)
	}
}

func TestAWorkloadsOwnBrokerIsRefused(t *testing.T) {
	broker := stage.StartBroker(t)
	own := stage.StartBrokerAt(t, fmt.Sprintf("127.0.0.2:%d", broker.Port()))
	n := stage.Start(t, broker.Addr(), stage.OrdersOnly, nil)
	n.AwaitReady()
	w := n.Workload(stage.OrdersUID)
	address := fmt.Sprintf("127.0.0.2:%d", broker.Port())
	wantReset(t, w, address)
	if l := n.AwaitRefusals(1, "no_cluster")[0]; l.Destination != address || l.SPIFFE != stage.Orders || l.Cluster != "" {
		t.Errorf("the audit says %+v", l)
	}
	if conns, _ := own.Arrived(); conns != 0 {
		t.Errorf("it was reached by %d connections", conns)
	}
}

func TestPortsThatBrokersAdvertiseAreInterceptedToo(t *testing.T) {
	broker := stage.StartBroker(t, kfake.NumBrokers(2))
	n := stage.Start(t, broker.Addr(), stage.OrdersOnly, nil)
	n.AwaitReady()
	w := n.Workload(stage.StrangerUID)
	for i, address := range broker.ListenAddrs() {
		conn := w.Dial(t, address)
		if got := topics(t, conn); len(got) > 0 {
			t.Errorf("by broker %d a stranger sees %v", i, got)
		}
		if broker.CameFrom(conn) {
			t.Errorf("the connection to broker %d went around", i)
		}
	}
	if got := n.Kernel("redirected"); got != 2 {
		t.Errorf("%d connects were redirected, not 2", got)
	}
}

func TestAStopGivesTheAnswersThatAreOwed(t *testing.T) {
	broker := stage.StartBroker(t)
	n := stage.Start(t, broker.Addr(), stage.OrdersOnly, nil)
	conn := n.Workload(stage.OrdersUID).Dial(t, broker.Addr())
	poll := kmsg.NewPtrFetchRequest()
	poll.Version, poll.MaxWaitMillis, poll.MinBytes = 4, 500, 1
	partition := kmsg.NewFetchRequestTopicPartition()
	partition.PartitionMaxBytes = 1 << 20
	poll.Topics = []kmsg.FetchRequestTopic{{Topic: "orders", Partitions: []kmsg.FetchRequestTopicPartition{partition}}}
	arrived := make(chan struct{})
	broker.ControlKey(poll.Key(), func(kmsg.Request) (kmsg.Response, error, bool) {
		close(arrived)
		return nil, nil, false
	})
	if _, err := conn.Write(stage.Frame(poll)); err != nil {
		t.Fatal(err)
	}
	<-arrived
	n.Stop()
	if got, err := stage.End(conn); err != nil || len(got) < 8 {
		t.Errorf("the client read %d bytes and %v, not an answer and the end", len(got), err)
	}
}

func TestConnectionsAreLimited(t *testing.T) {
	broker := stage.StartBroker(t)
	n := stage.Start(t, broker.Addr(), stage.OrdersOnly, stage.Config{"limits": "{connections: 2}"})
	w := n.Workload(stage.OrdersUID)
	served := []net.Conn{w.Dial(t, broker.Addr()), w.Dial(t, broker.Addr())}
	for _, conn := range served {
		if _, err := stage.Ask(conn, stage.Hello()); err != nil {
			t.Fatal(err)
		}
	}
	wantReset(t, w, broker.Addr())
	n.AwaitRefusals(1, "too_many_connections")
	if err := served[0].Close(); err != nil {
		t.Fatal(err)
	}
	stage.Await(t, "room for another connection", func() bool {
		conn, err := w.DialContext(t.Context(), "tcp", broker.Addr())
		if err != nil {
			return false
		}
		defer func() { _ = conn.Close() }()
		_, err = stage.Ask(conn, stage.Hello())
		return err == nil
	})
	if _, err := stage.Ask(served[1], stage.Hello()); err != nil {
		t.Errorf("the connection that was open all the time: %v", err)
	}
}

func TestAPolicyIsReloadedAndABadOneKeepsTheOld(t *testing.T) {
	broker := stage.StartBroker(t)
	n := stage.Start(t, broker.Addr(), stage.OrdersOnly, nil)
	conn := n.Workload(stage.ReportUID).Dial(t, broker.Addr())
	if got := topics(t, conn); len(got) > 0 {
		t.Fatalf("before, report sees %v", got)
	}
	file := filepath.Join(n.Dir, "policy.yaml")
	stage.WriteFile(t, file, strings.Replace(stage.OrdersOnly, stage.Orders, stage.Report, 1))
	if err := n.ReloadPolicy(); err != nil {
		t.Fatal(err)
	}
	if got := topics(t, conn); len(got) != 1 || got[0] != "orders" {
		t.Errorf("the open connection sees %v after the reload", got)
	}
	for text, want := range map[string]string{
		"apiVersion: klamm/v1\nruls: []\n": "policy.yaml:2:1: unknown key \"ruls\"",
		"":                                 "policy.yaml:1: the file is empty",
	} {
		stage.WriteFile(t, file, text)
		if err := n.ReloadPolicy(); err == nil || !strings.Contains(err.Error(), want) ||
			!strings.Contains(err.Error(), "the policy in force is kept") {
			t.Errorf("a bad policy: %v", err)
		}
		if got := topics(t, conn); len(got) != 1 {
			t.Errorf("with a bad policy the open connection sees %v", got)
		}
	}
}

func TestObserveModePassesAndEveryLineSaysWouldDeny(t *testing.T) {
	broker := stage.StartBroker(t)
	n := stage.Start(t, broker.Addr(), "apiVersion: klamm/v1\nmode: observe\nrules: []\n", nil)
	w := n.Workload(stage.StrangerUID)
	if err := write(t, w.Client(t, broker.Addr()), "payroll"); err != nil {
		t.Error(err)
	}
	reader := w.Client(t, broker.Addr(), kgo.ConsumeTopics("payroll"), kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()))
	ctx, cancel := context.WithTimeout(t.Context(), stage.Patience)
	defer cancel()
	if records := reader.PollRecords(ctx, 1); records.NumRecords() != 1 {
		t.Errorf("read: %v", records.Errors())
	}
	about := func(l stage.Line) bool { return l.Topic == "payroll" || len(l.Resources) > 0 }
	stage.Await(t, "lines about writing and reading", func() bool {
		apis := map[string]bool{}
		for _, l := range n.Audit(about) {
			apis[l.API] = true
		}
		return apis["Produce"] && apis["Fetch"] && apis["Metadata"]
	})
	for _, l := range n.Audit(about) {
		if l.Verdict != "would_deny" {
			t.Errorf("a line says %s: %+v", l.Verdict, l)
		}
	}
	if got := n.Metric(`klamm_requests_total{api="Produce",verdict="would_deny"}`); got != 1 {
		t.Errorf("%d writes are counted as would_deny, not 1", got)
	}
}

func TestARuleForHostsIsAboutTheAddressThatTheBrokerSees(t *testing.T) {
	broker := stage.StartBroker(t)
	n := stage.Start(t, broker.Addr(), stage.OrdersOnly, nil)
	w := n.Workload(stage.OrdersUID)
	for hosts, sees := range map[string]int{"[127.0.0.1]": 1, "[127.0.0.0/8]": 1, "[10.0.0.0/8]": 0, `["::1"]`: 0} {
		t.Run(hosts, func(t *testing.T) {
			stage.WriteFile(t, filepath.Join(n.Dir, "policy.yaml"),
				strings.Replace(stage.OrdersOnly, "allow:", "hosts: "+hosts+", allow:", 1))
			if err := n.ReloadPolicy(); err != nil {
				t.Fatal(err)
			}
			if got := topics(t, w.Dial(t, broker.Addr())); len(got) != sees {
				t.Errorf("it sees %v", got)
			}
		})
	}
}

func TestTheBrokerSeesTheAddressThatAClientWasBoundTo(t *testing.T) {
	broker := stage.StartBroker(t)
	n := stage.Start(t, broker.Addr(), strings.Replace(stage.OrdersOnly, "allow:", "hosts: [127.0.0.2], allow:", 1), nil)
	w := n.Workload(stage.OrdersUID)
	for from, sees := range map[string]int{"": 0, "127.0.0.1": 0, "127.0.0.2": 1} {
		if got := topics(t, w.DialFrom(t, from, broker.Addr())); len(got) != sees {
			t.Errorf("bound to %q it sees %v", from, got)
		}
	}
}

const aliceOnly = `apiVersion: klamm/v1
rules:
  - {name: alice, principals: ["User:alice"], allow: [{topic: orders, operations: [Write]}]}
`

// login logs in by PLAIN.
func login(t *testing.T, conn net.Conn, user, password string) error {
	t.Helper()
	handshake, authenticate := kmsg.NewPtrSASLHandshakeRequest(), kmsg.NewPtrSASLAuthenticateRequest()
	handshake.Version, handshake.Mechanism = 1, "PLAIN"
	authenticate.SASLAuthBytes = []byte("\x00" + user + "\x00" + password)
	if _, err := stage.Ask(conn, handshake); err != nil {
		t.Fatal(err)
	}
	resp, err := stage.Ask(conn, authenticate)
	if answer, ok := resp.(*kmsg.SASLAuthenticateResponse); ok {
		err = errors.Join(err, kerr.ErrorForCode(answer.ErrorCode))
	}
	return err
}

func TestASASLPrincipalCountsOnceTheBrokerHasAcceptedIt(t *testing.T) {
	mechanisms := map[string]func(user, password string) sasl.Mechanism{
		"PLAIN": func(u, p string) sasl.Mechanism { return plain.Auth{User: u, Pass: p}.AsMechanism() },
		"SCRAM-SHA-256": func(u, p string) sasl.Mechanism {
			return scram.Auth{User: u, Pass: p}.AsSha256Mechanism()
		},
		"SCRAM-SHA-512": func(u, p string) sasl.Mechanism {
			return scram.Auth{User: u, Pass: p}.AsSha512Mechanism()
		},
	}
	opts := []kfake.Opt{kfake.EnableSASL(), kfake.Superuser("PLAIN", "admin", "secret")}
	for name := range mechanisms {
		opts = append(opts, kfake.User(name, "alice", "wonder"), kfake.User(name, "bob", "builder"))
	}
	broker := stage.StartBroker(t, opts...)
	password := filepath.Join(t.TempDir(), "password")
	stage.WriteFile(t, password, "secret\n")
	n := stage.Start(t, broker.Addr(), aliceOnly, stage.Config{"clusters": fmt.Sprintf(
		"[{name: main, bootstrap: [%q], credentials: {mechanism: PLAIN, username: admin, password-file: %q}}]",
		broker.Addr(), password)})
	n.AwaitReady()
	w := n.Workload(stage.OrdersUID)
	for name, login := range mechanisms {
		t.Run(name, func(t *testing.T) {
			before := broker.Records("orders")
			as := func(user, password string) error {
				client := w.Client(t, broker.Addr(), kgo.SASL(login(user, password)))
				defer client.Close()
				return write(t, client, "orders")
			}
			if err := as("alice", "wonder"); err != nil {
				t.Errorf("alice: %v", err)
			}
			if err := as("bob", "builder"); !errors.Is(err, kerr.TopicAuthorizationFailed) {
				t.Errorf("bob: %v", err)
			}
			if got := broker.Records("orders") - before; got != 1 {
				t.Errorf("%d records were written, not 1", got)
			}
		})
	}
	guesser := w.Dial(t, broker.Addr())
	if err := login(t, guesser, "alice", "guessed"); err == nil {
		t.Error("a wrong password is right")
	}
	if resp, err := stage.Ask(guesser, stage.AllTopics()); err == nil {
		t.Errorf("after a wrong password the client is told %+v", resp)
	}
	lines := n.AwaitAudit(len(mechanisms), "what alice wrote", produced)
	for _, l := range lines {
		if l.Principal != "User:alice" || l.SPIFFE != stage.Orders {
			t.Errorf("the audit says %s beside %s", l.Principal, l.SPIFFE)
		}
	}
	// The node's log and audit must not tell what the clients know.
	audit, err := os.ReadFile(filepath.Join(n.Dir, "audit.jsonl"))
	if err != nil {
		t.Fatal(err)
	}
	for _, secret := range []string{"wonder", "builder", "guessed"} {
		if strings.Contains(string(audit)+n.Log.String(), secret) {
			t.Errorf("the password %q is on record", secret)
		}
	}
}

func TestAPrincipalThatTheBrokerRefusedIsNone(t *testing.T) {
	broker := stage.StartBroker(t)
	// A broker that lets the client go on after a failed login, as Kafka does not.
	var code atomic.Int32
	broker.ControlKey(int16(kmsg.SASLHandshake), func(kmsg.Request) (kmsg.Response, error, bool) {
		broker.KeepControl()
		resp := kmsg.NewPtrSASLHandshakeResponse()
		resp.Version = 1
		return resp, nil, true
	})
	broker.ControlKey(int16(kmsg.SASLAuthenticate), func(kmsg.Request) (kmsg.Response, error, bool) {
		broker.KeepControl()
		resp := kmsg.NewPtrSASLAuthenticateResponse()
		resp.ErrorCode = int16(code.Load())
		return resp, nil, true
	})
	n := stage.Start(t, broker.Addr(), aliceOnly, nil)
	conn := n.Workload(stage.OrdersUID).Dial(t, broker.Addr())
	code.Store(int32(kerr.SaslAuthenticationFailed.Code))
	if err := login(t, conn, "alice", "guessed"); !errors.Is(err, kerr.SaslAuthenticationFailed) {
		t.Errorf("the client is told %v", err)
	}
	if got := topics(t, conn); len(got) > 0 {
		t.Errorf("who failed to log in as alice sees %v", got)
	}
	code.Store(0)
	if err := login(t, conn, "alice", "wonder"); err != nil {
		t.Error(err)
	}
	if got := topics(t, conn); len(got) != 1 {
		t.Errorf("alice sees %v", got)
	}
}

func TestNothingPassesWhenTheAuditCannotBeWritten(t *testing.T) {
	broker := stage.StartBroker(t)
	n := stage.Start(t, broker.Addr(), stage.OrdersOnly, stage.Config{"audit": "{file: /dev/full}"})
	conn := n.Workload(stage.OrdersUID).Dial(t, broker.Addr())
	if resp, err := stage.Ask(conn, stage.Hello()); err == nil {
		t.Errorf("the client is told %+v", resp)
	}
	if _, bytes := broker.Arrived(); bytes != 0 {
		t.Errorf("%d bytes have reached the broker", bytes)
	}
	stage.Await(t, "the counter", func() bool { return n.Refused("audit") == 1 })
}

func TestAClientIsToldNoSuccessThatIsNotOnRecord(t *testing.T) {
	broker := stage.StartBroker(t)
	fifo := filepath.Join(t.TempDir(), "audit")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	reader, err := os.OpenFile(fifo, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	n := stage.Start(t, broker.Addr(), stage.OrdersOnly, stage.Config{"audit": "{file: " + fifo + "}"})
	client := n.Workload(stage.OrdersUID).Client(t, broker.Addr(), kgo.RecordRetries(0), kgo.ProducerBatchMaxBytes(1<<10))
	if err := write(t, client, "orders"); err != nil {
		t.Fatal(err)
	}
	for lines := bufio.NewReader(reader); ; {
		line, err := lines.ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(line, `"api":"Produce"`) && strings.Contains(line, `"sha256"`) {
			break
		}
	}
	if err := reader.Close(); err != nil {
		t.Fatal(err)
	}
	if err := write(t, client, "orders"); err == nil {
		t.Error("a write that is not on record succeeded")
	}
	stage.Await(t, "the counter", func() bool { return n.Refused("audit") > 0 })
}

func TestTheEndOfTheNodeEndsConnectionsAndTheRedirect(t *testing.T) {
	broker := stage.StartBroker(t)
	n := stage.Start(t, broker.Addr(), stage.OrdersOnly, nil)
	w := n.Workload(stage.OrdersUID)
	conn := w.Dial(t, broker.Addr())
	if _, err := stage.Ask(conn, stage.Hello()); err != nil {
		t.Fatal(err)
	}
	n.Stop()
	if _, err := stage.Ask(conn, stage.Hello()); err == nil {
		t.Error("the connection goes on")
	}
	again := w.Dial(t, broker.Addr())
	if got := topics(t, again); len(got) != 3 || !broker.CameFrom(again) {
		t.Errorf("after the node's end a client sees %v", got)
	}
}

func TestABrokerOnTheSameHostConnectsDirectly(t *testing.T) {
	broker := stage.StartBroker(t)
	cgroup := stage.NewCgroup(t, "kafka/jvm", "workloads")
	root, err := node.Cgroup2Mount()
	if err != nil {
		t.Fatal(err)
	}
	n := stage.Start(t, broker.Addr(), stage.OrdersOnly, stage.Config{
		"node": "{name: node-1, cgroup: " + cgroup + ", pins: \"\", socket: \"\"}",
		"intercept": fmt.Sprintf("{firewall: false, ports: [%d], exempt: [{cgroup: %s}]}", broker.Port(),
			strings.TrimPrefix(cgroup, root)+"/kafka"),
	})
	for below, direct := range map[string]bool{"kafka": true, "kafka/jvm": true, "workloads": false, ".": false} {
		t.Run(below, func(t *testing.T) {
			w := stage.StartWorkload(t, kafka.Place{Cgroup: filepath.Join(cgroup, below), UID: stage.StrangerUID}, "")
			conn := w.Dial(t, broker.Addr())
			if got := topics(t, conn); (len(got) == 3) != direct || broker.CameFrom(conn) != direct {
				t.Errorf("it sees %v, directly: %v", got, broker.CameFrom(conn))
			}
		})
	}
	if exempt, redirected := n.Kernel("passed_exempt"), n.Kernel("redirected"); exempt != 2 || redirected != 2 {
		t.Errorf("%d connects were exempt and %d redirected, not 2 and 2", exempt, redirected)
	}
}

func TestWhatIsWrongIsSaidAtTheStart(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = taken.Close() }()
	for _, c := range []struct {
		name   string
		config stage.Config
		want   string
	}{
		{"a policy that is not there", stage.Config{"policies": "[gone.yaml]"}, "gone.yaml: no such file"},
		{"a policy that is no policy", stage.Config{"policies": "[klamm.yaml]"}, "klamm.yaml:1:1: unknown key"},
		{"a cgroup that is not there", stage.Config{"node": "{cgroup: /gone, pins: \"\"}"}, "/gone: no such file"},
		{"a cgroup that is none", stage.Config{"node": "{cgroup: /tmp, pins: \"\"}"}, "is it a directory of cgroup2?"},
		{"a place for the audit that is not there", stage.Config{"audit": "{file: gone/audit}"}, "opening the audit file"},
		{"a metrics address in use", stage.Config{"metrics": "{listen: \"" + taken.Addr().String() + "\"}"},
			"address already in use: choose another address"},
		{"credentials that are not there", stage.Config{"clusters": "[{name: main, bootstrap: [\"a:1\"], " +
			"credentials: {mechanism: PLAIN, username: a, password-file: gone}}]"}, "read password-file"},
	} {
		t.Run(c.name, func(t *testing.T) {
			config := stage.Load(t, t.TempDir(), stage.NewCgroup(t), "127.0.0.1:9092", stage.OrdersOnly, c.config)
			n, err := node.Open(config, zerolog.New(io.Discard))
			if err == nil {
				err = errors.Join(n.Run(t.Context(), func() { t.Error("the node says it is ready") }), n.Close())
			}
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestAConnectionThatOutlivesItsProcessIsClosed(t *testing.T) {
	broker := stage.StartBroker(t)
	n := stage.Start(t, broker.Addr(), stage.OrdersOnly, nil)
	w := n.Workload(stage.OrdersUID)
	conn := w.Dial(t, broker.Addr()) // the test has it, too
	if got := topics(t, conn); len(got) != 1 {
		t.Fatalf("while its process lives it sees %v", got)
	}
	if err := w.End(); err != nil {
		t.Fatal(err)
	}
	if got, err := stage.End(conn); len(got) > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("it reads %q, %v", got, err)
	}
	l := n.AwaitRefusals(1, "identity_lost")[0]
	if l.SPIFFE != stage.Orders || l.PID != uint32(w.PID()) || !strings.Contains(l.Error, "process is gone") {
		t.Errorf("the audit says %+v", l)
	}
	if got := n.Metric(`klamm_identity_events_total{event="connection_lost"}`); got != 1 {
		t.Errorf("%d lost connections are counted", got)
	}
}

func TestAConnectionThatOutlivesItsProcessHasNoRightsWhereItStays(t *testing.T) {
	broker := stage.StartBroker(t)
	n := stage.Start(t, broker.Addr(), stage.OrdersOnly, stage.Config{"attestation": "{on-loss: deny}"})
	w := n.Workload(stage.OrdersUID)
	conn := w.Dial(t, broker.Addr())
	if got := topics(t, conn); len(got) != 1 {
		t.Fatalf("while its process lives it sees %v", got)
	}
	if err := w.End(); err != nil {
		t.Fatal(err)
	}
	stage.Await(t, "the end of its rights", func() bool { return len(topics(t, conn)) == 0 })
	if got := n.Metric(`klamm_processes{state="open"}`); got != 0 {
		t.Errorf("%d processes have a connection", got)
	}
}

func TestOneProcessIsAttestedOnceForAllItsConnections(t *testing.T) {
	broker := stage.StartBroker(t)
	n := stage.Start(t, broker.Addr(), stage.OrdersOnly, nil)
	w := n.Workload(stage.OrdersUID)
	for range 3 {
		conn := w.Dial(t, broker.Addr())
		if _, err := stage.Ask(conn, stage.Hello()); err != nil {
			t.Fatal(err)
		}
		if err := conn.Close(); err != nil {
			t.Fatal(err)
		}
		stage.Await(t, "the end of the connection", func() bool { return n.Open() == 0 })
	}
	for series, want := range map[string]int{
		`klamm_attestation_seconds_count{cached="false"}`: 1,
		`klamm_attestation_seconds_count{cached="true"}`:  2,
		`klamm_identities{source="static"}`:               1,
		`klamm_unidentified_processes`:                    0,
	} {
		if got := n.Metric(series); got != want {
			t.Errorf("%s is %d, not %d", series, got, want)
		}
	}
	status, err := n.Status()
	if err != nil || status.Attestation.Processes != 1 || status.Kernel.Unnoticed != "" {
		t.Errorf("the status is %+v, %v", status.Attestation, err)
	}
}
