package upstream

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"klamm/test/ca"
)

func TestABrokerIsVerified(t *testing.T) {
	brokers, others := must(ca.New("brokers"))(t), must(ca.New("others"))(t)
	leaf := func(a *ca.Authority, l ca.Leaf) *tls.Config { return anybody(must(a.Issue(l))(t)) }
	named, other, configured := ca.Leaf{Names: []string{"broker-1.example"}},
		ca.Leaf{Names: []string{"broker-2.example"}}, ca.Leaf{Names: []string{"kafka.example"}}
	svid, orders := ca.Leaf{ID: "spiffe://example.test/kafka"}, ca.Leaf{ID: "spiffe://example.test/orders"}
	foreign := ca.Leaf{ID: "spiffe://other.test/kafka"}
	expired := func(l ca.Leaf) ca.Leaf {
		l.Expires = time.Now().Add(-time.Second)
		return l
	}
	old := leaf(brokers, named)
	old.MinVersion, old.MaxVersion = tls.VersionTLS10, tls.VersionTLS11
	root := write(t, "ca.pem", brokers.PEM())
	bundle := x509bundle.FromX509Authorities(spiffeid.RequireTrustDomainFromString("example.test"),
		[]*x509.Certificate{brokers.Certificate})
	ids := []spiffeid.ID{idOf(t, "spiffe://example.test/other"), idOf(t, svid.ID)}
	byName, bySVID := TLS{CA: root}, TLS{CA: root, IDs: ids}
	byConfiguredName := TLS{CA: root, ServerName: "kafka.example"}
	for what, c := range map[string]struct {
		tls    TLS
		broker *tls.Config // nil: it speaks plaintext
		want   string      // of the error; "": it is trusted
	}{
		"a broker of its name":                  {byName, leaf(brokers, named), ""},
		"of a configured name":                  {byConfiguredName, leaf(brokers, configured), ""},
		"of another name":                       {byName, leaf(brokers, other), "not broker-1.example"},
		"of its name, though not as configured": {byConfiguredName, leaf(brokers, named), "not kafka.example"},
		"of another CA":                         {byName, leaf(others, named), "unknown authority"},
		"of no CA of the host":                  {TLS{}, leaf(brokers, named), "unknown authority"},
		"that has expired":                      {byName, leaf(brokers, expired(named)), "expired"},
		"that speaks plaintext":                 {byName, nil, "does not look like a TLS handshake"},
		"of old TLS":                            {byName, old, "protocol version"},
		"with its SVID":                         {bySVID, leaf(brokers, svid), ""},
		"with its SVID, by the agent's bundles": {TLS{Bundles: bundle, IDs: ids}, leaf(brokers, svid), ""},
		"with its SVID, where names count":      {byName, leaf(brokers, svid), "not valid for any names"},
		"of its name, where SPIFFE IDs count":   {bySVID, leaf(brokers, named), "no URI SAN"},
		"with an SVID of another CA":            {bySVID, leaf(others, svid), "unknown authority"},
		"with the SVID of somebody else":        {bySVID, leaf(brokers, orders), orders.ID},
		"with its SVID, expired":                {bySVID, leaf(brokers, expired(svid)), "expired"},
		"with an SVID of an unknown trust domain": {TLS{Bundles: bundle, IDs: []spiffeid.ID{idOf(t, foreign.ID)}},
			leaf(brokers, foreign), "no X.509 bundle"},
	} {
		t.Run(what, func(t *testing.T) {
			handle := kafka(0, nil)
			if c.broker == nil {
				handle = func(conn net.Conn) string {
					_, _ = io.WriteString(conn, "HTTP/1.1 400 Bad Request\r\n\r\n")
					return all(conn)
				}
			}
			s := serve(t, c.broker, handle)
			b, err := open(t, Options{TLS: &c.tls}, s, nil)
			if c.want != "" {
				if !errors.Is(err, ErrTLS) || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), name) {
					t.Errorf("the error is %v", err)
				}
				if e := s.end(t); strings.Contains(e.got, "klamm") || c.broker != nil && e.err == nil {
					t.Errorf("the broker got %q, its handshake ended with %v", e.got, e.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			_ = b.Close()
			if e := s.end(t); e.got != "" || e.err != nil {
				t.Errorf("the broker got %q, %v", e.got, e.err)
			}
		})
	}
}

// broker1 is the certificate of the broker that is dialled.
func broker1(t testing.TB, a *ca.Authority) *tls.Certificate {
	t.Helper()
	return must(a.Issue(ca.Leaf{Names: []string{"broker-1.example"}}))(t)
}

func TestABrokerThatDoesNotAnswerIsGivenUp(t *testing.T) {
	brokers := must(ca.New("brokers"))(t)
	root := write(t, "ca.pem", brokers.PEM())
	password := write(t, "password", []byte("secret"))
	for what, c := range map[string]struct {
		o      Options
		broker *tls.Config
		want   error
	}{
		"in the handshake": {Options{TLS: &TLS{CA: root}}, nil, ErrTLS},
		"in the login": {Options{Login: &Credentials{Mechanism: "PLAIN", Username: "u", PasswordFile: password}},
			nil, ErrLogin},
	} {
		t.Run(what, func(t *testing.T) {
			s := serve(t, c.broker, all)
			_, err := openFor(t, must(New(c.o))(t), s, nil, 100*time.Millisecond)
			if !errors.Is(err, c.want) {
				t.Errorf("the error is %v", err)
			}
		})
	}
}

func TestTheBrokerSeesTheCertificateThatIsConfigured(t *testing.T) {
	brokers, workloads, others := must(ca.New("brokers"))(t), must(ca.New("workloads"))(t), must(ca.New("others"))(t)
	certificate := broker1(t, brokers)
	root := write(t, "ca.pem", brokers.PEM())
	cert, key := write(t, "cert.pem", nil), write(t, "key.pem", nil)
	files := must(workloads.Issue(ca.Leaf{Subject: pkix.Name{CommonName: "files"}}))(t)
	if err := ca.Write(files, cert, key); err != nil {
		t.Fatal(err)
	}
	orders := workload(t, workloads, "spiffe://example.test/orders", "orders")
	node := workload(t, workloads, "spiffe://example.test/node", "node")
	stranger := workload(t, others, "spiffe://other.test/orders", "orders")
	asks := svids(workloads, certificate)
	asksOld := asks.Clone()
	asksOld.MaxVersion = tls.VersionTLS12
	for what, c := range map[string]struct {
		tls    TLS
		broker *tls.Config
		who    Identity
		want   string // common name
		err    error
		says   string
	}{
		"the workload's":            {TLS{Certificate: Workload}, asks, orders, "orders", nil, ""},
		"the node's":                {TLS{Certificate: Node}, asks, orders, "node", nil, ""},
		"that of files":             {TLS{Cert: cert, Key: key}, asks, orders, "files", nil, ""},
		"none, and none is asked":   {TLS{}, anybody(certificate), orders, "", nil, ""},
		"none, where one is wanted": {TLS{}, asks, orders, "", ErrTLS, "certificate required"},
		"none, by TLS 1.2":          {TLS{}, asksOld, orders, "", ErrTLS, "handshake failure"},
		"of a CA it does not trust": {TLS{Certificate: Workload}, asks, stranger, "", ErrTLS,
			"unknown certificate authority"},
		"none of a broker that does not ask": {TLS{Certificate: Workload}, anybody(certificate), orders, "", ErrTLS,
			"asks for no certificate"},
		"of a workload without SVID": {TLS{Certificate: Workload}, asks, &who{err: errors.New("no entry")}, "",
			ErrNoSVID, "no entry"},
		"of nobody": {TLS{Certificate: Workload}, asks, nil, "", ErrNoSVID, ""},
	} {
		t.Run(what, func(t *testing.T) {
			s := serve(t, c.broker, kafka(0, nil))
			c.tls.CA = root
			b, err := open(t, Options{TLS: &c.tls, Node: node}, s, c.who)
			if err == nil && c.err != nil { // by TLS 1.3 the broker's word comes after the handshake
				_, err = b.Read(make([]byte, 1))
			}
			if !errors.Is(err, c.err) || c.err != nil && !strings.Contains(err.Error(), c.says) {
				t.Fatalf("the error is %v", err)
			}
			if err != nil {
				return
			}
			_ = b.Close()
			if e := s.end(t); e.err != nil || subjectOf(e.state) != c.want || e.state.DidResume {
				t.Errorf("the broker saw %q, %v, resumed %v", subjectOf(e.state), e.err, e.state.DidResume)
			}
		})
	}
	_, err := open(t, Options{TLS: &TLS{CA: root, Certificate: Node}}, serve(t, asks, all), orders)
	if !errors.Is(err, ErrNoSVID) {
		t.Errorf("a node without identity: %v", err)
	}
}

func TestNoSessionIsResumedByAnotherWorkload(t *testing.T) {
	authority := must(ca.New("all"))(t)
	s := serve(t, svids(authority, broker1(t, authority)), kafka(0, nil))
	u := must(New(Options{TLS: &TLS{CA: write(t, "ca.pem", authority.PEM()), Certificate: Workload}}))(t)
	for _, who := range []string{"orders", "report", "orders"} {
		b, err := openFor(t, u, s, workload(t, authority, "spiffe://example.test/"+who, who), patience)
		if err != nil {
			t.Fatal(err)
		}
		_ = b.Close()
		if e := s.end(t); e.state.DidResume || subjectOf(e.state) != who {
			t.Errorf("%s: the broker saw %q, resumed %v", who, subjectOf(e.state), e.state.DidResume)
		}
	}
}

func TestFilesAreReadAnewAtEachHandshake(t *testing.T) {
	before, after := must(ca.New("before"))(t), must(ca.New("after"))(t)
	file := write(t, "ca.pem", before.PEM())
	u := must(New(Options{TLS: &TLS{CA: file}}))(t)
	s := serve(t, anybody(broker1(t, after)), kafka(0, nil))
	if _, err := openFor(t, u, s, nil, patience); !errors.Is(err, ErrTLS) {
		t.Errorf("before: %v", err)
	}
	rewrite(t, file, string(after.PEM()))
	if _, err := openFor(t, u, s, nil, patience); err != nil {
		t.Errorf("after: %v", err)
	}
	rewrite(t, file, "")
	if _, err := openFor(t, u, s, nil, patience); !errors.Is(err, ErrTLS) || !strings.Contains(err.Error(), file) {
		t.Errorf("without any: %v", err)
	}
}

func TestAConnectionIsCurrentWhileItsWorkloadIsTheSame(t *testing.T) {
	authority := must(ca.New("all"))(t)
	s := serve(t, svids(authority, broker1(t, authority)), kafka(0, nil))
	who := workload(t, authority, "spiffe://example.test/orders", "orders")
	b, err := open(t, Options{TLS: &TLS{CA: write(t, "ca.pem", authority.PEM()), Certificate: Workload}}, s, who)
	if err != nil {
		t.Fatal(err)
	}
	who.svid = workload(t, authority, "spiffe://example.test/orders", "orders").svid
	if err := b.Current(); err != nil {
		t.Errorf("with a new SVID: %v", err)
	}
	for what, change := range map[string]func(){
		"another SPIFFE ID": func() { who.svid = workload(t, authority, "spiffe://example.test/report", "orders").svid },
		"another subject":   func() { who.svid = workload(t, authority, "spiffe://example.test/orders", "report").svid },
		"no SVID":           func() { who.err = errors.New("it has expired") },
	} {
		change()
		if err := b.Current(); !errors.Is(err, ErrNoSVID) {
			t.Errorf("%s: %v", what, err)
		}
	}
	unbound, err := open(t, Options{}, s, who)
	if err != nil || unbound.Current() != nil {
		t.Errorf("a connection that shows nothing: %v", err)
	}
}

func TestAnEndWithoutNoticeIsAnEnd(t *testing.T) {
	authority := must(ca.New("all"))(t)
	s := serve(t, anybody(broker1(t, authority)), func(conn net.Conn) string {
		secure, is := conn.(*tls.Conn)
		if !is {
			return "no TLS"
		}
		_ = secure.NetConn().Close()
		return ""
	})
	b, err := open(t, Options{TLS: &TLS{CA: write(t, "ca.pem", authority.PEM())}}, s, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("the end is %v", err)
	}
}

func TestTheEndOfTheContextIsTheEndOfAnOpening(t *testing.T) {
	s := serve(t, nil, all)
	authority := must(ca.New("all"))(t)
	u := must(New(Options{TLS: &TLS{CA: write(t, "ca.pem", authority.PEM())}}))(t)
	ctx, cancel := context.WithCancel(t.Context())
	conn := must(net.Dial("tcp", s.addr))(t)
	time.AfterFunc(10*time.Millisecond, cancel)
	if _, err := u.Open(ctx, conn, name, nil); err == nil {
		t.Error("it is open")
	}
}
