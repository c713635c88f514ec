package spiffe

import (
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-jose/go-jose/v4"
)

const (
	defaultPace = 10 * time.Second
	// retryPace is the time to the next fetch after one that failed.
	retryPace = 30 * time.Second
	// maxKeys is how many keys of a set are kept.
	maxKeys = 256
	// minRSA is the least size of an RSA key, in bits (RFC 7518, section 3.3).
	minRSA = 2048
)

// KeySetOptions say where the keys of an issuer are.
type KeySetOptions struct {
	// Issuer is asked for its metadata (OpenID Connect Discovery 1.0, section 4) where neither URL nor File is given.
	Issuer string
	URL    string // of the JWK set
	File   string // with the JWK set
	Remote Remote // how Issuer and URL are asked
	// Refresh is how often the keys are fetched without need, over 0. So long may a withdrawn key still count.
	Refresh time.Duration
	// MaxStale is for how long keys count that could not be fetched again, at least Refresh. Then none count.
	MaxStale time.Duration
	// Pace is the least time between two fetches, however many tokens with unknown key ids come. Default: 10 s.
	Pace time.Duration
}

// KeySet is the keys of one issuer, kept up to date. Safe for concurrent use. Nobody who has a token whose key is there
// ever waits for the issuer.
type KeySet struct {
	o   KeySetOptions
	now func() time.Time

	ring            atomic.Pointer[ring]
	fetched, failed atomic.Uint64 // fetches

	mu      sync.Mutex
	running chan struct{} // closed when the fetch that runs has ended; nil when none runs
	tried   time.Time     // when the last fetch began
	err     error         // of the last fetch
}

// ring is one answer of the issuer.
type ring struct {
	keys []jose.JSONWebKey
	at   time.Time
}

// NewKeySet asks nobody yet.
func NewKeySet(o KeySetOptions) *KeySet {
	o.Pace = cmp.Or(o.Pace, defaultPace)
	return &KeySet{o: o, now: time.Now}
}

// Run keeps the keys up to date until ctx ends.
func (k *KeySet) Run(ctx context.Context) {
	for {
		wait := k.o.Refresh
		if err := k.Refresh(ctx); err != nil {
			wait = min(wait, retryPace)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(jittered(wait)):
		}
	}
}

// jittered is d, or up to a fifth less, so that the nodes of a fleet do not ask at the same moment.
func jittered(d time.Duration) time.Duration { return d - rand.N(d/5+1) } //nolint:gosec // no secret

