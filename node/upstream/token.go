package upstream

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"time"

	"golang.org/x/oauth2"
	"golang.org/x/oauth2/clientcredentials"
)

const (
	// tokenTimeout bounds one request to a token endpoint.
	tokenTimeout = 5 * time.Second
	// tokenPause is how long a failure of it is believed.
	tokenPause = time.Second
	// tokenLife is that of a token whose endpoint does not tell.
	tokenLife = time.Minute
	// tokenMargin is the least life of a token that is still used.
	tokenMargin = 5 * time.Second
)

// tokens are the access tokens of client credentials, one for all connections. A token is replaced in the background
// once half of its life is over: an endpoint that is down is noticed by nobody before the token's end.
type tokens struct {
	credentials *Credentials
	dial        func(ctx context.Context, network, address string) (net.Conn, error)

	mu      sync.Mutex
	token   string
	renew   time.Time // from when on it is replaced
	expires time.Time
	flight  chan struct{} // closed when the request that runs is over; nil when none runs
	err     error         // of the last request
	retry   time.Time     // until when err is believed
}

func newTokens(c *Credentials, dial func(ctx context.Context, network, address string) (net.Conn, error)) *tokens {
	return &tokens{credentials: c, dial: dial}
}

// get is a token that is good for a while.
func (t *tokens) get(ctx context.Context) (string, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	usable := now.Before(t.expires.Add(-tokenMargin))
	if now.After(t.renew) && t.flight == nil && !now.Before(t.retry) {
		t.flight = make(chan struct{})
		go t.fetch(t.flight)
	}
	if usable {
		return t.token, nil
	}
	if flight := t.flight; flight != nil {
		t.mu.Unlock()
		select {
		case <-flight:
		case <-ctx.Done():
		}
		t.mu.Lock()
	}
	if ctx.Err() != nil {
		return "", fmt.Errorf("wait for a token of %s: %w", t.credentials.TokenURL, context.Cause(ctx))
	}
	if t.err != nil {
		return "", t.err
	}
	return t.token, nil
}

func (t *tokens) fetch(flight chan struct{}) {
	defer close(flight)
	token, err := t.request()
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	t.flight, t.err = nil, err
	if err != nil {
		t.retry = now.Add(tokenPause)
		return
	}
	if token.Expiry.IsZero() {
		token.Expiry = now.Add(tokenLife)
	}
	t.token, t.expires, t.renew = token.AccessToken, token.Expiry, now.Add(token.Expiry.Sub(now)/2)
}

// request asks the endpoint. Its answer may hold what nobody should read: of a refusal the error code is told alone.
func (t *tokens) request() (*oauth2.Token, error) {
	c := t.credentials
	ctx, cancel := context.WithTimeout(context.Background(), tokenTimeout)
	defer cancel()
	pass, err := secret("client-secret-file", c.ClientSecretFile)
	if err != nil {
		return nil, err
	}
	client, err := t.client()
	if err != nil {
		return nil, err
	}
	defer client.CloseIdleConnections()
	request := clientcredentials.Config{ClientID: c.ClientID, ClientSecret: pass, TokenURL: c.TokenURL, Scopes: c.Scopes}
	token, err := request.Token(context.WithValue(ctx, oauth2.HTTPClient, client))
	var refusal *oauth2.RetrieveError
	switch {
	case errors.As(err, &refusal):
		return nil, fmt.Errorf("%s refuses a token: %s %.100q", c.TokenURL, refusal.Response.Status, refusal.ErrorCode)
	case err != nil:
		return nil, fmt.Errorf("no token from %s: %w", c.TokenURL, err)
	}
	return token, nil
}

func (t *tokens) client() (*http.Client, error) {
	conf := &tls.Config{MinVersion: tls.VersionTLS12}
	roots, err := readCA(t.credentials.CA)
	if err != nil {
		return nil, err
	}
	trust(conf, roots)
	return &http.Client{
		Transport: &http.Transport{DialContext: t.dial, TLSClientConfig: conf, Proxy: http.ProxyFromEnvironment},
		// The client's secret goes to nobody else.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}, nil
}
