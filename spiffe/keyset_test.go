package spiffe

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4"

	"klamm/test/bounds"
)

// server is an issuer's.
type server struct {
	*httptest.Server
	ca      string // its certificate's file
	fetches atomic.Int32
	bearer  atomic.Value                     // of the last request
	answer  atomic.Pointer[http.HandlerFunc] // in place of the keys

	mu   sync.Mutex
	keys []signingKey
}

func newServer(t *testing.T, keys ...signingKey) *server {
	t.Helper()
	s := &server{keys: keys}
	mux := http.NewServeMux()
	mux.HandleFunc("/.well-known/openid-configuration", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = fmt.Fprintf(w, `{"issuer":%q,"jwks_uri":%q}`, s.URL, s.URL+"/keys")
	})
	mux.HandleFunc("/keys", func(w http.ResponseWriter, r *http.Request) {
		s.fetches.Add(1)
		s.bearer.Store(r.Header.Get("Authorization"))
		if f := s.answer.Load(); f != nil {
			(*f)(w, r)
			return
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		set := jose.JSONWebKeySet{Keys: []jose.JSONWebKey{}}
		for _, k := range s.keys {
			set.Keys = append(set.Keys, k.public())
		}
		_ = json.NewEncoder(w).Encode(set)
	})
	s.Server = httptest.NewUnstartedServer(mux)
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.StartTLS()
	t.Cleanup(s.CloseClientConnections) // what hangs
	t.Cleanup(s.Close)
	s.ca = filepath.Join(t.TempDir(), "ca.pem")
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
	if err := os.WriteFile(s.ca, ca, 0o600); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *server) answers(f http.HandlerFunc) { s.answer.Store(&f) }

func (s *server) have(keys ...signingKey) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.keys = keys
}

// set is the server's keys as a node has them, with a pace that tests need not wait for.
func (s *server) set(change func(*KeySetOptions)) *KeySet {
	o := KeySetOptions{Issuer: s.URL, Remote: Remote{CA: s.ca}, Refresh: time.Hour, MaxStale: 24 * time.Hour,
		Pace: time.Nanosecond}
	if change != nil {
		change(&o)
	}
	return NewKeySet(o)
}

func TestKeysAreFetchedWhenTheyAreFirstNeededAndThenKept(t *testing.T) {
	s := newServer(t, newSigningKey(t, jose.ES256, "k1"))
	for name, change := range map[string]func(*KeySetOptions){
		"by discovery":   nil,
		"at the address": func(o *KeySetOptions) { o.URL = s.URL + "/keys" },
	} {
		before := s.fetches.Load()
		set := s.set(change)
		if state := set.State(); state.Ready() || state.Err != nil {
			t.Errorf("%s: before: %+v", name, state)
		}
		for range 3 {
			if found, err := set.keys(t.Context(), "k1"); err != nil || len(found) != 1 {
				t.Fatalf("%s: %v, %v", name, found, err)
			}
		}
		if n := s.fetches.Load() - before; n != 1 {
			t.Errorf("%s: %d fetches", name, n)
		}
		if state := set.State(); !state.Ready() || state.Keys != 1 || state.At.IsZero() || state.Err != nil {
			t.Errorf("%s: %+v", name, state)
		}
	}
}

func TestARotatedKeyIsFoundAndAWithdrawnOneVanishes(t *testing.T) {
	first, second := newSigningKey(t, jose.ES256, "k1"), newSigningKey(t, jose.ES256, "k2")
	s := newServer(t, first)
	set := s.set(nil)
	if _, err := set.keys(t.Context(), "k1"); err != nil {
		t.Fatal(err)
	}
	s.have(second)
	if _, err := set.keys(t.Context(), "k2"); err != nil {
		t.Fatal(err)
	}
	_, err := set.keys(t.Context(), "k1")
	wantCheck(t, err, CheckKey, "")
	s.have()
	if err := set.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err = set.keys(t.Context(), "k2"); err == nil || set.State().Ready() || set.State().Err == nil {
		t.Errorf("the issuer has withdrawn all keys: %v, %+v", err, set.State())
	}
}

