package issuer

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// signer is a CA of a test.
type signer struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// make makes a certificate of what change says beyond the usual, signed by s; a nil s signs itself.
func (s *signer) make(t testing.TB, change func(*x509.Certificate)) *signer {
	t.Helper()
	key, err := newKey()
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	c := &x509.Certificate{SerialNumber: big.NewInt(now.UnixNano()), Subject: pkix.Name{CommonName: t.Name()},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	change(c)
	above := s
	if s == nil {
		above = &signer{c, key}
	}
	der, err := x509.CreateCertificate(rand.Reader, c, above.cert, key.Public(), above.key)
	if err != nil {
		t.Fatal(err)
	}
	made := &signer{key: key}
	if made.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	return made
}

func authorityOf(c *x509.Certificate) {
	c.IsCA, c.BasicConstraintsValid, c.ExtKeyUsage = true, true, nil
	c.KeyUsage = x509.KeyUsageCertSign
}

func named(names ...string) func(*x509.Certificate) {
	return func(c *x509.Certificate) { c.DNSNames, c.IPAddresses = split(names) }
}

// confinedTo is an intermediate as an administrator should issue it.
func confinedTo(domains ...string) func(*x509.Certificate) {
	return func(c *x509.Certificate) {
		authorityOf(c)
		c.Subject.CommonName = "brokers on this node"
		c.PermittedDNSDomainsCritical, c.PermittedDNSDomains = true, domains
		c.ExcludedIPRanges = []*net.IPNet{{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)},
			{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}}
	}
}

func root(t testing.TB) *signer { t.Helper(); return (*signer)(nil).make(t, authorityOf) }

func (s *signer) pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(s.cert)
	return pool
}

func text(certs ...*signer) (out []byte) {
	for _, c := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.cert.Raw})...)
	}
	return out
}

func (s *signer) keyText(t testing.TB) []byte {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(s.key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

func write(t testing.TB, file string, text []byte) string {
	t.Helper()
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// files are a certificate with its chain, and its key.
func (s *signer) files(t testing.TB, chain ...*signer) (cert, key string) {
	t.Helper()
	dir := t.TempDir()
	return write(t, filepath.Join(dir, "tls.crt"), text(append([]*signer{s}, chain...)...)),
		write(t, filepath.Join(dir, "tls.key"), s.keyText(t))
}

// wantTrusted fails unless a client that trusts root takes the certificate for all of names.
func wantTrusted(t testing.TB, c *tls.Certificate, root *signer, names ...string) {
	t.Helper()
	chain, err := parse(c.Certificate)
	if err != nil {
		t.Fatal(err)
	}
	intermediates := x509.NewCertPool()
	for _, above := range chain[1:] {
		intermediates.AddCert(above)
	}
	for _, name := range names {
		if _, err := chain[0].Verify(x509.VerifyOptions{DNSName: name, Roots: root.pool(),
			Intermediates: intermediates}); err != nil {
			t.Errorf("a client of %s: %v", name, err)
		}
	}
}
