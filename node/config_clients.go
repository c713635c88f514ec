package node

import (
	"fmt"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/rs/zerolog"
	"go.yaml.in/yaml/v3"

	"klamm/enforcer/policy/strict"
	"klamm/node/issuer"
	"klamm/spiffe"
)

// ClientsConfig is how the clients of a cluster are met that speak TLS to its brokers.
type ClientsConfig struct {
	// Default: deny.
	TLS TLSMode `yaml:"tls"`
	// Host names by which clients know the brokers, beside those of bootstrap and those that brokers advertise.
	Names []string `yaml:"names"`
	// Of terminate: who signs the certificates that clients are shown for the brokers' names.
	Issuer *LeafIssuerConfig `yaml:"issuer"`
	// Of terminate: whose certificates count as evidence of who the client is. Default: none is asked for.
	ClientCertificates *ClientCertificatesConfig `yaml:"client-certificates"`
}

// TLSMode is what becomes of a client that speaks TLS.
type TLSMode string

// The TLS modes.
const (
	TLSDeny        TLSMode = "deny"        // it is refused with an alert
	TLSPassthrough TLSMode = "passthrough" // where the policy allows it, it passes unread
	TLSTerminate   TLSMode = "terminate"   // its TLS ends at the node, which shows a certificate for the broker's name
)

var tlsModes = []string{string(TLSDeny), string(TLSPassthrough), string(TLSTerminate)}

// LeafIssuerConfig is who signs. Exactly one is given.
type LeafIssuerConfig struct {
	Vault        *VaultConfig        `yaml:"vault"`
	Intermediate *IntermediateConfig `yaml:"intermediate"`
	Files        *KeyPairConfig      `yaml:"files"`
	CertManager  *CertManagerConfig  `yaml:"cert-manager"`
	SPIRE        *SVIDConfig         `yaml:"spire"`
}

// VaultConfig is a role of the PKI secrets engine of HashiCorp Vault or OpenBao. The node needs the right to update
// MOUNT/sign/ROLE, and no other.
type VaultConfig struct {
	// https://host:port; http only to this host.
	Address string `yaml:"address" strict:"required"`
	// Default: none.
	Namespace string `yaml:"namespace"`
	// Default: pki.
	Mount string `yaml:"mount"`
	Role  string `yaml:"role" strict:"required"`
	// Of a certificate. Default: as the role has it.
	TTL time.Duration `yaml:"ttl"`
	// PEM file with Vault's CAs. Default: the CAs the host trusts.
	CA string `yaml:"ca"`

	// One of these. A file with a token, read anew each time, as Vault Agent renews it.
	TokenFile  string                 `yaml:"token-file"`
	AppRole    *AppRoleConfig         `yaml:"app-role"`
	Kubernetes *VaultKubernetesConfig `yaml:"kubernetes"`
}

// AppRoleConfig is a login by Vault's auth method approle.
type AppRoleConfig struct {
	// Default: approle.
	Mount        string `yaml:"mount"`
	RoleID       string `yaml:"role-id" strict:"required"`
	SecretIDFile string `yaml:"secret-id-file" strict:"required"`
}

// VaultKubernetesConfig is a login by Vault's auth method kubernetes, with the node's own service account.
type VaultKubernetesConfig struct {
	// Default: kubernetes.
	Mount string `yaml:"mount"`
	Role  string `yaml:"role" strict:"required"`
	// Default: /var/run/secrets/kubernetes.io/serviceaccount/token.
	TokenFile string `yaml:"token-file"`
}

// IntermediateConfig is a CA that signs in the node's memory. Its certificate must confine it to the brokers' names.
type IntermediateConfig struct {
	// PEM files: its certificate and chain, and its key. Read anew when they change.
	Cert string `yaml:"cert" strict:"required"`
	Key  string `yaml:"key" strict:"required"`
	// Of a certificate, up to 24h. Default: 24h.
	TTL time.Duration `yaml:"ttl"`
}

// KeyPairConfig is a certificate for all brokers' names, which somebody else renews.
type KeyPairConfig struct {
	// PEM files: the certificate and its chain, and its key. Read anew when they change.
	Cert string `yaml:"cert" strict:"required"`
	Key  string `yaml:"key" strict:"required"`
}

// CertManagerConfig is a secret of cert-manager's with a certificate for all brokers' names.
type CertManagerConfig struct {
	// Where it is mounted: tls.crt, tls.key, and ca.crt if its issuer gives one.
	Directory string `yaml:"directory" strict:"required"`
}

// SVIDConfig is an X509-SVID of the node's that has the brokers' names as DNS names.
type SVIDConfig struct {
	// Which one, where the node has several. Default: the first.
	Hint string `yaml:"hint"`
}

