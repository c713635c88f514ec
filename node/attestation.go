package node

import (
	"fmt"

	"klamm/spiffe"
)

// source is where evidence of processes comes from.
type source struct {
	name       string // one of spiffe's
	section    string // of klamm.yaml
	configured func(*Config) bool
	// open gets it ready; what is to be closed with the node it adds to closers.
	open func(*Node, *spiffe.Processes) (spiffe.Source, error)
}

// sources are in the order in which their evidence counts by default.
func sources() []source {
	return []source{
		{spiffe.SourceSPIRE, "spire", func(c *Config) bool { return c.SPIRE != nil },
			func(n *Node, _ *spiffe.Processes) (spiffe.Source, error) { return n.spire, nil }},
		{spiffe.SourceKubernetes, "kubernetes", func(c *Config) bool { return c.Kubernetes != nil }, (*Node).openKubernetes},
		{spiffe.SourceTokenFile, "token-file", func(c *Config) bool { return len(c.TokenFiles) > 0 },
			(*Node).openTokenFiles},
		{spiffe.SourceStatic, "identities", func(c *Config) bool { return len(c.Identities) > 0 },
			func(n *Node, p *spiffe.Processes) (spiffe.Source, error) {
				return spiffe.NewStatic(n.config.Identities, p)
			}},
	}
}

func sourceNames() (names []string) {
	for _, s := range sources() {
		names = append(names, s.name)
	}
	return names
}

func sourceNamed(name string) (source, bool) {
	for _, s := range sources() {
		if s.name == name {
			return s, true
		}
	}
	return source{}, false
}

// asked are the sources that the configuration names, or all it has a section for.
func (c *Config) asked() (asked []source) {
	if c.Attestation.Sources == nil {
		for _, s := range sources() {
			if s.configured(c) {
				asked = append(asked, s)
			}
		}
		return asked
	}
	for _, name := range c.Attestation.Sources {
		if s, ok := sourceNamed(name); ok {
			asked = append(asked, s)
		}
	}
	return asked
}

// openAttestor opens the sources.
func (n *Node) openAttestor(p *spiffe.Processes) (*spiffe.Attestor, error) {
	var opened []spiffe.Source
	for _, s := range n.config.asked() {
		source, err := s.open(n, p)
		if err != nil {
			return nil, fmt.Errorf("open the identity source %s: %w", s.name, err)
		}
		opened = append(opened, source)
	}
	return spiffe.NewAttestor(p, opened...), nil
}
