package oidc

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"

	"klamm/spiffe"
)

// Check is one of what has to be so with tokens of a real issuer. It tells what it measured, if anything.
type Check struct {
	Name string
	Run  func(ctx context.Context, p *Provider) (measured string, err error)
}

const audience = "kafka"

// Checks are all of them, in their order, each on what the ones before it left. They end with an issuer that is well.
func Checks() []Check {
	checks := []Check{}
	for _, algorithm := range spiffe.DefaultAlgorithms {
		checks = append(checks, Check{"a token signed with " + algorithm + " is accepted", accepted(algorithm)})
	}
	for _, f := range forgeries {
		checks = append(checks, Check{f.name + " is refused", f.refused})
	}
	return append(checks,
		Check{"an opaque token is refused", opaque},
		Check{"an expired token is refused within a second", expires(spiffe.CheckExpiry, 0)},
		Check{"a token is refused within a second of its max age", expires(spiffe.CheckAge, time.Second)},
		Check{"a new key is taken up, and a withdrawn one refused", rotated},
		Check{"a storm of unknown keys is one fetch", storm},
		Check{"an issuer that hangs holds up nobody whose key is known", hangs})
}

// tokens are those of the issuer as a node trusts them; change may say otherwise.
func tokens(p *Provider, change func(*spiffe.Issuer)) (*spiffe.Tokens, *spiffe.KeySet, error) {
	keys := spiffe.NewKeySet(spiffe.KeySetOptions{Issuer: p.URL(), Refresh: time.Hour, MaxStale: time.Hour,
		Pace: time.Millisecond})
	i := spiffe.Issuer{Issuer: p.URL(), Keys: keys, Audiences: []string{"other", audience}, MaxAge: time.Hour,
		Required: []string{"team"}}
	if change != nil {
		change(&i)
	}
	t, err := spiffe.NewTokens(i)
	return t, keys, err
}

func ask(algorithm string) Ask {
	return Ask{Audience: audience, Algorithm: algorithm, Life: time.Minute}
}

func accepted(algorithm string) func(context.Context, *Provider) (string, error) {
	return func(ctx context.Context, p *Provider) (string, error) {
		verifier, _, err := tokens(p, nil)
		if err != nil {
			return "", err
		}
		token, err := p.Token(ctx, ask(algorithm))
		if err != nil {
			return "", err
		}
		e, err := verifier.Verify(ctx, token)
		if err != nil {
			return "", err
		}
		if left := time.Until(e.Expires); e.Subject != "orders" || e.Issuer != p.URL() || e.Claims["team"] != "payments" ||
			left <= 0 || left > time.Minute {
			return "", fmt.Errorf("its evidence is %+v", e)
		}
		return "", nil
	}
}

// forgery makes a token of a good one that has to be refused.
type forgery struct {
	name, check string
	make        func(ctx context.Context, p *Provider, good string) (string, error)
	verifier    func(*spiffe.Issuer)
}

var forgeries = []forgery{
	{"a token for another audience", spiffe.CheckAudience, forSomebodyElse, nil},
	{"a token without a required claim", spiffe.CheckClaim, same,
		func(i *spiffe.Issuer) { i.Required = []string{"clearance"} }},
	{"a token whose principal is no text", spiffe.CheckClaim, same, func(i *spiffe.Issuer) { i.Principal = "exp" }},
	{"an algorithm that is not allowed", spiffe.CheckAlgorithm, same,
		func(i *spiffe.Issuer) { i.Algorithms = []string{"RS256"} }},
	{"a token of another issuer", spiffe.CheckIssuer, same, func(i *spiffe.Issuer) { i.Issuer += "/" }},
	{"a token with changed claims", spiffe.CheckSignature, changedClaims, nil},
	{"a token without its signature", spiffe.CheckSignature, unsigned, nil},
	{"alg none", spiffe.CheckAlgorithm, algNone, nil},
	{"HS256 with the issuer's public key", spiffe.CheckAlgorithm, hs256, nil},
	{"another's signature under the issuer's key id", spiffe.CheckSignature, forged, nil},
	{"another's signature under a key id of its own", spiffe.CheckKey, selfSigned, nil},
}

func forSomebodyElse(ctx context.Context, p *Provider, _ string) (string, error) {
	return p.Token(ctx, Ask{Audience: "somebody-else", Algorithm: "ES256", Life: time.Minute})
}

func changedClaims(_ context.Context, _ *Provider, good string) (string, error) {
	parts := strings.Split(good, ".")
	claims, err := base64.RawURLEncoding.DecodeString(parts[1])
	parts[1] = encode(bytes.Replace(claims, []byte(`"sub":"orders"`), []byte(`"sub":"admins"`), 1))
	return strings.Join(parts, "."), err
}

