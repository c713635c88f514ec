package enforcer

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sys/unix"

	"klamm/enforcer/audit"
	"klamm/enforcer/hello"
	"klamm/enforcer/policy"
	"klamm/spiffe"
	"klamm/test/ca"
)

const mayPass = `apiVersion: klamm/v1
connections: [{name: opaque, principals: ["spiffe://example.test/orders"], passthrough: true}]
`

const mayNot = `apiVersion: klamm/v1
connections: [{name: others, principals: ["spiffe://example.test/report"], passthrough: true}]
`

// workload is one whose identity a test changes.
type workload struct {
	id      atomic.Pointer[spiffe.Identity]
	mu      sync.Mutex
	changed func()
}

func (w *workload) Identity() *spiffe.Identity { return w.id.Load() }

func (w *workload) Watch(changed func()) (stop func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.changed = changed
	return func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.changed = func() {}
	}
}

func (w *workload) become(id spiffe.Identity) {
	w.id.Store(&id)
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.changed != nil {
		w.changed()
	}
}

func named(path string) spiffe.Identity {
	return spiffe.Identity{ID: spiffeid.RequireFromString("spiffe://example.test/" + path), Source: spiffe.SourceStatic}
}

func rules(t testing.TB, text string) *policy.Policy {
	t.Helper()
	set, err := policy.Parse("policy.yaml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return policy.New(set)
}

// passage is a client, a broker, and the enforcer between them.
type passage struct {
	*Enforcer
	t              testing.TB
	workload       *workload
	client, broker *net.TCPConn
	lines          bytes.Buffer
	ended          chan error
	cut            context.CancelFunc
}

var brokerNames = hello.Names{Known: []string{"broker-1.example"}}

func newPassage(t testing.TB, text string) *passage {
	t.Helper()
	p := &passage{t: t, workload: new(workload), ended: make(chan error, 1)}
	p.Enforcer = New(Options{Policy: rules(t, text), Audit: audit.New(&p.lines, "node-1"), MaxFrame: 1 << 20,
		Memory: MinMemory(1 << 20), Metrics: prometheus.NewRegistry()})
	p.workload.become(named("orders"))
	return p
}

func tcp(t testing.TB) (dialled, accepted *net.TCPConn) {
	t.Helper()
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if accepted, err = l.AcceptTCP(); err != nil {
		t.Fatal(err)
	}
	dialled = c.(*net.TCPConn)
	t.Cleanup(func() { _, _ = dialled.Close(), accepted.Close() })
	return dialled, accepted
}

// start lets a client say first, what h is said to be of.
func (p *passage) start(h hello.Hello, first []byte) {
	p.t.Helper()
	var downstream, upstream *net.TCPConn
	p.client, downstream = tcp(p.t)
	upstream, p.broker = tcp(p.t)
	ctx, cut := context.WithCancel(p.t.Context())
	p.cut = cut
	p.t.Cleanup(cut)
	go func() {
		p.ended <- p.Passthrough(ctx, Opaque{Client: Client{ID: "1", Identity: *p.workload.Identity(), Cluster: "main",
			Destination: netip.MustParseAddrPort("192.0.2.1:9093")}, Downstream: downstream, Upstream: upstream,
			Workload: p.workload, Hello: h, Read: first, Names: brokerNames})
	}()
}

// begin starts and waits until the broker has what the client said first.
func (p *passage) begin() {
	p.t.Helper()
	p.start(hello.Hello{ServerName: "broker-1.example"}, []byte("first"))
	p.got(p.broker, "first")
}

func (p *passage) got(c net.Conn, want string) {
	p.t.Helper()
	b := make([]byte, len(want))
	if _, err := io.ReadFull(c, b); err != nil || string(b) != want {
		p.t.Fatalf("%q came, %v; want %q", b, err, want)
	}
}

type opaqueLine struct {
	Event, State, Verdict, Reason, Error, SNI, Rule string
	Opaque, Drained                                 bool
	ToBroker                                        int64 `json:"bytes_to_broker"`
	ToClient                                        int64 `json:"bytes_to_client"`
}

// audited are the lines, once the connection has ended. All must say that it is opaque.
func (p *passage) audited() (lines []opaqueLine, err error) {
	p.t.Helper()
	select {
	case err = <-p.ended:
	case <-time.After(20 * time.Second):
		p.t.Fatal("the connection does not end")
	}
	for _, text := range bytes.Split(bytes.TrimSpace(p.lines.Bytes()), []byte("\n")) {
		var l opaqueLine
		if err := json.Unmarshal(text, &l); err != nil {
			p.t.Fatal(err)
		}
		if !l.Opaque {
			p.t.Errorf("it does not say opaque: %s", text)
		}
		lines = append(lines, l)
	}
	return lines, err
}

func TestTLSPassesUnreadAndIsOnRecordAsThat(t *testing.T) {
	p := newPassage(t, mayPass)
	p.begin()
	sent := make([]byte, 5<<20)
	_, _ = rand.Read(sent)
	got := make(chan []byte)
	go func() {
		b, _ := io.ReadAll(p.broker)
		got <- b
	}()
	go func() {
		_, _ = p.client.Write(sent)
		_ = p.client.CloseWrite()
	}()
	if b := <-got; !bytes.Equal(b, sent) {
		t.Errorf("%d of %d bytes came", len(b), len(sent))
	}
	// The broker's direction is still open.
	go func() {
		_, _ = p.broker.Write([]byte("an answer"))
		_ = p.broker.Close()
	}()
	if b, err := io.ReadAll(p.client); err != nil || string(b) != "an answer" {
		t.Errorf("the client read %q, %v", b, err)
	}
	lines, err := p.audited()
	if err != nil || len(lines) != 2 {
		t.Fatalf("%v: %+v", err, lines)
	}
	want := []opaqueLine{
		{Event: "connection", State: "open", Verdict: "allow", SNI: "broker-1.example", Rule: "opaque", Opaque: true},
		{Event: "connection", State: "closed", Verdict: "allow", SNI: "broker-1.example", Opaque: true,
			ToBroker: int64(len("first") + len(sent)), ToClient: int64(len("an answer"))},
	}
	for i := range want {
		if lines[i] != want[i] {
			t.Errorf("got  %+v\nwant %+v", lines[i], want[i])
		}
	}
}

func TestWhatMayNotPassHearsAnAlert(t *testing.T) {
	for what, c := range map[string]struct {
		policy string
		hello  hello.Hello
		alert  hello.Alert
		reason string
	}{
		"no entry":     {mayNot, hello.Hello{ServerName: "broker-1.example"}, hello.AccessDenied, "denied"},
		"another name": {mayPass, hello.Hello{ServerName: "other.example"}, hello.UnrecognizedName, "tls_name"},
		"no name":      {mayPass, hello.Hello{}, hello.UnrecognizedName, "tls_name"},
		"a hidden name": {mayPass, hello.Hello{ServerName: "broker-1.example", Encrypted: true}, hello.UnrecognizedName,
			"tls_name"},
	} {
		p := newPassage(t, c.policy)
		p.start(c.hello, []byte("first"))
		if b, err := io.ReadAll(p.client); err != nil || !bytes.Equal(b, c.alert.Bytes()) {
			t.Errorf("%s: the client read %x, %v", what, b, err)
		}
		if b, err := io.ReadAll(p.broker); err != nil || len(b) > 0 {
			t.Errorf("%s: the broker read %q, %v", what, b, err)
		}
		lines, err := p.audited()
		if err == nil || len(lines) != 1 || lines[0].Event != "refusal" || lines[0].Reason != c.reason {
			t.Errorf("%s: %v: %+v", what, err, lines)
		}
	}
}

func TestAnObservedPolicySaysWhatItWouldRefuse(t *testing.T) {
	p := newPassage(t, "apiVersion: klamm/v1\nmode: observe\nrules: [{name: r, principals: [\"*\"], "+
		"allow: [{topic: t, operations: [Read]}]}]\n")
	p.begin()
	_, _ = p.client.Close(), p.broker.Close()
	lines, _ := p.audited()
	for _, l := range lines {
		if l.Verdict != "would_deny" {
			t.Errorf("the line says %+v", l)
		}
	}
}

func TestAnOpaqueConnectionEndsWithWhatAllowedIt(t *testing.T) {
	for what, c := range map[string]struct {
		change func(p *passage)
		reason string
	}{
		"another policy": {func(p *passage) { p.SetPolicy(rules(p.t, mayNot)) }, "denied"},
		"a lost identity": {func(p *passage) {
			p.workload.become(spiffe.Identity{ID: named("orders").ID, Lost: errors.New("the process exited")})
		}, "identity_lost"},
		"another identity": {func(p *passage) { p.workload.become(named("report")) }, "identity_changed"},
	} {
		p := newPassage(t, mayPass)
		p.begin()
		c.change(p)
		for who, conn := range map[string]net.Conn{"client": p.client, "broker": p.broker} {
			if b, err := io.ReadAll(conn); len(b) > 0 || err != nil && !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("%s: the %s read %q, %v", what, who, b, err)
			}
		}
		lines, err := p.audited()
		if err == nil || len(lines) != 3 || lines[1].Event != "refusal" || lines[1].Reason != c.reason ||
			lines[2].State != "closed" {
			t.Errorf("%s: %v: %+v", what, err, lines)
		}
	}
}

