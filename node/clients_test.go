package node_test

import (
	"context"
	"crypto/tls"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kgo"
	"golang.org/x/sys/unix"

	"klamm/test/ca"
	"klamm/test/stage"
)

// letThrough lets TLS of orders pass unread, in addition to what the policy says of what can be read.
const letThrough = stage.OrdersOnly + `connections:
  - {name: opaque, principals: ["` + stage.Orders + `"], passthrough: true}
`

// tlsStage is a broker that speaks TLS alone, and what it takes to meet its clients.
type tlsStage struct {
	*stage.Broker
	t       *testing.T
	dir     string
	brokers *ca.Authority // whom the node trusts: the brokers' own
	cluster *ca.Authority // whom the clients trust
	clients *ca.Authority // signs their certificates
}

func newTLSStage(t *testing.T) *tlsStage {
	t.Helper()
	s := &tlsStage{t: t, dir: t.TempDir()}
	for name, a := range map[string]**ca.Authority{"brokers": &s.brokers, "cluster": &s.cluster, "clients": &s.clients} {
		var err error
		if *a, err = ca.New(name); err != nil {
			t.Fatal(err)
		}
		stage.WriteFile(t, s.file(name), string((*a).PEM()))
	}
	s.Broker = stage.StartBroker(t, kfake.TLS(s.serves(s.brokers)))
	return s
}

// serves is the TLS of a broker.
func (s *tlsStage) serves(by *ca.Authority) *tls.Config {
	return &tls.Config{Certificates: []tls.Certificate{*s.issue(by, ca.Leaf{Names: []string{"localhost", "127.0.0.1"}})},
		MinVersion: tls.VersionTLS12}
}

func (s *tlsStage) issue(by *ca.Authority, l ca.Leaf) *tls.Certificate {
	s.t.Helper()
	c, err := by.Issue(l)
	if err != nil {
		s.t.Fatal(err)
	}
	return c
}

func (s *tlsStage) file(name string) string { return filepath.Join(s.dir, name+".pem") }

// bootstrap has the broker under a name and an address.
func (s *tlsStage) bootstrap() string {
	return fmt.Sprintf(`["localhost:%d", %q]`, s.Port(), s.Addr())
}

// confined writes an intermediate of the clients' CA, and is the section issuer with it.
func (s *tlsStage) confined(ttl string) string {
	s.t.Helper()
	c, err := s.cluster.Intermediate("brokers of this node", []string{"kafka.example", "localhost.localdomain"},
		&net.IPNet{IP: net.IPv4(127, 0, 0, 0).To4(), Mask: net.CIDRMask(8, 32)})
	if err != nil {
		s.t.Fatal(err)
	}
	if err := ca.Write(c, s.file("intermediate"), s.file("intermediate-key")); err != nil {
		s.t.Fatal(err)
	}
	return fmt.Sprintf("{intermediate: {cert: %s, key: %s, ttl: %s}}", s.file("intermediate"),
		s.file("intermediate-key"), ttl)
}

// written is the section issuer with a certificate in files.
func (s *tlsStage) written(by *ca.Authority, names ...string) string {
	s.t.Helper()
	if err := ca.Write(s.issue(by, ca.Leaf{Names: names}), s.file("leaf"), s.file("leaf-key")); err != nil {
		s.t.Fatal(err)
	}
	return fmt.Sprintf("{files: {cert: %s, key: %s}}", s.file("leaf"), s.file("leaf-key"))
}

// start runs a node that meets TLS clients like this.
func (s *tlsStage) start(policy, clients string) *stage.Node {
	s.t.Helper()
	n := stage.Start(s.t, s.Addr(), policy, stage.Config{"clusters": fmt.Sprintf(
		"[{name: main, bootstrap: %s, upstream: {tls: {ca: %s}}, clients: %s}]", s.bootstrap(), s.file("brokers"), clients)})
	n.AwaitReady()
	return n
}

// trusts is the TLS of a client.
func (s *tlsStage) trusts(a *ca.Authority, name string, shown ...*tls.Certificate) *tls.Config {
	conf := &tls.Config{RootCAs: a.Pool(), ServerName: name, MinVersion: tls.VersionTLS12}
	for _, c := range shown {
		conf.Certificates = append(conf.Certificates, *c)
	}
	return conf
}

