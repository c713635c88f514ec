// Package ca is a certificate authority for tests: brokers, clients, and workloads with SVIDs.
package ca

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"net/url"
	"os"
	"time"
)

// lifetime is how long a certificate is valid, before now and after.
const lifetime = 24 * time.Hour

// Authority is a root that signs leaves.
type Authority struct {
	Certificate *x509.Certificate
	key         *ecdsa.PrivateKey
}

// Leaf says whom a certificate is for, a server or a client.
type Leaf struct {
	Subject pkix.Name
	Names   []string  // DNS names and IP addresses
	ID      string    // a URI, such as a SPIFFE ID; empty: none
	Expires time.Time // may be past by less than a day; zero: in a day
}

// New makes a root of this common name.
func New(name string) (*Authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	root := &x509.Certificate{Subject: pkix.Name{CommonName: name}, SerialNumber: big.NewInt(now.UnixNano()),
		NotBefore: now.Add(-lifetime), NotAfter: now.Add(lifetime),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign}
	der, err := x509.CreateCertificate(rand.Reader, root, root, key.Public(), key)
	if err != nil {
		return nil, err
	}
	root, err = x509.ParseCertificate(der)
	return &Authority{root, key}, err
}

// Issue signs a certificate.
func (a *Authority) Issue(l Leaf) (*tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	t := &x509.Certificate{Subject: l.Subject, SerialNumber: big.NewInt(time.Now().UnixNano()),
		NotBefore: a.Certificate.NotBefore, NotAfter: a.Certificate.NotAfter, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	if !l.Expires.IsZero() {
		t.NotAfter = l.Expires
	}
	for _, name := range l.Names {
		if ip := net.ParseIP(name); ip != nil {
			t.IPAddresses = append(t.IPAddresses, ip)
		} else {
			t.DNSNames = append(t.DNSNames, name)
		}
	}
	if l.ID != "" {
		id, err := url.Parse(l.ID)
		if err != nil {
			return nil, err
		}
		t.URIs = []*url.URL{id}
	}
	der, err := x509.CreateCertificate(rand.Reader, t, a.Certificate, key.Public(), a.key)
	if err != nil {
		return nil, err
	}
	leaf, err := x509.ParseCertificate(der)
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}, err
}

// Pool trusts this root alone.
func (a *Authority) Pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(a.Certificate)
	return pool
}

// PEM is the root's certificate.
func (a *Authority) PEM() []byte { return encode("CERTIFICATE", a.Certificate.Raw) }

// PEM is a certificate with its chain, and its key in PKCS #8.
func PEM(c *tls.Certificate) (chain, key []byte, err error) {
	for _, der := range c.Certificate {
		chain = append(chain, encode("CERTIFICATE", der)...)
	}
	der, err := x509.MarshalPKCS8PrivateKey(c.PrivateKey)
	return chain, encode("PRIVATE KEY", der), err
}

// Write writes a certificate with its chain, and its key, to files that only their owner can read.
func Write(c *tls.Certificate, chainFile, keyFile string) error {
	chain, key, err := PEM(c)
	if err != nil {
		return err
	}
	return errors.Join(os.WriteFile(chainFile, chain, 0o600), os.WriteFile(keyFile, key, 0o600))
}

func encode(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}
