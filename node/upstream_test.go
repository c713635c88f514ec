package node_test

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
	"github.com/twmb/franz-go/pkg/sasl/scram"
	"golang.org/x/sys/unix"

	"klamm/test/ca"
	"klamm/test/issuer"
	"klamm/test/kafka"
	"klamm/test/spire"
	"klamm/test/spire/fake"
	"klamm/test/stage"
)

// world is a Kafka with all its listeners, and a SPIRE agent that knows orders and the node itself.
type world struct {
	*kafka.Cluster
	agent   *fake.Agent
	brokers *ca.Authority
	tokens  *issuer.Issuer
	dir     string
}

// ordersOf are the principals by which the broker may know orders.
var ordersOf = []string{"User:orders.shop", "User:" + stage.Orders, "User:alice", "User:token-client"}

// newWorld makes one. Life is that of SVIDs and of sessions at the broker; 0: longer than any test.
func newWorld(t *testing.T, life time.Duration) *world {
	t.Helper()
	w := &world{dir: t.TempDir()}
	var err error
	if w.agent, err = fake.New(fake.Options{TTL: life}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.agent.Stop(); err != nil {
			t.Error(err)
		}
	})
	w.register(t, spire.Entry{ID: stage.Orders, DNSNames: []string{"orders.shop"}, JWTTTL: life,
		Selectors: []string{fmt.Sprint("unix:uid:", stage.OrdersUID)}})
	node, err := w.agent.NodeEntry(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := w.agent.Update(t.Context(), node, spire.Entry{ID: spire.Node, DNSNames: []string{"klamm"},
		Selectors: []string{"unix:uid:0"}}); err != nil {
		t.Fatal(err)
	}
	if w.brokers, err = ca.New("brokers"); err != nil {
		t.Fatal(err)
	}
	if w.tokens, err = issuer.New(); err != nil {
		t.Fatal(err)
	}
	w.Cluster = kafka.Start(t, kafka.Options{Authorizer: true, Decisions: true,
		Users: map[string]string{"alice": "wonder"}, MaxReauth: life,
		Config: map[string]string{"listener.name.sasltls.ssl.client.auth": "requested"}, // KIP-684
		TLS: &kafka.TLS{CA: w.brokers, ClientAuth: "required", Clients: []*x509.Certificate{w.agent.Root()},
			Mapping: "RULE:^CN=([^,]+),O=SPIRE,C=US$/$1/"},
		OAuth: &kafka.OAuth{KeySet: "file://" + w.file(t, "keys.json", w.keySet(t)), Audience: "kafka"}})
	if err := w.CreateTopic(t.Context(), "orders", 1); err != nil {
		t.Fatal(err)
	}
	for _, principal := range ordersOf {
		if err := w.Allow(t.Context(), principal, kmsg.ACLResourceTypeTopic, "orders", kmsg.ACLOperationWrite); err != nil {
			t.Fatal(err)
		}
	}
	w.file(t, "brokers.pem", w.brokers.PEM())
	return w
}

func (w *world) register(t *testing.T, e spire.Entry) string {
	t.Helper()
	id, err := w.agent.Register(t.Context(), e)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// keySet are the keys of both JWT-SVIDs and the issuer's tokens.
func (w *world) keySet(t *testing.T) []byte {
	t.Helper()
	var all struct {
		Keys []json.RawMessage `json:"keys"`
	}
	for _, of := range []func() ([]byte, error){w.agent.KeySet, w.tokens.KeySet} {
		set, err := of()
		if err != nil {
			t.Fatal(err)
		}
		var one struct{ Keys []json.RawMessage }
		if err := json.Unmarshal(set, &one); err != nil {
			t.Fatal(err)
		}
		all.Keys = append(all.Keys, one.Keys...)
	}
	merged, err := json.Marshal(all)
	if err != nil {
		t.Fatal(err)
	}
	return merged
}

// file writes a file into the world's directory.
func (w *world) file(t *testing.T, name string, data []byte) string {
	t.Helper()
	path := filepath.Join(w.dir, name)
	stage.WriteFile(t, path, string(data))
	return path
}

// config are the sections by which a node reaches brokers as the section upstream says.
func (w *world) config(broker, upstream string) stage.Config {
	return stage.Config{
		"clusters": fmt.Sprintf("[{name: main, bootstrap: [%q], upstream: %s}]", broker, upstream),
		"spire": fmt.Sprintf("{api: delegated, socket: %q, workload-api: %q}",
			w.agent.Socket("delegated"), w.agent.WorkloadAPI())}
}

// node runs one.
func (w *world) node(t *testing.T, broker, upstream string) *stage.Node {
	t.Helper()
	return stage.Start(t, broker, stage.OrdersOnly, w.config(broker, upstream))
}

// place is anywhere, as a user.
func place(uid uint32) kafka.Place { return kafka.Place{UID: uid, GID: uid} }

// tls is the beginning of the section upstream with the brokers' CA.
func (w *world) tls(more string) string {
	return fmt.Sprintf("{tls: {ca: %q%s}", filepath.Join(w.dir, "brokers.pem"), more)
}

// endpoint is a token endpoint that knows one client by its secret.
func (w *world) endpoint(t *testing.T) string {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if id, secret, _ := r.BasicAuth(); id != "klamm" || secret != "cl1ent" {
			http.Error(rw, "no", http.StatusUnauthorized)
			return
		}
		token, err := w.tokens.Token(issuer.Claims{Subject: "token-client", Audience: []string{"kafka"}})
		if err != nil {
			t.Error(err)
		}
		rw.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(rw).Encode(map[string]any{"access_token": token, "token_type": "Bearer", "expires_in": 3600})
	}))
	t.Cleanup(s.Close)
	return s.URL
}