// dial speaks TLS as the workload. The connection ends with the test.
func (s *tlsStage) dial(w *stage.Workload, conf *tls.Config) (*tls.Conn, error) {
	s.t.Helper()
	conn := tls.Client(w.Dial(s.t, s.Addr()), conf)
	if err := conn.SetDeadline(time.Now().Add(stage.Patience)); err != nil {
		s.t.Fatal(err)
	}
	err := conn.Handshake()
	if err == nil && conn.ConnectionState().Version == tls.VersionTLS13 && len(conf.Certificates) > 0 {
		_, err = stage.Ask(conn, stage.Hello()) // what the server says of our certificate comes only then
	}
	return conn, err
}

// client is a Kafka client that speaks TLS as the workload, and verifies the name it dialled.
func (s *tlsStage) client(w *stage.Workload, conf *tls.Config) *kgo.Client {
	return w.Client(s.t, s.Addr(), kgo.Dialer(func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := w.DialContext(ctx, network, address)
		if err != nil {
			return nil, err
		}
		conf := conf.Clone()
		conf.ServerName, _, _ = net.SplitHostPort(address)
		secure := tls.Client(conn, conf)
		return secure, secure.HandshakeContext(ctx)
	}))
}

// refusedWith tells whether a handshake ended with this alert by the other side.
func refusedWith(err error, alert tls.AlertError) bool {
	var op *net.OpError
	return errors.As(err, &op) && op.Op == "remote error" && op.Err.Error() == alert.Error()
}

func TestTLSPassesUnreadOnlyWhereThePolicyAllowsIt(t *testing.T) {
	s := newTLSStage(t)
	n := s.start(letThrough, "{tls: passthrough}")
	orders, report := n.Workload(stage.OrdersUID), n.Workload(stage.ReportUID)
	// What nobody reads nobody decides: the topic is none of its own.
	if err := write(t, s.client(orders, s.trusts(s.brokers, "")), "payroll"); err != nil {
		t.Errorf("what may pass: %v", err)
	}
	if _, err := s.dial(report, s.trusts(s.brokers, "localhost")); !refusedWith(err, 49) {
		t.Errorf("what may not pass: %v", err)
	}
	if _, err := s.dial(orders, s.trusts(s.brokers, "other.example")); !refusedWith(err, 112) {
		t.Errorf("another name: %v", err)
	}
	n.AwaitRefusals(1, "denied")
	n.AwaitRefusals(1, "tls_name")
	for _, l := range n.Audit(func(l stage.Line) bool { return l.SPIFFE != "" }) {
		if !l.Opaque || l.API != "" {
			t.Errorf("an audit line of an opaque connection says %+v", l)
		}
	}
	// Plaintext is what it was: the node speaks TLS for it, and decides.
	if err := write(t, orders.Client(t, s.Addr()), "payroll"); !errors.Is(err, kerr.TopicAuthorizationFailed) {
		t.Errorf("in plaintext: %v", err)
	}
}

func TestTLSThatEndsAtTheNodeIsDecidedOn(t *testing.T) {
	s := newTLSStage(t)
	n := s.start(stage.OrdersOnly, "{tls: terminate, issuer: "+s.confined("1h")+"}")
	orders := n.Workload(stage.OrdersUID)
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		conf := s.trusts(s.cluster, "")
		conf.MaxVersion = version
		client := s.client(orders, conf)
		if err := write(t, client, "orders"); err != nil {
			t.Errorf("what is allowed: %v", err)
		}
		if err := write(t, client, "payroll"); !errors.Is(err, kerr.TopicAuthorizationFailed) {
			t.Errorf("what is not allowed: %v", err)
		}
	}
	if got := [...]int64{s.Records("orders"), s.Records("payroll")}; got != [...]int64{2, 0} {
		t.Errorf("orders and payroll have %d records, not 2 and 0", got)
	}
	for _, l := range n.AwaitAudit(2, "a produce", produced) {
		if l.Verdict == "allow" && (l.SPIFFE != stage.Orders || l.Topic != "orders" || len(l.Batches) != 1) {
			t.Errorf("the audit says %+v", l)
		}
	}
}

func TestAClientThatDoesNotTrustTheIssuerIsToldOf(t *testing.T) {
	s := newTLSStage(t)
	n := s.start(stage.OrdersOnly, "{tls: terminate, issuer: "+s.confined("1h")+"}")
	if _, err := s.dial(n.Workload(stage.OrdersUID), s.trusts(s.brokers, "127.0.0.1")); err == nil {
		t.Error("it trusts the node")
	}
	l := n.AwaitRefusals(1, "tls_untrusted")[0]
	if l.SPIFFE != stage.Orders || !strings.Contains(l.Hint, "klamm doctor tls") {
		t.Errorf("the audit says %+v", l)
	}
}