func unsigned(_ context.Context, _ *Provider, good string) (string, error) {
	return good[:strings.LastIndexByte(good, '.')+1], nil
}

func algNone(_ context.Context, _ *Provider, good string) (string, error) {
	return encode([]byte(`{"alg":"none","typ":"at+jwt"}`)) + "." + strings.Split(good, ".")[1] + ".", nil
}

func hs256(ctx context.Context, p *Provider, good string) (string, error) {
	key, err := p.publicKey(ctx, "RS256")
	if err != nil {
		return "", err
	}
	secret, err := x509.MarshalPKIXPublicKey(key.Key)
	if err != nil {
		return "", err
	}
	return signAgain(good, jose.SigningKey{Algorithm: jose.HS256, Key: secret}, key.KeyID)
}

func forged(ctx context.Context, p *Provider, good string) (string, error) {
	key, err := p.publicKey(ctx, "ES256")
	if err != nil {
		return "", err
	}
	return signOneself(good, key.KeyID)
}

func selfSigned(_ context.Context, _ *Provider, good string) (string, error) {
	return signOneself(good, "own")
}

// signOneself signs the claims of a token with a key that is nobody's.
func signOneself(token, kid string) (string, error) {
	own, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return "", err
	}
	return signAgain(token, jose.SigningKey{Algorithm: jose.ES256, Key: own}, kid)
}

func same(_ context.Context, _ *Provider, good string) (string, error) { return good, nil }

func (f forgery) refused(ctx context.Context, p *Provider) (string, error) {
	verifier, _, err := tokens(p, f.verifier)
	if err != nil {
		return "", err
	}
	good, err := p.Token(ctx, ask("ES256"))
	if err != nil {
		return "", err
	}
	token, err := f.make(ctx, p, good)
	if err != nil {
		return "", err
	}
	_, err = verifier.Verify(ctx, token)
	return said(err), wants(err, f.check)
}

func opaque(ctx context.Context, p *Provider) (string, error) {
	verifier, _, err := tokens(p, nil)
	if err != nil {
		return "", err
	}
	token, err := p.Token(ctx, ask("opaque"))
	if err != nil {
		return "", err
	}
	_, err = verifier.Verify(ctx, token)
	return said(err), wants(err, spiffe.CheckFormat)
}

// said is what the owner of a token is told.
func said(err error) string {
	var wrong *spiffe.TokenError
	if errors.As(err, &wrong) {
		return wrong.Public()
	}
	return ""
}

func wants(err error, check string) error {
	var wrong *spiffe.TokenError
	if errors.As(err, &wrong) && wrong.Check == check {
		return nil
	}
	return fmt.Errorf("want it to fail the check %q, got: %w", check, errors.Join(err, errAccepted))
}

var errAccepted = errors.New("it was not refused for that")

// expires waits for a token's end.
func expires(check string, age time.Duration) func(context.Context, *Provider) (string, error) {
	return func(ctx context.Context, p *Provider) (string, error) {
		verifier, _, err := tokens(p, func(i *spiffe.Issuer) { i.MaxAge = age })
		if err != nil {
			return "", err
		}
		life := 2 * time.Second
		if age > 0 {
			life = time.Minute
		}
		token, err := p.Token(ctx, Ask{Audience: audience, Algorithm: "ES256", Life: life})
		if err != nil {
			return "", err
		}
		e, err := verifier.Verify(ctx, token)
		if err != nil {
			return "", err
		}
		for err == nil && time.Since(e.Expires) < 5*time.Second {
			time.Sleep(time.Millisecond)
			_, err = verifier.Verify(ctx, token)
		}
		late := time.Since(e.Expires)
		if late < 0 || late > time.Second {
			return "", fmt.Errorf("it was refused %v after its end: %w", late, err)
		}
		return fmt.Sprintf("%v after its end", late.Round(time.Millisecond)), wants(err, check)
	}
}

func rotated(ctx context.Context, p *Provider) (string, error) {
	verifier, keys, err := tokens(p, nil)
	if err != nil {
		return "", err
	}
	before, err := p.Token(ctx, ask("ES256"))
	if err != nil {
		return "", err
	}
	if _, err := verifier.Verify(ctx, before); err != nil {
		return "", err
	}
	if err := p.Rotate(ctx); err != nil {
		return "", err
	}
	if _, err := verifier.Verify(ctx, before); err != nil {
		return "", fmt.Errorf("nothing has told of the withdrawal yet, but: %w", err)
	}
	after, err := p.Token(ctx, ask("ES256"))
	if err != nil {
		return "", err
	}
	if _, err := verifier.Verify(ctx, after); err != nil {
		return "", fmt.Errorf("the new key: %w", err)
	}
	if _, err := verifier.Verify(ctx, before); err == nil {
		return "", errors.New("a token of the withdrawn key is still accepted")
	} else if err := wants(err, spiffe.CheckKey); err != nil {
		return "", err
	}
	return "", keys.Refresh(ctx)
}

