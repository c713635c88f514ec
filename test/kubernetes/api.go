package kubernetes

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"time"
)

// API is the API server, asked as its administrator.
type API struct {
	client *http.Client
	url    string
}

func newAPI(dir, url string) (*API, error) {
	own, err := tls.LoadX509KeyPair(filepath.Join(dir, "admin.crt"), filepath.Join(dir, "admin.key"))
	if err != nil {
		return nil, err
	}
	ca, err := os.ReadFile(filepath.Join(dir, "ca.crt"))
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	trust := &tls.Config{Certificates: []tls.Certificate{own}, RootCAs: roots}
	return &API{client: &http.Client{Transport: &http.Transport{TLSClientConfig: trust}}, url: url}, nil
}

// statusError is an answer of the API server other than success.
type statusError struct {
	code int
	body string
}

func (e statusError) Error() string { return fmt.Sprintf("the API server says %d: %s", e.code, e.body) }

// Is tells whether the API server answered with an HTTP status.
func Is(err error, code int) bool {
	var status statusError
	return errors.As(err, &status) && status.code == code
}

// Call sends YAML, or nothing, and returns the answer.
func (a *API) Call(ctx context.Context, method, path, yaml string) ([]byte, error) {
	request, err := http.NewRequestWithContext(ctx, method, a.url+path, bytes.NewBufferString(yaml))
	if err != nil {
		return nil, err
	}
	request.Header.Set("Content-Type", "application/yaml")
	answer, err := a.client.Do(request)
	if err != nil {
		return nil, err
	}
	defer func() { _ = answer.Body.Close() }()
	body, err := io.ReadAll(answer.Body)
	if err != nil {
		return nil, err
	}
	if answer.StatusCode >= http.StatusMultipleChoices {
		return nil, fmt.Errorf("%s %s: %w", method, path, statusError{answer.StatusCode, string(body)})
	}
	return body, nil
}

// Get reads what is at a path.
func (a *API) Get(ctx context.Context, path string, out any) error {
	body, err := a.Call(ctx, http.MethodGet, path, "")
	if err != nil {
		return err
	}
	return json.Unmarshal(body, out)
}

// poll is how often the state of something is asked for.
const poll = 50 * time.Millisecond

// Limit is how long any one thing may take: ten pods at a time, on two cores.
const Limit = 60 * time.Second

// Await calls done until it says so or fails, for at most Limit.
func Await(ctx context.Context, what string, done func() (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, Limit)
	defer cancel()
	tick := time.NewTicker(poll)
	defer tick.Stop()
	for {
		ok, err := done()
		if err != nil && ctx.Err() == nil {
			return fmt.Errorf("wait for %s: %w", what, err)
		}
		if ok {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for %s: %w", what, errors.Join(ctx.Err(), err))
		case <-tick.C:
		}
	}
}
