package fake

import (
	"crypto/x509"
	"encoding/json"

	"github.com/go-jose/go-jose/v4"
)

// Root is the CA of the X509-SVIDs.
func (a *Agent) Root() *x509.Certificate { return a.root.Certificate }

// KeySet is the JWKS of the JWT-SVIDs, as SPIRE's OIDC discovery provider gives it.
func (a *Agent) KeySet() ([]byte, error) {
	return json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: a.key.Public(), KeyID: keyID}}})
}

// keyID is that of the key of the JWT-SVIDs.
const keyID = "1"
