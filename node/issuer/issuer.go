// Package issuer gets certificates for brokers' names from whom clients trust already: the node shows them to clients
// whose TLS it ends.
package issuer

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"
)

// Issuer gives certificates.
type Issuer interface {
	// Leaf is a certificate for all of names (DNS names and IP addresses, at least one) with its key and chain, fit to be
	// shown to clients now. The error names whom it asked, and what for.
	Leaf(ctx context.Context, names []string) (*tls.Certificate, error)
}

// maxCommonName is RFC 5280's ub-common-name. A longer name stands in the SANs alone, where clients look.
const maxCommonName = 64

// check tells whether a certificate is whole: the key is its own, and each of its chain is signed by the next; and
// whether it may be shown now, see fit. It sets c.Leaf.
func check(c *tls.Certificate, names []string, now time.Time) error {
	chain, err := parse(c.Certificate)
	if err != nil {
		return err
	}
	c.Leaf = chain[0]
	signer, ok := c.PrivateKey.(crypto.Signer)
	if !ok {
		return fmt.Errorf("a private key of type %T", c.PrivateKey)
	}
	public, ok := c.Leaf.PublicKey.(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !public.Equal(signer.Public()) {
		return errors.New("the private key is not the certificate's")
	}
	for i, above := range chain[1:] {
		if err := chain[i].CheckSignatureFrom(above); err != nil {
			return fmt.Errorf("the chain is broken: %q is not signed by %q, which follows it: %w", chain[i].Subject,
				above.Subject, err)
		}
	}
	return fit(c.Leaf, names, now)
}

// fit tells whether a certificate may be shown for names now: it is valid, for servers, and for them all.
func fit(leaf *x509.Certificate, names []string, now time.Time) error {
	switch {
	case now.Before(leaf.NotBefore):
		return fmt.Errorf("the certificate is not valid before %s", leaf.NotBefore.Format(time.RFC3339))
	case now.After(leaf.NotAfter):
		return fmt.Errorf("the certificate expired at %s", leaf.NotAfter.Format(time.RFC3339))
	case !forServers(leaf):
		return errors.New("the certificate is not for servers (its extended key usage has no serverAuth)")
	}
	for _, name := range names {
		if err := leaf.VerifyHostname(name); err != nil {
			return fmt.Errorf("the certificate is not for %s: %w", name, err)
		}
	}
	return nil
}

func parse(chain [][]byte) (parsed []*x509.Certificate, err error) {
	if len(chain) == 0 {
		return nil, errors.New("there is no certificate")
	}
	for _, der := range chain {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("parse the certificate: %w", err)
		}
		parsed = append(parsed, c)
	}
	return parsed, nil
}

// forServers: without the extension a certificate is for all (RFC 5280, section 4.2.1.12).
func forServers(c *x509.Certificate) bool {
	return len(c.ExtKeyUsage) == 0 && len(c.UnknownExtKeyUsage) == 0 ||
		slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageServerAuth) || slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageAny)
}

// newKey is the key of a leaf; it is never written anywhere.
func newKey() (*ecdsa.PrivateKey, error) { return ecdsa.GenerateKey(elliptic.P256(), rand.Reader) }

// split parts DNS names from addresses.
func split(names []string) (dns []string, ips []net.IP) {
	for _, name := range names {
		if ip := net.ParseIP(name); ip != nil {
			ips = append(ips, ip)
		} else {
			dns = append(dns, name)
		}
	}
	return dns, ips
}

// commonName is the first name that fits.
func commonName(names []string) string {
	for _, name := range names {
		if len(name) <= maxCommonName {
			return name
		}
	}
	return ""
}

// certificates are those in a PEM text.
func certificates(text []byte) (ders [][]byte) {
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		if block.Type == "CERTIFICATE" {
			ders = append(ders, block.Bytes)
		}
	}
	return ders
}

// isRoot tells a certificate that signs itself; clients have it already.
func isRoot(c *x509.Certificate) bool { return c.CheckSignatureFrom(c) == nil }

func failed(whom string, names []string, err error) error {
	return fmt.Errorf("%s: a certificate for %s: %w", whom, strings.Join(names, ", "), err)
}
