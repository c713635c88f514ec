package node_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"klamm/node"
	"klamm/test/stage"
)

// issuerOf serves the keys of an issuer in plain text on loopback, when up says so.
func issuerOf(t *testing.T, key *ecdsa.PrivateKey, up func() bool) *httptest.Server {
	t.Helper()
	var s *httptest.Server
	s = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case !up():
			w.WriteHeader(http.StatusServiceUnavailable)
		case r.URL.Path == "/keys":
			_ = json.NewEncoder(w).Encode(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "k1"}}})
		default:
			_, _ = fmt.Fprintf(w, `{"issuer":%q,"jwks_uri":"%s/keys"}`, s.URL, s.URL)
		}
	}))
	t.Cleanup(s.Close)
	return s
}

func signed(t *testing.T, key *ecdsa.PrivateKey, issuer string) string {
	t.Helper()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: "k1"}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now().Unix()
	jws, err := signer.Sign(fmt.Appendf(nil, `{"iss":%q,"sub":"orders","aud":"kafka","iat":%d,"exp":%d}`,
		issuer, now, now+300))
	if err != nil {
		t.Fatal(err)
	}
	token, err := jws.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return token
}

func TestANodeStartsWithoutItsIssuerAndIsReadyWithIt(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	marker := filepath.Join(t.TempDir(), "up")
	issuer := issuerOf(t, key, func() bool {
		_, err := os.Stat(marker)
		return err == nil
	})
	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte(signed(t, key, issuer.URL)), 0o644); err != nil {
		t.Fatal(err)
	}
	broker := stage.StartBroker(t)
	n := stage.Start(t, broker.Addr(), stage.OrdersOnly, stage.Config{
		"oidc":       fmt.Sprintf("[{issuer: %q, audiences: [kafka], refresh: 10s}]", issuer.URL),
		"token-file": fmt.Sprintf("[{path: %q, issuer: %q, audience: kafka}]", file, issuer.URL)})
	stage.Await(t, "the issuer to be asked", func() bool {
		code, text := n.Get("/readyz")
		return code == http.StatusServiceUnavailable && strings.Contains(text, "issuer "+issuer.URL) &&
			strings.Contains(text, "503 Service Unavailable")
	})
	w := n.Workload(stage.OrdersUID)
	// Its token cannot be verified now; who it is otherwise counts nevertheless.
	if seen := topics(t, w.Dial(t, broker.Addr())); len(seen) == 0 {
		t.Error("a workload with another identity sees no topics")
	}
	const accepted = `klamm_oidc_tokens_total{result="accepted"}`
	if failed := n.Metric(`klamm_oidc_tokens_total{result="keys unavailable"}`); failed == 0 || n.Metric(accepted) > 0 {
		t.Errorf("%d tokens could not be verified, %d were accepted", failed, n.Metric(accepted))
	}
	if err := os.WriteFile(marker, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	n.AwaitReady()
	conn := w.Dial(t, broker.Addr())
	defer func() { _ = conn.Close() }()
	stage.Await(t, "its token to be accepted", func() bool { return n.Metric(accepted) > 0 })
	if keys := n.Metric(`klamm_oidc_keys{issuer="` + issuer.URL + `"}`); keys != 1 {
		t.Errorf("%d keys", keys)
	}
	status, err := n.Status()
	if err != nil || len(status.Issuers) != 1 || !status.Issuers[0].Ready || status.Issuers[0].At.IsZero() {
		t.Errorf("%v, %+v", err, status.Issuers)
	}
}

func TestAnIssuerAndReviewsAreProbed(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		up   bool
		want string
	}{
		"up":   {true, "1 keys"},
		"down": {false, "503"},
	} {
		issuer := issuerOf(t, key, func() bool { return test.up })
		detail, err := node.ProbeIssuer(t.Context(), node.IssuerConfig{Issuer: issuer.URL, MaxStale: time.Hour})
		if (err == nil) != test.up || !strings.Contains(detail+fmt.Sprint(err), test.want) {
			t.Errorf("%s: %q, %v", name, detail, err)
		}
	}
	forbidden := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusForbidden)
	}))
	defer forbidden.Close()
	k := node.KubernetesConfig{Audience: "klamm", Review: &node.ReviewConfig{Server: forbidden.URL}}
	if detail, err := node.ProbeReview(t.Context(), k); err == nil || !strings.Contains(err.Error(), "403 Forbidden") {
		t.Errorf("%q, %v", detail, err)
	}
}