func storm(ctx context.Context, p *Provider) (string, error) {
	keys := spiffe.NewKeySet(spiffe.KeySetOptions{URL: p.KeysURL(), Refresh: time.Hour, MaxStale: time.Hour,
		Pace: time.Hour})
	verifier, _, err := tokens(p, func(i *spiffe.Issuer) { i.Keys = keys })
	if err != nil {
		return "", err
	}
	good, err := p.Token(ctx, ask("ES256"))
	if err != nil {
		return "", err
	}
	before, err := p.Fetches(ctx)
	if err != nil {
		return "", err
	}
	const size = 1000
	failures := make([]error, size+1)
	var all sync.WaitGroup
	for i := range size {
		all.Go(func() {
			token, err := signOneself(good, fmt.Sprint("unknown-", i))
			if err == nil {
				_, err = verifier.Verify(ctx, token)
				err = wants(err, spiffe.CheckKey)
			}
			_, ok := verifier.Verify(ctx, good)
			failures[i] = errors.Join(err, ok)
		})
	}
	all.Wait()
	after, err := p.Fetches(ctx)
	if err == nil && after-before != 1 {
		err = fmt.Errorf("%d fetches", after-before)
	}
	failures[size] = err
	return fmt.Sprintf("%d tokens, %d fetch", size, after-before), errors.Join(failures...)
}

func hangs(ctx context.Context, p *Provider) (string, error) {
	verifier, _, err := tokens(p, nil)
	if err != nil {
		return "", err
	}
	good, err := p.Token(ctx, ask("ES256"))
	if err != nil {
		return "", err
	}
	if _, err := verifier.Verify(ctx, good); err != nil {
		return "", err
	}
	unknown, err := signOneself(good, "unknown")
	if err != nil {
		return "", err
	}
	if err := p.Hang(); err != nil {
		return "", err
	}
	waited := make(chan error, 1)
	go func() {
		_, err := verifier.Verify(ctx, unknown)
		waited <- err
	}()
	began, n := time.Now(), 0
	var slowest time.Duration
	for {
		select {
		case err := <-waited:
			took := time.Since(began)
			if took > 10*time.Second {
				err = fmt.Errorf("it took %v", took)
			}
			return fmt.Sprintf("a token of an unknown key waited %v; meanwhile %d others, %v at most",
					took.Round(100*time.Millisecond), n, slowest.Round(time.Microsecond)),
				errors.Join(wants(err, spiffe.CheckKey), p.GoOn())
		default:
		}
		one := time.Now()
		if _, err := verifier.Verify(ctx, good); err != nil {
			return "", errors.Join(err, p.GoOn())
		}
		if slowest, n = max(slowest, time.Since(one)), n+1; slowest > time.Second {
			return "", errors.Join(fmt.Errorf("a token of a known key waited %v", slowest), p.GoOn())
		}
		time.Sleep(time.Millisecond)
	}
}

// publicKey is the issuer's key of that algorithm.
func (p *Provider) publicKey(ctx context.Context, algorithm string) (jose.JSONWebKey, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, p.KeysURL(), nil)
	if err != nil {
		return jose.JSONWebKey{}, err
	}
	answer, err := http.DefaultClient.Do(request)
	if err != nil {
		return jose.JSONWebKey{}, err
	}
	defer func() { _ = answer.Body.Close() }()
	text, err := io.ReadAll(answer.Body)
	if err != nil {
		return jose.JSONWebKey{}, err
	}
	var set jose.JSONWebKeySet
	if err := json.Unmarshal(text, &set); err != nil {
		return jose.JSONWebKey{}, err
	}
	for _, key := range set.Keys {
		if key.Algorithm == algorithm {
			return key, nil
		}
	}
	return jose.JSONWebKey{}, fmt.Errorf("the issuer has no key for %s", algorithm)
}

// signAgain signs the claims of a token with another key.
func signAgain(token string, key jose.SigningKey, kid string) (string, error) {
	claims, err := base64.RawURLEncoding.DecodeString(strings.Split(token, ".")[1])
	if err != nil {
		return "", err
	}
	signer, err := jose.NewSigner(key, new(jose.SignerOptions).WithType("at+jwt").WithHeader("kid", kid))
	if err != nil {
		return "", err
	}
	signed, err := signer.Sign(claims)
	if err != nil {
		return "", err
	}
	return signed.CompactSerialize()
}

func encode(b []byte) string { return base64.RawURLEncoding.EncodeToString(b) }