// ClientCertificatesConfig says whose certificates count.
type ClientCertificatesConfig struct {
	// PEM files with CAs. A certificate of theirs is evidence by its subject.
	CA []string `yaml:"ca"`
	// SVIDs of the trust domains that the SPIRE agent has bundles of. They are evidence by their SPIFFE ID.
	SPIRE bool `yaml:"spire"`
	// A client without a certificate is refused. Default: false.
	Required bool `yaml:"required"`
}

// What is where, unless it is said.
const (
	defaultMount        = "pki"
	defaultAppRole      = "approle"
	defaultKubernetes   = "kubernetes"
	serviceAccountToken = "/var/run/secrets/kubernetes.io/serviceaccount/token" //nolint:gosec // it is where one is
)

// UnmarshalYAML checks what goes with which mode.
func (c *ClientsConfig) UnmarshalYAML(node *yaml.Node) error {
	type plain ClientsConfig
	return section(node, (*plain)(c), func() []check {
		terminates := c.TLS == TLSTerminate
		checks := []check{
			{c.TLS == "" || slices.Contains(tlsModes, string(c.TLS)), key(node, "tls"),
				strict.Unknown("mode", string(c.TLS), tlsModes)},
			{!terminates || c.Issuer != nil, node, "terminate needs an issuer whom the clients trust: give issuer"},
			{terminates || c.Issuer == nil, key(node, "issuer"), "it is for tls: terminate"},
			{terminates || c.ClientCertificates == nil, key(node, "client-certificates"), "it is for tls: terminate"},
			{c.TLS == TLSPassthrough || terminates || c.Names == nil, key(node, "names"),
				"they are for tls: passthrough or terminate"},
		}
		for i, name := range c.Names {
			checks = append(checks, check{hostName.MatchString(name), at(key(node, "names"), i),
				fmt.Sprintf("%q is no host name in lower case, like kafka.example", name)})
		}
		return checks
	})
}

var hostName = regexp.MustCompile(`^[a-z0-9_]([a-z0-9_.-]{0,251}[a-z0-9_])?$`)

// UnmarshalYAML checks that one is given.
func (c *LeafIssuerConfig) UnmarshalYAML(node *yaml.Node) error {
	type plain LeafIssuerConfig
	return section(node, (*plain)(c), func() []check {
		return []check{{one(c.Vault != nil, c.Intermediate != nil, c.Files != nil, c.CertManager != nil, c.SPIRE != nil),
			node, "give one of vault, intermediate, files, cert-manager, spire"}}
	})
}

// one tells whether exactly one is true.
func one(given ...bool) bool {
	n := 0
	for _, g := range given {
		if g {
			n++
		}
	}
	return n == 1
}

var vaultPath = regexp.MustCompile(`^[A-Za-z0-9_-]+([./][A-Za-z0-9_-]+)*$`)

// UnmarshalYAML checks address, paths and the way to log in.
func (c *VaultConfig) UnmarshalYAML(node *yaml.Node) error {
	type plain VaultConfig
	c.Mount = defaultMount
	return section(node, (*plain)(c), func() []check {
		return []check{
			{isVault(c.Address), key(node, "address"),
				"want https://host:port, without a path; http only to a loopback address"},
			{vaultPath.MatchString(c.Mount), key(node, "mount"), "want the path of a secrets engine, like pki"},
			{vaultPath.MatchString(c.Role), key(node, "role"), "want the name of a role, like kafka"},
			{c.TTL >= 0, key(node, "ttl"), "want a duration like 24h"},
			{one(c.TokenFile != "", c.AppRole != nil, c.Kubernetes != nil), node,
				"give one way to log in: token-file, app-role or kubernetes"},
		}
	})
}

func isVault(address string) bool {
	u, err := url.Parse(address)
	if err != nil || u.Host == "" || u.User != nil || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" {
		return false
	}
	return u.Scheme == "https" || u.Scheme == "http" && isLoopback(u.Hostname())
}

// isLoopback tells of a host that is this one.
func isLoopback(host string) bool {
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.IsLoopback()
}

// UnmarshalYAML checks the mount.
func (c *AppRoleConfig) UnmarshalYAML(node *yaml.Node) error {
	type plain AppRoleConfig
	c.Mount = defaultAppRole
	return section(node, (*plain)(c), func() []check {
		return []check{{vaultPath.MatchString(c.Mount), key(node, "mount"), "want the path of an auth method, like approle"}}
	})
}

// UnmarshalYAML checks the mount.
func (c *VaultKubernetesConfig) UnmarshalYAML(node *yaml.Node) error {
	type plain VaultKubernetesConfig
	c.Mount, c.TokenFile = defaultKubernetes, serviceAccountToken
	return section(node, (*plain)(c), func() []check {
		return []check{{vaultPath.MatchString(c.Mount), key(node, "mount"),
			"want the path of an auth method, like kubernetes"}}
	})
}

