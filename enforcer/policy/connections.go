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

// matter is what is asked about a connection.
type matter struct {
	name           string
	speaks, allows func(*connection) bool
	sasl           string // the login asked for
}

func loginAs(sasl string) matter {
	return matter{"logins", func(c *connection) bool { return c.SASL != nil }, func(c *connection) bool {
		return slices.ContainsFunc(c.SASL, func(a asPrincipal) bool { return a.names(sasl) })
	}, sasl}
}

func passesThrough() matter {
	passthrough := func(c *connection) bool { return c.Passthrough }
	return matter{"unread TLS", passthrough, passthrough, ""}
}

// Login tells whether the subject's workload may log in as a SASL principal ("User:alice"; empty where the mechanism
// does not show it). The subject's own Principal, of an earlier login, plays no part; conditions see the login asked
// for, of which Facts.SASL has the rest. The answer holds as long as the facts are the same.
//
// As long as no entry for the cluster is about logins every login is allowed, because it gives no right by itself; from
// the first one on only what an entry allows. Sets in observe mode only say what they would refuse.
func (p *Policy) Login(s Subject, sasl string) Decision {
	d, _ := p.login(s, sasl)
	return d
}

func (p *Policy) login(s Subject, sasl string) (Decision, string) {
	if p == nil {
		return Decision{}, noPolicy
	}
	enforced, observed := p.permits(s, loginAs(sasl))
	switch {
	case enforced.allows:
		return Decision{Allowed: true, Rule: enforced.rule}, "an entry allows it"
	case enforced.speaks:
		return Decision{}, "there are entries about logins, and none allows it"
	case observed.allows:
		return Decision{Allowed: true, Rule: observed.rule}, "an entry allows it"
	case observed.speaks:
		return Decision{Allowed: true, WouldDeny: true},
			"no entry allows it; it passes because the files with entries about logins are in observe mode"
	default:
		return Decision{Allowed: true}, "no entry is about logins: all are allowed"
	}
}

// Passthrough tells whether the subject's TLS may pass unread. No rule is enforced on such a connection, so that an
// entry must allow it, and where a set that enforces speaks of the cluster at all, one of such a set.
func (p *Policy) Passthrough(s Subject) Decision {
	d, _ := p.passthrough(s)
	return d
}

func (p *Policy) passthrough(s Subject) (Decision, string) {
	if p == nil {
		return Decision{}, noPolicy
	}
	enforced, observed := p.permits(s, passesThrough())
	switch {
	case enforced.allows:
		return Decision{Allowed: true, Rule: enforced.rule}, "an entry allows it"
	case !p.onlyObserved(&s, func(*Set) bool { return true }):
		return Decision{}, "no entry allows it (default deny)"
	case observed.allows:
		return Decision{Allowed: true, Rule: observed.rule}, "an entry allows it"
	default:
		return Decision{Allowed: true, WouldDeny: true},
			"no entry allows it; it passes because every file for this cluster is in observe mode"
	}
}

// permission is what the entries of one mode say together.
type permission struct {
	speaks, allows bool
	rule           string // the first entry that allows
}

// permits asks all entries for the subject's cluster.
func (p *Policy) permits(s Subject, m matter) (enforced, observed permission) {
	facts := m.facts(s)
	s.Principal = ""
	for _, set := range p.sets {
		by := &enforced
		if set.Mode == Observe {
			by = &observed
		}
		for i := range set.connections {
			c := &set.connections[i]
			if !scoped(set.Cluster, &s) || !scoped(c.Cluster, &s) {
				continue
			}
			by.speaks = by.speaks || m.speaks(c)
			if !by.allows && m.allows(c) && c.names(&s, facts) {
				by.allows, by.rule = true, c.Name
			}
		}
	}
	return enforced, observed
}

// facts for conditions, which see the login asked for.
func (m matter) facts(s Subject) *known {
	s.Principal = m.sasl
	return newKnown(&s)
}

func (c *connection) names(s *Subject, facts *known) bool {
	if c.excludes(s) != "" || !c.grants(s) {
		return false
	}
	holds, err := c.When.holds(facts)
	return holds && err == nil
}
