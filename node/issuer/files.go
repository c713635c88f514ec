package issuer

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/rs/zerolog"
)

// Files is a certificate in PEM files, which somebody else renews. They are read anew when they have changed. What is
// in them is not used while it is wrong; what they held before is, until it expires.
type Files struct {
	log zerolog.Logger
	// paths finds the files each time; ca may be "".
	paths func() (cert, key, ca string)

	mu     sync.Mutex
	good   *tls.Certificate // nil: none was read yet
	stamp  string           // of the files that good is of
	warned string           // stamp of the files that were wrong
}

// NewFiles reads a certificate with its chain, and its key. What is wrong with them now is an error.
func NewFiles(cert, key string, log zerolog.Logger) (*Files, error) {
	return newFiles(func() (string, string, string) { return cert, key, "" }, log)
}

// NewCertManager reads tls.crt, tls.key and, where it is there, ca.crt in a directory, as cert-manager's secrets are
// mounted. The chain must then lead to one in ca.crt.
func NewCertManager(dir string, log zerolog.Logger) (*Files, error) {
	return newFiles(func() (string, string, string) {
		at := dir
		// Kubelet replaces all files of a volume at once, by this link: through it they are of one time.
		if now, err := filepath.EvalSymlinks(filepath.Join(dir, "..data")); err == nil {
			at = now
		}
		return filepath.Join(at, "tls.crt"), filepath.Join(at, "tls.key"), filepath.Join(at, "ca.crt")
	}, log)
}

func newFiles(paths func() (cert, key, ca string), log zerolog.Logger) (*Files, error) {
	f := &Files{paths: paths, log: log}
	if _, err := f.current(); err != nil {
		return nil, err
	}
	return f, nil
}

// Leaf is the certificate in the files, where it is for names.
func (f *Files) Leaf(_ context.Context, names []string) (*tls.Certificate, error) {
	c, err := f.current()
	if err == nil {
		err = fit(c.Leaf, names, time.Now())
	}
	if err != nil {
		cert, _, _ := f.paths()
		return nil, failed(cert, names, err)
	}
	return c, nil
}

func (f *Files) current() (*tls.Certificate, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	cert, key, ca := f.paths()
	now := stamp(cert, key, ca)
	if f.good != nil && now == f.stamp {
		return f.good, nil
	}
	c, err := load(cert, key, ca)
	switch {
	case err == nil:
		f.good, f.stamp = c, now
	case f.good == nil:
		return nil, err
	case f.warned != now:
		f.warned = now
		f.log.Warn().Err(err).Str("file", cert).Time("until", f.good.Leaf.NotAfter).
			Msg("the new certificate is not usable; the one before it is used until it expires")
	}
	return f.good, nil
}

// stamp changes with the files.
func stamp(files ...string) (s string) {
	for _, file := range files {
		if i, err := os.Stat(file); err == nil {
			s += fmt.Sprint(file, i.Size(), i.ModTime().UnixNano(), ";")
		}
	}
	return s
}

func load(cert, key, ca string) (*tls.Certificate, error) {
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		return nil, fmt.Errorf("load %s and %s: %w", cert, key, err)
	}
	if err := check(&pair, nil, time.Now()); err != nil {
		return nil, fmt.Errorf("%s: %w", cert, err)
	}
	if ca == "" {
		return &pair, nil
	}
	text, err := os.ReadFile(ca)
	if errors.Is(err, os.ErrNotExist) {
		return &pair, nil // ACME issuers give none
	}
	if err != nil {
		return nil, err
	}
	return &pair, leadsTo(&pair, text, ca)
}

// leadsTo tells whether a chain ends in one of the certificates of a PEM text.
func leadsTo(c *tls.Certificate, text []byte, file string) error {
	opts := x509.VerifyOptions{Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(),
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	for _, der := range certificates(text) {
		if root, err := x509.ParseCertificate(der); err == nil {
			opts.Roots.AddCert(root)
		}
	}
	chain, err := parse(c.Certificate)
	if err != nil {
		return err
	}
	for _, above := range chain[1:] {
		opts.Intermediates.AddCert(above)
	}
	if _, err := chain[0].Verify(opts); err != nil {
		return fmt.Errorf("the certificate is not of the CA in %s: %w", file, err)
	}
	return nil
}
