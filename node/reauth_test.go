package node_test

import (
	"bytes"
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
	"github.com/twmb/franz-go/pkg/sasl"
	"github.com/twmb/franz-go/pkg/sasl/oauth"
	"github.com/twmb/franz-go/pkg/sasl/plain"
	"github.com/twmb/franz-go/pkg/sasl/scram"

	"klamm/test/issuer"
	"klamm/test/kafka"
	"klamm/test/stage"
)

const (
	session = 4 * time.Second // how long a login lasts at the broker (KIP-368); franz-go needs more than 2.5 s
	rate    = 20              // records a second
)

// renewals is a Kafka at which logins must be renewed, behind a node.
type renewals struct {
	*stage.Node
	broker *kafka.Cluster
	tokens *issuer.Issuer
	dir    string
}

func startRenewals(t *testing.T, upstream string) *renewals {
	t.Helper()
	r := &renewals{dir: t.TempDir()}
	var err error
	if r.tokens, err = issuer.New(); err != nil {
		t.Fatal(err)
	}
	keys, err := r.tokens.KeySet()
	if err != nil {
		t.Fatal(err)
	}
	file := func(name, text string) string {
		path := filepath.Join(r.dir, name)
		stage.WriteFile(t, path, text)
		return path
	}
	keySet := file("keys.json", string(keys))
	password, wonder := file("password", kafka.AdminPassword), file("wonder", "wonder")
	r.broker = kafka.Start(t, kafka.Options{Authorizer: true, Users: map[string]string{"alice": "wonder"},
		OAuth:  &kafka.OAuth{KeySet: "file://" + keySet, Issuer: "https://issuer.example.test", Audience: "kafka"},
		Config: map[string]string{"connections.max.reauth.ms": fmt.Sprint(session.Milliseconds())}})
	if err := r.broker.CreateTopic(t.Context(), "orders", 1); err != nil {
		t.Fatal(err)
	}
	if err := r.broker.Allow(t.Context(), "User:alice", kmsg.ACLResourceTypeTopic, "orders",
		kmsg.ACLOperationWrite); err != nil {
		t.Fatal(err)
	}
	const rules = `apiVersion: klamm/v1
rules:
  - {name: alice, principals: ["User:alice"], allow: [{topic: orders, operations: [Write]}]}
  - {name: orders, principals: ["` + stage.Orders + `"], allow: [{topic: orders, operations: [Write]}]}
`
	addr := r.broker.SASLAddrs()[0]
	cluster := fmt.Sprintf("{name: main, bootstrap: [%q], "+
		"credentials: {mechanism: PLAIN, username: %s, password-file: %q}%s}", addr, kafka.Admin, password,
		strings.ReplaceAll(upstream, "{wonder}", wonder))
	r.Node = stage.Start(t, addr, rules, stage.Config{"clusters": "[" + cluster + "]",
		"oidc": fmt.Sprintf("[{issuer: %q, audiences: [kafka], jwks: {file: %q}}]", "https://issuer.example.test", keySet)})
	r.AwaitReady()
	return r
}

