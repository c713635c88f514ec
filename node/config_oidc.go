package node

import (
	"fmt"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.yaml.in/yaml/v3"

	"klamm/enforcer/policy/strict"
	"klamm/spiffe"
)

// IssuerConfig is one issuer of OIDC tokens that is trusted. Exactly one of issuer and trust-domain is given.
type IssuerConfig struct {
	// The issuer as it calls itself: the claim iss must be this, byte for byte.
	Issuer string `yaml:"issuer"`
	// A SPIFFE trust domain, whose JWT-SVIDs are verified with the bundles of the SPIRE agent (section spire).
	TrustDomain string `yaml:"trust-domain"`
	// Of which a login's token must have one. Default: none, no login with a token of this issuer counts; what sections
	// kubernetes and token-file accept they say themselves.
	Audiences []string `yaml:"audiences"`
	// RS256, RS384, RS512, ES256, ES384, ES512, PS256, PS384, PS512, EdDSA. Default: RS256, ES256, PS256, EdDSA.
	Algorithms []string `yaml:"algorithms"`
	// How far the clocks of this host and of the issuer may be apart, 0s to 1m: a token counts until its exp plus this.
	// Default: 30s.
	Skew time.Duration `yaml:"skew"`
	// How long after its iat a token counts at most, whatever its exp; "0s": as long as that says. Default: 24h.
	MaxAge time.Duration `yaml:"max-age"`
	// The claim that names who it is, without "User:". Default: sub.
	PrincipalClaim string `yaml:"principal-claim"`
	// Claims that a token must have, beside those above.
	RequiredClaims []string `yaml:"required-claims"`
	// Where the keys are. Default: where the issuer's metadata says (/.well-known/openid-configuration).
	JWKS *JWKSConfig `yaml:"jwks"`
	// PEM file with the CA of the issuer's server. Default: the CAs the host trusts.
	CA string `yaml:"ca"`
	// File with the token by which the node may read metadata and keys. An API server of Kubernetes wants that of a
	// service account. Default: none.
	BearerFile string `yaml:"bearer-file"`
	// How often the keys are fetched anew, 10s to 24h: so long does a key count that the issuer has withdrawn. Keys that
	// are not known yet are looked for at once, though at most every 10s. Default: 10m.
	Refresh time.Duration `yaml:"refresh"`
	// How long keys count while they cannot be fetched, at least refresh. Default: 24h.
	MaxStale time.Duration `yaml:"max-stale"`
}

// JWKSConfig is where a key set is. Exactly one of the fields is given.
type JWKSConfig struct {
	URL  string `yaml:"url"`
	File string `yaml:"file"`
}

// KubernetesConfig is which service account tokens of pods count.
type KubernetesConfig struct {
	// Where the token is, as the pod sees it. Default: /var/run/secrets/klamm/token.
	Token string `yaml:"token"`
	// The only audience it may have: that of its volume in the pod (projected.sources.serviceAccountToken.audience).
	// Default: klamm.
	Audience string `yaml:"audience"`
	// Accept the API server's own audience: then workloads' files hold what is also a credential for the API server.
	APIServerAudience bool `yaml:"api-server-audience"`
	// One of section oidc: the tokens are proven by its keys, and count until their exp though the pod be deleted.
	Issuer string `yaml:"issuer"`
	// Asks the API server about each token, again and again: a deleted pod's counts for no more than 15 seconds.
	// Default: it is not asked, issuer is required.
	Review *ReviewConfig `yaml:"review"`
	// What a token must name as the pod's node. Default: any.
	Node string `yaml:"node"`
}

// ReviewConfig is how the API server is asked to review tokens. One of token-file, and cert and key, is given: of an
// account that may create tokenreviews, as ClusterRole system:auth-delegator may.
type ReviewConfig struct {
	// The API server's address.
	Server string `yaml:"server" strict:"required"`
	// PEM file with its CA. Default: the CAs the host trusts.
	CA        string `yaml:"ca"`
	TokenFile string `yaml:"token-file"`
	Cert      string `yaml:"cert"`
	Key       string `yaml:"key"`
	// How often a token is reviewed while a process with it is connected, 1s to 1m. The API server's own cache adds ten
	// seconds. Default: 3s.
	Every time.Duration `yaml:"every"`
	// How long a reviewed token counts while the API server does not answer, from every to 1h. Default: 15s.
	MaxStale time.Duration `yaml:"max-stale"`
}

// TokenFileConfig is a place where a workload may have a token, which it must be able to read itself.
type TokenFileConfig struct {
	// As the workload sees it.
	Path string `yaml:"path" strict:"required"`
	// One of section oidc; spiffe://TRUST-DOMAIN where that is a trust domain.
	Issuer string `yaml:"issuer" strict:"required"`
	// What the token must be for.
	Audience string `yaml:"audience" strict:"required"`
}

