package node

import (
	"fmt"
	"net/netip"
	"net/url"
	"regexp"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.yaml.in/yaml/v3"

	"klamm/enforcer/policy/strict"
	"klamm/node/upstream"
	"klamm/spiffe"
)

// UpstreamConfig is how the node reaches a cluster's brokers on behalf of workloads. What tls and credentials of the
// cluster leave out, the node's own client does likewise, with the node's SVID where a workload's would be shown.
type UpstreamConfig struct {
	// Default: plaintext.
	TLS *TLSConfig `yaml:"tls"`
	// How the node logs in for workloads, which then need not. Default: it does not; what clients log in with passes.
	Login *LoginConfig `yaml:"login"`
	// Let the login go over plaintext, where all who see the network can use what they see of it. Default: false.
	Cleartext bool `yaml:"cleartext"`
	// Whose network the connections come from: node, or client, by which brokers see the pod's address. The latter
	// takes tls, for a container's root can read what leaves it, and no firewall. Default: node.
	From Origin `yaml:"from"`
}

// Origin is the network namespace from which brokers are dialled.
type Origin string

// The origins.
const (
	FromNode   Origin = "node"
	FromClient Origin = "client"
)

var origins = []string{string(FromNode), string(FromClient)}

// TLSConfig is how brokers are verified, and what they are shown. Verification cannot be turned off.
type TLSConfig struct {
	// PEM file with the brokers' CAs. Default: the CAs the host trusts.
	CA string `yaml:"ca"`
	// The name in the brokers' certificates. Default: for each broker the name by which the cluster advertises it.
	ServerName string `yaml:"server-name"`
	// Brokers that have SVIDs: one of these SPIFFE IDs counts, and no name. They are verified by ca, then of one trust
	// domain, or by the bundles of the SPIRE agent.
	SPIFFEIDs []spiffeid.ID `yaml:"spiffe-ids"`
	// Whose X509-SVID brokers are shown: workload, in upstream alone, or node. Default: none.
	Certificate upstream.Whose `yaml:"certificate"`
	// Or PEM files with a certificate of the node's and its chain, and its key: both or none. Read anew at each
	// handshake.
	Cert string `yaml:"cert"`
	Key  string `yaml:"key"`
}

// LoginConfig is a SASL login by the node.
type LoginConfig struct {
	// SASL/OAUTHBEARER with a JWT-SVID: of the workload, and of the node itself in its own client.
	JWTSVID *JWTSVIDConfig `yaml:"jwt-svid"`

	// Or PLAIN, SCRAM-SHA-256, SCRAM-SHA-512, or OAUTHBEARER with a token that an issuer gives for client credentials.
	Mechanism string `yaml:"mechanism"`
	// Of PLAIN and SCRAM.
	Username string `yaml:"username"`
	// Holds the password alone; a line end at its end is dropped. Read anew at each login.
	PasswordFile string `yaml:"password-file"`
	// Of OAUTHBEARER: the issuer's token endpoint, an https URL or one of this host.
	TokenURL string `yaml:"token-url"`
	ClientID string `yaml:"client-id"`
	// As password-file.
	ClientSecretFile string   `yaml:"client-secret-file"`
	Scopes           []string `yaml:"scopes"`
	// PEM file with the CAs of token-url. Default: the CAs the host trusts.
	CA string `yaml:"ca"`

	// SASL extensions of OAUTHBEARER, such as logicalCluster and identityPoolId.
	Extensions map[string]string `yaml:"extensions"`
}

// JWTSVIDConfig says what a JWT-SVID is for.
type JWTSVIDConfig struct {
	// As the brokers expect it (sasl.oauthbearer.expected.audience).
	Audience string `yaml:"audience" strict:"required"`
}

// UnmarshalYAML checks what goes together.
func (c *UpstreamConfig) UnmarshalYAML(node *yaml.Node) error {
	type plain UpstreamConfig
	return section(node, (*plain)(c), func() []check {
		return []check{
			{c.Login == nil || c.TLS != nil || c.Cleartext, key(node, "login"),
				"without tls who sees the network sees the login: add tls, or cleartext: true where that is no harm"},
			{!c.Cleartext || c.Login != nil && c.TLS == nil, key(node, "cleartext"),
				"there is no login in cleartext: leave it out"},
			{c.From == "" || slices.Contains(origins, string(c.From)), key(node, "from"),
				strict.Unknown("origin", string(c.From), origins)},
			{c.From != FromClient || c.TLS != nil, key(node, "from"),
				"without tls a container's root could read and change what the node sends: add tls"},
		}
	})
}

