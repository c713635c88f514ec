package kafka

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"klamm/test/ca"
)

// TLS adds the listeners at TLSPort and SASLTLSPort.
type TLS struct {
	CA *ca.Authority // signs the brokers' certificates, for their names and addresses
	// Names are host names that the brokers advertise at these ports, one each, which clients must be able to resolve;
	// nil: their addresses.
	Names []string
	// ClientAuth is ssl.client.auth at TLSPort: none, requested or required; empty: none.
	ClientAuth string
	// Clients are the CAs of clients' certificates, such as a SPIFFE bundle; nil: CA.
	Clients []*x509.Certificate
	// Mapping are ssl.principal.mapping.rules, by which a certificate's subject becomes a principal; empty: Kafka's
	// default, by which it is the whole subject.
	Mapping string
}

// OAuth adds SASL/OAUTHBEARER with Kafka's own validator (KIP-768) at SASLPort and, where there is one, SASLTLSPort.
// The principal is the claim sub.
type OAuth struct {
	KeySet   string // URL of the JWKS: http, https or file
	CA       []byte // PEM of the CAs of an https URL; nil: those that Java trusts
	Issuer   string // claim iss; empty: any
	Audience string // in claim aud; empty: any
}

const handlers = "org.apache.kafka.common.security.oauthbearer."

// addTLS writes the broker's certificates, and adds the properties of TLS and OAuth.
func (c *Cluster) addTLS(b *broker, p map[string]string) error {
	if c.opts.OAuth != nil {
		if err := c.addOAuth(b, p); err != nil {
			return err
		}
	}
	o := c.opts.TLS
	if o == nil {
		return nil
	}
	certificate, err := o.CA.Issue(ca.Leaf{Subject: pkix.Name{CommonName: b.name}, Names: []string{b.name, b.host}})
	if err != nil {
		return err
	}
	chain, key, err := ca.PEM(certificate)
	if err != nil {
		return err
	}
	clients := o.CA.PEM()
	if o.Clients != nil {
		clients = nil
		for _, c := range o.Clients {
			clients = append(clients, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
		}
	}
	keyStore, trustStore := filepath.Join(b.dir, "keystore.pem"), filepath.Join(b.dir, "truststore.pem")
	if err := os.WriteFile(keyStore, append(key, chain...), 0o600); err != nil {
		return err
	}
	if err := os.WriteFile(trustStore, clients, 0o600); err != nil {
		return err
	}
	listeners := fmt.Sprintf(",TLS://%[1]s:%[2]d,SASLTLS://%[1]s:%[3]d", b.host, TLSPort, SASLTLSPort)
	p["listeners"] += listeners
	p["advertised.listeners"] += strings.ReplaceAll(listeners, b.host, b.name)
	p["listener.security.protocol.map"] += ",TLS:SSL,SASLTLS:SASL_SSL"
	for _, listener := range []string{"tls", "sasltls"} {
		maps.Copy(p, map[string]string{
			"listener.name." + listener + ".ssl.keystore.type":       "PEM",
			"listener.name." + listener + ".ssl.keystore.location":   keyStore,
			"listener.name." + listener + ".ssl.truststore.type":     "PEM",
			"listener.name." + listener + ".ssl.truststore.location": trustStore,
		})
	}
	if o.ClientAuth != "" {
		p["listener.name.tls.ssl.client.auth"] = o.ClientAuth
	}
	if o.Mapping != "" {
		p["ssl.principal.mapping.rules"] = o.Mapping
	}
	for key, value := range p {
		if setting, is := strings.CutPrefix(key, "listener.name.sasl."); is {
			p["listener.name.sasltls."+setting] = value
		}
	}
	return nil
}

func (c *Cluster) addOAuth(b *broker, p map[string]string) error {
	o := c.opts.OAuth
	login := handlers + "OAuthBearerLoginModule required"
	if o.CA != nil {
		file := filepath.Join(b.dir, "oauth-ca.pem")
		if err := os.WriteFile(file, o.CA, 0o600); err != nil {
			return err
		}
		// With any option Kafka also makes a token of its own at start-up, which nobody sees, and wants to know whose.
		login += fmt.Sprintf(" ssl.truststore.type=PEM ssl.truststore.location=%q unsecuredLoginStringClaim_sub=unused", file)
	}
	maps.Copy(p, map[string]string{
		"listener.name.sasl.oauthbearer.sasl.jaas.config":                   login + ";",
		"listener.name.sasl.oauthbearer.sasl.server.callback.handler.class": handlers + "OAuthBearerValidatorCallbackHandler",
		"listener.name.sasl.sasl.oauthbearer.jwks.endpoint.url":             o.KeySet,
	})
	p["listener.name.sasl.sasl.enabled.mechanisms"] += ",OAUTHBEARER"
	for claim, want := range map[string]string{"issuer": o.Issuer, "audience": o.Audience} {
		if want != "" {
			p["listener.name.sasl.sasl.oauthbearer.expected."+claim] = want
		} else { // Kafka 4.4 wants that said
			p["listener.name.sasl.sasl.oauthbearer.allow.unverified."+claim] = "true"
		}
	}
	return nil
}

func milliseconds(d time.Duration) string { return strconv.FormatInt(d.Milliseconds(), 10) }