const (
	defaultToken    = "/var/run/secrets/klamm/token" //nolint:gosec // a path
	defaultAudience = "klamm"
	maxSkew         = time.Minute // what go-spiffe allows JWT-SVIDs
)

// Name is what other sections call the issuer.
func (c *IssuerConfig) Name() string {
	if c.TrustDomain != "" {
		return "spiffe://" + c.TrustDomain
	}
	return c.Issuer
}

// UnmarshalYAML fills in the defaults and checks what the issuer says by itself.
func (c *IssuerConfig) UnmarshalYAML(node *yaml.Node) error {
	type plain IssuerConfig
	c.Skew, c.MaxAge, c.Refresh, c.MaxStale = 30*time.Second, 24*time.Hour, 10*time.Minute, 24*time.Hour
	c.PrincipalClaim, c.Algorithms = "sub", spiffe.DefaultAlgorithms
	return section(node, (*plain)(c), func() []check {
		checks := []check{
			{(c.Issuer == "") != (c.TrustDomain == ""), node, "give either issuer or trust-domain"},
			{c.Skew >= 0 && c.Skew <= maxSkew, key(node, "skew"), "want 0s to 1m"},
			{c.MaxAge >= 0, key(node, "max-age"), "want a duration like 24h, or 0s for none"},
			{c.PrincipalClaim != "", key(node, "principal-claim"), "the claim's name is empty"},
			{c.Refresh >= 10*time.Second && c.Refresh <= 24*time.Hour, key(node, "refresh"), "want 10s to 24h"},
			{c.MaxStale >= c.Refresh, key(node, "max-stale"), "want at least refresh"},
			{len(c.Algorithms) > 0, key(node, "algorithms"), "no algorithm: leave the key out for the usual ones"},
		}
		for i, name := range c.Algorithms {
			checks = append(checks, check{slices.Contains(spiffe.Algorithms, name), at(key(node, "algorithms"), i),
				strict.Unknown("algorithm", name, spiffe.Algorithms)})
		}
		for name, list := range map[string][]string{"audiences": c.Audiences, "required-claims": c.RequiredClaims} {
			for i, text := range list {
				checks = append(checks, check{text != "", at(key(node, name), i), "it is empty"})
			}
		}
		if c.TrustDomain != "" {
			return append(checks, c.domain(node)...)
		}
		err := spiffe.CheckRemote(c.Issuer)
		elsewhere := c.JWKS != nil // then it is only compared
		return append(checks, check{c.Issuer == "" || elsewhere || err == nil, key(node, "issuer"), fmt.Sprint(err)})
	})
}

// domain: the keys of a trust domain come with its bundle.
func (c *IssuerConfig) domain(node *yaml.Node) []check {
	td, err := spiffeid.TrustDomainFromString(c.TrustDomain)
	checks := []check{{err == nil && td.Name() == c.TrustDomain, key(node, "trust-domain"),
		fmt.Sprintf("%q is no trust domain like example.org", c.TrustDomain)}}
	for _, name := range []string{"jwks", "ca", "bearer-file", "refresh", "max-stale"} {
		checks = append(checks, check{key(node, name) == node, key(node, name),
			"the keys of a trust domain come from the SPIRE agent"})
	}
	return checks
}

// UnmarshalYAML checks that one place is given.
func (c *JWKSConfig) UnmarshalYAML(node *yaml.Node) error {
	type plain JWKSConfig
	return section(node, (*plain)(c), func() []check {
		err := spiffe.CheckRemote(c.URL)
		return []check{
			{(c.URL == "") != (c.File == ""), node, "give either url or file"},
			{c.URL == "" || err == nil, key(node, "url"), fmt.Sprint(err)},
		}
	})
}

// UnmarshalYAML fills in the defaults and checks what the section says by itself.
func (c *KubernetesConfig) UnmarshalYAML(node *yaml.Node) error {
	type plain KubernetesConfig
	c.Token, c.Audience = defaultToken, defaultAudience
	return section(node, (*plain)(c), func() []check {
		ofServer := c.Audience == c.Issuer || strings.HasPrefix(c.Audience, "https://kubernetes.default.svc")
		return []check{
			{absolute(c.Token), key(node, "token"), wantAbsolute},
			{c.Audience != "", key(node, "audience"), "it is empty"},
			{c.Issuer != "" || c.Review != nil, node, "nothing proves the tokens: give issuer, review or both"},
			{c.Audience == "" || !ofServer || c.APIServerAudience, key(node, "audience"), "that is the API server's own " +
				"audience: such a token is a credential there. Mount one with an audience of its own, or give " +
				"api-server-audience: true"},
		}
	})
}

