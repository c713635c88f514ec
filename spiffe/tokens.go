package spiffe

import (
	"context"
	"crypto"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
	josejwt "github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
)

const (
	// maxToken is the largest token that is looked at, in bytes.
	maxToken = 16 << 10
	// maxVerified bounds the cache of verified tokens.
	maxVerified = 4096
)

// Algorithms are the signature algorithms an issuer may be allowed: the asymmetric ones of RFC 7518 and RFC 8037.
var Algorithms = []string{"RS256", "RS384", "RS512", "ES256", "ES384", "ES512", "PS256", "PS384", "PS512", "EdDSA"}

// DefaultAlgorithms are those of an issuer that names none.
var DefaultAlgorithms = []string{"RS256", "ES256", "PS256", "EdDSA"}

// Issuer is whose tokens are trusted, and for what. Either Issuer and Keys are given or TrustDomain and Bundles.
type Issuer struct {
	// Issuer is what the claim iss must be, byte for byte.
	Issuer string
	Keys   *KeySet
	// TrustDomain is whose JWT-SVIDs are verified with its bundle: their iss says nothing (JWT-SVID, section 3).
	TrustDomain spiffeid.TrustDomain
	Bundles     jwtbundle.Source

	Audiences  []string // of logins, any of which will do; none: no login with a token of this issuer is accepted
	Algorithms []string // default: DefaultAlgorithms
	// Skew is how far this host's clock and the issuer's may be apart, for exp, nbf, iat and MaxAge.
	Skew time.Duration
	// MaxAge is for how long a token counts after its iat, which it then must have; 0: until its exp.
	MaxAge    time.Duration
	Principal string   // the claim that names who it is; default: sub
	Required  []string // claims a token must have
}

// name is what evidence calls the issuer before a token of it is read.
func (i Issuer) name() string {
	if i.Issuer == "" {
		return i.TrustDomain.IDString()
	}
	return i.Issuer
}

// The checks of a token, in the words that are safe to tell anybody.
const (
	CheckSize      = "size"
	CheckFormat    = "format"
	CheckType      = "type"
	CheckIssuer    = "issuer"
	CheckAlgorithm = "algorithm"
	CheckKeys      = "keys unavailable"
	CheckKey       = "key"
	CheckSignature = "signature"
	CheckExpiry    = "expired"
	CheckNotBefore = "not yet valid"
	CheckIssuedAt  = "issued in the future"
	CheckAge       = "too old"
	CheckAudience  = "audience"
	CheckClaim     = "claim"
	CheckPod       = "pod"    // of the Kubernetes source
	CheckReview    = "review" // of the Kubernetes source
)

// TokenError says which check a token failed. It never holds the token.
type TokenError struct {
	Check string // one of the constants
	Err   error  // for the operator
}

func (e *TokenError) Error() string { return e.Public() + ": " + e.Err.Error() }

// Unwrap is the reason.
func (e *TokenError) Unwrap() error { return e.Err }

// Public is what may be said to who sent the token, who is nobody yet.
func (e *TokenError) Public() string { return "token rejected: " + e.Check }

func rejected(check, format string, args ...any) error {
	return &TokenError{check, fmt.Errorf(format, args...)}
}

// Tokens verifies the tokens of a fixed list of issuers. Safe for concurrent use.
type Tokens struct {
	issuers  []*issuer
	verified bounded[verifiedKey, verified]
	now      func() time.Time

	mu     sync.Mutex
	counts map[string]uint64 // by check
}

type issuer struct {
	Issuer
	keys       func(ctx context.Context, kid string) ([]jose.JSONWebKey, error)
	algorithms []jose.SignatureAlgorithm
}

type verifiedKey struct {
	issuer *issuer
	token  [sha256.Size]byte
}

// verified is what was found in a token whose signature is right. Neither the time nor the audience is: they are looked
// at each time. It holds for as long as key is one of the issuer's.
type verified struct {
	key    jose.JSONWebKey
	claims josejwt.Claims
	all    map[string]any
	id     spiffeid.ID
}