func TestAChangeThatLeavesTheRightChangesNothing(t *testing.T) {
	p := newPassage(t, mayPass)
	p.begin()
	again := named("orders")
	again.Evidence = []spiffe.Evidence{{Source: spiffe.SourceStatic, ID: again.ID}}
	p.workload.become(again)
	p.SetPolicy(rules(t, mayPass))
	if _, err := p.client.Write([]byte("more")); err != nil {
		t.Fatal(err)
	}
	p.got(p.broker, "more")
	_, _ = p.client.Close(), p.broker.Close()
	if lines, err := p.audited(); err != nil || len(lines) != 2 {
		t.Errorf("%v: %+v", err, lines)
	}
}

func TestAResetOfOneSideIsOneOfTheOther(t *testing.T) {
	for _, side := range []string{"client", "broker"} {
		p := newPassage(t, mayPass)
		p.begin()
		near, far := p.client, p.broker
		if side == "broker" {
			near, far = far, near
		}
		_ = near.SetLinger(0)
		_ = near.Close()
		if _, err := far.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("after a reset by the %s the other side reads %v", side, err)
		}
		if lines, _ := p.audited(); lines[len(lines)-1].State != "closed" {
			t.Errorf("the last line is %+v", lines[len(lines)-1])
		}
	}
}