func TestACertificateIsShownForTheBrokersNamesAlone(t *testing.T) {
	s := newTLSStage(t)
	n := s.start(stage.OrdersOnly, "{tls: terminate, names: [kafka.internal, unsigned.internal], issuer: "+
		s.written(s.cluster, "localhost", "127.0.0.1", "kafka.internal")+"}")
	w := n.Workload(stage.OrdersUID)
	for _, name := range []string{"localhost", "127.0.0.1", "kafka.internal"} {
		if conn, err := s.dial(w, s.trusts(s.cluster, name)); err != nil {
			t.Errorf("for %s: %v", name, err)
		} else if _, err := stage.Ask(conn, stage.Hello()); err != nil {
			t.Errorf("for %s: %v", name, err)
		}
	}
	if _, err := s.dial(w, s.trusts(s.cluster, "other.example")); !refusedWith(err, 112) {
		t.Errorf("for another name: %v", err)
	}
	n.AwaitRefusals(1, "tls_name")
	if _, err := s.dial(w, s.trusts(s.cluster, "unsigned.internal")); !refusedWith(err, 80) {
		t.Errorf("for a name that the certificate has not: %v", err)
	}
	if l := n.AwaitRefusals(1, "tls_issuer")[0]; !strings.Contains(l.Error, "not for unsigned.internal") {
		t.Errorf("the audit says %+v", l)
	}
}

func TestAClientCertificateIsEvidence(t *testing.T) {
	s := newTLSStage(t)
	issuer := s.confined("1h")
	n := s.start(stage.OrdersOnly, fmt.Sprintf("{tls: terminate, issuer: %s, client-certificates: {ca: [%s], "+
		"required: true}}", issuer, s.file("clients")))
	w := n.Workload(stage.OrdersUID)
	shown := s.issue(s.clients, ca.Leaf{Subject: pkix.Name{CommonName: "orders", Organization: []string{"shop"}}})
	conn, err := s.dial(w, s.trusts(s.cluster, "127.0.0.1", shown))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stage.Ask(conn, stage.Hello()); err != nil {
		t.Fatal(err)
	}
	opened := n.AwaitAudit(1, "an open connection", func(l stage.Line) bool { return l.State == "open" })[0]
	if n := len(opened.Evidence); opened.SPIFFE != stage.Orders || n != 2 || opened.Evidence[1].Source != "tls" ||
		opened.Evidence[1].Subject != "CN=orders,O=shop" || opened.Evidence[1].Issuer != "CN=clients" {
		t.Errorf("the audit says %+v", opened)
	}
	for what, c := range map[string]struct {
		shown *tls.Certificate
		alert tls.AlertError
	}{
		"of another CA": {s.issue(s.brokers, ca.Leaf{}), 48},
		"expired":       {s.issue(s.clients, ca.Leaf{Expires: time.Now().Add(-time.Hour)}), 45},
	} {
		conf := s.trusts(s.cluster, "127.0.0.1")
		conf.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return c.shown, nil }
		if err := s.asked(w, conf); !refusedWith(err, c.alert) {
			t.Errorf("a certificate %s: %v", what, err)
		}
	}
	if err := s.asked(w, s.trusts(s.cluster, "127.0.0.1")); !refusedWith(err, 116) {
		t.Errorf("no certificate: %v", err)
	}
	n.AwaitRefusals(3, "tls_certificate")
}

// asked is how the first question of a client ends.
func (s *tlsStage) asked(w *stage.Workload, conf *tls.Config) error {
	conn, err := s.dial(w, conf)
	if err == nil {
		_, err = stage.Ask(conn, stage.Hello())
	}
	return err
}

