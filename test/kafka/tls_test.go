package kafka

import (
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
	"github.com/twmb/franz-go/pkg/sasl/oauth"
	"github.com/twmb/franz-go/pkg/sasl/plain"
	"github.com/twmb/franz-go/pkg/sasl/scram"

	"klamm/test/ca"
	"klamm/test/issuer"
)

func authority(t *testing.T, name string) *ca.Authority {
	t.Helper()
	a, err := ca.New(name)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestEveryListenerKnowsItsClients(t *testing.T) {
	for _, version := range []string{Newest, Previous} {
		t.Run(version, func(t *testing.T) { everyListenerKnowsItsClients(t, version) })
	}
}

func everyListenerKnowsItsClients(t *testing.T, version string) {
	ctx := limit(t)
	brokers, workloads := authority(t, "brokers"), authority(t, "workloads")
	tokens, err := issuer.New()
	if err != nil {
		t.Fatal(err)
	}
	keys, err := tokens.KeySet()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "keys.json")
	if err := os.WriteFile(file, keys, 0o600); err != nil {
		t.Fatal(err)
	}
	token := func(audience string) kgo.Opt {
		signed, err := tokens.Token(issuer.Claims{Issuer: "https://issuer.test", Subject: "spiffe://example.test/carol",
			Audience: []string{audience}})
		if err != nil {
			t.Fatal(err)
		}
		return kgo.SASL(oauth.Auth{Token: signed}.AsMechanism())
	}
	began := time.Now()
	cluster := Start(t, Options{Version: version, Authorizer: true, Users: map[string]string{"alice": "wonder"},
		TLS: &TLS{CA: brokers, ClientAuth: "required", Clients: []*x509.Certificate{workloads.Certificate},
			Mapping: "RULE:^CN=([^,]+),O=SPIRE,C=US$/$1/"},
		OAuth:     &OAuth{KeySet: "file://" + file, Issuer: "https://issuer.test", Audience: "kafka"},
		MaxReauth: time.Hour, Decisions: true})
	t.Logf("Kafka %s with TLS and OAuth: ready after %v", version, time.Since(began).Round(time.Millisecond))
	if err := cluster.CreateTopic(ctx, "orders", 1); err != nil {
		t.Fatal(err)
	}
	for _, principal := range []string{"alice", "bob", "spiffe://example.test/carol"} {
		if err := cluster.Allow(ctx, "User:"+principal, kmsg.ACLResourceTypeTopic, "orders",
			kmsg.ACLOperationWrite); err != nil {
			t.Fatal(err)
		}
	}
	bob, err := workloads.Issue(ca.Leaf{ID: "spiffe://example.test/bob",
		Subject: pkix.Name{CommonName: "bob", Organization: []string{"SPIRE"}, Country: []string{"US"}}})
	if err != nil {
		t.Fatal(err)
	}
	unnamed, err := workloads.Issue(ca.Leaf{ID: "spiffe://example.test/unnamed",
		Subject: pkix.Name{Organization: []string{"SPIRE"}, Country: []string{"US"}}})
	if err != nil {
		t.Fatal(err)
	}
	with := func(client ...*tls.Certificate) kgo.Opt {
		conf := &tls.Config{RootCAs: brokers.Pool(), MinVersion: tls.VersionTLS12}
		for _, c := range client {
			conf.Certificates = append(conf.Certificates, *c)
		}
		return kgo.DialTLSConfig(conf)
	}
	overTLS, loginTLS := kgo.SeedBrokers(cluster.TLSAddrs()...), kgo.SeedBrokers(cluster.SASLTLSAddrs()...)
	login := kgo.SeedBrokers(cluster.SASLAddrs()...)
	for name, c := range map[string]struct {
		opts []kgo.Opt
		want string // principal; empty: refused
	}{
		"a certificate with a name": {[]kgo.Opt{overTLS, with(bob)}, "User:bob"},
		"one without":               {[]kgo.Opt{overTLS, with(unnamed)}, ""},
		"no certificate":            {[]kgo.Opt{overTLS, with()}, ""},
		"PLAIN over TLS": {[]kgo.Opt{loginTLS, with(),
			kgo.SASL(plain.Auth{User: "alice", Pass: "wonder"}.AsMechanism())}, "User:alice"},
		"SCRAM over TLS": {[]kgo.Opt{loginTLS, with(),
			kgo.SASL(scram.Auth{User: "alice", Pass: "wonder"}.AsSha512Mechanism())}, "User:alice"},
		"a token over TLS":          {[]kgo.Opt{loginTLS, with(), token("kafka")}, "User:spiffe://example.test/carol"},
		"a token":                   {[]kgo.Opt{login, token("kafka")}, "User:spiffe://example.test/carol"},
		"a token for somebody else": {[]kgo.Opt{login, token("other")}, ""},
		"a wrong password over TLS": {[]kgo.Opt{loginTLS, with(),
			kgo.SASL(scram.Auth{User: "alice", Pass: "x"}.AsSha256Mechanism())}, ""},
		"plaintext where TLS is spoken": {[]kgo.Opt{overTLS}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			before, err := cluster.Decisions()
			if err != nil {
				t.Fatal(err)
			}
			conn := client(t, append(c.opts, kgo.DefaultProduceTopic("orders"), kgo.DisableIdempotentWrite(),
				kgo.RequestRetries(0), kgo.RecordRetries(0), kgo.UnknownTopicRetries(0))...)
			err = conn.ProduceSync(ctx, kgo.StringRecord("x")).FirstErr()
			if (err == nil) != (c.want != "") {
				t.Fatalf("the write: %v", err)
			}
			if c.want == "" {
				return
			}
			after, err := cluster.Decisions()
			if err != nil {
				t.Fatal(err)
			}
			want := Decision{c.want, true, "WRITE", "Topic:LITERAL:orders"}
			if fresh := after[len(before):]; !slices.Contains(fresh, want) {
				t.Errorf("the authorizer says %+v, not %+v", fresh, want)
			}
		})
	}
}