func (r *renewals) token(t *testing.T, life time.Duration) string {
	t.Helper()
	token, err := r.tokens.Token(issuer.Claims{Issuer: "https://issuer.example.test", Subject: "alice",
		Audience: []string{"kafka"}, Life: life})
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// wrote are the connections over which a client with this id has written, and how often it logged in on each.
func (r *renewals) wrote(clientID string) map[string]int {
	logins := map[string]int{}
	for _, l := range r.Audit(func(l stage.Line) bool { return l.ClientID == clientID && l.Topic == "orders" }) {
		logins[l.Conn] = 0
	}
	for _, l := range r.Audit(func(l stage.Line) bool { return l.API == "SASLHandshake" }) {
		if _, wrote := logins[l.Conn]; wrote {
			logins[l.Conn]++
		}
	}
	return logins
}

// wantRenewed fails unless a client has written over one connection all the time, on which it logged in again.
func (r *renewals) wantRenewed(t *testing.T, clientID string) {
	t.Helper()
	logins := r.wrote(clientID)
	if len(logins) != 1 {
		t.Errorf("%s has written over the connections %v", clientID, logins)
	}
	for _, n := range logins {
		if n < 2 {
			t.Errorf("%s has logged in %d times", clientID, n)
		}
	}
}

func TestLoginsAreRenewedInTheConnectionWithARealKafka(t *testing.T) {
	r := startRenewals(t, "")
	for name, mechanism := range map[string]sasl.Mechanism{
		"PLAIN":         plain.Auth{User: "alice", Pass: "wonder"}.AsMechanism(),
		"SCRAM-SHA-256": scram.Auth{User: "alice", Pass: "wonder"}.AsSha256Mechanism(),
		"SCRAM-SHA-512": scram.Auth{User: "alice", Pass: "wonder"}.AsSha512Mechanism(),
		"OAUTHBEARER": oauth.Oauth(func(context.Context) (oauth.Auth, error) {
			return oauth.Auth{Token: r.token(t, 2*session)}, nil
		}),
	} {
		t.Run("franz-go, "+name, func(t *testing.T) {
			t.Parallel()
			n, id := r.In(t), "franz-go-"+name
			client := n.Workload(stage.OrdersUID).Client(t, r.broker.SASLAddrs()[0], kgo.SASL(mechanism), kgo.ClientID(id))
			tick := time.NewTicker(time.Second / rate)
			defer tick.Stop()
			for range int(rate * (2 * session).Seconds()) {
				<-tick.C
				if err := client.ProduceSync(t.Context(), &kgo.Record{Topic: "orders", Value: []byte(id)}).FirstErr(); err != nil {
					t.Fatal(err)
				}
			}
			r.wantRenewed(t, id)
		})
	}
	stage.WriteFile(t, filepath.Join(r.dir, "token"), r.token(t, time.Hour))
	const module = "sasl.jaas.config=org.apache.kafka.common.security."
	for name, properties := range map[string]string{
		"PLAIN":         module + `plain.PlainLoginModule required username="alice" password="wonder";`,
		"SCRAM-SHA-512": module + `scram.ScramLoginModule required username="alice" password="wonder";`,
		"OAUTHBEARER": module + "oauthbearer.OAuthBearerLoginModule required;\n" +
			"sasl.oauthbearer.jwt.retriever.class=org.apache.kafka.common.security.oauthbearer.FileJwtRetriever\n" +
			"sasl.oauthbearer.token.endpoint.url=file://" + filepath.Join(r.dir, "token") + "\n" +
			"sasl.login.callback.handler.class=" +
			"org.apache.kafka.common.security.oauthbearer.OAuthBearerLoginCallbackHandler",
	} {
		t.Run("Java, "+name, func(t *testing.T) {
			t.Parallel()
			id := "java-" + name
			file := filepath.Join(r.dir, id)
			stage.WriteFile(t, file, fmt.Sprintf("bootstrap.servers=%s\nclient.id=%s\nsecurity.protocol=SASL_PLAINTEXT\n"+
				"sasl.mechanism=%s\nenable.idempotence=false\n%s\n", r.broker.SASLAddrs()[0], id, name, properties))
			tool, err := kafka.Tool(t.Context(), kafka.ProducerPerformance, "--topic", "orders", "--record-size", "10",
				"--throughput", fmt.Sprint(rate), "--num-records", fmt.Sprint(int(rate*(2*session).Seconds())),
				"--producer.config", file)
			if err != nil {
				t.Fatal(err)
			}
			tool.Env = append(tool.Environ(), "JAVA_TOOL_OPTIONS=-Dorg.apache.kafka.sasl.oauthbearer.allowed.urls=file://"+
				filepath.Join(r.dir, "token")+" -Dorg.apache.kafka.sasl.oauthbearer.allowed.files="+filepath.Join(r.dir, "token"))
			var said bytes.Buffer
			tool.Stdout, tool.Stderr = &said, &said
			if err := (kafka.Place{Cgroup: r.Cgroup}).Start(tool); err != nil {
				t.Fatal(err)
			}
			if err := tool.Wait(); err != nil || strings.Contains(said.String(), "Exception") {
				t.Fatalf("%v\n%s", err, said.String())
			}
			r.wantRenewed(t, id)
		})
	}
}

// The node's own login is renewed before the next request, also when the session has ended meanwhile.
func TestTheNodesLoginIsRenewedWithARealKafka(t *testing.T) {
	for name, login := range map[string]string{
		"PLAIN":         "PLAIN, username: alice, password-file: {wonder}",
		"SCRAM-SHA-256": "SCRAM-SHA-256, username: alice, password-file: {wonder}",
	} {
		t.Run(name, func(t *testing.T) {
			r := startRenewals(t, ", upstream: {login: {mechanism: "+login+"}, cleartext: true}")
			client := r.Workload(stage.OrdersUID).Client(t, r.broker.SASLAddrs()[0], kgo.ClientID("unaware"))
			write := func() {
				t.Helper()
				if err := client.ProduceSync(t.Context(), &kgo.Record{Topic: "orders", Value: []byte("x")}).FirstErr(); err != nil {
					t.Fatal(err)
				}
			}
			tick := time.NewTicker(time.Second / rate)
			defer tick.Stop()
			for range int(rate * (2 * session).Seconds()) {
				<-tick.C
				write()
			}
			<-time.After(session + time.Second) // idle past the end of the session
			write()
			if logins := r.wrote("unaware"); len(logins) != 1 {
				t.Errorf("it has written over the connections %v", logins)
			}
			for conn, n := range r.wrote("unaware") {
				if n != 0 {
					t.Errorf("on connection %s the client is said to have logged in %d times", conn, n)
				}
			}
		})
	}
}
