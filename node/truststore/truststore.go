// Package truststore reads the files in which TLS clients keep whom they trust: PEM, and Java's JKS and PKCS #12.
package truststore

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"

	"github.com/pavlo-v-chernykh/keystore-go/v4"
	"software.sslmate.com/src/go-pkcs12"
)

// MaxSize is the largest file that is read. That of all public CAs has some 200 KB.
const MaxSize = 16 << 20

// Store is what a client trusts.
type Store struct {
	Kind         string // PEM, JKS or PKCS12
	Certificates []*x509.Certificate
}

// Pool is the store for Go's verification.
func (s *Store) Pool() *x509.CertPool {
	pool := x509.NewCertPool()
	for _, c := range s.Certificates {
		pool.AddCert(c)
	}
	return pool
}

// defaultPassword is what Java's own cacerts has; "" is for stores without one.
const defaultPassword = "changeit"

// ErrPassword says that a store opens with none of the passwords.
var ErrPassword = errors.New("the password is wrong, or one is needed")

var (
	magicJKS   = []byte{0xfe, 0xed, 0xfe, 0xed}
	magicJCEKS = []byte{0xce, 0xce, 0xce, 0xce}
)

// Read reads a store of any kind. Password is tried first, then Java's default and none. One without a certificate is
// an error.
func Read(r io.Reader, password string) (*Store, error) {
	data, err := io.ReadAll(io.LimitReader(r, MaxSize+1))
	if err != nil {
		return nil, err
	}
	s := new(Store)
	switch {
	case len(data) > MaxSize:
		return nil, fmt.Errorf("it has over %d MiB", MaxSize>>20)
	case bytes.HasPrefix(data, magicJCEKS):
		return nil, errors.New("it is a JCEKS store: convert it with keytool -importkeystore -deststoretype PKCS12")
	case bytes.HasPrefix(data, magicJKS):
		s.Kind = "JKS"
		if err = boundJKS(data); err == nil {
			s.Certificates, err = tried(data, password, fromJKS)
		}
	case len(data) > 0 && data[0] == 0x30: // an ASN.1 sequence
		s.Kind = "PKCS12"
		if err = boundPKCS12(data); err == nil {
			s.Certificates, err = tried(data, password, fromPKCS12)
		}
	default:
		s.Kind = "PEM"
		s.Certificates = fromPEM(data)
	}
	if err == nil && len(s.Certificates) == 0 {
		err = errors.New("it holds no certificate that is trusted")
	}
	if err != nil {
		return nil, err
	}
	return s, nil
}

// tried reads with each password: to one without a password any password is wrong, too.
func tried(data []byte, password string, read func([]byte, string) ([]*x509.Certificate, error)) (
	[]*x509.Certificate, error) {
	var failed error
	for _, p := range []string{password, defaultPassword, ""} {
		certs, err := read(data, p)
		if err == nil {
			return certs, nil
		}
		if failed == nil || errors.Is(err, ErrPassword) {
			failed = err
		}
	}
	return nil, failed
}

func fromPEM(data []byte) (certs []*x509.Certificate) {
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" && block.Type != "TRUSTED CERTIFICATE" {
			continue
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			continue // as OpenSSL and Go do: old stores hold what no longer parses
		}
		certs = append(certs, c)
	}
	return certs
}

// fromJKS reads the entries of certificates; those of keys are no trust.
func fromJKS(data []byte, password string) (certs []*x509.Certificate, err error) {
	store := keystore.New()
	if err := store.Load(bytes.NewReader(data), []byte(password)); err != nil {
		if err.Error() == "got invalid digest" {
			return nil, ErrPassword
		}
		return nil, fmt.Errorf("read the JKS store: %w", err)
	}
	for _, alias := range store.Aliases() {
		if !store.IsTrustedCertificateEntry(alias) {
			continue
		}
		entry, err := store.GetTrustedCertificateEntry(alias)
		if err != nil {
			return nil, err
		}
		if c, err := x509.ParseCertificate(entry.Certificate.Content); err == nil {
			certs = append(certs, c)
		}
	}
	return certs, nil
}

func fromPKCS12(data []byte, password string) ([]*x509.Certificate, error) {
	certs, err := pkcs12.DecodeTrustStore(data, password)
	switch {
	case errors.Is(err, pkcs12.ErrIncorrectPassword), errors.Is(err, pkcs12.ErrDecryption):
		return nil, ErrPassword
	case err != nil:
		return nil, fmt.Errorf("read the PKCS #12 store: %w", err)
	}
	return certs, nil
}
