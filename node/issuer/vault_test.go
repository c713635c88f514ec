package issuer

import (
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"maps"
	"math/big"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// vault answers as the API of Vault's PKI secrets engine and of two of its auth methods is documented. It is no Vault.
type vault struct {
	*httptest.Server
	t    *testing.T
	root *signer
	ca   *signer

	mu     sync.Mutex
	tokens map[string]bool
	logins int
	asked  []map[string]string // requests to sign
	hook   func(w http.ResponseWriter) bool
}

func startVault(t *testing.T) *vault {
	t.Helper()
	v := &vault{t: t, root: root(t), tokens: map[string]bool{"of a file": true}}
	v.ca = v.root.make(t, authorityOf)
	v.Server = httptest.NewTLSServer(v)
	t.Cleanup(v.Close)
	return v
}

func (v *vault) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	v.mu.Lock()
	defer v.mu.Unlock()
	var body map[string]string
	if err := json.NewDecoder(r.Body).Decode(&body); err != nil {
		v.t.Error(err)
	}
	if v.hook != nil && v.hook(w) {
		return
	}
	switch r.Method + " " + r.URL.Path {
	case "POST /v1/auth/approle/login":
		v.login(w, body, map[string]string{"role_id": "node", "secret_id": "a secret id"})
	case "POST /v1/auth/kubernetes/login":
		v.login(w, body, map[string]string{"role": "node", "jwt": "a token"})
	case "POST /v1/team/pki/sign/kafka":
		if !v.tokens[r.Header.Get("X-Vault-Token")] || r.Header.Get("X-Vault-Namespace") != "streams" {
			answer(w, http.StatusForbidden, map[string]any{"errors": []string{"permission denied"}})
			return
		}
		v.asked = append(v.asked, body)
		v.sign(w, body)
	default:
		answer(w, http.StatusNotFound, map[string]any{"errors": []string{"no handler for route"}})
	}
}

func (v *vault) login(w http.ResponseWriter, got, want map[string]string) {
	if !maps.Equal(got, want) {
		answer(w, http.StatusBadRequest, map[string]any{"errors": []string{"invalid role or secret ID"}})
		return
	}
	v.logins++
	token := fmt.Sprint("of login ", v.logins)
	v.tokens[token] = true
	answer(w, http.StatusOK, map[string]any{"auth": map[string]any{"client_token": token, "lease_duration": 3600}})
}

func (v *vault) sign(w http.ResponseWriter, body map[string]string) {
	block, _ := pem.Decode([]byte(body["csr"]))
	request, err := x509.ParseCertificateRequest(block.Bytes)
	if err == nil {
		err = request.CheckSignature()
	}
	if err != nil {
		v.t.Error(err)
	}
	for _, name := range request.DNSNames {
		if !strings.HasSuffix(name, ".kafka.example") {
			answer(w, http.StatusBadRequest, map[string]any{"errors": []string{"subject alternate name " + name +
				" not allowed by this role"}})
			return
		}
	}
	life, err := time.ParseDuration(body["ttl"])
	if err != nil {
		v.t.Error(err)
	}
	now := time.Now()
	leaf := &x509.Certificate{SerialNumber: big.NewInt(now.UnixNano()), Subject: request.Subject,
		DNSNames:    request.DNSNames,
		IPAddresses: request.IPAddresses, NotBefore: now.Add(-30 * time.Second), NotAfter: now.Add(life),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	der, err := x509.CreateCertificate(rand.Reader, leaf, v.ca.cert, request.PublicKey, v.ca.key)
	if err != nil {
		v.t.Error(err)
	}
	answer(w, http.StatusOK, map[string]any{"data": map[string]any{
		"certificate": string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})),
		"issuing_ca":  string(text(v.ca)), "ca_chain": []string{string(text(v.ca)), string(text(v.root))}}})
}

func answer(w http.ResponseWriter, code int, body map[string]any) {
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(body) // who asked may have gone
}

// options are for this Vault, with the token of a file.
func (v *vault) options() VaultOptions {
	v.t.Helper()
	dir := v.t.TempDir()
	ca := write(v.t, filepath.Join(dir, "ca.pem"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE",
		Bytes: v.Certificate().Raw}))
	client, err := VaultClient(ca)
	if err != nil {
		v.t.Fatal(err)
	}
	return VaultOptions{Address: v.URL, Namespace: "streams", Mount: "team/pki", Role: "kafka", Life: time.Hour,
		Client: client, TokenFile: write(v.t, filepath.Join(dir, "token"), []byte("of a file\n"))}
}

func (v *vault) secret(name, value string) string {
	return write(v.t, filepath.Join(v.t.TempDir(), name), []byte(value))
}

