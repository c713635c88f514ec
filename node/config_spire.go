package node

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.yaml.in/yaml/v3"

	"klamm/enforcer/policy/strict"
	"klamm/spiffe"
)

// SPIREConfig is the SPIRE agent of this host, which tells the SVIDs of its workloads.
type SPIREConfig struct {
	// How the node asks on behalf of a workload: broker (SPIFFE Broker API, SPIRE 1.15.2 and later) or delegated
	// (Delegated Identity API, SPIRE 1.10.2 and later).
	API string `yaml:"api" strict:"required"`
	// The unix socket at which the agent serves that API: socket_path of its broker section, or its admin_socket_path.
	// Default with broker: $SPIFFE_BROKER_SOCKET.
	Socket string `yaml:"socket"`
	// The unix socket of the Workload API, from which the node has its own X509-SVID and the bundles of the trust
	// domains it trusts. Default: $SPIFFE_ENDPOINT_SOCKET, or else /tmp/spire-agent/public/api.sock, SPIRE's own.
	WorkloadAPI string `yaml:"workload-api"`
	// Which SVID counts of a workload that has several SPIFFE IDs. Default: none of them.
	Hint string `yaml:"hint"`
	// Those whose SVIDs are believed. Default: the node's own.
	TrustDomains []string `yaml:"trust-domains"`
}

// The variables by which SPIFFE has sockets found, and SPIRE's default.
const (
	endpointVariable   = "SPIFFE_ENDPOINT_SOCKET"
	brokerVariable     = "SPIFFE_BROKER_SOCKET"
	defaultWorkloadAPI = "/tmp/spire-agent/public/api.sock"
)

// UnmarshalYAML fills in the defaults and checks sockets and trust domains.
func (c *SPIREConfig) UnmarshalYAML(node *yaml.Node) error {
	type plain SPIREConfig
	return section(node, (*plain)(c), func() []check {
		if c.API == spiffe.APIBroker {
			c.Socket = cmp.Or(c.Socket, os.Getenv(brokerVariable))
		}
		c.WorkloadAPI = cmp.Or(c.WorkloadAPI, os.Getenv(endpointVariable), defaultWorkloadAPI)
		domains := key(node, "trust-domains")
		checks := []check{
			{slices.Contains(spiffe.APIs, c.API), key(node, "api"), strict.Unknown("API", c.API, spiffe.APIs)},
			{c.Socket != "", node, "give socket: where the agent serves the API"},
			{c.TrustDomains == nil || len(c.TrustDomains) > 0, domains, "no trust domain: leave the key out for the node's own"},
		}
		for name, socket := range map[string]*string{"socket": &c.Socket, "workload-api": &c.WorkloadAPI} {
			var err error
			if *socket, err = socketPath(*socket); err != nil {
				checks = append(checks, check{at: key(node, name), message: err.Error()})
			}
		}
		for i, d := range c.TrustDomains {
			td, err := spiffeid.TrustDomainFromString(d)
			checks = append(checks,
				check{err == nil && td.Name() == d, at(domains, i), fmt.Sprintf("%q is no trust domain like example.org", d)},
				check{!slices.Contains(c.TrustDomains[:i], d), at(domains, i), fmt.Sprintf("%s is given twice", d)})
		}
		return checks
	})
}

// socketPath is the path of a unix socket, which may be written as a URI, as SPIFFE's variables are.
func socketPath(s string) (string, error) {
	path, uri := strings.CutPrefix(s, "unix:")
	if uri {
		path = filepath.Clean(path) // unix:/a, unix:///a
	}
	if uri && !filepath.IsAbs(path) || strings.Contains(path, "://") || strings.ContainsAny(path, "?#%") {
		return "", fmt.Errorf("%q is not the path of a unix socket, like /run/spire/agent.sock, "+
			"or with unix:// in front", s)
	}
	return path, nil
}

// options are the source's.
func (c *SPIREConfig) options() spiffe.SPIREOptions {
	o := spiffe.SPIREOptions{API: c.API, Socket: c.Socket, WorkloadAPI: c.WorkloadAPI, Hint: c.Hint}
	for _, d := range c.TrustDomains {
		o.TrustDomains = append(o.TrustDomains, spiffeid.RequireTrustDomainFromString(d))
	}
	return o
}
