package spiffe

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"time"
)

const (
	// remoteTimeout bounds one request to an issuer or an API server, its answer included.
	remoteTimeout = 5 * time.Second
	// maxBody is the largest answer that is read, in bytes. Key sets have some KiB.
	maxBody = 1 << 20
)

// Remote is how a server is asked: an issuer, or Kubernetes' API server. Its files are read anew for each request.
type Remote struct {
	CA        string // PEM file; empty: the CAs the host trusts
	Cert, Key string // PEM files of the client's certificate, or both empty
	Bearer    string // file with the client's token, or empty
}

// ask sends a request and returns the body of its answer, which must be a success. Errors name the server, never what
// it said or what it was sent: both may hold secrets, or be anybody's text.
func (r Remote) ask(ctx context.Context, method, url string, body []byte) ([]byte, error) {
	client, err := r.client()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, remoteTimeout)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, method, url, bytes.NewReader(body))
	if err != nil {
		return nil, fmt.Errorf("ask %s: %w", url, err)
	}
	// Kubernetes gives its keys only to those who ask for a key set.
	request.Header.Set("Accept", "application/json, application/jwk-set+json")
	if body != nil {
		request.Header.Set("Content-Type", "application/json")
	}
	if r.Bearer != "" {
		text, err := os.ReadFile(r.Bearer)
		if err != nil {
			return nil, fmt.Errorf("read the token for %s: %w", url, err)
		}
		token := strings.Fields(string(text))
		if len(token) != 1 {
			return nil, fmt.Errorf("%s has no token alone, for %s", r.Bearer, url)
		}
		request.Header.Set("Authorization", "Bearer "+token[0])
	}
	answer, err := client.Do(request)
	if err != nil {
		return nil, err // names method and address
	}
	defer func() { _ = answer.Body.Close() }()
	if answer.StatusCode != http.StatusOK && answer.StatusCode != http.StatusCreated {
		return nil, &statusError{method, url, answer.StatusCode}
	}
	text, err := io.ReadAll(io.LimitReader(answer.Body, maxBody+1))
	if err != nil {
		return nil, fmt.Errorf("read the answer of %s: %w", url, err)
	}
	if len(text) > maxBody {
		return nil, fmt.Errorf("the answer of %s has more than %d bytes", url, maxBody)
	}
	return text, nil
}

// client follows no redirect: it would lead to a server nobody has named.
func (r Remote) client() (*http.Client, error) {
	conf := &tls.Config{MinVersion: tls.VersionTLS12}
	if r.CA != "" {
		pem, err := os.ReadFile(r.CA)
		if err != nil {
			return nil, fmt.Errorf("read the CA: %w", err)
		}
		conf.RootCAs = x509.NewCertPool()
		if !conf.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("no PEM certificate in %s", r.CA)
		}
	}
	if r.Cert != "" {
		pair, err := tls.LoadX509KeyPair(r.Cert, r.Key)
		if err != nil {
			return nil, fmt.Errorf("load the client's certificate: %w", err)
		}
		conf.Certificates = []tls.Certificate{pair}
	}
	return &http.Client{
		Transport: &http.Transport{TLSClientConfig: conf, Proxy: http.ProxyFromEnvironment, DisableKeepAlives: true,
			ForceAttemptHTTP2: true, MaxResponseHeaderBytes: 64 << 10},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}, nil
}

// statusError is an answer other than success.
type statusError struct {
	method, url string
	code        int
}

func (e *statusError) Error() string {
	text := fmt.Sprintf("%s %s: answered %d %s", e.method, e.url, e.code, http.StatusText(e.code))
	if e.code/100 == 3 {
		text += ": redirects are not followed, give the address they lead to"
	}
	return text
}