// UnmarshalYAML checks what goes together.
func (c *TLSConfig) UnmarshalYAML(node *yaml.Node) error {
	type plain TLSConfig
	return section(node, (*plain)(c), func() []check {
		ids := key(node, "spiffe-ids")
		checks := []check{
			{(c.Cert == "") == (c.Key == ""), node, "cert and key are given together or not at all"},
			{c.Cert == "" || c.Certificate == upstream.Nobody, key(node, "certificate"), "give it, or cert and key"},
			{c.Certificate == upstream.Nobody || slices.Contains(certificates, string(c.Certificate)),
				key(node, "certificate"), strict.Unknown("certificate", string(c.Certificate), certificates)},
			{c.SPIFFEIDs == nil || len(c.SPIFFEIDs) > 0, ids, "no SPIFFE ID: leave the key out to go by names"},
		}
		for i, id := range c.SPIFFEIDs {
			checks = append(checks,
				check{id.Path() != "", at(ids, i), "want the SPIFFE ID of a broker, like spiffe://example.org/kafka"},
				check{c.CA == "" || id.TrustDomain() == c.SPIFFEIDs[0].TrustDomain(), at(ids, i),
					"ca is the bundle of one trust domain, and this is another: leave ca out to ask the SPIRE agent"})
		}
		return checks
	})
}

var certificates = []string{string(upstream.Workload), string(upstream.Node)}

// loginKeys are the keys that a mechanism takes, and whether it needs them.
var loginKeys = map[string]map[string]bool{
	"PLAIN":         {"username": true, "password-file": true},
	"SCRAM-SHA-256": {"username": true, "password-file": true},
	"SCRAM-SHA-512": {"username": true, "password-file": true},
	"OAUTHBEARER": {"token-url": true, "client-id": true, "client-secret-file": true, "scopes": false, "ca": false,
		"extensions": false},
	"jwt-svid": {"extensions": false},
}

// UnmarshalYAML checks that there is what the mechanism takes, and nothing else.
func (c *LoginConfig) UnmarshalYAML(node *yaml.Node) error {
	type plain LoginConfig
	return section(node, (*plain)(c), func() []check {
		kind := c.Mechanism
		if c.JWTSVID != nil {
			kind = "jwt-svid"
		}
		checks := []check{
			{(c.JWTSVID == nil) != (c.Mechanism == ""), node, "give either jwt-svid or mechanism"},
			{c.JWTSVID != nil || c.Mechanism == "" || loginKeys[kind] != nil, key(node, "mechanism"),
				strict.Unknown("mechanism", c.Mechanism, upstream.Mechanisms())},
			{c.JWTSVID == nil || c.JWTSVID.Audience != "", key(key(node, "jwt-svid"), "audience"), "the audience is empty"},
		}
		for name, value := range map[string]string{"username": c.Username, "password-file": c.PasswordFile,
			"token-url": c.TokenURL, "client-id": c.ClientID, "client-secret-file": c.ClientSecretFile, "ca": c.CA} {
			checks = append(checks, c.takes(node, kind, name, value != ""))
		}
		checks = append(checks, c.takes(node, kind, "scopes", len(c.Scopes) > 0),
			c.takes(node, kind, "extensions", len(c.Extensions) > 0))
		if c.TokenURL != "" {
			err := checkTokenURL(c.TokenURL)
			checks = append(checks, check{err == nil, key(node, "token-url"), fmt.Sprint(err)})
		}
		for name, value := range c.Extensions {
			checks = append(checks, check{extensionName.MatchString(name) && name != "auth" && extensionValue.MatchString(value),
				key(key(node, "extensions"), name), "want letters as name, not auth, and printable ASCII as value"})
		}
		return checks
	})
}

// Of KIP-342.
var (
	extensionName  = regexp.MustCompile(`^[A-Za-z]+$`)
	extensionValue = regexp.MustCompile(`^[\x21-\x7E \t\r\n]+$`)
)

func (c *LoginConfig) takes(node *yaml.Node, kind, name string, given bool) check {
	needs, takes := loginKeys[kind][name]
	switch {
	case loginKeys[kind] == nil || given == takes || takes && !needs:
		return check{ok: true}
	case given:
		return check{at: key(node, name), message: fmt.Sprintf("%s has no %s", kind, name)}
	}
	return check{at: key(node, name), message: fmt.Sprintf("%s needs %s", kind, name)}
}

