package node

import (
	"fmt"
	"slices"
	"time"

	"go.yaml.in/yaml/v3"

	"klamm/enforcer/policy/strict"
)

// AttestationConfig is how it is told who is behind a connection.
type AttestationConfig struct {
	// The sources that are asked about a process: of the first that knows it is the identity that rules name, the
	// evidence of all counts. Each needs its own section. Default: those that have one, in the order spire, kubernetes,
	// token-file, static (section identities).
	Sources []string `yaml:"sources"`
	// What becomes of connections whose workload is no longer who it was. Default: close.
	OnLoss LossMode `yaml:"on-loss"`
	// For the sources to tell who connected, over 0; who is not known by then is refused. Default: 5s.
	Timeout time.Duration `yaml:"timeout"`
}

// LossMode is what becomes of a connection whose identity is lost or changed.
type LossMode string

// The loss modes.
const (
	LossClose LossMode = "close" // it is closed; its client connects again and is attested anew
	LossDeny  LossMode = "deny"  // it stays, without the rights it had
)

var lossModes = []string{string(LossClose), string(LossDeny)}

// UnmarshalYAML checks what it says by itself.
func (c *AttestationConfig) UnmarshalYAML(node *yaml.Node) error {
	type plain AttestationConfig
	return section(node, (*plain)(c), func() []check {
		checks := []check{
			{slices.Contains(lossModes, string(c.OnLoss)), key(node, "on-loss"),
				strict.Unknown("mode", string(c.OnLoss), lossModes)},
			{c.Timeout > 0, key(node, "timeout"), "want a duration over 0, like 5s"},
		}
		for i, name := range c.Sources {
			checks = append(checks,
				check{slices.Contains(sourceNames(), name), at(key(node, "sources"), i),
					strict.Unknown("source", name, sourceNames())},
				check{!slices.Contains(c.Sources[:i], name), at(key(node, "sources"), i),
					fmt.Sprintf("%s is given twice", name)})
		}
		return checks
	})
}

// sources checks that what is asked is configured.
func (c *Config) sources(node *yaml.Node) (checks []check) {
	for i, name := range c.Attestation.Sources {
		if s, ok := sourceNamed(name); ok {
			checks = append(checks, check{s.configured(c), at(key(key(node, "attestation"), "sources"), i),
				fmt.Sprintf("%s needs the section %q, which is missing", name, s.section)})
		}
	}
	return checks
}