func TestADrainWaitsForAMomentWhenNothingPasses(t *testing.T) {
	p := newPassage(t, mayPass)
	p.begin()
	busy := make(chan struct{})
	go func() { // an answer in parts
		for range 10 {
			_, _ = p.broker.Write([]byte("part"))
			time.Sleep(quietFor / 10)
		}
		close(busy)
	}()
	cut := make(chan int)
	go func() { cut <- p.Drain(t.Context(), 0) }()
	if b, err := io.ReadAll(p.client); err != nil || len(b) != 40 {
		t.Errorf("the client read %q, %v", b, err)
	}
	<-busy
	if n := <-cut; n != 0 {
		t.Errorf("%d were cut", n)
	}
	lines, err := p.audited()
	if last := lines[len(lines)-1]; err != nil || !last.Drained || last.Error != "" {
		t.Errorf("%v: the last line is %+v", err, last)
	}
}

func TestADrainCutsWhatIsNeverQuiet(t *testing.T) {
	p := newPassage(t, mayPass)
	p.begin()
	go func() {
		for {
			if _, err := p.broker.Write([]byte("part")); err != nil {
				return
			}
			time.Sleep(quietFor / 10)
		}
	}()
	go func() { _, _ = io.Copy(io.Discard, p.client) }()
	ctx, cancel := context.WithTimeout(t.Context(), 3*quietFor)
	defer cancel()
	if n := p.Drain(ctx, 0); n != 1 {
		t.Errorf("%d were cut", n)
	}
	if _, err := p.audited(); !errors.Is(err, errCut) {
		t.Errorf("it ended with %v", err)
	}
}