func TestTheBackgroundRefreshReplacesTheKeys(t *testing.T) {
	file := filepath.Join(t.TempDir(), "keys.json")
	first, second := newSigningKey(t, jose.ES256, "k1"), newSigningKey(t, jose.ES256, "k2")
	keyFile(t, file, first)
	synctest.Test(t, func(t *testing.T) {
		set := NewKeySet(KeySetOptions{File: file, Refresh: 10 * time.Minute, MaxStale: time.Hour})
		ctx, stop := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() { set.Run(ctx) })
		synctest.Wait()
		if set.current().find("k1") == nil {
			t.Fatal("not fetched at start")
		}
		keyFile(t, file, second)
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if r := set.current(); r.find("k1") != nil || r.find("k2") == nil {
			t.Error("the withdrawn key counts after the refresh, or the new one does not")
		}
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
		time.Sleep(50 * time.Minute)
		synctest.Wait()
		if state := set.State(); state.Keys != 1 || state.Err == nil {
			t.Errorf("while the keys may be stale: %+v", state)
		}
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if state := set.State(); state.Ready() || state.Failed < 50 {
			t.Errorf("after max-stale: %+v", state)
		}
		_, err := set.keys(ctx, "k2")
		wantCheck(t, err, CheckKeys, "")
		if !strings.Contains(err.Error(), "max-stale") || !strings.Contains(err.Error(), file) {
			t.Error(err)
		}
		keyFile(t, file, second)
		time.Sleep(time.Minute)
		synctest.Wait()
		if !set.State().Ready() {
			t.Errorf("after the issuer came back: %+v", set.State())
		}
		stop()
		running.Wait()
	})
}

func TestAStormOfUnknownKeysIsOneFetchAndHoldsNobodyUp(t *testing.T) {
	s := newServer(t, newSigningKey(t, jose.ES256, "k1"))
	set := s.set(func(o *KeySetOptions) { o.Pace = time.Hour })
	if _, err := set.keys(t.Context(), "k1"); err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	set.now = func() time.Time { return now.Add(2 * time.Hour) } // a fetch is due
	released := make(chan struct{})
	s.answers(func(http.ResponseWriter, *http.Request) { <-released })
	var storm sync.WaitGroup
	for i := range 1000 {
		storm.Go(func() {
			if _, err := set.keys(t.Context(), fmt.Sprint("unknown ", i)); err == nil {
				t.Error("an unknown key was found")
			}
		})
	}
	for s.fetches.Load() < 2 { // the storm's fetch hangs
		if _, err := set.keys(t.Context(), "k1"); err != nil {
			t.Error(err)
		}
	}
	if _, err := set.keys(t.Context(), "k1"); err != nil {
		t.Error(err)
	}
	impatient, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := set.keys(impatient, "unknown")
	wantCheck(t, err, CheckKeys, "")
	close(released)
	storm.Wait()
	for range 1000 {
		if _, err := set.keys(t.Context(), "unknown"); err == nil {
			t.Error("an unknown key was found")
		}
	}
	if n := s.fetches.Load(); n != 2 {
		t.Errorf("%d fetches, want the first and one for 2,001 tokens", n)
	}
}

func TestAnIssuerThatMisbehavesGivesNoKeysAndAClearError(t *testing.T) {
	const secret = "SECRET-OF-THE-BODY"
	status := func(code int) func(http.ResponseWriter, *http.Request) {
		return func(w http.ResponseWriter, _ *http.Request) { http.Error(w, secret, code) }
	}
	text := func(text string) func(http.ResponseWriter, *http.Request) {
		return func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(text)) }
	}
	for name, test := range map[string]struct {
		answer func(http.ResponseWriter, *http.Request)
		want   string
	}{
		"an outage":        {status(http.StatusServiceUnavailable), "answered 503 Service Unavailable"},
		"not allowed":      {status(http.StatusForbidden), "answered 403 Forbidden"},
		"no content":       {status(http.StatusNoContent), "answered 204"},
		"another text":     {text(secret), "is no JWK set"},
		"no list of keys":  {text(`{"secret":"` + secret + `"}`), "is no JWK set"},
		"a huge body":      {text(`{"keys":[],"x":"` + strings.Repeat("x", maxBody) + `"}`), "more than 1048576 bytes"},
		"too many keys":    {text(`{"keys":[` + strings.Repeat(`{},`, maxKeys) + `{}]}`), "257 keys"},
		"a cut connection": {func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, "EOF"},
		"a redirect": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "/elsewhere", http.StatusFound)
		}, "redirects are not followed"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newServer(t, newSigningKey(t, jose.ES256, "k1"))
			set := s.set(nil)
			s.answers(test.answer)
			_, err := set.keys(t.Context(), "k1")
			wantCheck(t, err, CheckKeys, "")
			if !strings.Contains(err.Error(), test.want) || strings.Contains(err.Error(), secret) {
				t.Errorf("got %v, want %s", err, test.want)
			}
			if !strings.Contains(err.Error(), s.URL) {
				t.Errorf("it does not name the issuer: %v", err)
			}
			s.answer.Store(nil)
			if _, err = set.keys(t.Context(), "k1"); err != nil {
				t.Errorf("after it has mended its ways: %v", err)
			}
			s.answers(test.answer)
			if err = set.Refresh(t.Context()); err == nil {
				t.Error("the fetch did not fail")
			}
			if _, err = set.keys(t.Context(), "k1"); err != nil {
				t.Errorf("with the keys it had: %v", err)
			}
		})
	}
}

