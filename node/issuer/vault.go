package issuer

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"
)

const (
	vaultTimeout = 10 * time.Second // for one request
	vaultAnswer  = 1 << 20          // bytes that are read of an answer
	tokenPart    = 2. / 3           // of its lease a token is used
)

// VaultOptions say which role of which PKI secrets engine signs, and how the node logs in. Exactly one way of logging
// in is given.
type VaultOptions struct {
	Address   string // https://host:port
	Namespace string // of Vault Enterprise, OpenBao; empty: none
	Mount     string // path of the engine, such as pki
	Role      string
	Life      time.Duration // of a certificate; 0: as the role has it
	Client    *http.Client

	TokenFile string // read anew for each request, as Vault Agent renews it
	Login     *VaultLogin
}

// VaultLogin is a login by which Vault gives a token.
type VaultLogin struct {
	Mount string // of the auth method, such as approle or kubernetes
	// Fields of the request, read from files at each login: name to file; and those that are no secret: name to value.
	Files, Values map[string]string
}

// Vault signs certificates by HashiCorp Vault's API, which OpenBao has too. The key is made here and never leaves
// memory: what is sent is a request to sign (POST /v1/MOUNT/sign/ROLE).
type Vault struct {
	o VaultOptions

	mu    sync.Mutex
	token string
	until time.Time // it is used
}

// NewVault does not talk to Vault yet.
func NewVault(o VaultOptions) *Vault { return &Vault{o: o} }

// Leaf makes a key and has its certificate signed.
func (v *Vault) Leaf(ctx context.Context, names []string) (*tls.Certificate, error) {
	c, err := v.leaf(ctx, names)
	if err != nil {
		return nil, failed(fmt.Sprintf("Vault at %s, role %s of %s", v.o.Address, v.o.Role, v.o.Mount), names, err)
	}
	return c, nil
}

func (v *Vault) leaf(ctx context.Context, names []string) (*tls.Certificate, error) {
	key, err := newKey()
	if err != nil {
		return nil, err
	}
	request := &x509.CertificateRequest{Subject: pkix.Name{CommonName: commonName(names)}}
	request.DNSNames, request.IPAddresses = split(names)
	der, err := x509.CreateCertificateRequest(rand.Reader, request, key)
	if err != nil {
		return nil, err
	}
	signed, err := v.sign(ctx, v.body(request, der))
	if err != nil {
		return nil, err
	}
	c := &tls.Certificate{PrivateKey: key, Certificate: certificates([]byte(signed.Certificate))}
	for _, above := range append(signed.Chain, signed.Issuer) {
		c.Certificate = append(c.Certificate, certificates([]byte(above))...)
	}
	if c.Certificate, err = ordered(c.Certificate); err != nil {
		return nil, err
	}
	return c, check(c, names, time.Now())
}

// ordered leaves what leads up from the first certificate, each once, without the root.
func ordered(ders [][]byte) ([][]byte, error) {
	all, err := parse(ders)
	if err != nil {
		return nil, err
	}
	chain := [][]byte{all[0].Raw}
	last := all[0]
	for _, above := range all[1:] {
		if !isRoot(above) && last.CheckSignatureFrom(above) == nil {
			chain, last = append(chain, above.Raw), above
		}
	}
	return chain, nil
}

// body is for roles that take the names of the request to sign, which is the default, and for those that do not.
func (v *Vault) body(request *x509.CertificateRequest, der []byte) map[string]string {
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
	var ips []string
	for _, ip := range request.IPAddresses {
		ips = append(ips, ip.String())
	}
	body := map[string]string{"csr": string(text), "common_name": request.Subject.CommonName, "format": "pem",
		"alt_names": strings.Join(request.DNSNames, ","), "ip_sans": strings.Join(ips, ",")}
	if v.o.Life > 0 {
		body["ttl"] = v.o.Life.String()
	}
	return body
}

type signature struct {
	Certificate string   `json:"certificate"`
	Issuer      string   `json:"issuing_ca"`
	Chain       []string `json:"ca_chain"`
}

func (v *Vault) sign(ctx context.Context, body map[string]string) (signature, error) {
	var answer struct {
		Data signature `json:"data"`
	}
	path := v.o.Mount + "/sign/" + v.o.Role
	for try := 0; ; try++ {
		token, err := v.login(ctx)
		if err != nil {
			return signature{}, err
		}
		err = v.post(ctx, path, token, body, &answer)
		var status *vaultError
		if errors.As(err, &status) && status.code == http.StatusForbidden && v.o.Login != nil && try == 0 {
			v.forget(token) // it was revoked, or Vault lost it
			continue
		}
		return answer.Data, err
	}
}