func TestTheBrokerKnowsTheWorkloadAsWhoItIs(t *testing.T) {
	w := newWorld(t, 0)
	password, secret := w.file(t, "password", []byte("wonder\n")), w.file(t, "secret", []byte("cl1ent\n"))
	overTLS, login := w.TLSAddrs()[0], w.SASLTLSAddrs()[0]
	alice := kgo.SASL(scram.Auth{User: "alice", Pass: "wonder"}.AsSha512Mechanism())
	for name, c := range map[string]struct {
		broker, upstream, principal string
		client                      []kgo.Opt
	}{
		"by its certificate": {overTLS, w.tls(", certificate: workload") + "}", ordersOf[0], nil},
		"by its JWT-SVID":    {login, w.tls("") + ", login: {jwt-svid: {audience: kafka}}}", ordersOf[1], nil},
		"by its own login, behind its certificate": {login, w.tls(", certificate: workload") + fmt.Sprintf(
			"}, credentials: {mechanism: SCRAM-SHA-512, username: alice, password-file: %q}", password), ordersOf[2],
			[]kgo.Opt{alice}},
		"by a password of the node's": {login, w.tls("") + fmt.Sprintf(
			", login: {mechanism: SCRAM-SHA-512, username: alice, password-file: %q}}", password), ordersOf[2], nil},
		"by client credentials of the node's": {login, w.tls("") + fmt.Sprintf(", login: {mechanism: OAUTHBEARER, "+
			"token-url: %q, client-id: klamm, client-secret-file: %q}}", w.endpoint(t), secret), ordersOf[3], nil},
		"by its JWT-SVID in cleartext": {w.SASLAddrs()[0], "{login: {jwt-svid: {audience: kafka}}, cleartext: true}",
			ordersOf[1], nil},
	} {
		t.Run(name, func(t *testing.T) {
			n := w.node(t, c.broker, c.upstream)
			n.AwaitReady()
			before := w.decisions(t)
			if err := write(t, n.Workload(stage.OrdersUID).Client(t, c.broker, c.client...), "orders"); err != nil {
				t.Fatal(err)
			}
			want := kafka.Decision{Principal: c.principal, Allowed: true, Operation: "WRITE", Resource: "Topic:LITERAL:orders"}
			if got := w.decisions(t)[len(before):]; !slices.Contains(got, want) {
				t.Errorf("the authorizer says %+v, not %+v", got, want)
			}
			if l := n.AwaitAudit(1, "a produce", produced)[0]; l.SPIFFE != stage.Orders || l.Outcome != "NONE" {
				t.Errorf("the audit says %+v", l)
			}
			if strings.Contains(n.Log.String(), "wonder") || strings.Contains(n.Log.String(), "cl1ent") {
				t.Error("the log has a secret")
			}
		})
	}
	t.Run("or not at all", func(t *testing.T) {
		n := w.node(t, overTLS, w.tls(", certificate: workload")+"}")
		wantReset(t, n.Workload(stage.ReportUID), overTLS)
		n.AwaitRefusals(1, "no_svid")
	})
	t.Run("and no longer than it is", func(t *testing.T) {
		n := w.node(t, overTLS, w.tls(", certificate: workload")+"}")
		id := w.register(t, spire.Entry{ID: stage.Report, DNSNames: []string{"report.shop"},
			Selectors: []string{fmt.Sprint("unix:uid:", stage.ReportUID)}})
		conn := n.Workload(stage.ReportUID).Dial(t, overTLS)
		if _, err := stage.Ask(conn, stage.Hello()); err != nil {
			t.Fatal(err)
		}
		if err := w.agent.Update(t.Context(), id, spire.Entry{ID: stage.Report, DNSNames: []string{"other.shop"},
			Selectors: []string{fmt.Sprint("unix:uid:", stage.ReportUID)}}); err != nil {
			t.Fatal(err)
		}
		if got, err := stage.End(conn); len(got) > 0 {
			t.Errorf("the client reads %q, %v", got, err)
		}
		if l := n.AwaitRefusals(1, "no_svid")[0]; !strings.Contains(l.Error, "other.shop") {
			t.Errorf("the audit says %+v", l)
		}
	})
}

