package policy

import (
	"regexp"
	"slices"
	"strings"

	"github.com/twmb/franz-go/pkg/kmsg"
	"go.yaml.in/yaml/v3"

	"klamm/enforcer/policy/strict"
)

// legalTopic is what Kafka accepts in a topic's name (Topic.validate).
var legalTopic = regexp.MustCompile(`^[a-zA-Z0-9._-]{0,249}$`)

// Warnings lists what is valid but hardly meant: rules that never match, allows that a deny always takes back,
// operations and conditions that say nothing.
func (s *Set) Warnings() []strict.Error {
	w := warner{file: s.File}
	for i := range s.rules {
		r := &s.rules[i]
		w.scope(s.Cluster, &r.scope)
		for _, e := range slices.Concat(r.Allow, r.Deny) {
			w.entry(e)
		}
		for _, e := range r.Allow {
			if by := s.deniedBy(r, e); by != "" {
				w.warn(e.node, "this allow has no effect: rule %q denies all of it", by)
			}
		}
	}
	for i := range s.connections {
		c := &s.connections[i]
		w.scope(s.Cluster, &c.scope)
		if c.SASL == nil && c.When != nil && slices.Contains(c.When.reads, "sasl") {
			w.warn(c.When.node, "no login is known of a connection whose TLS passes unread")
		}
	}
	return w.found
}

type warner struct {
	file  string
	found []strict.Error
}

func (w *warner) warn(node *yaml.Node, format string, args ...any) {
	e := strict.Errorf(node, format, args...)
	e.File = w.file
	w.found = append(w.found, e)
}

func (w *warner) scope(cluster string, r *scope) {
	if cluster != "" && r.Cluster != "" && r.Cluster != cluster {
		w.warn(r.node, "rule %q never matches: it is for the cluster %q, its file for %q only", r.Name, r.Cluster, cluster)
	}
	for _, p := range r.Principals {
		if p.kind == login && !p.pattern.prefix && strings.HasSuffix(p.pattern.text, "*") {
			w.warn(r.node, "rule %q: %q is one user whose name ends in *, as in Kafka's ACLs, and no pattern",
				r.Name, p.pattern.text)
		}
	}
	ofWorkload := func(name string) bool { return name != "cluster" && name != "host" }
	switch {
	case r.When == nil:
	case len(r.When.reads) == 0:
		w.warn(r.When.node, "the condition is always the same: it looks at nothing")
	case r.Principals == nil && !slices.ContainsFunc(r.When.reads, ofWorkload):
		w.warn(r.When.node, "the condition looks at nothing of the workload: rule %q is about everyone, identified or not",
			r.Name)
	}
}

func (w *warner) entry(e entry) {
	if e.kind == kmsg.ACLResourceTypeTopic && !legalTopic.MatchString(e.pattern.text) {
		w.warn(e.node, "no topic matches %s: Kafka's topic names are up to 249 of a-z A-Z 0-9 . _ -", e.pattern)
	}
	if all := setOf(kmsg.ACLOperationAll); e.operations&all != 0 && e.operations != all {
		w.warn(e.node, "All includes the other operations")
	}
}

// deniedBy names a rule whose deny covers all subjects, names and operations of an allow.
func (s *Set) deniedBy(r *rule, allow entry) string {
	granted := allow.operations.effective(true)
	for i := range s.rules {
		by := &s.rules[i]
		for _, d := range by.Deny {
			if d.kind == allow.kind && granted&^d.operations.effective(false) == 0 &&
				d.pattern.covers(allow.pattern) && by.about(&r.scope) {
				return by.Name
			}
		}
	}
	return ""
}

// about tells whether the scope names every subject that q names.
func (r *scope) about(q *scope) bool {
	return r.When == nil && q.Principals != nil && (r.Cluster == "" || r.Cluster == q.Cluster) &&
		all(q.Principals, func(b principal) bool {
			return slices.ContainsFunc(r.Principals, func(a principal) bool { return a.covers(b) })
		}) &&
		(len(r.Hosts) == 0 || len(q.Hosts) > 0 && all(q.Hosts, func(b host) bool {
			return slices.ContainsFunc(r.Hosts, func(a host) bool { return a.covers(b) })
		}))
}

func all[T any](list []T, f func(T) bool) bool {
	return !slices.ContainsFunc(list, func(one T) bool { return !f(one) })
}

func (p principal) covers(q principal) bool {
	return p.kind == anyone || p.kind == q.kind && p.pattern.covers(q.pattern)
}

func (h host) covers(q host) bool {
	return !h.IsValid() || q.IsValid() && h.Bits() <= q.Bits() && h.Contains(q.Addr())
}
