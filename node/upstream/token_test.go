package upstream

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// endpoint is a token endpoint that counts, and gives the n-th token under the name token-n.
type endpoint struct {
	*httptest.Server
	asked  atomic.Int32
	answer atomic.Pointer[http.HandlerFunc] // instead of a token
	life   atomic.Int64                     // seconds
	secret atomic.Pointer[string]
}

func newEndpoint(t testing.TB) *endpoint {
	t.Helper()
	e := new(endpoint)
	e.life.Store(3600)
	e.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n := e.asked.Add(1)
		_ = r.ParseForm() // what is not read hides that the client is gone
		if answer := e.answer.Load(); answer != nil {
			(*answer)(w, r)
			return
		}
		_, secret, _ := r.BasicAuth()
		e.secret.Store(&secret)
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(map[string]any{"access_token": fmt.Sprint("token-", n), "token_type": "Bearer",
			"expires_in": e.life.Load()})
	}))
	t.Cleanup(e.Close)
	return e
}

func (e *endpoint) credentials(t testing.TB) *Credentials {
	t.Helper()
	return &Credentials{Mechanism: bearer, TokenURL: e.URL, ClientID: "klamm",
		ClientSecretFile: write(t, "secret", []byte("cl1ent-secret\n"))}
}

func (e *endpoint) answerBy(f http.HandlerFunc) { e.answer.Store(&f) }

func TestOneTokenServesAllConnections(t *testing.T) {
	e := newEndpoint(t)
	tokens := newTokens(e.credentials(t), nil)
	var all sync.WaitGroup
	for range 20 {
		all.Go(func() {
			if token, err := tokens.get(t.Context()); err != nil || token != "token-1" {
				t.Errorf("%q, %v", token, err)
			}
		})
	}
	all.Wait()
	if n := e.asked.Load(); n != 1 {
		t.Errorf("the endpoint was asked %d times", n)
	}
}

func TestATokenIsReplacedAtHalfOfItsLifeAndGoodToItsEnd(t *testing.T) {
	e := newEndpoint(t)
	credentials := e.credentials(t)
	tokens := newTokens(credentials, nil)
	get := func() string {
		t.Helper()
		token, err := tokens.get(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return token
	}
	get()
	half := func() { tokens.mu.Lock(); tokens.renew, tokens.retry = time.Now(), time.Time{}; tokens.mu.Unlock() }
	rest := func() {
		tokens.mu.Lock()
		flight := tokens.flight
		tokens.mu.Unlock()
		if flight != nil {
			<-flight
		}
	}
	e.answerBy(func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "down", http.StatusInternalServerError) })
	half()
	for range 3 {
		if got := get(); got != "token-1" {
			t.Errorf("while the endpoint is down: %s", got)
		}
		rest()
	}
	if n := e.asked.Load() - 1; n != 2 { // once for each way to show the secret
		t.Errorf("an endpoint that is down was asked %d times", n)
	}
	e.answer.Store(nil)
	rewrite(t, credentials.ClientSecretFile, "n3w-secret")
	half()
	get()
	rest()
	if got := get(); got != "token-4" || *e.secret.Load() != "n3w-secret" {
		t.Errorf("%s by the secret %s", got, *e.secret.Load())
	}
}

func TestAnEndpointThatGivesNoTokenIsNamedAndNoSecretIs(t *testing.T) {
	other := newEndpoint(t)
	for what, c := range map[string]struct {
		answer http.HandlerFunc
		want   string
	}{
		"it fails": {func(w http.ResponseWriter, _ *http.Request) {
			http.Error(w, "cl1ent-secret", http.StatusInternalServerError)
		},
			"500 Internal Server Error"},
		"it refuses": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusUnauthorized)
			_, _ = w.Write([]byte(`{"error":"invalid_client","error_description":"cl1ent-secret is wrong"}`))
		}, `401 Unauthorized "invalid_client"`},
		"it hangs":            {func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, "deadline"},
		"it answers no JSON":  {says("\x01 cl1ent-secret"), "no token from"},
		"it answers no token": {says("{}"), "no token from"},
		"it answers for ever": {func(w http.ResponseWriter, r *http.Request) { flood(w, r) }, "no token from"},
		"it sends to others": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, other.URL, http.StatusTemporaryRedirect)
		}, "307"},
	} {
		t.Run(what, func(t *testing.T) {
			e := newEndpoint(t)
			e.answerBy(c.answer)
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			_, err := newTokens(e.credentials(t), nil).get(ctx)
			if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), e.URL) ||
				strings.Contains(err.Error(), "cl1ent-secret") {
				t.Errorf("the error is %v", err)
			}
			e.CloseClientConnections()
		})
	}
	if other.asked.Load() > 0 {
		t.Error("the secret went where a redirect points")
	}
	down := newEndpoint(t)
	credentials := down.credentials(t)
	down.Close()
	tokens := newTokens(credentials, nil)
	if _, err := tokens.get(t.Context()); err == nil || !strings.Contains(err.Error(), "refused") {
		t.Errorf("an endpoint that is down: %v", err)
	}
	s := serve(t, nil, kafka(0, nil))
	if _, err := open(t, Options{Login: credentials}, s, nil); !errors.Is(err, ErrLogin) {
		t.Errorf("a login without a token: %v", err)
	}
	if e := s.end(t); e.got != "" {
		t.Errorf("the broker got %q", e.got)
	}
}

func says(text string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write([]byte(text))
	}
}

// flood writes as much as is read.
func flood(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	for block := []byte(strings.Repeat(" ", 64<<10)); r.Context().Err() == nil; {
		if _, err := w.Write(block); err != nil {
			return
		}
	}
}
