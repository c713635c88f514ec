package node

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"slices"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/sasl"
	"github.com/twmb/franz-go/pkg/sasl/plain"
	"github.com/twmb/franz-go/pkg/sasl/scram"
)

// DialFunc opens a connection that is not redirected.
type DialFunc func(ctx context.Context, network, address string) (net.Conn, error)

// newClient is the node's own client of a cluster. It connects when it is first used.
func newClient(c ClusterConfig, dial DialFunc) (*kgo.Client, error) {
	opts := []kgo.Opt{
		kgo.ClientID("klamm"),
		kgo.SeedBrokers(c.Bootstrap...),
		kgo.Dialer(dial),
		kgo.DialTimeout(5 * time.Second),
		kgo.RequestRetries(2), // who asks keeps asking, at a pace of its own
		kgo.DisableClientMetrics(),
	}
	if c.TLS != nil {
		conf, err := c.TLS.client()
		if err != nil {
			return nil, err
		}
		opts = append(opts, kgo.Dialer(func(ctx context.Context, network, address string) (net.Conn, error) {
			return dialTLS(ctx, dial, conf, network, address)
		}))
	}
	if c.Credentials != nil {
		if _, err := c.Credentials.password(); err != nil {
			return nil, err
		}
		opts = append(opts, kgo.SASL(mechanisms[c.Credentials.Mechanism](*c.Credentials)))
	}
	return kgo.NewClient(opts...)
}

func dialTLS(ctx context.Context, dial DialFunc, conf *tls.Config, network, address string) (net.Conn, error) {
	conn, err := dial(ctx, network, address)
	if err != nil {
		return nil, err
	}
	if conf.ServerName == "" {
		conf = conf.Clone()
		if conf.ServerName, _, err = net.SplitHostPort(address); err != nil {
			return nil, errors.Join(err, conn.Close())
		}
	}
	secure := tls.Client(conn, conf)
	if err = secure.HandshakeContext(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("TLS with %s (%s): %w", address, conf.ServerName, err), conn.Close())
	}
	return secure, nil
}

func (c *TLSConfig) client() (*tls.Config, error) {
	conf := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: c.ServerName}
	if c.CA != "" {
		pem, err := os.ReadFile(c.CA)
		if err != nil {
			return nil, fmt.Errorf("read tls.ca: %w", err)
		}
		conf.RootCAs = x509.NewCertPool()
		if !conf.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("tls.ca: no PEM certificate in %s", c.CA)
		}
	}
	if c.Cert != "" {
		load := func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			pair, err := tls.LoadX509KeyPair(c.Cert, c.Key)
			return &pair, err
		}
		if _, err := load(nil); err != nil {
			return nil, fmt.Errorf("load tls.cert and tls.key: %w", err)
		}
		conf.GetClientCertificate = load
	}
	return conf, nil
}

var (
	mechanisms = map[string]func(CredentialsConfig) sasl.Mechanism{
		"PLAIN": func(c CredentialsConfig) sasl.Mechanism {
			return plain.Plain(func(context.Context) (plain.Auth, error) {
				pass, err := c.password()
				return plain.Auth{User: c.Username, Pass: pass}, err
			})
		},
		"SCRAM-SHA-256": func(c CredentialsConfig) sasl.Mechanism { return scram.Sha256(c.scram) },
		"SCRAM-SHA-512": func(c CredentialsConfig) sasl.Mechanism { return scram.Sha512(c.scram) },
	}
	mechanismNames = slices.Sorted(maps.Keys(mechanisms))
)

func (c CredentialsConfig) scram(context.Context) (scram.Auth, error) {
	pass, err := c.password()
	return scram.Auth{User: c.Username, Pass: pass}, err
}

func (c CredentialsConfig) password() (string, error) {
	b, err := os.ReadFile(c.PasswordFile)
	if err != nil {
		return "", fmt.Errorf("read credentials.password-file: %w", err)
	}
	b = bytes.TrimSuffix(bytes.TrimSuffix(b, []byte("\n")), []byte("\r"))
	if len(b) == 0 {
		return "", fmt.Errorf("credentials.password-file: %s is empty", c.PasswordFile)
	}
	return string(b), nil
}