func TestTheNodesEndEndsAnOpaqueConnection(t *testing.T) {
	p := newPassage(t, mayPass)
	p.begin()
	p.cut()
	if _, err := p.audited(); !errors.Is(err, errCut) {
		t.Errorf("it ended with %v", err)
	}
}

func TestAnOpaqueConnectionThatCannotBeOnRecordIsRefused(t *testing.T) {
	p := newPassage(t, mayPass)
	p.audit = audit.New(failing{}, "node-1")
	p.start(hello.Hello{ServerName: "broker-1.example"}, []byte("first"))
	if b, err := io.ReadAll(p.broker); err != nil || len(b) > 0 {
		t.Errorf("the broker read %q, %v", b, err)
	}
	if err := <-p.ended; err == nil {
		t.Error("it passed")
	}
}

type failing struct{}

func (failing) Write([]byte) (int, error) { return 0, errors.New("the disk is full") }

func TestTLSIsUnbrokenByThePassage(t *testing.T) {
	p := newPassage(t, mayPass)
	root, err := ca.New("brokers")
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := root.Issue(ca.Leaf{Names: []string{"broker-1.example"}})
	if err != nil {
		t.Fatal(err)
	}
	near, far := tcp(t)
	secure := tls.Client(near, &tls.Config{RootCAs: root.Pool(), ServerName: "broker-1.example",
		MinVersion: tls.VersionTLS12})
	done := make(chan error, 1)
	go func() { done <- secure.Handshake() }()
	h, first, err := hello.Read(far)
	if err != nil {
		t.Fatal(err)
	}
	p.start(h, first)
	go func() { _, _ = io.Copy(p.client, far) }() // the rest of what the client says
	go func() { _, _ = io.Copy(far, p.client) }()
	server := tls.Server(p.broker, &tls.Config{Certificates: []tls.Certificate{*leaf}, MinVersion: tls.VersionTLS12})
	if err := errors.Join(server.Handshake(), <-done); err != nil {
		t.Fatal(err)
	}
	go func() { _, _ = server.Write([]byte("hello")) }()
	p.got(secure, "hello")
}

// BenchmarkPassage compares the relay with io.Copy, which is what a bare relay does.
func BenchmarkPassage(b *testing.B) {
	const size = 1 << 20
	copying := func(r *relay) {
		go func() { _, _ = io.Copy(r.Upstream, r.Downstream); _ = r.Upstream.CloseWrite() }()
		_, _ = io.Copy(r.Downstream, r.Upstream)
	}
	relaying := func(r *relay) { _ = r.run(audit.Allow) }
	for name, way := range map[string]func(*relay){"bare": copying, "opaque": relaying} {
		b.Run(name, func(b *testing.B) {
			p := newPassage(b, mayPass)
			client, downstream := tcp(b)
			upstream, broker := tcp(b)
			r := &relay{Opaque: Opaque{Downstream: downstream, Upstream: upstream, Workload: p.workload,
				Client: Client{Identity: *p.workload.Identity()}}, enforcer: p.Enforcer, trail: p.audit.Trail(audit.Subject{}),
				started: time.Now()}
			go way(r)
			got := make(chan error)
			go func() {
				_, err := io.Copy(io.Discard, broker)
				got <- err
			}()
			sent := make([]byte, size)
			b.SetBytes(size)
			var before, after unix.Rusage
			_ = unix.Getrusage(unix.RUSAGE_SELF, &before)
			for b.Loop() {
				if _, err := client.Write(sent); err != nil {
					b.Fatal(err)
				}
			}
			_ = client.CloseWrite()
			if err := <-got; err != nil {
				b.Fatal(err)
			}
			_ = unix.Getrusage(unix.RUSAGE_SELF, &after)
			used := after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano()
			b.ReportMetric(float64(used)/float64(b.N)/1e6, "cpu-ms/MB")
			_ = broker.Close()
		})
	}
}