// NewTokens fails where an issuer is given twice or names an algorithm that is none of Algorithms.
func NewTokens(issuers ...Issuer) (*Tokens, error) {
	t := &Tokens{verified: newBounded[verifiedKey, verified](maxVerified), now: time.Now,
		counts: map[string]uint64{}}
	for _, of := range issuers {
		if t.find(of.name()) != nil {
			return nil, fmt.Errorf("a second issuer %q", of.name())
		}
		i := &issuer{Issuer: of}
		if i.Principal == "" {
			i.Principal = "sub"
		}
		i.keys = i.svidKeys
		if of.Keys != nil {
			i.keys = of.Keys.keys
		}
		if len(of.Algorithms) == 0 {
			of.Algorithms = DefaultAlgorithms
		}
		for _, name := range of.Algorithms {
			if !slices.Contains(Algorithms, name) {
				return nil, fmt.Errorf("issuer %q: unknown algorithm %q", of.name(), name)
			}
			i.algorithms = append(i.algorithms, jose.SignatureAlgorithm(name))
		}
		t.issuers = append(t.issuers, i)
	}
	return t, nil
}

func (t *Tokens) find(name string) *issuer {
	for _, i := range t.issuers {
		if i.name() == name {
			return i
		}
	}
	return nil
}

// Run keeps the keys of all issuers up to date until ctx ends.
func (t *Tokens) Run(ctx context.Context) {
	var all sync.WaitGroup
	for _, i := range t.issuers {
		if i.Keys != nil {
			all.Go(func() { i.Keys.Run(ctx) })
		}
	}
	all.Wait()
}

// Verify verifies the token of a SASL/OAUTHBEARER login. Its error is a *TokenError. The evidence ends when Verify
// would no longer accept the token: at exp, or MaxAge after iat, each plus Skew. It may wait for the issuer's keys,
// five seconds at most, where the token's is not known.
func (t *Tokens) Verify(ctx context.Context, token string) (*Evidence, error) {
	e, err := t.verify(ctx, token, "", nil)
	if err != nil {
		return nil, err
	}
	e.Source = SourceSASL
	return e, nil
}

// verify accepts tokens of the issuer of that name for that audience; with an empty name those of all issuers, for the
// audiences that each has for logins.
func (t *Tokens) verify(ctx context.Context, token, name string, audiences []string) (*Evidence, error) {
	e, err := t.evidence(ctx, token, name, audiences)
	t.count(err)
	return e, err
}

func (t *Tokens) evidence(ctx context.Context, token, name string, audiences []string) (*Evidence, error) {
	parsed, err := parseToken(token)
	if err != nil {
		return nil, err
	}
	var claims josejwt.Claims
	if parsed.UnsafeClaimsWithoutVerification(&claims) != nil {
		return nil, rejected(CheckFormat, "its claims are not those of a JWT (RFC 7519)")
	}
	i, err := t.issuerOf(claims)
	if err != nil {
		return nil, err
	}
	if name == "" {
		audiences = i.Audiences
	} else if i.name() != name {
		return nil, rejected(CheckIssuer, "it is of %s; here only those of %s count", i.name(), name)
	}
	v, err := t.signed(ctx, i, token, parsed)
	if err != nil {
		return nil, err
	}
	return i.accept(v, t.now(), audiences)
}

// issuerOf picks the issuer by what a token says itself. Nothing of it is believed before that issuer's key has proven
// it.
func (t *Tokens) issuerOf(claims josejwt.Claims) (*issuer, error) {
	if claims.Issuer != "" {
		if i := t.find(claims.Issuer); i != nil && i.Issuer.Issuer != "" {
			return i, nil
		}
	}
	if id, err := spiffeid.FromString(claims.Subject); err == nil {
		if i := t.find(id.TrustDomain().IDString()); i != nil && !i.TrustDomain.IsZero() {
			return i, nil
		}
	}
	return nil, rejected(CheckIssuer, "%.200q is none of the issuers that are trusted", claims.Issuer)
}

var allAlgorithms = func() (all []jose.SignatureAlgorithm) {
	for _, name := range Algorithms {
		all = append(all, jose.SignatureAlgorithm(name))
	}
	return all
}()

