package node

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/rs/zerolog"

	"klamm/node/truststore"
	"klamm/spiffe"
)

// BrokerTLS is how a broker shows itself to clients.
type BrokerTLS struct {
	Name    string // host, as clients dial it
	Chain   []*x509.Certificate
	Asks    bool  // for a client certificate
	Failed  error // of the handshake, after its chain was seen: a broker that insists on a client certificate
	Version uint16
}

// ProbeBrokerTLS speaks TLS to a broker, host:port, as long as it takes to see its certificate, which it does not
// verify.
func ProbeBrokerTLS(ctx context.Context, broker string) (*BrokerTLS, error) {
	host, _, err := splitBroker(broker)
	if err != nil {
		return nil, err
	}
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", broker)
	if err != nil {
		return nil, err
	}
	defer func() { _ = conn.Close() }()
	b := &BrokerTLS{Name: host}
	secure := tls.Client(conn, &tls.Config{ServerName: host, MinVersion: tls.VersionTLS12, SessionTicketsDisabled: true,
		InsecureSkipVerify: true, //nolint:gosec // to see the certificate is what it is for; nothing is sent
		VerifyPeerCertificate: func(ders [][]byte, _ [][]*x509.Certificate) error {
			for _, der := range ders {
				c, err := x509.ParseCertificate(der)
				if err != nil {
					return err
				}
				b.Chain = append(b.Chain, c)
			}
			return nil
		},
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			b.Asks = true
			return new(tls.Certificate), nil
		}})
	err = secure.HandshakeContext(ctx)
	if len(b.Chain) == 0 {
		return nil, fmt.Errorf("%s shows no certificate: %w: does it speak TLS at this port?", broker, err)
	}
	b.Failed, b.Version = err, secure.ConnectionState().Version
	return b, nil
}

// ProbeLeaf has the issuer of a cluster make a certificate for a broker's name.
func ProbeLeaf(ctx context.Context, c Config, cluster ClusterConfig, name string) (_ []*x509.Certificate, err error) {
	var agent *spiffe.Agent
	if cluster.Clients.needsAgent() {
		agent = spiffe.OpenAgent(c.SPIRE.WorkloadAPI, zerolog.Nop())
		defer func() { err = errors.Join(err, agent.Close()) }()
		if err := awaitSVID(ctx, agent); err != nil {
			return nil, err
		}
	}
	issuer, done, err := OpenIssuer(cluster.Clients.Issuer, agent, zerolog.Nop())
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, done()) }()
	leaf, err := issuer.Leaf(ctx, []string{name})
	if err != nil {
		return nil, err
	}
	var chain []*x509.Certificate
	for _, der := range leaf.Certificate {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		chain = append(chain, c)
	}
	return chain, nil
}

// awaitSVID waits for the agent to tell who the node is.
func awaitSVID(ctx context.Context, agent *spiffe.Agent) error {
	for {
		_, err := agent.GetX509SVID()
		if err == nil {
			return nil
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return err
		}
	}
}

// Trusts tells why a client with these roots does not take a chain for a name; nil: it does. Roots of nil are the
// host's.
func Trusts(roots *truststore.Store, chain []*x509.Certificate, name string) error {
	opts := x509.VerifyOptions{DNSName: name, Intermediates: x509.NewCertPool()}
	if roots != nil {
		opts.Roots = roots.Pool()
	}
	for _, above := range chain[1:] {
		opts.Intermediates.AddCert(above)
	}
	_, err := chain[0].Verify(opts)
	return err
}
