package main

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

// api is the API server, asked as its administrator.
type api struct {
	client *http.Client
	url    string
}

func newAPI(dir, url string) (*api, error) {
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
	return &api{client: &http.Client{Transport: &http.Transport{TLSClientConfig: trust}}, url: url}, nil
}

// statusError is an answer of the API server other than success.
type statusError struct {
	code int
	body string
}

func (e statusError) Error() string { return fmt.Sprintf("the API server says %d: %s", e.code, e.body) }

func is(err error, code int) bool {
	var status statusError
	return errors.As(err, &status) && status.code == code
}

// call sends YAML, or nothing, and returns the answer.
func (a *api) call(ctx context.Context, method, path, yaml string) ([]byte, error) {
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

func (a *api) get(ctx context.Context, path string, out any) error {
	body, err := a.call(ctx, http.MethodGet, path, "")
	if err != nil {
		return err
	}
	return json.Unmarshal(body, out)
}

// poll is how often the state of something is asked for.
const poll = 50 * time.Millisecond

// limit is how long any one thing may take: ten pods at a time, on two cores.
const limit = 60 * time.Second

// await calls done until it says so or fails, for at most limit.
func await(ctx context.Context, what string, done func() (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
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