func TestVaultSignsForAKeyThatStaysHere(t *testing.T) {
	v := startVault(t)
	names := []string{"broker-1.kafka.example", "192.0.2.1"}
	c, err := NewVault(v.options()).Leaf(t.Context(), names)
	if err != nil {
		t.Fatal(err)
	}
	wantTrusted(t, c, v.root, names...)
	if len(c.Certificate) != 2 {
		t.Errorf("the chain has %d certificates: the leaf and the intermediate are wanted, once each", len(c.Certificate))
	}
	asked := v.asked[0]
	if asked["alt_names"] != names[0] || asked["ip_sans"] != names[1] || asked["common_name"] != names[0] ||
		asked["ttl"] != "1h0m0s" || strings.Contains(asked["csr"], "PRIVATE") {
		t.Errorf("Vault was asked %v", asked)
	}
}

func TestANameThatIsTooLongForACommonNameIsLeftToTheOthers(t *testing.T) {
	v := startVault(t)
	long := strings.Repeat("a", 60) + ".kafka.example"
	c, err := NewVault(v.options()).Leaf(t.Context(), []string{long})
	if err != nil {
		t.Fatal(err)
	}
	wantTrusted(t, c, v.root, long)
	if v.asked[0]["common_name"] != "" {
		t.Errorf("the common name is %q", v.asked[0]["common_name"])
	}
}

func TestTheNodeLogsInToVault(t *testing.T) {
	for method, login := range map[string]func(v *vault) *VaultLogin{
		"AppRole": func(v *vault) *VaultLogin {
			return &VaultLogin{Mount: "approle", Values: map[string]string{"role_id": "node"},
				Files: map[string]string{"secret_id": v.secret("secret-id", "a secret id\n")}}
		},
		"Kubernetes": func(v *vault) *VaultLogin {
			return &VaultLogin{Mount: "kubernetes", Values: map[string]string{"role": "node"},
				Files: map[string]string{"jwt": v.secret("token", "a token")}}
		},
	} {
		t.Run(method, func(t *testing.T) {
			v := startVault(t)
			o := v.options()
			o.TokenFile, o.Login = "", login(v)
			client := NewVault(o)
			for range 2 {
				if _, err := client.Leaf(t.Context(), []string{"broker-1.kafka.example"}); err != nil {
					t.Fatal(err)
				}
			}
			if v.logins != 1 {
				t.Errorf("it logged in %d times", v.logins)
			}
			clear(v.tokens) // all are revoked
			if _, err := client.Leaf(t.Context(), []string{"broker-1.kafka.example"}); err != nil || v.logins != 2 {
				t.Errorf("after %d logins: %v", v.logins, err)
			}
		})
	}
}

func TestWhatVaultRefusesIsSaidWithoutSecrets(t *testing.T) {
	always := func(code int, text string) func(http.ResponseWriter) bool {
		return func(w http.ResponseWriter) bool {
			w.WriteHeader(code)
			_, _ = w.Write([]byte(text))
			return true
		}
	}
	for what, c := range map[string]struct {
		change func(*vault, *VaultOptions)
		want   string
	}{
		"a name of another role": {func(*vault, *VaultOptions) {}, "not allowed by this role"},
		"a token that is wrong": {func(v *vault, o *VaultOptions) { o.TokenFile = v.secret("t", "hvs.other") },
			"403 permission denied"},
		"a token that is empty": {func(v *vault, o *VaultOptions) { o.TokenFile = v.secret("t", "\n") }, "is empty"},
		"a wrong secret": {func(v *vault, o *VaultOptions) {
			o.TokenFile, o.Login = "", &VaultLogin{Mount: "approle", Values: map[string]string{"role_id": "node"},
				Files: map[string]string{"secret_id": v.secret("s", "hvs.other")}}
		}, "auth method approle: it answers 400 invalid role or secret ID"},
		"another engine": {func(_ *vault, o *VaultOptions) { o.Mount = "other" }, "404 no handler for route"},
		"a sealed Vault": {func(v *vault, _ *VaultOptions) { v.hook = always(503, `{"errors":["Vault is sealed"]}`) },
			"503 Vault is sealed"},
		"something else":     {func(v *vault, _ *VaultOptions) { v.hook = always(200, "<html>") }, "no JSON of Vault's"},
		"no certificate":     {func(v *vault, _ *VaultOptions) { v.hook = always(200, "{}") }, "there is no certificate"},
		"a redirect":         {func(v *vault, _ *VaultOptions) { v.hook = always(307, "") }, "it answers 307"},
		"nobody who answers": {func(v *vault, _ *VaultOptions) { v.Close() }, "connection refused"},
		"a CA that is not its own": {func(_ *vault, o *VaultOptions) { o.Client = http.DefaultClient },
			"certificate signed by unknown authority"},
	} {
		t.Run(what, func(t *testing.T) {
			v := startVault(t)
			v.Config.ErrorLog = nil
			o := v.options()
			c.change(v, &o)
			_, err := NewVault(o).Leaf(t.Context(), []string{"broker-1.other.example"})
			if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), v.URL) {
				t.Fatalf("it says %v", err)
			}
			if slices.ContainsFunc([]string{"hvs", "of a file", "a secret"}, func(s string) bool {
				return strings.Contains(err.Error(), s)
			}) {
				t.Errorf("it tells a secret: %v", err)
			}
		})
	}
}