const wantAbsolute = "want an absolute path, as the workload sees it"

func absolute(file string) bool { return path.IsAbs(file) && path.Clean(file) == file && file != "/" }

// UnmarshalYAML fills in the defaults and checks address, credentials and ranges.
func (c *ReviewConfig) UnmarshalYAML(node *yaml.Node) error {
	type plain ReviewConfig
	c.Every, c.MaxStale = 3*time.Second, 15*time.Second
	return section(node, (*plain)(c), func() []check {
		return []check{
			{strings.HasPrefix(c.Server, "https://") && spiffe.CheckRemote(c.Server) == nil, key(node, "server"),
				"want an address like https://10.96.0.1:443"},
			{(c.Cert == "") == (c.Key == ""), node, "cert and key are given together or not at all"},
			{(c.TokenFile == "") != (c.Cert == ""), node, "give either token-file, or cert and key"},
			{c.Every >= time.Second && c.Every <= time.Minute, key(node, "every"), "want 1s to 1m"},
			{c.MaxStale >= c.Every && c.MaxStale <= time.Hour, key(node, "max-stale"), "want at least every, and up to 1h"},
		}
	})
}

// UnmarshalYAML checks that nothing is empty.
func (c *TokenFileConfig) UnmarshalYAML(node *yaml.Node) error {
	type plain TokenFileConfig
	return section(node, (*plain)(c), func() []check {
		return []check{
			{absolute(c.Path), key(node, "path"), wantAbsolute},
			{c.Audience != "", key(node, "audience"), "it is empty"},
		}
	})
}

// issuers checks what concerns several issuers, and who names them.
func (c *Config) issuers(node *yaml.Node) (checks []check) {
	list := key(node, "oidc")
	used := map[string]bool{}
	named := func(name string, at *yaml.Node) check {
		used[name] = true
		known := slices.ContainsFunc(c.OIDC, func(i IssuerConfig) bool { return i.Name() == name })
		return check{known, at, fmt.Sprintf("%q is no issuer of section oidc", name)}
	}
	if k := c.Kubernetes; k != nil && k.Issuer != "" {
		checks = append(checks, named(k.Issuer, key(key(node, "kubernetes"), "issuer")))
	}
	for i, f := range c.TokenFiles {
		checks = append(checks, named(f.Issuer, key(at(key(node, "token-file"), i), "issuer")))
	}
	for i, issuer := range c.OIDC {
		here := at(list, i)
		again := slices.ContainsFunc(c.OIDC[:i], func(o IssuerConfig) bool { return o.Name() == issuer.Name() })
		checks = append(checks,
			check{!again, here, fmt.Sprintf("a second issuer %q", issuer.Name())},
			check{issuer.TrustDomain == "" || c.SPIRE != nil, key(here, "trust-domain"),
				"its keys come from the SPIRE agent: the section spire is missing"},
			check{len(issuer.Audiences) > 0 || used[issuer.Name()], here,
				"nothing uses it: give the audiences of logins, or name it in kubernetes or token-file"})
	}
	return checks
}

// tokenPaths are the files that sections oidc and kubernetes name on this host.
func (c *Config) tokenPaths() (paths []*string) {
	for i := range c.OIDC {
		issuer := &c.OIDC[i]
		paths = append(paths, &issuer.CA, &issuer.BearerFile)
		if issuer.JWKS != nil {
			paths = append(paths, &issuer.JWKS.File)
		}
	}
	if c.Kubernetes != nil && c.Kubernetes.Review != nil {
		r := c.Kubernetes.Review
		paths = append(paths, &r.CA, &r.TokenFile, &r.Cert, &r.Key)
	}
	return paths
}

func (c *IssuerConfig) keys() spiffe.KeySetOptions {
	o := spiffe.KeySetOptions{Issuer: c.Issuer, Remote: spiffe.Remote{CA: c.CA, Bearer: c.BearerFile},
		Refresh: c.Refresh, MaxStale: c.MaxStale}
	if c.JWKS != nil {
		o.URL, o.File = c.JWKS.URL, c.JWKS.File
	}
	return o
}

func (c *ReviewConfig) options() spiffe.ReviewOptions {
	return spiffe.ReviewOptions{Server: c.Server, Every: c.Every, MaxStale: c.MaxStale,
		Remote: spiffe.Remote{CA: c.CA, Cert: c.Cert, Key: c.Key, Bearer: c.TokenFile}}
}