// types are what the header typ may be: a JWT that says no more, or an access token (RFC 9068). Others are made for one
// purpose, which is not this (RFC 8725, section 3.11): a logout token must not log in.
var types = []string{"", "jwt", "jose", "at+jwt", "application/at+jwt"}

// parseToken looks at all that needs no key.
func parseToken(token string) (*josejwt.JSONWebToken, error) {
	if len(token) > maxToken {
		return nil, rejected(CheckSize, "it has %d bytes, more than %d", len(token), maxToken)
	}
	parsed, err := josejwt.ParseSigned(token, allAlgorithms)
	if unexpected := new(jose.ErrUnexpectedSignatureAlgorithm); errors.As(err, &unexpected) {
		return nil, rejected(CheckAlgorithm, "%.20q is never accepted", unexpected.Got)
	}
	if err != nil { // it may quote the token
		return nil, rejected(CheckFormat, "it is no signed JWT in compact form (an opaque or an encrypted one?)")
	}
	typ, given := parsed.Headers[0].ExtraHeaders[jose.HeaderType]
	name, text := typ.(string)
	if given && (!text || !slices.Contains(types, strings.ToLower(name))) {
		return nil, rejected(CheckType, "its typ is %.50q: want an access token's or none", fmt.Sprint(typ))
	}
	return parsed, nil
}

// signed proves the token's signature, or remembers that it was proven.
func (t *Tokens) signed(ctx context.Context, i *issuer, token string, parsed *josejwt.JSONWebToken) (verified, error) {
	header := parsed.Headers[0]
	if !slices.Contains(i.algorithms, jose.SignatureAlgorithm(header.Algorithm)) {
		return verified{}, rejected(CheckAlgorithm, "%s is not allowed for %s", header.Algorithm, i.name())
	}
	keys, err := i.keys(ctx, header.KeyID)
	if err != nil {
		return verified{}, err
	}
	key := verifiedKey{i, sha256.Sum256([]byte(token))}
	if v, ok := t.verified.get(key); ok && slices.ContainsFunc(keys, v.provenBy) {
		return v, nil
	}
	for _, k := range keys {
		v := verified{key: k}
		if k.Algorithm != "" && k.Algorithm != header.Algorithm {
			continue
		}
		if parsed.Claims(k.Key, &v.claims, &v.all) != nil {
			continue
		}
		if err := i.checkSVID(&v, token, t.now()); err != nil {
			return verified{}, err
		}
		t.verified.put(key, v)
		return v, nil
	}
	return verified{}, rejected(CheckSignature, "no key of %s has made its signature", i.name())
}

func (v verified) provenBy(key jose.JSONWebKey) bool {
	public, ok := v.key.Key.(interface{ Equal(crypto.PublicKey) bool })
	return ok && public.Equal(key.Key)
}

// svidKeys are those of the trust domain's bundle.
func (i *issuer) svidKeys(_ context.Context, kid string) ([]jose.JSONWebKey, error) {
	bundle, err := i.Bundles.GetJWTBundleForTrustDomain(i.TrustDomain)
	if err != nil {
		return nil, &TokenError{CheckKeys, err}
	}
	key, ok := bundle.FindJWTAuthority(kid)
	if !ok {
		return nil, rejected(CheckKey, "the bundle of %s has no key %.100q", i.TrustDomain.IDString(), kid)
	}
	return []jose.JSONWebKey{{Key: key, KeyID: kid}}, nil
}

// checkSVID: a token of a trust domain has to be a JWT-SVID in all that the standard asks.
func (i *issuer) checkSVID(v *verified, token string, now time.Time) error {
	if i.TrustDomain.IsZero() {
		return nil
	}
	if _, err := i.checkTimes(v.claims, now); err != nil { // the library's error would not say which
		return err
	}
	svid, err := jwtsvid.ParseAndValidate(token, i.Bundles, nil)
	if err != nil {
		return &TokenError{CheckFormat, err}
	}
	if svid.ID.Path() == "" {
		return rejected(CheckClaim, "its sub %s is a trust domain, not a workload", svid.ID)
	}
	v.id = svid.ID
	return nil
}

