package policy

import (
	"fmt"
	"slices"
	"strings"

	"github.com/twmb/franz-go/pkg/kmsg"
)

// Explanation is a decision and how it came about.
type Explanation struct {
	Allowed   bool         `json:"allowed"`
	WouldDeny bool         `json:"would_deny"`
	Rule      string       `json:"rule,omitempty"`
	Why       string       `json:"why"`
	Rules     []Considered `json:"rules"`
}

// Considered is one rule's part in a decision.
type Considered struct {
	Rule    string `json:"rule"`
	File    string `json:"file"`
	Line    int    `json:"line"`
	Mode    Mode   `json:"mode"`
	Matched bool   `json:"matched"` // it allows or denies this
	Why     string `json:"why"`
	When    *When  `json:"when,omitempty"` // nil: it has no condition
}

// When is a rule's condition and what it comes to.
type When struct {
	Expression string `json:"expression"`
	Holds      bool   `json:"holds"`
	Error      string `json:"error,omitempty"` // why it cannot be told; the rule then denies and does not allow
}

// noPolicy is why nothing is allowed without one.
const noPolicy = "there is no policy: everything is refused"

// Explain decides as the subject's View does and says what each rule had to do with it.
func (p *Policy) Explain(s Subject, t kmsg.ACLResourceType, name string, op kmsg.ACLOperation) Explanation {
	d := p.For(s).Decide(t, name, op)
	e := Explanation{Allowed: d.Allowed, WouldDeny: d.WouldDeny, Rule: d.Rule, Rules: []Considered{}}
	switch {
	case p == nil:
		e.Why = noPolicy
		return e
	case !concrete(t, op):
		e.Why = "Kafka has no such resource type or operation"
		return e
	}
	e.Why = p.reason(&s, d)
	facts := newKnown(&s)
	for i, r := range p.rules {
		set := p.owner[i]
		c := set.considered(&r.scope, facts)
		if scoped(set.Cluster, &s) {
			c.Matched, c.Why = r.consider(&s, c.When, t, name, op)
		}
		e.Rules = append(e.Rules, c)
	}
	return e
}

// ExplainLogin decides as Login does and says what each entry for connections had to do with it.
func (p *Policy) ExplainLogin(s Subject, sasl string) Explanation {
	d, why := p.login(s, sasl)
	return p.explainConnection(s, loginAs(sasl), d, why)
}

// ExplainPassthrough decides as Passthrough does and says what each entry for connections had to do with it.
func (p *Policy) ExplainPassthrough(s Subject) Explanation {
	d, why := p.passthrough(s)
	return p.explainConnection(s, passesThrough(), d, why)
}

func (p *Policy) explainConnection(s Subject, m matter, d Decision, why string) Explanation {
	e := Explanation{Allowed: d.Allowed, WouldDeny: d.WouldDeny, Rule: d.Rule, Why: why, Rules: []Considered{}}
	if p == nil {
		return e
	}
	facts := m.facts(s)
	s.Principal = ""
	for _, set := range p.sets {
		for i := range set.connections {
			connection := &set.connections[i]
			c := set.considered(&connection.scope, facts)
			if scoped(set.Cluster, &s) {
				c.Matched, c.Why = connection.consider(&s, c.When, m)
			}
			e.Rules = append(e.Rules, c)
		}
	}
	return e
}

// considered is a rule of the set, as if the set were for another cluster.
func (s *Set) considered(r *scope, facts *known) Considered {
	c := Considered{Rule: r.Name, File: s.File, Line: r.node.Line, Mode: s.Mode,
		Why: fmt.Sprintf("its file is for the cluster %q only", s.Cluster)}
	if r.When != nil {
		c.When = &When{Expression: r.When.text}
		var err error
		if c.When.Holds, err = r.When.holds(facts); err != nil {
			c.When.Error = err.Error()
		}
	}
	return c
}

// fails tells that the condition is known not to hold.
func (w *When) fails() bool { return w != nil && !w.Holds && w.Error == "" }

// untold tells that it is not known whether the condition holds.
func (w *When) untold() bool { return w != nil && w.Error != "" }

func (c *connection) consider(s *Subject, when *When, m matter) (bool, string) {
	why := c.excludes(s)
	switch {
	case why != "":
		return false, why
	case !m.speaks(c):
		return false, "it is not about " + m.name
	case !m.allows(c):
		return false, "it is about other " + m.name
	case when.fails():
		return false, "its condition does not hold"
	case when.untold():
		return false, "its condition cannot be told, and then it does not allow"
	case !c.grants(s):
		return false, `"*" allows only who is identified`
	default:
		return true, "allows it"
	}
}

// reason puts a decision in words.
func (p *Policy) reason(s *Subject, d Decision) string {
	inScope := slices.ContainsFunc(p.sets, func(set *Set) bool { return set.rules != nil && scoped(set.Cluster, s) })
	switch {
	case !inScope:
		return "no policy file has rules for this cluster: everything is refused"
	case !d.Allowed && d.Rule == "":
		return "no rule allows it (default deny)"
	case !d.Allowed:
		return "a rule denies it, and deny wins over allow"
	case !d.WouldDeny:
		return "a rule allows it and none denies it"
	case d.Rule == "":
		return "no rule allows it; it passes because every file for this cluster is in observe mode"
	default:
		return "a rule denies it; it passes because that rule's file is in observe mode"
	}
}

// excludes says why the rule is not about the subject, its condition apart; empty when it is.
func (r *scope) excludes(s *Subject) string {
	switch {
	case s.lost() != nil:
		return fmt.Sprintf("nobody is behind the connection any more: %s", s.lost())
	case !scoped(r.Cluster, s):
		return fmt.Sprintf("it is for the cluster %q only", r.Cluster)
	case r.Principals != nil && !slices.ContainsFunc(r.Principals, func(p principal) bool { return p.names(s) }):
		return "none of its principals matches"
	case len(r.Hosts) > 0 && !slices.ContainsFunc(r.Hosts, func(h host) bool { return h.names(s) }):
		return "none of its hosts matches"
	}
	return ""
}

// consider tells whether the rule allows or denies the access, and by which entry, or why it does neither.
func (r *rule) consider(s *Subject, when *When, t kmsg.ACLResourceType, name string, op kmsg.ACLOperation) (
	bool, string) {
	if why := r.excludes(s); why != "" {
		return false, why
	}
	if when.fails() {
		return false, "its condition does not hold"
	}
	var others []string
	for _, part := range []struct {
		verb    string
		entries []entry
		deny    bool
	}{{"denies", r.Deny, true}, {"allows", r.Allow, false}} {
		for _, e := range part.entries {
			says := fmt.Sprintf("%s %s (line %d)", part.verb, e, e.node.Line)
			switch {
			case e.kind != t || !e.pattern.matches(name):
			case !e.operations.effective(!part.deny).has(op):
				others = append(others, fmt.Sprintf("%s only %s (line %d)", part.verb, e, e.node.Line))
			case part.deny && when.untold():
				return true, says + ", as it does where its condition cannot be told"
			case part.deny:
				return true, says
			case when.untold():
				others = append(others, says+", but not where its condition cannot be told")
			case !r.grants(s):
				others = append(others, says+`, but "*" allows only who is identified`)
			default:
				return true, says
			}
		}
	}
	if len(others) > 0 {
		return false, strings.Join(others, "; ")
	}
	return false, fmt.Sprintf("none of its entries is for the %s %q", resources[t].key, name)
}
