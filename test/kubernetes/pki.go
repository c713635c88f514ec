package kubernetes

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

// Authority is the cluster's certificate authority. All it issues is written to dir as NAME.crt and NAME.key.
type Authority struct {
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

const lifetime = 24 * time.Hour

func newAuthority(dir string) (*Authority, error) {
	a := &Authority{dir: dir, cert: &x509.Certificate{
		Subject: pkix.Name{CommonName: "klamm test"}, SerialNumber: big.NewInt(1),
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(lifetime),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}}
	var err error
	if a.key, err = newKey(dir, "ca"); err != nil {
		return nil, err
	}
	return a, a.sign("ca", a.cert, a.key)
}

// Server issues a certificate for addresses.
func (a *Authority) Server(name string, addresses ...string) error {
	t := &x509.Certificate{
		Subject:     pkix.Name{CommonName: name},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	for _, address := range addresses {
		t.IPAddresses = append(t.IPAddresses, net.ParseIP(address))
	}
	return a.issue(name, t)
}

// Client issues a certificate that the API server takes for this user of this group (its x509 authentication).
func (a *Authority) Client(name, user, group string) error {
	return a.issue(name, &x509.Certificate{
		Subject:     pkix.Name{CommonName: user, Organization: []string{group}},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
}

func (a *Authority) issue(name string, t *x509.Certificate) error {
	t.SerialNumber, t.KeyUsage = big.NewInt(time.Now().UnixNano()), x509.KeyUsageDigitalSignature
	t.NotBefore, t.NotAfter = a.cert.NotBefore, a.cert.NotAfter
	key, err := newKey(a.dir, name)
	if err != nil {
		return err
	}
	return a.sign(name, t, key)
}

func (a *Authority) sign(name string, t *x509.Certificate, key *ecdsa.PrivateKey) error {
	der, err := x509.CreateCertificate(rand.Reader, t, a.cert, key.Public(), a.key)
	if err != nil {
		return err
	}
	return writePEM(filepath.Join(a.dir, name+".crt"), "CERTIFICATE", der)
}

// newKey also writes the public key, as NAME.pub: that of the service account tokens is wanted alone.
func newKey(dir, name string) (*ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return nil, err
	}
	return key, errors.Join(
		writePEM(filepath.Join(dir, name+".key"), "PRIVATE KEY", private),
		writePEM(filepath.Join(dir, name+".pub"), "PUBLIC KEY", public))
}

func writePEM(file, kind string, der []byte) error {
	return os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600)
}