// accept looks at the claims of a token that is the issuer's.
func (i *issuer) accept(v verified, now time.Time, audiences []string) (*Evidence, error) {
	expires, err := i.checkTimes(v.claims, now)
	if err != nil {
		return nil, err
	}
	if !slices.ContainsFunc(audiences, v.claims.Audience.Contains) {
		return nil, rejected(CheckAudience, "it is for %.200q, not for one of %q", v.claims.Audience, audiences)
	}
	// OpenID Connect Back-Channel Logout 1.0 does not require a typ.
	if events, ok := v.all["events"].(map[string]any); ok && events[logoutEvent] != nil {
		return nil, rejected(CheckType, "it is a logout token")
	}
	for _, name := range i.Required {
		if v.all[name] == nil {
			return nil, rejected(CheckClaim, "it has no claim %s", name)
		}
	}
	principal, ok := v.all[i.Principal].(string)
	if !ok || principal == "" {
		return nil, rejected(CheckClaim, "its claim %s, which is to be the principal, is no text, or empty", i.Principal)
	}
	return &Evidence{ID: v.id, Issuer: i.name(), Subject: principal, Claims: v.all, Expires: expires}, nil
}

const logoutEvent = "http://schemas.openid.net/event/backchannel-logout"

// checkTimes also tells when the token ends.
func (i *issuer) checkTimes(c josejwt.Claims, now time.Time) (expires time.Time, err error) {
	if c.Expiry == nil {
		return expires, rejected(CheckClaim, "it has no exp")
	}
	expires = c.Expiry.Time().Add(i.Skew)
	if !now.Before(expires) {
		return expires, rejected(CheckExpiry, "it ended at %s", stamp(c.Expiry))
	}
	if c.NotBefore != nil && now.Add(i.Skew).Before(c.NotBefore.Time()) {
		return expires, rejected(CheckNotBefore, "it begins at %s", stamp(c.NotBefore))
	}
	if c.IssuedAt != nil && now.Add(i.Skew).Before(c.IssuedAt.Time()) {
		return expires, rejected(CheckIssuedAt, "it says %s: compare the clocks of this host and of %s",
			stamp(c.IssuedAt), i.name())
	}
	if i.MaxAge == 0 {
		return expires, nil
	}
	if c.IssuedAt == nil {
		return expires, rejected(CheckClaim, "it has no iat, without which its age is unknown")
	}
	old := c.IssuedAt.Time().Add(i.MaxAge + i.Skew)
	if !now.Before(old) {
		return expires, rejected(CheckAge, "it is of %s, more than max-age (%s) ago", stamp(c.IssuedAt), i.MaxAge)
	}
	if old.Before(expires) {
		expires = old
	}
	return expires, nil
}

func stamp(d *josejwt.NumericDate) string { return d.Time().UTC().Format(time.RFC3339) }

func (t *Tokens) count(err error) {
	result := "accepted"
	if wrong := new(TokenError); errors.As(err, &wrong) {
		result = wrong.Check
	} else if err != nil {
		result = "unknown"
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.counts[result]++
}

// Counts is how many tokens were "accepted", how many failed each check, and of how many it is "unknown", since the API
// server did not answer. A workload's token is counted each time it is looked at.
func (t *Tokens) Counts() map[string]uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return maps.Clone(t.counts)
}

// CheckRemote says what is wrong with the address of an issuer or of its keys: whoever can change the answer on its way
// can be anybody, so that plain http is for this host alone.
func CheckRemote(address string) error {
	u, err := url.Parse(address)
	if err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http" {
		return fmt.Errorf("%.200q is no address like https://issuer.example", address)
	}
	if u.User != nil || u.Fragment != "" {
		return fmt.Errorf("%.200q has a user or a fragment", u.Redacted())
	}
	ip := net.ParseIP(u.Hostname())
	if u.Scheme == "http" && u.Hostname() != "localhost" && !ip.IsLoopback() {
		return fmt.Errorf("%.200q is not https: anybody on the way could answer", address)
	}
	return nil
}
