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
	Matched bool   `json:"matched"` // it allows or denies this access
	Why     string `json:"why"`
}

// Explain decides as the subject's View does and says what each rule had to do with it.
func (p *Policy) Explain(s Subject, t kmsg.ACLResourceType, name string, op kmsg.ACLOperation) Explanation {
	d := p.For(s).Decide(t, name, op)
	e := Explanation{Allowed: d.Allowed, WouldDeny: d.WouldDeny, Rule: d.Rule, Rules: []Considered{}}
	switch {
	case p == nil:
		e.Why = "there is no policy: everything is refused"
		return e
	case !concrete(t, op):
		e.Why = "Kafka has no such resource type or operation"
		return e
	}
	e.Why = p.reason(&s, d)
	for i, r := range p.rules {
		c := Considered{Rule: r.Name, File: p.owner[i].File, Line: r.node.Line, Mode: p.owner[i].Mode}
		if scoped(p.owner[i].Cluster, &s) {
			c.Matched, c.Why = r.consider(&s, t, name, op)
		} else {
			c.Why = fmt.Sprintf("its file is for the cluster %q only", p.owner[i].Cluster)
		}
		e.Rules = append(e.Rules, c)
	}
	return e
}

// reason puts a decision in words.
func (p *Policy) reason(s *Subject, d Decision) string {
	inScope := slices.ContainsFunc(p.sets, func(set *Set) bool { return set.rules != nil && scoped(set.Cluster, s) })
	switch {
	case !inScope:
		return "no policy file is for this cluster: everything is refused"
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

// excludes says why the rule is not about the subject; empty when it is.
func (r *scope) excludes(s *Subject) string {
	switch {
	case !scoped(r.Cluster, s):
		return fmt.Sprintf("it is for the cluster %q only", r.Cluster)
	case !slices.ContainsFunc(r.Principals, func(p principal) bool { return p.names(s) }):
		return "none of its principals matches"
	case len(r.Hosts) > 0 && !slices.ContainsFunc(r.Hosts, func(h host) bool { return h.names(s) }):
		return "none of its hosts matches"
	}
	return ""
}

// consider tells whether the rule allows or denies the access, and by which entry, or why it does neither.
func (r *rule) consider(s *Subject, t kmsg.ACLResourceType, name string, op kmsg.ACLOperation) (bool, string) {
	if why := r.excludes(s); why != "" {
		return false, why
	}
	var others []string
	for _, part := range []struct {
		verb    string
		entries []entry
		deny    bool
	}{{"denies", r.Deny, true}, {"allows", r.Allow, false}} {
		for _, e := range part.entries {
			switch {
			case e.kind != t || !e.pattern.matches(name):
			case !e.operations.effective(!part.deny).has(op):
				others = append(others, fmt.Sprintf("%s only %s (line %d)", part.verb, e, e.node.Line))
			case !part.deny && !r.grants(s):
				others = append(others, fmt.Sprintf(`allows %s (line %d), but "*" allows only who is identified`, e, e.node.Line))
			default:
				return true, fmt.Sprintf("%s %s (line %d)", part.verb, e, e.node.Line)
			}
		}
	}
	if len(others) > 0 {
		return false, strings.Join(others, "; ")
	}
	return false, fmt.Sprintf("none of its entries is for the %s %q", resources[t].key, name)
}
