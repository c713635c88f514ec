package upstream

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"

	"klamm/node/secure"
)

// TLS says how brokers are verified, and what they are shown. Files are read anew at each handshake.
type TLS struct {
	CA string // PEM file with the brokers' CAs; empty: those the host trusts
	// ServerName is in the brokers' certificates. Empty: the name by which the cluster has the broker.
	ServerName string
	// IDs are the brokers' SPIFFE IDs. Then brokers have SVIDs, of which these count and no names. CA is the bundle of
	// the trust domain, which must be one, or Bundles are asked.
	IDs     []spiffeid.ID
	Bundles x509bundle.Source // of the SPIRE agent; nil: none
	// Certificate is whose SVID is shown. Cert and Key are files with a certificate and its chain, and its key, instead.
	Certificate Whose
	Cert, Key   string
}

// Whose SVID it is.
type Whose string

// The subjects of certificates.
const (
	Nobody   Whose = ""
	Workload Whose = "workload" // on whose behalf the connection is
	Node     Whose = "node"
)

// verifier makes connections TLS. There is no way to make it trust anybody.
type verifier struct{ *TLS }

func newVerifier(t *TLS) (*verifier, error) {
	v := &verifier{t}
	if _, err := readCA(t.CA); err != nil {
		return nil, err
	}
	if len(t.IDs) > 0 && t.CA == "" && t.Bundles == nil {
		return nil, errors.New("the brokers' SVIDs cannot be verified: there is no SPIRE agent to ask for bundles; " +
			"give it, or ca")
	}
	if t.Cert != "" {
		if _, err := v.pair(); err != nil {
			return nil, err
		}
	}
	return v, nil
}

// readCA reads the CAs of a file; of none it is nil, which stands for those of the host.
func readCA(file string) ([]*x509.Certificate, error) {
	if file == "" {
		return nil, nil
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read ca: %w", err)
	}
	var roots []*x509.Certificate
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			continue
		}
		root, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("read ca: %s: %w", file, err)
		}
		roots = append(roots, root)
	}
	if len(roots) == 0 {
		return nil, fmt.Errorf("read ca: no PEM certificate in %s", file)
	}
	return roots, nil
}

// trust makes a configuration trust these CAs alone, or those of the host.
func trust(conf *tls.Config, roots []*x509.Certificate) {
	if roots == nil {
		return
	}
	conf.RootCAs = x509.NewCertPool()
	for _, root := range roots {
		conf.RootCAs.AddCert(root)
	}
}

func (v *verifier) pair() (*tls.Certificate, error) {
	pair, err := tls.LoadX509KeyPair(v.Cert, v.Key)
	if err != nil {
		return nil, fmt.Errorf("load cert and key: %w", err)
	}
	return &pair, nil
}

// config verifies a broker. It has no session cache: a session resumed would be that of another workload.
func (v *verifier) config(broker string) (*tls.Config, error) {
	conf := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: v.ServerName}
	if conf.ServerName == "" {
		var err error
		if conf.ServerName, _, err = net.SplitHostPort(broker); err != nil {
			return nil, err
		}
	}
	roots, err := readCA(v.CA)
	if err != nil {
		return nil, err
	}
	if len(v.IDs) == 0 {
		trust(conf, roots)
		return conf, nil
	}
	bundles := v.Bundles
	if roots != nil {
		bundles = x509bundle.FromX509Authorities(v.IDs[0].TrustDomain(), roots)
	}
	tlsconfig.HookTLSClientConfig(conf, bundles, tlsconfig.AuthorizeOneOf(v.IDs...))
	return conf, nil
}

// certificate is what a broker is shown that asks; nil where none is configured.
func (v *verifier) certificate(subject Identity) (*tls.Certificate, error) {
	switch {
	case v.Cert != "":
		pair, err := v.pair()
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrTLS, err)
		}
		return pair, nil
	case v.Certificate == Nobody:
		return nil, nil
	case subject == nil:
		return nil, fmt.Errorf("%w: the node has no identity of its own: there is no SPIRE agent to ask", ErrNoSVID)
	}
	svid, err := subject.X509SVID()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoSVID, err)
	}
	return tlsconfig.GetCertificate(svid)(nil)
}

// handshake makes a connection TLS, with the broker that the name or the SPIFFE IDs say.
func (v *verifier) handshake(ctx context.Context, conn net.Conn, broker string, subject Identity) (*secured, error) {
	conf, err := v.config(broker)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrTLS, err)
	}
	certificate, err := v.certificate(subject)
	if err != nil {
		return nil, err
	}
	s := new(secured)
	if certificate != nil {
		conf.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			s.shown = true
			return certificate, nil
		}
	}
	s.Conn = secure.Client(conn, conf)
	if err := s.HandshakeContext(ctx); err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrTLS, v.wanted(conf), err)
	}
	return s, nil
}

// wanted says who the broker should be.
func (v *verifier) wanted(conf *tls.Config) string {
	if len(v.IDs) > 0 {
		return fmt.Sprintf("want one of %v", v.IDs)
	}
	return "want " + conf.ServerName
}

// secured is a TLS connection.
type secured struct {
	*secure.Conn
	shown bool // our certificate, for the broker asked
}

// Read is ErrTLS where the broker sends an alert.
func (s *secured) Read(b []byte) (int, error) {
	n, err := s.Conn.Read(b)
	return n, alerted(err)
}

// TryRead is Read that does not wait; see secure.Conn.
func (s *secured) TryRead(b []byte) (int, error) {
	n, err := s.Conn.TryRead(b)
	return n, alerted(err)
}

// alerted tells an alert of the other side from the ends of a connection. No OpError is in it: these are in order.
func alerted(err error) error {
	if op := new(net.OpError); errors.As(err, &op) && op.Op == "remote error" {
		return fmt.Errorf("%w: the broker says %w", ErrTLS, op.Err)
	}
	return err
}