// UnmarshalYAML checks the life of certificates.
func (c *IntermediateConfig) UnmarshalYAML(node *yaml.Node) error {
	type plain IntermediateConfig
	c.TTL = issuer.MaxLife
	return section(node, (*plain)(c), func() []check {
		return []check{{c.TTL > 0 && c.TTL <= issuer.MaxLife, key(node, "ttl"), "want a duration of up to 24h"}}
	})
}

// UnmarshalYAML checks that somebody's certificates count.
func (c *ClientCertificatesConfig) UnmarshalYAML(node *yaml.Node) error {
	type plain ClientCertificatesConfig
	return section(node, (*plain)(c), func() []check {
		return []check{{len(c.CA) > 0 || c.SPIRE, node, "give ca, or spire: true, or leave the key out"}}
	})
}

// clients checks what concerns other sections.
func (c *Config) clients(clusters *yaml.Node) (checks []check) {
	for i, cluster := range c.Clusters {
		at := key(clusters.Content[i], "clients")
		encrypted := cluster.Upstream != nil && cluster.Upstream.TLS != nil
		checks = append(checks,
			check{cluster.Clients.TLS != TLSTerminate || encrypted || cluster.isLocal(), key(at, "tls"),
				"what clients encrypt would go on to the brokers in plaintext: give upstream.tls, too"},
			check{!cluster.Clients.needsAgent() || c.SPIRE != nil, at, "SVIDs take a SPIRE agent: add section spire"})
	}
	return checks
}

func (c *ClientsConfig) needsAgent() bool {
	return c.Issuer != nil && c.Issuer.SPIRE != nil || c.ClientCertificates != nil && c.ClientCertificates.SPIRE
}

// isLocal tells whether all brokers are on this host, where plaintext is seen by nobody else.
func (c *ClusterConfig) isLocal() bool {
	return !slices.ContainsFunc(c.Bootstrap, func(b string) bool {
		host, _, err := splitBroker(b)
		return err != nil || !isLoopback(host)
	})
}

// paths are those of the files it names.
func (c *ClientsConfig) paths() (paths []*string) {
	if certs := c.ClientCertificates; certs != nil {
		for i := range certs.CA {
			paths = append(paths, &certs.CA[i])
		}
	}
	if c.Issuer == nil {
		return paths
	}
	if v := c.Issuer.Vault; v != nil {
		paths = append(paths, &v.CA, &v.TokenFile)
		if v.AppRole != nil {
			paths = append(paths, &v.AppRole.SecretIDFile)
		}
		if v.Kubernetes != nil {
			paths = append(paths, &v.Kubernetes.TokenFile)
		}
	}
	if i := c.Issuer.Intermediate; i != nil {
		paths = append(paths, &i.Cert, &i.Key)
	}
	if f := c.Issuer.Files; f != nil {
		paths = append(paths, &f.Cert, &f.Key)
	}
	if m := c.Issuer.CertManager; m != nil {
		paths = append(paths, &m.Directory)
	}
	return paths
}

// OpenIssuer makes the issuer that a configuration names. Agent is nil where there is no SPIRE agent. Close ends what
// it does in the background.
func OpenIssuer(c *LeafIssuerConfig, agent *spiffe.Agent, log zerolog.Logger) (
	i issuer.Issuer, done func() error, err error) {
	done = func() error { return nil }
	switch {
	case c.Files != nil:
		i, err = issuer.NewFiles(c.Files.Cert, c.Files.Key, log)
	case c.CertManager != nil:
		i, err = issuer.NewCertManager(c.CertManager.Directory, log)
	case c.SPIRE != nil:
		i = issuer.SVID{Fetch: agent.Hinted(c.SPIRE.Hint)}
	case c.Intermediate != nil:
		i, err = issuer.NewIntermediate(c.Intermediate.Cert, c.Intermediate.Key, c.Intermediate.TTL)
	default:
		i, err = c.Vault.open()
	}
	if err != nil {
		return nil, nil, err
	}
	if c.Vault != nil || c.Intermediate != nil {
		cache := issuer.NewCache(i, log)
		return cache, cache.Close, nil
	}
	return i, done, nil
}

func (c *VaultConfig) open() (issuer.Issuer, error) {
	client, err := issuer.VaultClient(c.CA)
	if err != nil {
		return nil, err
	}
	o := issuer.VaultOptions{Address: c.Address, Namespace: c.Namespace, Mount: c.Mount, Role: c.Role, Life: c.TTL,
		Client: client, TokenFile: c.TokenFile}
	if a := c.AppRole; a != nil {
		o.Login = &issuer.VaultLogin{Mount: a.Mount, Values: map[string]string{"role_id": a.RoleID},
			Files: map[string]string{"secret_id": a.SecretIDFile}}
	}
	if k := c.Kubernetes; k != nil {
		o.Login = &issuer.VaultLogin{Mount: k.Mount, Values: map[string]string{"role": k.Role},
			Files: map[string]string{"jwt": k.TokenFile}}
	}
	return issuer.NewVault(o), nil
}