func checkTokenURL(s string) error {
	u, err := url.Parse(s)
	if err != nil || u.Host == "" || u.User != nil || u.Scheme != "https" && u.Scheme != "http" {
		return fmt.Errorf("want a URL like https://issuer.example/token, without a user in it")
	}
	ip, _ := netip.ParseAddr(u.Hostname())
	if u.Scheme == "http" && !ip.IsLoopback() {
		return fmt.Errorf("the client's secret would go in cleartext: want https")
	}
	return nil
}

// upstreams checks what concerns other sections.
func (c *Config) upstreams(clusters *yaml.Node) (checks []check) {
	bySPIRE := slices.ContainsFunc(c.asked(), func(s source) bool { return s.name == spiffe.SourceSPIRE })
	for i, cluster := range c.Clusters {
		at := key(clusters.Content[i], "upstream")
		if u := cluster.Upstream; u != nil {
			checks = append(checks,
				check{!u.asWorkload() || bySPIRE, at,
					"SVIDs of workloads take a SPIRE agent: add section spire, and let attestation.sources name it"},
				check{!u.fromClient() || !c.Intercept.Firewall, key(at, "from"),
					"the firewall drops what containers send to brokers: give intercept.firewall: false too"})
		}
		tls, login := cluster.own()
		checks = append(checks, check{!needsNode(tls, login) || c.SPIRE != nil, at,
			"SVIDs of the node take a SPIRE agent: add section spire, or give tls and credentials of the node's own client"})
	}
	return checks
}

// asWorkload tells whether brokers see the workload's own identity.
func (c *UpstreamConfig) asWorkload() bool {
	return c.TLS != nil && c.TLS.Certificate == upstream.Workload || c.Login != nil && c.Login.JWTSVID != nil
}

// needsNode tells whether the node has to have an identity.
func needsNode(tls *TLSConfig, login *LoginConfig) bool {
	return tls != nil && (tls.Certificate != upstream.Nobody || len(tls.SPIFFEIDs) > 0 && tls.CA == "") ||
		login != nil && login.JWTSVID != nil
}

// own is how the node's own client reaches brokers: as is configured for it, and else as for workloads.
func (c *ClusterConfig) own() (*TLSConfig, *LoginConfig) {
	tls, login := c.TLS, c.Credentials
	if u := c.Upstream; u != nil && tls == nil {
		tls = u.TLS
	}
	if u := c.Upstream; u != nil && login == nil {
		login = u.Login
	}
	return tls, login
}

// paths are those of the files it names.
func (c *TLSConfig) paths() []*string { return []*string{&c.CA, &c.Cert, &c.Key} }

// paths are those of the files it names.
func (c *LoginConfig) paths() []*string {
	return []*string{&c.PasswordFile, &c.ClientSecretFile, &c.CA}
}

func (c *UpstreamConfig) fromClient() bool { return c != nil && c.From == FromClient }

// open is the way to brokers for workloads.
func (c *UpstreamConfig) open(agent *spiffe.Agent, dial DialFunc) (*upstream.Upstream, error) {
	if c == nil {
		return newUpstream(nil, nil, agent, dial)
	}
	return newUpstream(c.TLS, c.Login, agent, dial)
}

// newUpstream makes a way to brokers. Agent is nil where there is no SPIRE agent.
func newUpstream(tls *TLSConfig, login *LoginConfig, agent *spiffe.Agent, dial DialFunc) (*upstream.Upstream, error) {
	o := upstream.Options{Dial: dial}
	if agent != nil {
		o.Node = agent
	}
	if tls != nil {
		o.TLS = &upstream.TLS{CA: tls.CA, ServerName: tls.ServerName, IDs: tls.SPIFFEIDs, Certificate: tls.Certificate,
			Cert: tls.Cert, Key: tls.Key}
		if agent != nil {
			o.TLS.Bundles = agent
		}
	}
	if l := login; l != nil {
		o.Login = &upstream.Credentials{Mechanism: l.Mechanism, Username: l.Username, PasswordFile: l.PasswordFile,
			TokenURL: l.TokenURL, ClientID: l.ClientID, ClientSecretFile: l.ClientSecretFile, Scopes: l.Scopes, CA: l.CA,
			Extensions: l.Extensions}
		if l.JWTSVID != nil {
			o.Login.Audience = l.JWTSVID.Audience
		}
	}
	return upstream.New(o)
}
