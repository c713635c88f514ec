package node

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
	"github.com/twmb/franz-go/pkg/kversion"
)

// patient is a pace at which nothing happens but on demand, and that at once.
var patient = pace{refresh: time.Hour, retry: time.Hour, demand: 0, lookups: 0, unknown: time.Hour}

func fake(t *testing.T, opts ...kfake.Opt) *kfake.Cluster {
	t.Helper()
	c, err := kfake.NewCluster(opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func open(t *testing.T, config ClusterConfig, opts ClusterOptions) *Cluster {
	t.Helper()
	if config.Name == "" {
		config.Name = "payments"
	}
	if opts.Dial == nil {
		opts.Dial = new(net.Dialer).DialContext
	}
	if opts.pace == nil {
		opts.pace = &patient
	}
	opts.Log = zerolog.New(zerolog.NewTestWriter(t))
	c, err := OpenCluster(config, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// reached waits until the cluster was looked at and fails when it did not answer.
func reached(t *testing.T, c *Cluster) {
	t.Helper()
	<-c.refresh()
	if s := c.State(); !s.Ready() {
		t.Fatalf("%+v", s)
	}
}

func addr(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

func portOf(t *testing.T, hostport string) uint16 {
	t.Helper()
	_, port, err := splitBroker(hostport)
	if err != nil {
		t.Fatal(err)
	}
	return port
}

// answer is a Metadata answer as a client would receive it.
func answer(id [16]byte, name string, brokers ...string) *kmsg.MetadataResponse {
	m := kmsg.NewPtrMetadataResponse()
	m.Version = 12
	for i, b := range brokers {
		host, port, err := splitBroker(b)
		if err != nil {
			panic(err)
		}
		m.Brokers = append(m.Brokers, kmsg.MetadataResponseBroker{NodeID: int32(i), Host: host, Port: int32(port)})
	}
	m.Topics = []kmsg.MetadataResponseTopic{{Topic: &name, TopicID: id}}
	return m
}

// idOf asks a broker for a topic's id, as a client of its own.
func idOf(t *testing.T, k *kfake.Cluster, name string) [16]byte {
	t.Helper()
	client, err := kgo.NewClient(kgo.SeedBrokers(k.ListenAddrs()...))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	req := kmsg.NewPtrMetadataRequest()
	req.Topics = []kmsg.MetadataRequestTopic{{Topic: &name}}
	m, err := req.RequestWith(t.Context(), client)
	if err != nil {
		t.Fatal(err)
	}
	return m.Topics[0].TopicID
}

// asked counts the requests for topic ids, and the ids in them.
func asked(k *kfake.Cluster) (requests, ids *atomic.Int32) {
	requests, ids = new(atomic.Int32), new(atomic.Int32)
	k.ControlKey(int16(kmsg.Metadata), func(req kmsg.Request) (kmsg.Response, error, bool) {
		k.KeepControl()
		if m, ok := req.(*kmsg.MetadataRequest); ok && len(m.Topics) > 0 {
			requests.Add(1)
			ids.Add(int32(len(m.Topics)))
		}
		return nil, nil, false
	})
	return requests, ids
}

func TestAdvertisedBrokersAreDestinationsAndOthersAreNot(t *testing.T) {
	k := fake(t, kfake.NumBrokers(3))
	all := k.ListenAddrs()
	c := open(t, ClusterConfig{Bootstrap: all[:1]}, ClusterOptions{Ports: []uint16{9092}})
	reached(t, c)
	for _, b := range all {
		d, err := Clusters{c}.Find(t.Context(), addr(b))
		if err != nil || d.Cluster != c || d.Broker != b || !d.Confirmed {
			t.Errorf("%s: %+v, %v", b, d, err)
		}
	}
	if s := c.State(); !slices.Equal(s.Brokers, slices.Sorted(slices.Values(all))) || s.Name != "payments" {
		t.Errorf("%+v", s)
	}
	other := "127.0.0.2:" + strconv.Itoa(int(portOf(t, all[0])))
	_, err := Clusters{c}.Find(t.Context(), addr(other))
	if !errors.Is(err, ErrNoCluster) || !strings.Contains(fmt.Sprint(err), other) ||
		!strings.Contains(fmt.Sprint(err), "cidrs") {
		t.Errorf("another address on a broker's port: %v", err)
	}
}

func TestADestinationHasOneForm(t *testing.T) {
	k := fake(t, kfake.NumBrokers(1))
	port := strconv.Itoa(int(portOf(t, k.ListenAddrs()[0])))
	c := open(t, ClusterConfig{Bootstrap: []string{"localhost:" + port}}, ClusterOptions{})
	reached(t, c)
	for host, want := range map[string]bool{
		"127.0.0.1":          true,
		"[::ffff:127.0.0.1]": true, // an IPv4 destination of an IPv6 socket
		"[::1]":              true,
		"0.0.0.0":            true, // Linux connects it to loopback
		"[::]":               true,
		"[::ffff:0.0.0.0]":   true,
		"127.0.0.2":          false,
		"[::2]":              false,
	} {
		if got := c.Lookup(addr(host + ":" + port)); got != want {
			t.Errorf("%s: %v, want %v", host, got, want)
		}
	}
	if c.Lookup(addr("127.0.0.1:1")) {
		t.Error("another port of the broker's host is taken for the broker")
	}
}

func TestANetworkIsTheClustersOnInterceptedPorts(t *testing.T) {
	k := fake(t, kfake.NumBrokers(1))
	port := strconv.Itoa(int(portOf(t, k.ListenAddrs()[0])))
	c := open(t, ClusterConfig{Bootstrap: k.ListenAddrs(), CIDRs: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16")}},
		ClusterOptions{Ports: []uint16{9092}})
	reached(t, c)
	for a, want := range map[string]bool{
		"10.1.2.3:9092":          true,
		"[::ffff:10.1.2.3]:9092": true,
		"10.1.2.3:" + port:       true, // a broker's port, so intercepted too
		"10.1.2.3:9093":          false,
		"10.2.0.1:9092":          false,
	} {
		if got := c.Lookup(addr(a)); got != want {
			t.Errorf("%s: %v, want %v", a, got, want)
		}
	}
	d, err := Clusters{c}.Find(t.Context(), addr("10.1.2.3:9092"))
	if err != nil || d.Confirmed || d.Broker != "10.1.2.3:9092" {
		t.Fatalf("%+v, %v", d, err)
	}
	d.Learn(answer([16]byte{1}, "orders"))
	if _, known := c.Name([16]byte{1}); known {
		t.Error("who listens somewhere in a configured network taught a topic id")
	}
}

func TestTheClusterThatNamesAnAddressWinsOverOneThatHasItsNetwork(t *testing.T) {
	k := fake(t, kfake.NumBrokers(1))
	wide := open(t, ClusterConfig{Name: "wide", Bootstrap: []string{"192.0.2.1:9092"},
		CIDRs: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}},
		ClusterOptions{Ports: []uint16{portOf(t, k.ListenAddrs()[0])}, Dial: refuse})
	named := open(t, ClusterConfig{Name: "named", Bootstrap: k.ListenAddrs()}, ClusterOptions{})
	reached(t, named)
	d, err := Clusters{wide, named}.Find(t.Context(), addr(k.ListenAddrs()[0]))
	if err != nil || d.Config().Name != "named" {
		t.Errorf("%+v, %v", d, err)
	}
}

func refuse(context.Context, string, string) (net.Conn, error) {
	return nil, errors.New("nobody there")
}

func TestAnUnknownDestinationIsLookedForOnce(t *testing.T) {
	k := fake(t, kfake.NumBrokers(1))
	c := open(t, ClusterConfig{Bootstrap: k.ListenAddrs()}, ClusterOptions{})
	reached(t, c)
	_, port, err := k.AddNode(7, 0)
	if err != nil {
		t.Fatal(err)
	}
	fresh := netip.AddrPortFrom(loopbacks[0], uint16(port))
	if c.Lookup(fresh) {
		t.Fatal("known before it was looked for")
	}
	if _, err = (Clusters{c}).Find(t.Context(), fresh); err != nil {
		t.Error(err)
	}
}

func TestUnknownDestinationsDoNotStormTheBroker(t *testing.T) {
	k := fake(t, kfake.NumBrokers(1))
	var looks atomic.Int32
	k.ControlKey(int16(kmsg.Metadata), func(kmsg.Request) (kmsg.Response, error, bool) {
		k.KeepControl()
		looks.Add(1)
		return nil, nil, false
	})
	slow := patient
	slow.demand = time.Hour
	c := open(t, ClusterConfig{Bootstrap: k.ListenAddrs()}, ClusterOptions{pace: &slow})
	reached(t, c)
	before := looks.Load()
	var all sync.WaitGroup
	for i := range 1000 {
		all.Go(func() {
			a := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), 9092)
			if _, err := (Clusters{c}).Find(t.Context(), a); !errors.Is(err, ErrNoCluster) {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if got := looks.Load(); got != before {
		t.Errorf("%d requests within the pause", got-before)
	}
}

func TestFindEndsWithItsContext(t *testing.T) {
	hang := func(ctx context.Context, _, _ string) (net.Conn, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	c := open(t, ClusterConfig{Bootstrap: []string{"192.0.2.1:9092"}}, ClusterOptions{Dial: hang})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := Clusters{c}.Find(ctx, addr("192.0.2.2:9092"))
	if !errors.Is(err, ErrNoCluster) || !strings.Contains(err.Error(), "cluster payments is not reached") {
		t.Error(err)
	}
}

func TestABrokerDownAtStartIsAskedAgain(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	broker := addr(l.Addr().String())
	if err = l.Close(); err != nil {
		t.Fatal(err)
	}
	eager := patient
	eager.retry = time.Millisecond
	c := open(t, ClusterConfig{Bootstrap: []string{broker.String()}}, ClusterOptions{pace: &eager})
	<-c.refresh()
	if s := c.State(); s.Ready() || s.Err == nil || !s.Reached.IsZero() {
		t.Errorf("while the broker is down: %+v", s)
	}
	if !c.Lookup(broker) {
		t.Error("the bootstrap address is not known before the broker answers")
	}
	fake(t, kfake.NumBrokers(1), kfake.Ports(int(broker.Port())))
	for !c.State().Ready() { // by the cluster's own looks, which this only waits for
		c.mu.Lock()
		flight := c.flight
		c.mu.Unlock()
		if flight != nil {
			<-flight
		}
		if t.Context().Err() != nil {
			t.Fatalf("%+v", c.State())
		}
	}
}

func TestPassingMetadataIsNoReasonToTrustABroker(t *testing.T) {
	k := fake(t, kfake.NumBrokers(1))
	c := open(t, ClusterConfig{Bootstrap: k.ListenAddrs()}, ClusterOptions{
		OnPorts: func(ports []uint16) {
			if slices.Contains(ports, 6666) {
				t.Error("a port of a broker that only passing metadata names")
			}
		}})
	reached(t, c)
	looked := c.State().Reached
	d := Destination{Cluster: c, Confirmed: true}
	d.Learn(answer([16]byte{1}, "orders", "127.0.0.1:6666"))
	<-c.refresh()
	if !c.State().Reached.After(looked) {
		t.Error("the cluster was not asked about the broker")
	}
	if _, err := (Clusters{c}).Find(t.Context(), addr("127.0.0.1:6666")); !errors.Is(err, ErrNoCluster) {
		t.Errorf("the broker of passing metadata: %v", err)
	}
}

func TestPortsOfBrokersAreReportedOnce(t *testing.T) {
	k := fake(t, kfake.NumBrokers(3))
	var mu sync.Mutex
	var got, want []uint16
	for _, b := range k.ListenAddrs() {
		want = append(want, portOf(t, b))
	}
	configured := want[0]
	c := open(t, ClusterConfig{Bootstrap: k.ListenAddrs()[:2]}, ClusterOptions{Ports: []uint16{configured},
		OnPorts: func(ports []uint16) {
			mu.Lock()
			defer mu.Unlock()
			got = append(got, ports...)
		}})
	mu.Lock()
	if !slices.Contains(got, want[1]) {
		t.Errorf("the bootstrap's port is not among %v when the cluster is open", got)
	}
	mu.Unlock()
	for range 3 {
		reached(t, c)
	}
	mu.Lock()
	defer mu.Unlock()
	slices.Sort(got)
	if want = slices.Sorted(slices.Values(want[1:])); !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestNamesAreResolvedToAllTheirAddresses(t *testing.T) {
	var mu sync.Mutex
	now := []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")}
	set := func(a []netip.Addr) { mu.Lock(); now = a; mu.Unlock() }
	c := open(t, ClusterConfig{Bootstrap: []string{"b.example:9092"}}, ClusterOptions{Dial: refuse,
		lookup: func(context.Context, string) ([]netip.Addr, error) {
			mu.Lock()
			defer mu.Unlock()
			if now == nil {
				return nil, errors.New("no answer")
			}
			return now, nil
		}})
	<-c.refresh()
	for step, test := range []struct {
		answer     []netip.Addr
		unresolved int
		want       []string
	}{
		{now, 0, []string{"192.0.2.1:9092", "[2001:db8::1]:9092"}},
		{nil, 1, []string{"192.0.2.1:9092", "[2001:db8::1]:9092"}}, // the last ones stay
		{[]netip.Addr{netip.MustParseAddr("192.0.2.2")}, 0, []string{"192.0.2.1:9092", "192.0.2.2:9092"}},
	} {
		set(test.answer)
		<-c.refresh()
		<-c.refresh() // the first may have been under way
		for _, a := range test.want {
			if !c.Lookup(addr(a)) {
				t.Errorf("step %d: %s is not known", step, a)
			}
		}
		if got := c.State().Unresolved; len(got) != test.unresolved {
			t.Errorf("step %d: unresolved %v", step, got)
		}
	}
	b := brokers{names: []string{"b.example:9092"}, addrs: map[netip.AddrPort][]broker{
		addr("192.0.2.9:9092"): {{"b.example:9092", time.Now().Add(-holdAddress)}},
		addr("192.0.2.8:9092"): {{"gone.example:9092", time.Now()}}}}
	c.resolveNames(t.Context(), &b)
	if len(b.addrs) != 1 {
		t.Errorf("addresses not seen for long, or of a name that is no broker's any more, stay: %v", b.addrs)
	}
}

func TestTopicIDsAreLookedUpAndThenKnown(t *testing.T) {
	k := fake(t, kfake.NumBrokers(1), kfake.SeedTopics(1, "orders", "payouts"))
	orders, payouts := idOf(t, k, "orders"), idOf(t, k, "payouts")
	c := open(t, ClusterConfig{Bootstrap: k.ListenAddrs()}, ClusterOptions{})
	if _, known := c.Name(orders); known {
		t.Fatal("known before it was looked up")
	}
	unknown := [16]byte{0xff}
	if err := c.Resolve(t.Context(), [][16]byte{orders, payouts, unknown, {}}); err != nil {
		t.Fatal(err)
	}
	for id, want := range map[[16]byte]string{orders: "orders", payouts: "payouts", unknown: "", {}: ""} {
		if name, known := c.Name(id); name != want || known != (want != "") {
			t.Errorf("%x is %q, want %q", id, name, want)
		}
	}
	if n := testing.AllocsPerRun(100, func() { c.Name(orders) }); n != 0 {
		t.Errorf("Name allocates %v times", n)
	}
}

func TestTheIDOfADeletedTopicIsForgottenWhenItIsAskedFor(t *testing.T) {
	k := fake(t, kfake.NumBrokers(1), kfake.SeedTopics(1, "orders", "payouts"))
	orders, payouts := idOf(t, k, "orders"), idOf(t, k, "payouts")
	c := open(t, ClusterConfig{Bootstrap: k.ListenAddrs()}, ClusterOptions{})
	known := func(want map[[16]byte]bool) {
		t.Helper()
		if err := c.Resolve(t.Context(), [][16]byte{orders, payouts}); err != nil {
			t.Fatal(err)
		}
		for id, is := range want {
			name, known := c.Name(id)
			back, _ := c.ID(name)
			if known != is || known && back != id {
				t.Errorf("%x: %q is known: %v; want %v", id, name, known, is)
			}
		}
	}
	known(map[[16]byte]bool{orders: true, payouts: true})
	client, err := kgo.NewClient(kgo.SeedBrokers(k.ListenAddrs()...))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	name := "orders"
	if _, err := (&kmsg.DeleteTopicsRequest{TimeoutMillis: 10_000, TopicNames: []string{name},
		Topics: []kmsg.DeleteTopicsRequestTopic{{Topic: &name}}}).RequestWith(t.Context(), client); err != nil {
		t.Fatal(err)
	}
	known(map[[16]byte]bool{orders: false, payouts: true})
}

func TestUnknownIDsDoNotStormTheBroker(t *testing.T) {
	k := fake(t, kfake.NumBrokers(1))
	requests, ids := asked(k)
	c := open(t, ClusterConfig{Bootstrap: k.ListenAddrs()}, ClusterOptions{})
	reached(t, c)
	for range 10 { // the same id again and again
		if err := c.Resolve(t.Context(), [][16]byte{{1}}); err != nil {
			t.Fatal(err)
		}
	}
	if requests.Load() != 1 || ids.Load() != 1 {
		t.Errorf("%d requests for %d ids, want 1 for 1", requests.Load(), ids.Load())
	}
	flood := make([][16]byte, 3*maxLookup) // ever new ids
	for i := range flood {
		flood[i] = [16]byte{2, byte(i), byte(i >> 8)}
	}
	if err := c.Resolve(t.Context(), flood); err != nil {
		t.Fatal(err)
	}
	if requests.Load() != 2 || ids.Load() != 1+maxLookup {
		t.Errorf("%d requests for %d ids, want 2 for %d", requests.Load(), ids.Load(), 1+maxLookup)
	}
	c.mu.Lock()
	c.topics.mu.Lock()
	if n := len(c.asked); n != 1+maxLookup {
		t.Errorf("%d ids are remembered", n)
	}
	c.topics.mu.Unlock()
	c.mu.Unlock()
}

func TestConnectionsShareALookup(t *testing.T) {
	k := fake(t, kfake.NumBrokers(1))
	requests, _ := asked(k)
	c := open(t, ClusterConfig{Bootstrap: k.ListenAddrs()}, ClusterOptions{})
	reached(t, c)
	c.turn <- struct{}{} // another look-up runs
	var all sync.WaitGroup
	for i := range 100 {
		all.Go(func() {
			if err := c.Resolve(t.Context(), [][16]byte{{byte(i + 1)}}); err != nil {
				t.Error(err)
			}
		})
	}
	for joined := 0; joined < 100 && t.Context().Err() == nil; { // until all of them wait
		c.topics.mu.Lock()
		if c.next != nil {
			joined = len(c.next.ids)
		}
		c.topics.mu.Unlock()
	}
	<-c.turn
	all.Wait()
	if requests.Load() != 1 {
		t.Errorf("%d requests, want 1", requests.Load())
	}
}

func TestResolveSaysWhyItCannot(t *testing.T) {
	t.Run("no broker answers", func(t *testing.T) {
		c := open(t, ClusterConfig{Bootstrap: []string{"192.0.2.1:9092"}}, ClusterOptions{Dial: refuse})
		err := c.Resolve(t.Context(), [][16]byte{{1}})
		if err == nil || !strings.Contains(err.Error(), "nobody there") {
			t.Error(err)
		}
	})
	t.Run("the context ends", func(t *testing.T) {
		c := open(t, ClusterConfig{Bootstrap: []string{"192.0.2.1:9092"}}, ClusterOptions{Dial: refuse})
		c.turn <- struct{}{}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := c.Resolve(ctx, [][16]byte{{1}}); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		<-c.turn
	})
	for _, old := range []*kversion.Versions{kversion.V2_6_0(), kversion.V2_8_0(), kversion.V3_0_0()} {
		t.Run("the broker cannot answer by id, as of "+old.VersionGuess(), func(t *testing.T) {
			k := fake(t, kfake.NumBrokers(1), kfake.MaxVersions(old))
			c := open(t, ClusterConfig{Bootstrap: k.ListenAddrs()}, ClusterOptions{})
			reached(t, c) // all else works
			if err := c.Resolve(t.Context(), [][16]byte{{1}}); err == nil || !strings.Contains(err.Error(), "needs 12") {
				t.Error(err)
			}
		})
	}
	t.Run("the node's own client may not see the topic", func(t *testing.T) {
		k := fake(t, kfake.NumBrokers(1))
		c := open(t, ClusterConfig{Bootstrap: k.ListenAddrs()}, ClusterOptions{})
		reached(t, c)
		k.ControlKey(int16(kmsg.Metadata), func(req kmsg.Request) (kmsg.Response, error, bool) {
			m := kmsg.NewPtrMetadataResponse()
			m.Version = req.GetVersion()
			m.Topics = []kmsg.MetadataResponseTopic{{ErrorCode: 29, TopicID: [16]byte{1}}}
			return m, nil, true
		})
		if err := c.Resolve(t.Context(), [][16]byte{{1}}); err == nil || !strings.Contains(err.Error(), "Describe") {
			t.Error(err)
		}
	})
}

func TestPassingMetadataTeachesTopicIDsForGood(t *testing.T) {
	ids := newTopics(patient, zerolog.New(zerolog.NewTestWriter(t)))
	one, none := [16]byte{1}, [16]byte{2}
	ids.learn(answer(one, "orders"))
	ids.learn(answer(one, "payouts"))
	if name, _ := ids.Name(one); name != "orders" {
		t.Errorf("the id was bound to another name: %s", name)
	}
	denied := answer(none, "secret")
	denied.Topics[0].ErrorCode = 29
	ids.learn(denied)
	unnamed := answer(none, "")
	unnamed.Topics[0].Topic = nil
	ids.learn(unnamed)
	ids.learn(answer([16]byte{}, "old"))
	if n := len(ids.names.Load().names); n != 1 {
		t.Errorf("%d ids are known, want 1", n)
	}
}

func TestATopicMadeAnewHasItsNewIDAlone(t *testing.T) {
	ids := newTopics(patient, zerolog.Nop())
	one, two := [16]byte{1}, [16]byte{2}
	ids.learn(answer(one, "orders"))
	ids.learn(answer([16]byte{3}, "logs"))
	ids.learn(answer(two, "orders"))
	if name, known := ids.Name(one); known {
		t.Errorf("the id of the deleted topic is still %s", name)
	}
	if id, _ := ids.ID("orders"); id != two {
		t.Errorf("orders has id %x", id)
	}
	if name, _ := ids.Name([16]byte{3}); name != "logs" {
		t.Errorf("logs is %q", name)
	}
}

func TestKnownTopicIDsAreBounded(t *testing.T) {
	ids := newTopics(patient, zerolog.Nop())
	for part := range 3 {
		m := kmsg.NewPtrMetadataResponse()
		for i := range maxTopics / 2 {
			name := fmt.Sprint("t", part, i)
			m.Topics = append(m.Topics, kmsg.MetadataResponseTopic{Topic: &name,
				TopicID: [16]byte{byte(part + 1), byte(i), byte(i >> 8), byte(i >> 16)}})
		}
		ids.learn(m)
		if _, known := ids.Name(m.Topics[0].TopicID); !known {
			t.Error("what was learned last is not known")
		}
	}
	if n := len(ids.names.Load().names); n != maxTopics/2 {
		t.Errorf("%d ids are kept", n)
	}
}

func TestTheOwnClientLogsIn(t *testing.T) {
	password := filepath.Join(t.TempDir(), "password")
	for _, mechanism := range []string{"PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"} {
		t.Run(mechanism, func(t *testing.T) {
			k := fake(t, kfake.NumBrokers(1), kfake.EnableSASL(), kfake.Superuser(mechanism, "klamm", "s3cret"))
			if err := os.WriteFile(password, []byte("s3cret\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			login := &LoginConfig{Mechanism: mechanism, Username: "klamm", PasswordFile: password}
			reached(t, open(t, ClusterConfig{Bootstrap: k.ListenAddrs(), Credentials: login}, ClusterOptions{}))

			if err := os.WriteFile(password, []byte("wr0ng"), 0o600); err != nil {
				t.Fatal(err)
			}
			c := open(t, ClusterConfig{Bootstrap: k.ListenAddrs(), Credentials: login}, ClusterOptions{})
			<-c.refresh()
			if s := c.State(); s.Ready() || strings.Contains(fmt.Sprint(s.Err), "wr0ng") {
				t.Errorf("with a wrong password: %+v", s)
			}
		})
	}
}

func TestTheOwnClientVerifiesBrokersByTLS(t *testing.T) {
	dir := t.TempDir()
	ca, leaf := certificate(t, dir, "broker.example")
	server := &tls.Config{Certificates: []tls.Certificate{leaf}, MinVersion: tls.VersionTLS12}
	k := fake(t, kfake.NumBrokers(1), kfake.TLS(server))
	for name, test := range map[string]struct {
		conf TLSConfig
		want string
	}{
		"its CA and name":      {TLSConfig{CA: ca, ServerName: "broker.example"}, ""},
		"another name":         {TLSConfig{CA: ca, ServerName: "other.example"}, "not other.example"},
		"the address as name":  {TLSConfig{CA: ca}, "127.0.0.1"},
		"the host's CAs alone": {TLSConfig{ServerName: "broker.example"}, "unknown authority"},
	} {
		c := open(t, ClusterConfig{Bootstrap: k.ListenAddrs(), TLS: &test.conf}, ClusterOptions{})
		<-c.refresh()
		if s := c.State(); s.Ready() != (test.want == "") || !strings.Contains(fmt.Sprint(s.Err), test.want) {
			t.Errorf("%s: %+v, want %q", name, s, test.want)
		}
	}
}

// certificate makes a self-signed certificate for name and returns the file it is in.
func certificate(t *testing.T, dir, name string) (file string, pair tls.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name},
		DNSNames: []string{name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	file = filepath.Join(dir, "ca.pem")
	if err = os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	return file, tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func TestWhatIsWrongOnTheHostIsSaidWhenAClusterIsOpened(t *testing.T) {
	dir := t.TempDir()
	empty := filepath.Join(dir, "empty")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	none := filepath.Join(dir, "none")
	for want, config := range map[string]ClusterConfig{
		"read ca: ":                   {TLS: &TLSConfig{CA: none}},
		"read ca: no PEM certificate": {TLS: &TLSConfig{CA: empty}},
		"load cert and key: ":         {TLS: &TLSConfig{Cert: empty, Key: empty}},
		"read password-file: ":        {Credentials: &LoginConfig{Mechanism: "PLAIN", PasswordFile: none}},
		"read password-file: " + empty + " is empty": {
			Credentials: &LoginConfig{Mechanism: "PLAIN", PasswordFile: empty}},
	} {
		config.Name, config.Bootstrap = "payments", []string{"192.0.2.1:9092"}
		_, err := OpenCluster(config, ClusterOptions{Dial: refuse})
		if err == nil || !strings.HasPrefix(err.Error(), "cluster payments: "+want) {
			t.Errorf("got %v, want %s", err, want)
		}
	}
}
