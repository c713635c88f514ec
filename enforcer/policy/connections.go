package policy

import (
	"fmt"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"klamm/enforcer/policy/strict"
)

// connection says what may be done with a connection of a workload as a whole, before there is an access to decide on.
type connection struct {
	scope       `yaml:",inline"`
	SASL        []asPrincipal `yaml:"sasl"`        // whom the workload may log in as
	Passthrough bool          `yaml:"passthrough"` // its TLS may pass unread
}

// UnmarshalYAML adds the checks that concern several keys.
func (c *connection) UnmarshalYAML(node *yaml.Node) error {
	type plain connection
	err := strict.Node(node, (*plain)(c))
	c.node = node
	if err != nil {
		return err
	}
	errs := []error{c.check()}
	if c.SASL != nil && len(c.SASL) == 0 {
		errs = append(errs, strict.Errorf(node, `sasl is empty: list whom the workload may log in as, or leave the key out`))
	}
	if c.SASL == nil && !c.Passthrough {
		errs = append(errs, strict.Errorf(node, "the entry allows nothing: give it sasl or passthrough: true"))
	}
	for _, p := range c.Principals {
		if p.kind == login {
			errs = append(errs, strict.Errorf(node, "%q in principals: no login was accepted yet when a connection is judged; "+
				"name the workload, and under sasl whom it may log in as", p.pattern.text))
		}
	}
	return strict.Join(node, errs...)
}

// asPrincipal is whom a workload may log in as.
type asPrincipal struct {
	pattern pattern
	unseen  bool // also where the mechanism does not show it
}

// UnmarshalText reads "User:name", "User:*" or "*".
func (a *asPrincipal) UnmarshalText(text []byte) error {
	switch word := string(text); {
	case word == "*":
		*a = asPrincipal{pattern{prefix: true}, true}
	case word == "User:*":
		a.pattern = pattern{"User:", true}
	case strings.HasPrefix(word, "User:") && word != "User:":
		a.pattern = pattern{text: word}
	default:
		return fmt.Errorf(`%q is no SASL principal: want "User:name", "User:*" for any, or "*" for any and for those that `+
			`their mechanism does not show`, word)
	}
	return nil
}

func (a asPrincipal) names(sasl string) bool {
	if sasl == "" {
		return a.unseen
	}
	return a.pattern.matches(sasl)
}

// Login tells whether the subject's workload may log in as a SASL principal ("User:alice"; empty where the mechanism does
// not show it). The subject's own Principal, of an earlier login, plays no part.
//
// As long as no entry for the cluster is about logins every login is allowed, because it gives no right by itself; from
// the first one on only what an entry allows. Sets in observe mode only say what they would refuse.
func (p *Policy) Login(s Subject, sasl string) Decision {
	if p == nil {
		return Decision{}
	}
	enforced, observed := p.permits(&s, func(c *connection) (speaks, allows bool) {
		return c.SASL != nil, slices.ContainsFunc(c.SASL, func(a asPrincipal) bool { return a.names(sasl) })
	})
	switch {
	case enforced.speaks:
		return Decision{Allowed: enforced.allows, Rule: enforced.rule}
	default:
		return Decision{Allowed: true, WouldDeny: observed.speaks && !observed.allows, Rule: observed.rule}
	}
}

// Passthrough tells whether the subject's TLS may pass unread. No rule is enforced on such a connection, so that an entry
// must allow it, and where a set that enforces speaks of the cluster at all, one of such a set.
func (p *Policy) Passthrough(s Subject) Decision {
	if p == nil {
		return Decision{}
	}
	enforced, observed := p.permits(&s, func(c *connection) (speaks, allows bool) { return c.Passthrough, c.Passthrough })
	if enforced.allows || !p.onlyObserved(&s, func(*Set) bool { return true }) {
		return Decision{Allowed: enforced.allows, Rule: enforced.rule}
	}
	return Decision{Allowed: true, WouldDeny: !observed.allows, Rule: observed.rule}
}

// permission is what the entries of one mode say together.
type permission struct {
	speaks, allows bool
	rule           string // the first entry that allows
}

// permits asks all entries for the subject's cluster whether they speak of a matter, and whether they allow it.
func (p *Policy) permits(s *Subject, ask func(*connection) (speaks, allows bool)) (enforced, observed permission) {
	workload := *s
	workload.Principal = ""
	for _, set := range p.sets {
		by := &enforced
		if set.Mode == Observe {
			by = &observed
		}
		for i := range set.connections {
			c := &set.connections[i]
			if !scoped(set.Cluster, s) || !scoped(c.Cluster, s) {
				continue
			}
			speaks, allows := ask(c)
			by.speaks = by.speaks || speaks
			if allows && !by.allows && c.excludes(&workload) == "" && c.grants(&workload) {
				by.allows, by.rule = true, c.Name
			}
		}
	}
	return enforced, observed
}