func TestRotationAndRenewalLoseNoRequest(t *testing.T) {
	const life = 4 * time.Second
	w := newWorld(t, life)
	password := w.file(t, "password", []byte("wonder\n"))
	for name, c := range map[string]struct{ broker, upstream string }{
		"of X509-SVIDs": {w.TLSAddrs()[0], w.tls(", certificate: workload") + "}"},
		"of JWT-SVIDs":  {w.SASLTLSAddrs()[0], w.tls("") + ", login: {jwt-svid: {audience: kafka}}}"},
		"of a password's sessions": {w.SASLTLSAddrs()[0], w.tls("") + fmt.Sprintf(
			", login: {mechanism: SCRAM-SHA-256, username: alice, password-file: %q}}", password)},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := w.node(t, c.broker, c.upstream)
			client := n.Workload(stage.OrdersUID).Client(t, c.broker, kgo.RequestRetries(0), kgo.RecordRetries(0))
			for end := time.Now().Add(2 * life); time.Now().Before(end); {
				if err := write(t, client, "orders"); err != nil {
					t.Fatal(err)
				}
			}
			opened := n.Audit(func(l stage.Line) bool { return l.Event == "connection" && l.State == "open" })
			if closed := n.Audit(func(l stage.Line) bool { return l.State == "closed" }); len(closed) > 0 || len(opened) > 2 {
				t.Errorf("%d connections were opened and %d closed", len(opened), len(closed))
			}
		})
	}
}

func (w *world) decisions(t *testing.T) []kafka.Decision {
	t.Helper()
	all, err := w.Decisions()
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// impostor listens where a broker should be, and notes all it gets.
type impostor struct {
	net.Listener
	mu  sync.Mutex
	got bytes.Buffer
}

// Write notes what it got.
func (i *impostor) Write(b []byte) (int, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.got.Write(b)
}

func startImpostor(t *testing.T, conf *tls.Config) *impostor {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	i := &impostor{Listener: l}
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer func() { _ = conn.Close() }()
				if conf != nil {
					conn = tls.Server(conn, conf)
				}
				_, _ = io.Copy(i, conn)
			}()
		}
	}()
	return i
}

func TestNothingOfAClientReachesAnImpostor(t *testing.T) {
	brokers, err := ca.New("brokers")
	if err != nil {
		t.Fatal(err)
	}
	others, err := ca.New("others")
	if err != nil {
		t.Fatal(err)
	}
	root := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(root, brokers.PEM(), 0o600); err != nil {
		t.Fatal(err)
	}
	server := func(a *ca.Authority, l ca.Leaf) *tls.Config {
		certificate, err := a.Issue(l)
		if err != nil {
			t.Fatal(err)
		}
		return &tls.Config{Certificates: []tls.Certificate{*certificate}, MinVersion: tls.VersionTLS12}
	}
	for name, conf := range map[string]*tls.Config{
		"of another CA":   server(others, ca.Leaf{Names: []string{"127.0.0.1"}}),
		"of another name": server(brokers, ca.Leaf{Names: []string{"127.0.0.2", "localhost"}}),
		"in plaintext":    nil,
	} {
		t.Run(name, func(t *testing.T) {
			i := startImpostor(t, conf)
			broker := i.Addr().String()
			n := stage.Start(t, broker, stage.OrdersOnly, stage.Config{"clusters": fmt.Sprintf(
				"[{name: main, bootstrap: [%q], upstream: {tls: {ca: %q}}}]", broker, root),
				"limits": "{dial-timeout: 300ms}"})
			conn := n.Workload(stage.OrdersUID).Dial(t, broker)
			_, err := conn.Write(stage.Frame(stage.Hello()))
			var got []byte
			if err == nil {
				got, err = stage.End(conn)
			}
			if !errors.Is(err, unix.ECONNRESET) || len(got) > 0 {
				t.Errorf("the client reads %q, %v", got, err)
			}
			if l := n.AwaitRefusals(1, "upstream_tls")[0]; !strings.Contains(l.Error, broker) {
				t.Errorf("the audit says %+v", l)
			}
			i.mu.Lock()
			defer i.mu.Unlock()
			if bytes.Contains(i.got.Bytes(), []byte("workload")) || conf != nil && i.got.Len() > 0 {
				t.Errorf("the impostor got %q", i.got.Bytes())
			}
		})
	}
}