// Refresh fetches the keys now, if the pace allows, and tells how the last fetch ended.
func (k *KeySet) Refresh(ctx context.Context) error {
	if err := k.await(ctx); err != nil {
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.err
}

// await starts a fetch if none runs and the pace allows one, and waits for its end.
func (k *KeySet) await(ctx context.Context) error {
	running := k.fetchAgain()
	if running == nil {
		return nil
	}
	select {
	case <-running:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for the keys of %s: %w", k.where(), context.Cause(ctx))
	}
}

// fetchAgain is closed when the fetch has ended that runs now; nil when the pace does not allow one.
func (k *KeySet) fetchAgain() <-chan struct{} {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.running != nil {
		return k.running
	}
	if !k.tried.IsZero() && k.now().Sub(k.tried) < k.o.Pace {
		return nil
	}
	k.tried = k.now()
	done := make(chan struct{})
	k.running = done
	go func() {
		defer close(done)
		// Not the context of who happened to ask first: others wait too.
		ctx, cancel := context.WithTimeout(context.Background(), remoteTimeout)
		defer cancel()
		keys, err := k.fetch(ctx)
		k.mu.Lock()
		defer k.mu.Unlock()
		k.running, k.err = nil, err
		if err != nil {
			k.failed.Add(1)
			return
		}
		k.fetched.Add(1)
		k.ring.Store(&ring{keys, k.tried})
	}()
	return done
}

// keys are those that may have signed a token with this key id; all of the set when it has none.
func (k *KeySet) keys(ctx context.Context, kid string) ([]jose.JSONWebKey, error) {
	if found := k.current().find(kid); len(found) > 0 {
		return found, nil
	}
	if err := k.await(ctx); err != nil {
		return nil, &TokenError{CheckKeys, err}
	}
	r := k.current()
	if r == nil {
		return nil, &TokenError{CheckKeys, k.missing()}
	}
	found := r.find(kid)
	if len(found) > 0 {
		return found, nil
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.err != nil {
		return nil, rejected(CheckKey, "the key %.100q is not known, and new keys could not be had: %w", kid, k.err)
	}
	return nil, rejected(CheckKey, "%s has no key %.100q", k.where(), kid)
}

// current is nil while there is no set, or only one that is too old.
func (k *KeySet) current() *ring {
	r := k.ring.Load()
	if r == nil || k.now().Sub(r.at) > k.o.MaxStale {
		return nil
	}
	return r
}

func (k *KeySet) missing() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if r := k.ring.Load(); r != nil {
		return fmt.Errorf("the keys of %s are of %s, older than max-stale (%s): the last error is: %w",
			k.where(), r.at.UTC().Format(time.RFC3339), k.o.MaxStale, k.err)
	}
	return fmt.Errorf("no keys of %s yet: %w", k.where(), k.err)
}

func (r *ring) find(kid string) (found []jose.JSONWebKey) {
	if r == nil {
		return nil
	}
	if kid == "" {
		return r.keys
	}
	for _, key := range r.keys {
		if key.KeyID == kid {
			found = append(found, key)
		}
	}
	return found
}

// where names the place the keys come from.
func (k *KeySet) where() string {
	for _, place := range []string{k.o.File, k.o.URL} {
		if place != "" {
			return place
		}
	}
	return k.o.Issuer
}

func (k *KeySet) fetch(ctx context.Context) ([]jose.JSONWebKey, error) {
	text, err := k.text(ctx)
	if err != nil {
		return nil, err
	}
	keys, err := parseKeys(text)
	if err != nil {
		return nil, fmt.Errorf("the key set of %s: %w", k.where(), err)
	}
	return keys, nil
}

func (k *KeySet) text(ctx context.Context) ([]byte, error) {
	if k.o.File != "" {
		f, err := os.Open(k.o.File)
		if err != nil {
			return nil, err
		}
		defer func() { _ = f.Close() }()
		return io.ReadAll(io.LimitReader(f, maxBody))
	}
	address := k.o.URL
	if address == "" {
		var err error
		if address, err = k.discover(ctx); err != nil {
			return nil, err
		}
	}
	return k.o.Remote.ask(ctx, http.MethodGet, address, nil)
}

// discover asks the issuer where its keys are.
func (k *KeySet) discover(ctx context.Context) (string, error) {
	address := strings.TrimSuffix(k.o.Issuer, "/") + "/.well-known/openid-configuration"
	text, err := k.o.Remote.ask(ctx, http.MethodGet, address, nil)
	if err != nil {
		return "", err
	}
	var metadata struct {
		Issuer string `json:"issuer"`
		Keys   string `json:"jwks_uri"`
	}
	if json.Unmarshal(text, &metadata) != nil {
		return "", fmt.Errorf("%s is no metadata of an issuer", address)
	}
	if metadata.Issuer != k.o.Issuer {
		return "", fmt.Errorf("%s is the metadata of %.200q, not of %q: write the issuer as it calls itself",
			address, metadata.Issuer, k.o.Issuer)
	}
	if err := CheckRemote(metadata.Keys); err != nil {
		return "", fmt.Errorf("jwks_uri in %s: %w", address, err)
	}
	return metadata.Keys, nil
}

// parseKeys reads a JWK set (RFC 7517, section 5). What is no usable public key for signatures is left out, as that
// section wants it: an issuer may have keys for other ends.
func parseKeys(text []byte) ([]jose.JSONWebKey, error) {
	var set struct {
		Keys []json.RawMessage `json:"keys"`
	}
	if json.Unmarshal(text, &set) != nil || set.Keys == nil {
		return nil, errors.New("it is no JWK set")
	}
	if len(set.Keys) > maxKeys {
		return nil, fmt.Errorf("it has %d keys, more than %d", len(set.Keys), maxKeys)
	}
	var keys []jose.JSONWebKey
	for _, text := range set.Keys {
		var key jose.JSONWebKey
		if key.UnmarshalJSON(text) == nil && usable(key) {
			keys = append(keys, key)
		}
	}
	return keys, nil
}

func usable(key jose.JSONWebKey) bool {
	if key.Use != "" && key.Use != "sig" {
		return false
	}
	switch public := key.Key.(type) {
	case *rsa.PublicKey:
		return public.N.BitLen() >= minRSA
	case *ecdsa.PublicKey, ed25519.PublicKey:
		return true
	}
	return false
}

// KeySetState is how a key set is.
type KeySetState struct {
	Keys            int       // that count; 0 when they are too old
	At              time.Time // of the set; zero while there is none
	Err             error     // of the last fetch
	Fetched, Failed uint64    // fetches
}

// Ready tells whether tokens can be verified.
func (s KeySetState) Ready() bool { return s.Keys > 0 }

// State is how the key set is now.
func (k *KeySet) State() KeySetState {
	s := KeySetState{Fetched: k.fetched.Load(), Failed: k.failed.Load()}
	if r := k.ring.Load(); r != nil {
		s.At = r.at
	}
	if r := k.current(); r != nil {
		s.Keys = len(r.keys)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if s.Err = k.err; s.Err == nil && !s.At.IsZero() && s.Keys == 0 {
		s.Err = fmt.Errorf("%s has no key for signatures that is usable", k.where())
	}
	return s
}