func TestAnIssuerThatHangsIsWaitedForNoLongerThanTheTimeout(t *testing.T) {
	s := newServer(t, newSigningKey(t, jose.ES256, "k1"))
	s.answers(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	set := s.set(nil)
	began := time.Now()
	_, err := set.keys(t.Context(), "k1")
	wantCheck(t, err, CheckKeys, "")
	if took := time.Since(began); took < remoteTimeout || took > 2*remoteTimeout {
		t.Errorf("%v after %v", err, took)
	}
}

func TestMetadataOfAnotherIssuerOrPlaceIsRefused(t *testing.T) {
	for name, test := range map[string]struct{ metadata, want string }{
		"another issuer": {`{"issuer":"https://evil.test","jwks_uri":"https://evil.test"}`,
			`"https://evil.test", not of`},
		"the issuer with a /": {`{"issuer":"URL/","jwks_uri":"URL/keys"}`, "write the issuer as it calls itself"},
		"keys in plain text":  {`{"issuer":"URL","jwks_uri":"http://issuer.test/keys"}`, "is not https"},
		"keys in a file":      {`{"issuer":"URL","jwks_uri":"file:///etc/passwd"}`, "is no address"},
		"no keys":             {`{"issuer":"URL"}`, "is no address"},
		"no metadata":         {`x`, "is no metadata"},
	} {
		t.Run(name, func(t *testing.T) {
			var s *httptest.Server
			s = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				_, _ = w.Write([]byte(strings.ReplaceAll(test.metadata, "URL", s.URL)))
			}))
			defer s.Close()
			err := NewKeySet(KeySetOptions{Issuer: s.URL}).Refresh(t.Context())
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want %s", err, test.want)
			}
		})
	}
}

func TestAnUnknownCertificateIsRefused(t *testing.T) {
	s := newServer(t, newSigningKey(t, jose.ES256, "k1"))
	set := s.set(func(o *KeySetOptions) { o.Remote.CA = "" })
	if err := set.Refresh(t.Context()); err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Error(err)
	}
	set = s.set(func(o *KeySetOptions) { o.Remote.CA = filepath.Join(t.TempDir(), "gone") })
	if err := set.Refresh(t.Context()); err == nil || !strings.Contains(err.Error(), "gone") {
		t.Error(err)
	}
}

func TestTheIssuerIsAskedWithTheNodesOwnToken(t *testing.T) {
	s := newServer(t, newSigningKey(t, jose.ES256, "k1"))
	file := filepath.Join(t.TempDir(), "token")
	set := s.set(func(o *KeySetOptions) { o.Remote.Bearer = file })
	if err := set.Refresh(t.Context()); err == nil {
		t.Error("no token, but an answer")
	}
	if err := os.WriteFile(file, []byte("two\nlines"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := set.Refresh(t.Context()); err == nil || !strings.Contains(err.Error(), file) {
		t.Error(err)
	}
	for _, token := range []string{"first", "second"} {
		if err := os.WriteFile(file, []byte(token+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := set.Refresh(t.Context()); err != nil || s.bearer.Load() != "Bearer "+token {
			t.Errorf("%v, it was asked with %q", err, s.bearer.Load())
		}
	}
}

func TestOnlyPublicKeysForSignaturesOfAKeySetCount(t *testing.T) {
	good := newSigningKey(t, jose.ES256, "good").public()
	encryption := newSigningKey(t, jose.ES256, "encryption").public()
	encryption.Use = "enc"
	private := jose.JSONWebKey{Key: newSigningKey(t, jose.ES256, "x").private, KeyID: "private"}
	set, err := json.Marshal(map[string]any{"keys": []any{good, encryption, private,
		map[string]string{"kty": "oct", "k": "c2VjcmV0", "kid": "symmetric"},
		map[string]string{"kty": "future", "kid": "unknown"},
		map[string]string{"kty": "RSA", "kid": "short", "e": "AQAB", "n": strings.Repeat("v", 171)},
		map[string]string{"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA", "kid": "not on the curve"}, 7}})
	if err != nil {
		t.Fatal(err)
	}
	keys, err := parseKeys(set)
	if err != nil || len(keys) != 1 || keys[0].KeyID != "good" {
		t.Errorf("%v, %+v", err, keys)
	}
}

func FuzzParseKeys(f *testing.F) {
	for _, alg := range DefaultAlgorithms {
		text, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{
			newSigningKey(f, jose.SignatureAlgorithm(alg), "k").public()}})
		if err != nil {
			f.Fatal(err)
		}
		f.Add(text)
	}
	f.Add([]byte(`{"keys":[{"kty":"oct","k":"AA"},{"kty":"RSA","n":"AA","e":"AA"}]}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		var keys []jose.JSONWebKey
		var err error
		bounds.Check(t, len(text), 1<<12, func() { keys, err = parseKeys(text) })
		if err != nil && len(keys) > 0 {
			t.Errorf("%d keys with %v", len(keys), err)
		}
		for _, k := range keys {
			if !k.IsPublic() || !k.Valid() {
				t.Errorf("%+v", k)
			}
		}
	})
}