// login is a token to ask with.
func (v *Vault) login(ctx context.Context) (string, error) {
	if v.o.Login == nil {
		return readSecret(v.o.TokenFile)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.token != "" && time.Now().Before(v.until) {
		return v.token, nil
	}
	body := map[string]string{}
	for name, value := range v.o.Login.Values {
		body[name] = value
	}
	for name, file := range v.o.Login.Files {
		secret, err := readSecret(file)
		if err != nil {
			return "", err
		}
		body[name] = secret
	}
	var answer struct {
		Auth struct {
			Token string `json:"client_token"`
			Lease int64  `json:"lease_duration"` // seconds; 0: it does not end
		} `json:"auth"`
	}
	if err := v.post(ctx, "auth/"+v.o.Login.Mount+"/login", "", body, &answer); err != nil {
		return "", fmt.Errorf("log in by auth method %s: %w", v.o.Login.Mount, err)
	}
	if answer.Auth.Token == "" {
		return "", fmt.Errorf("log in by auth method %s: the answer has no token", v.o.Login.Mount)
	}
	lease := time.Duration(answer.Auth.Lease) * time.Second
	if lease == 0 {
		lease = 24 * time.Hour
	}
	v.token, v.until = answer.Auth.Token, time.Now().Add(time.Duration(float64(lease)*tokenPart))
	return v.token, nil
}

func (v *Vault) forget(token string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.token == token {
		v.token = ""
	}
}

func readSecret(file string) (string, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	s := strings.TrimSpace(string(b))
	if s == "" {
		return "", fmt.Errorf("%s is empty", file)
	}
	return s, nil
}

// vaultError is an answer that is none.
type vaultError struct {
	code int
	text string
}

func (e *vaultError) Error() string { return fmt.Sprintf("it answers %d %s", e.code, e.text) }

// post asks one thing of the API.
func (v *Vault) post(ctx context.Context, path, token string, body, answer any) error {
	ctx, cancel := context.WithTimeout(ctx, vaultTimeout)
	defer cancel()
	text, err := json.Marshal(body)
	if err != nil {
		return err
	}
	to := strings.TrimSuffix(v.o.Address, "/") + "/v1/" + path
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, to, bytes.NewReader(text))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("X-Vault-Request", "true")
	for name, value := range map[string]string{"X-Vault-Token": token, "X-Vault-Namespace": v.o.Namespace} {
		if value != "" {
			req.Header.Set(name, value)
		}
	}
	resp, err := v.o.Client.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }() // it is read as far as it is used
	if text, err = io.ReadAll(io.LimitReader(resp.Body, vaultAnswer)); err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return &vaultError{resp.StatusCode, reasons(text)}
	}
	if err := json.Unmarshal(text, answer); err != nil {
		return fmt.Errorf("its answer is no JSON of Vault's: %w", err)
	}
	return nil
}

// reasons are what an error answer says.
func reasons(text []byte) string {
	var answer struct {
		Errors []string `json:"errors"`
	}
	if json.Unmarshal(text, &answer) != nil || len(answer.Errors) == 0 {
		return "without a reason"
	}
	return strings.Join(answer.Errors, "; ")
}

// VaultClient talks TLS to Vault, whose CA is in a PEM file; "": one that the host trusts. It follows no redirect: what
// it sends is secret.
func VaultClient(ca string) (*http.Client, error) {
	conf := &tls.Config{MinVersion: tls.VersionTLS12}
	if ca != "" {
		text, err := os.ReadFile(ca)
		if err != nil {
			return nil, err
		}
		conf.RootCAs = x509.NewCertPool()
		if !conf.RootCAs.AppendCertsFromPEM(text) {
			return nil, fmt.Errorf("no PEM certificate in %s", ca)
		}
	}
	return &http.Client{
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport: &http.Transport{TLSClientConfig: conf, Proxy: http.ProxyFromEnvironment, MaxIdleConns: 2,
			IdleConnTimeout: time.Minute, ForceAttemptHTTP2: true,
			DialContext: (&net.Dialer{Timeout: vaultTimeout}).DialContext},
	}, nil
}