func TestAnImpostorOfABrokerIsRefused(t *testing.T) {
	s := newTLSStage(t)
	impostor := stage.StartBrokerAt(t, fmt.Sprintf("127.0.0.2:%d", s.Port()), kfake.TLS(s.serves(s.clients)))
	n := stage.Start(t, s.Addr(), stage.OrdersOnly, stage.Config{"clusters": fmt.Sprintf(
		"[{name: main, bootstrap: %s, cidrs: [127.0.0.2/32], upstream: {tls: {ca: %s}}, "+
			"clients: {tls: terminate, issuer: %s}}]",
		s.bootstrap(), s.file("brokers"), s.confined("1h"))})
	n.AwaitReady()
	conn := tls.Client(n.Workload(stage.OrdersUID).Dial(t, impostor.Addr()), s.trusts(s.cluster, "127.0.0.2"))
	if err := conn.Handshake(); err != nil {
		t.Fatal(err)
	}
	if got, err := stage.End(conn); len(got) > 0 {
		t.Errorf("the client read %q, %v", got, err)
	}
	n.AwaitRefusals(1, "upstream_tls")
	if _, sent := impostor.Arrived(); sent > 0 {
		// What it got is the beginning of a handshake, which it did not end.
		t.Logf("the impostor got %d bytes", sent)
	}
}

func TestACertificateIsReplacedWithoutAnyoneNoticing(t *testing.T) {
	s := newTLSStage(t)
	n := s.start(stage.OrdersOnly, "{tls: terminate, issuer: "+s.confined("3s")+"}")
	w := n.Workload(stage.OrdersUID)
	old, err := s.dial(w, s.trusts(s.cluster, "127.0.0.1"))
	if err != nil {
		t.Fatal(err)
	}
	serial := func(c *tls.Conn) string { return c.ConnectionState().PeerCertificates[0].SerialNumber.String() }
	seen := map[string]bool{serial(old): true}
	for end := time.Now().Add(stage.Patience); len(seen) < 3 && time.Now().Before(end); {
		conn, err := s.dial(w, s.trusts(s.cluster, "127.0.0.1"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := stage.Ask(conn, stage.Hello()); err != nil {
			t.Fatal(err)
		}
		seen[serial(conn)] = true
		if _, err := stage.Ask(old, stage.Hello()); err != nil {
			t.Fatalf("the first connection, after %d certificates: %v", len(seen), err)
		}
	}
	if len(seen) < 3 {
		t.Errorf("%d certificates were seen", len(seen))
	}
}

func TestAStopEndsTLSInOrder(t *testing.T) {
	s := newTLSStage(t)
	n := s.start(stage.OrdersOnly, "{tls: terminate, issuer: "+s.confined("1h")+"}")
	conn, err := s.dial(n.Workload(stage.OrdersUID), s.trusts(s.cluster, "127.0.0.1"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stage.Ask(conn, stage.Hello()); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error)
	go func() {
		_, err := stage.End(conn)
		_ = conn.Close()
		ended <- err
	}()
	n.Stop()
	if err := <-ended; err != nil {
		t.Errorf("the client reads %v, not an end", err)
	}
}

func TestWhoSaysNothingMaySpeakLater(t *testing.T) {
	s := newTLSStage(t)
	n := s.start(stage.OrdersOnly, "{tls: terminate, issuer: "+s.confined("1h")+"}")
	w := n.Workload(stage.OrdersUID)
	silent, early := w.Dial(t, s.Addr()), w.Dial(t, s.Addr())
	_ = early.Close()
	if err := s.asked(w, s.trusts(s.cluster, "127.0.0.1")); err != nil {
		t.Fatal(err)
	}
	if _, err := silent.Write([]byte{0x16}); err != nil { // the first byte alone
		t.Fatal(err)
	}
	var once sync.Once
	conn := tls.Client(lateConn{silent, &once}, s.trusts(s.cluster, "127.0.0.1"))
	if _, err := stage.Ask(conn, stage.Hello()); err != nil {
		t.Errorf("a client that was silent, and then slow: %v", err)
	}
	garbage := w.Dial(t, s.Addr())
	if _, err := garbage.Write([]byte{0x16, 3, 1, 0, 5, 2, 0, 0, 0, 0}); err != nil {
		t.Fatal(err)
	}
	if got, err := stage.End(garbage); len(got) > 0 || !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, io.EOF) {
		t.Errorf("who speaks neither reads %q, %v", got, err)
	}
	n.AwaitRefusals(1, "tls_handshake")
}

// lateConn has its first byte sent already.
type lateConn struct {
	net.Conn
	once *sync.Once
}

// Write implements net.Conn.
func (c lateConn) Write(b []byte) (int, error) {
	n := 0
	c.once.Do(func() { n = 1 })
	m, err := c.Conn.Write(b[n:])
	return n + m, err
}
