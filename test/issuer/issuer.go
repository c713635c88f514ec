// Package issuer issues tokens for tests: JWTs of any claims, and a key set to verify them by.
package issuer

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
)

const keyID = "test"

// Issuer signs tokens with one key.
type Issuer struct {
	key *ecdsa.PrivateKey
}

// Claims are what a token says.
type Claims struct {
	Issuer   string        `json:"iss,omitempty"`
	Subject  string        `json:"sub,omitempty"`
	Audience []string      `json:"aud,omitempty"`
	Life     time.Duration `json:"-"` // from now; 0: an hour
}

// New makes an issuer.
func New() (*Issuer, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	return &Issuer{key}, err
}

// Token signs a token.
func (i *Issuer) Token(c Claims) (string, error) {
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: i.key, KeyID: keyID}},
		new(jose.SignerOptions).WithType("JWT"))
	if err != nil {
		return "", err
	}
	if c.Life == 0 {
		c.Life = time.Hour
	}
	now := time.Now()
	return jwt.Signed(signer).Claims(c).Claims(jwt.Claims{IssuedAt: jwt.NewNumericDate(now),
		Expiry: jwt.NewNumericDate(now.Add(c.Life))}).Serialize()
}

// KeySet is the JWKS (RFC 7517).
func (i *Issuer) KeySet() ([]byte, error) {
	return json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{
		{Key: i.key.Public(), KeyID: keyID, Algorithm: string(jose.ES256), Use: "sig"}}})
}
