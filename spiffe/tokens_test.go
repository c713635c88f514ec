package spiffe

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"klamm/test/bounds"
)

const (
	testIssuer   = "https://issuer.test"
	testAudience = "kafka"
)

// signingKey is a key of an issuer.
type signingKey struct {
	alg     jose.SignatureAlgorithm
	kid     string
	private crypto.Signer
}

func newSigningKey(t testing.TB, alg jose.SignatureAlgorithm, kid string) signingKey {
	t.Helper()
	k := signingKey{alg: alg, kid: kid}
	var err error
	switch alg {
	case jose.EdDSA:
		_, k.private, err = ed25519.GenerateKey(rand.Reader)
	case jose.ES256:
		k.private, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case jose.ES384:
		k.private, err = ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	default:
		k.private, err = rsa.GenerateKey(rand.Reader, 2048)
	}
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func (k signingKey) public() jose.JSONWebKey {
	return jose.JSONWebKey{Key: k.private.Public(), KeyID: k.kid, Use: "sig"}
}

// sign makes a token; header adds to its header.
func (k signingKey) sign(t testing.TB, claims any, header map[string]any) string {
	t.Helper()
	o := &jose.SignerOptions{}
	for name, value := range header {
		o.WithHeader(jose.HeaderKey(name), value)
	}
	s, err := jose.NewSigner(jose.SigningKey{Algorithm: k.alg, Key: jose.JSONWebKey{Key: k.private, KeyID: k.kid}}, o)
	if err != nil {
		t.Fatal(err)
	}
	text, ok := claims.(string)
	if !ok {
		b, err := json.Marshal(claims)
		if err != nil {
			t.Fatal(err)
		}
		text = string(b)
	}
	jws, err := s.Sign([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	token, err := jws.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// keyFile writes a JWK set, in place of the one before.
func keyFile(t testing.TB, file string, keys ...signingKey) {
	t.Helper()
	set := jose.JSONWebKeySet{Keys: []jose.JSONWebKey{}}
	for _, k := range keys {
		set.Keys = append(set.Keys, k.public())
	}
	text, err := json.Marshal(set)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
}

func fromFile(file string) *KeySet {
	return NewKeySet(KeySetOptions{File: file, Refresh: time.Hour, MaxStale: time.Hour, Pace: time.Nanosecond})
}

// trusted are tokens of testIssuer, with these keys.
func trusted(t testing.TB, keys ...signingKey) *Tokens {
	t.Helper()
	file := filepath.Join(t.TempDir(), "keys.json")
	keyFile(t, file, keys...)
	tokens, err := NewTokens(Issuer{Issuer: testIssuer, Keys: fromFile(file), Audiences: []string{"other", testAudience},
		Skew: 30 * time.Second, MaxAge: time.Hour, Required: []string{"team"}})
	if err != nil {
		t.Fatal(err)
	}
	return tokens
}

type claims = map[string]any

// goodClaims are of a token that is accepted, unless changed. A nil value removes a claim.
func goodClaims(change claims) claims {
	now := time.Now().Unix()
	c := claims{"iss": testIssuer, "sub": "orders", "aud": testAudience, "iat": now, "nbf": now, "exp": now + 300,
		"team": "payments"}
	for name, value := range change {
		if c[name] = value; value == nil {
			delete(c, name)
		}
	}
	return c
}

func wantCheck(t *testing.T, err error, check, token string) {
	t.Helper()
	if check == "" {
		if err != nil {
			t.Errorf("refused: %v", err)
		}
		return
	}
	var wrong *TokenError
	if !errors.As(err, &wrong) || wrong.Check != check {
		t.Fatalf("got %v, want it to fail the check %q", err, check)
	}
	if wrong.Public() != "token rejected: "+check {
		t.Errorf("anybody is told %q", wrong.Public())
	}
	for part := range strings.SplitSeq(token, ".") {
		if len(part) > 8 && strings.Contains(err.Error(), part) {
			t.Errorf("the error holds the token: %v", err)
		}
	}
}

func TestATokenIsAcceptedOnlyIfEveryCheckPasses(t *testing.T) {
	key := newSigningKey(t, jose.RS256, "k1")
	tokens := trusted(t, key)
	now := time.Now()
	ago := func(d time.Duration) int64 { return now.Add(-d).Unix() }
	public, err := x509.MarshalPKIXPublicKey(key.private.Public())
	if err != nil {
		t.Fatal(err)
	}
	stranger := newSigningKey(t, jose.RS256, "k1")
	encode := base64.RawURLEncoding.EncodeToString
	unsigned := func(header string) string {
		body, _ := json.Marshal(goodClaims(nil))
		return encode([]byte(header)) + "." + encode(body) + "."
	}
	good := key.sign(t, goodClaims(nil), nil)
	parts := strings.Split(good, ".")
	changed, _ := json.Marshal(goodClaims(claims{"sub": "admin"}))

	symmetric, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.HS256, Key: public},
		(&jose.SignerOptions{}).WithHeader("kid", "k1"))
	if err != nil {
		t.Fatal(err)
	}
	body, _ := json.Marshal(goodClaims(nil))
	jws, err := symmetric.Sign(body)
	if err != nil {
		t.Fatal(err)
	}
	hs256, _ := jws.CompactSerialize()

	of := func(change claims) string { return key.sign(t, goodClaims(change), nil) }
	headed := func(header claims) string { return key.sign(t, goodClaims(nil), header) }
	for name, test := range map[string]struct{ token, check string }{
		"a good one":                  {good, ""},
		"an access token (RFC 9068)":  {headed(claims{"typ": "at+jwt"}), ""},
		"its long media type":         {headed(claims{"typ": "application/AT+JWT"}), ""},
		"typ JWT":                     {headed(claims{"typ": "JWT"}), ""},
		"one of several audiences":    {of(claims{"aud": []string{"x", "other"}}), ""},
		"without nbf":                 {of(claims{"nbf": nil}), ""},
		"expired within the skew":     {of(claims{"exp": ago(20 * time.Second)}), ""},
		"issued soon within the skew": {of(claims{"iat": ago(-20 * time.Second)}), ""},
		"begins within the skew":      {of(claims{"nbf": ago(-20 * time.Second)}), ""},
		"empty":                       {"", CheckFormat},
		"opaque":                      {"VnJ0w2tVtXYm2mLLqQK1jQ", CheckFormat},
		"one part too many":           {good + ".x", CheckFormat},
		"too large":                   {of(claims{"x": strings.Repeat("x", maxToken)}), CheckSize},
		"claims that are no object":   {key.sign(t, `[]`, nil), CheckFormat},
		"claims that are no JSON":     {key.sign(t, `{`, nil), CheckFormat},
		"a claim given twice":         {key.sign(t, `{"iss":"https://issuer.test","iss":"x"}`, nil), CheckFormat},
		"exp as text":                 {of(claims{"exp": "tomorrow"}), CheckFormat},
		"exp that overflows":          {of(claims{"exp": 1e300}), CheckFormat},
		"aud as a number":             {of(claims{"aud": 1}), CheckFormat},
		"alg none":                    {unsigned(`{"alg":"none"}`), CheckAlgorithm},
		"alg None":                    {unsigned(`{"alg":"None"}`), CheckAlgorithm},
		"alg missing":                 {unsigned(`{"kid":"k1"}`), CheckAlgorithm},
		"HS256 with the public key":   {hs256, CheckAlgorithm},
		"an algorithm not allowed": {newSigningKey(t, jose.ES384, "k1").sign(t, goodClaims(nil), nil),
			CheckAlgorithm},
		"another key of the same id": {stranger.sign(t, goodClaims(nil), nil), CheckSignature},
		"another key of another id":  {newSigningKey(t, jose.RS256, "k2").sign(t, goodClaims(nil), nil), CheckKey},
		"another key of no id":       {newSigningKey(t, jose.RS256, "").sign(t, goodClaims(nil), nil), CheckSignature},
		"another kind of key of the id": {newSigningKey(t, jose.ES256, "k1").sign(t, goodClaims(nil), nil),
			CheckSignature},
		"a key that it brings along": {stranger.sign(t, goodClaims(nil), claims{"jwk": stranger.public()}),
			CheckSignature},
		"changed claims":                    {parts[0] + "." + encode(changed) + "." + parts[2], CheckSignature},
		"no signature":                      {parts[0] + "." + parts[1] + ".", CheckSignature},
		"a critical header of its own":      {headed(claims{"crit": []string{"x"}, "x": 1}), CheckSignature},
		"a logout token":                    {headed(claims{"typ": "logout+jwt"}), CheckType},
		"a logout token without typ":        {of(claims{"events": claims{logoutEvent: claims{}}}), CheckType},
		"a typ that is a number":            {headed(claims{"typ": 1}), CheckType},
		"a proof of possession":             {headed(claims{"typ": "dpop+jwt"}), CheckType},
		"no issuer":                         {of(claims{"iss": nil}), CheckIssuer},
		"another issuer":                    {of(claims{"iss": "https://evil.test"}), CheckIssuer},
		"the issuer with a slash":           {of(claims{"iss": testIssuer + "/"}), CheckIssuer},
		"the issuer in capitals":            {of(claims{"iss": "HTTPS://issuer.test"}), CheckIssuer},
		"a SPIFFE ID as subject":            {of(claims{"iss": nil, "sub": orders}), CheckIssuer},
		"no exp":                            {of(claims{"exp": nil}), CheckClaim},
		"expired":                           {of(claims{"exp": ago(31 * time.Second)}), CheckExpiry},
		"expired long ago":                  {of(claims{"exp": -1}), CheckExpiry},
		"begins later":                      {of(claims{"nbf": ago(-time.Minute)}), CheckNotBefore},
		"issued in the future":              {of(claims{"iat": ago(-time.Minute)}), CheckIssuedAt},
		"issued too long ago":               {of(claims{"iat": ago(61 * time.Minute)}), CheckAge},
		"no iat, though there is a max age": {of(claims{"iat": nil}), CheckClaim},
		"another audience":                  {of(claims{"aud": "https://kubernetes.default.svc"}), CheckAudience},
		"part of the audience":              {of(claims{"aud": "kafk"}), CheckAudience},
		"no audience":                       {of(claims{"aud": nil}), CheckAudience},
		"an empty list of audiences":        {of(claims{"aud": []string{}}), CheckAudience},
		"a required claim missing":          {of(claims{"team": nil}), CheckClaim},
		"no sub":                            {of(claims{"sub": nil}), CheckClaim},
		"an empty sub":                      {of(claims{"sub": ""}), CheckClaim},
	} {
		t.Run(name, func(t *testing.T) {
			e, err := tokens.Verify(t.Context(), test.token)
			wantCheck(t, err, test.check, test.token)
			if (e == nil) != (err != nil) {
				t.Errorf("evidence %+v with error %v", e, err)
			}
			if _, again := tokens.Verify(t.Context(), test.token); fmt.Sprint(again) != fmt.Sprint(err) {
				t.Errorf("at first %v, then %v", err, again)
			}
		})
	}
	if n := tokens.Counts(); n["accepted"] != 18 || n[CheckExpiry] != 4 {
		t.Errorf("counted: %v", n)
	}
}

func TestEvidenceSaysWhoTheTokenIsOfAndWhenItEnds(t *testing.T) {
	for _, alg := range DefaultAlgorithms {
		key := newSigningKey(t, jose.SignatureAlgorithm(alg), "k1")
		tokens := trusted(t, key)
		tokens.issuers[0].Principal = "team"
		c := goodClaims(claims{"roles": []string{"a"}})
		e, err := tokens.Verify(t.Context(), key.sign(t, c, nil))
		if err != nil {
			t.Fatal(alg, err)
		}
		ends := time.Unix(c["exp"].(int64), 0).Add(30 * time.Second)
		if e.Source != SourceSASL || e.Issuer != testIssuer || e.Subject != "payments" || !e.ID.IsZero() ||
			!e.Expires.Equal(ends) || e.Claims["sub"] != "orders" {
			t.Errorf("%s: %+v", alg, e)
		}
	}
}

func TestATokenEndsAtItsMaxAgeWhereThatComesBeforeItsExp(t *testing.T) {
	key := newSigningKey(t, jose.ES256, "k1")
	tokens := trusted(t, key)
	issued := time.Now().Add(-time.Minute).Truncate(time.Second)
	token := key.sign(t, goodClaims(claims{"iat": issued.Unix(), "exp": issued.Add(48 * time.Hour).Unix()}), nil)
	e, err := tokens.Verify(t.Context(), token)
	if err != nil || !e.Expires.Equal(issued.Add(time.Hour+30*time.Second)) {
		t.Fatalf("%+v, %v", e, err)
	}
	tokens.now = func() time.Time { return e.Expires.Add(-time.Nanosecond) }
	if _, err = tokens.Verify(t.Context(), token); err != nil {
		t.Errorf("just before its end: %v", err)
	}
	tokens.now = func() time.Time { return e.Expires }
	_, err = tokens.Verify(t.Context(), token)
	wantCheck(t, err, CheckAge, token)
}

func TestAVerifiedTokenIsRefusedWhenItsKeyIsWithdrawn(t *testing.T) {
	before, after := newSigningKey(t, jose.ES256, "k1"), newSigningKey(t, jose.ES256, "k2")
	tokens := trusted(t, before)
	token := before.sign(t, goodClaims(nil), nil)
	for range 2 {
		if _, err := tokens.Verify(t.Context(), token); err != nil {
			t.Fatal(err)
		}
	}
	keys := tokens.issuers[0].Keys
	for _, set := range []struct {
		key   signingKey
		check string
	}{
		{after, CheckKey},
		{signingKey{private: after.private, kid: before.kid}, CheckSignature}, // another key of the same id
	} {
		keyFile(t, keys.o.File, set.key)
		if err := keys.Refresh(t.Context()); err != nil {
			t.Fatal(err)
		}
		_, err := tokens.Verify(t.Context(), token)
		wantCheck(t, err, set.check, token)
	}
}

func TestIssuersThatCannotBeAreRefused(t *testing.T) {
	for name, list := range map[string][]Issuer{
		"twice":                 {{Issuer: testIssuer, Keys: fromFile("")}, {Issuer: testIssuer, Keys: fromFile("")}},
		"a symmetric algorithm": {{Issuer: testIssuer, Keys: fromFile(""), Algorithms: []string{"HS256"}}},
		"no algorithm":          {{Issuer: testIssuer, Keys: fromFile(""), Algorithms: []string{"none"}}},
	} {
		if _, err := NewTokens(list...); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

var exampleTrust = spiffeid.RequireTrustDomainFromString("example.test")

func TestAJWTSVIDIsVerifiedWithTheBundleOfItsTrustDomain(t *testing.T) {
	key, stranger := newSigningKey(t, jose.ES256, "a1"), newSigningKey(t, jose.ES256, "a1")
	federated := newSigningKey(t, jose.ES256, "b1")
	bundle := jwtbundle.FromJWTAuthorities(exampleTrust, map[string]crypto.PublicKey{"a1": key.private.Public()})
	partner := spiffeid.RequireTrustDomainFromString("partner.test")
	bundles := jwtbundle.NewSet(bundle,
		jwtbundle.FromJWTAuthorities(partner, map[string]crypto.PublicKey{"b1": federated.private.Public()}))
	tokens, err := NewTokens(Issuer{TrustDomain: exampleTrust, Bundles: bundles, Audiences: []string{testAudience},
		Skew: 30 * time.Second, MaxAge: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	svid := func(change claims) claims {
		c := goodClaims(claims{"sub": orders, "iss": nil, "team": nil})
		for name, value := range change {
			if c[name] = value; value == nil {
				delete(c, name)
			}
		}
		return c
	}
	ago := func(d time.Duration) int64 { return time.Now().Add(-d).Unix() }
	for name, test := range map[string]struct{ token, check string }{
		"a good one":              {key.sign(t, svid(nil), claims{"typ": "JWT"}), ""},
		"with an issuer":          {key.sign(t, svid(claims{"iss": "https://spire.test"}), nil), ""},
		"of another authority":    {stranger.sign(t, svid(nil), nil), CheckSignature},
		"of an unknown authority": {newSigningKey(t, jose.ES256, "z").sign(t, svid(nil), nil), CheckKey},
		"without a key id":        {newSigningKey(t, jose.ES256, "").sign(t, svid(nil), nil), CheckKey},
		"of a trust domain not listed": {federated.sign(t, svid(claims{"sub": "spiffe://partner.test/x"}), nil),
			CheckIssuer},
		"signed by another trust domain": {federated.sign(t, svid(nil), nil), CheckKey},
		"an access token's typ":          {key.sign(t, svid(nil), claims{"typ": "at+jwt"}), CheckFormat},
		"for somebody else":              {key.sign(t, svid(claims{"aud": "other"}), nil), CheckAudience},
		"expired":                        {key.sign(t, svid(claims{"exp": ago(time.Hour)}), nil), CheckExpiry},
		"of the trust domain itself":     {key.sign(t, svid(claims{"sub": "spiffe://example.test"}), nil), CheckClaim},
		"of no SPIFFE ID":                {key.sign(t, svid(claims{"sub": "orders"}), nil), CheckIssuer},
	} {
		t.Run(name, func(t *testing.T) {
			e, err := tokens.Verify(t.Context(), test.token)
			wantCheck(t, err, test.check, test.token)
			if err == nil && (e.ID.String() != orders || e.Subject != orders || e.Issuer != "spiffe://example.test") {
				t.Errorf("%+v", e)
			}
		})
	}
	bundle.RemoveJWTAuthority("a1")
	good := key.sign(t, svid(nil), nil)
	_, err = tokens.Verify(t.Context(), good)
	wantCheck(t, err, CheckKey, good)
	bundles.Remove(exampleTrust)
	_, err = tokens.Verify(t.Context(), good)
	wantCheck(t, err, CheckKeys, good)
}

func TestAddressesOfIssuersAreHTTPS(t *testing.T) {
	for address, want := range map[string]bool{
		"https://issuer.test":        true,
		"https://issuer.test/realm":  true,
		"http://127.0.0.1:8080":      true,
		"http://[::1]:8080":          true,
		"http://localhost/":          true,
		"http://issuer.test":         false,
		"http://127.0.0.1.evil.test": false,
		"https://a:b@issuer.test":    false,
		"https://issuer.test/#x":     false,
		"file:///etc/passwd":         false,
		"issuer.test":                false,
		"https://":                   false,
		"":                           false,
		"%":                          false,
	} {
		if err := CheckRemote(address); (err == nil) != want {
			t.Errorf("%q: %v", address, err)
		}
	}
}

func FuzzVerify(f *testing.F) {
	key := newSigningKey(f, jose.ES256, "k1")
	tokens := trusted(f, key)
	good := key.sign(f, goodClaims(nil), nil)
	want, err := tokens.Verify(f.Context(), good)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(key.sign(f, `{"iss":"https://issuer.test","aud":[1],"exp":{}}`, nil))
	f.Add("eyJhbGciOiJub25lIn0.e30.")
	f.Add("..")
	f.Fuzz(func(t *testing.T, token string) {
		var e *Evidence
		var err error
		bounds.Check(t, len(token), 1<<10, func() { e, err = tokens.Verify(t.Context(), token) })
		if err == nil && !reflect.DeepEqual(e, want) { // base64 may have bits to spare: other text, the same token
			t.Errorf("accepted %q as %+v", token, e)
		}
		var wrong *TokenError
		if err != nil && !errors.As(err, &wrong) {
			t.Errorf("%T: %v", err, err)
		}
	})
}
