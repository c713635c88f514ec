// Package policy is the language that says who may do what in Kafka, and its decisions.
//
// Everything Kafka's ACLs can say can be said: resource types, patterns and operations are Kafka's, as is what a rule
// implies. What nothing allows is refused. A set of rules in observe mode refuses nothing and says what it would
// refuse.
package policy

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"sync"
)

// Policy is all rule sets in force, immutable and safe for concurrent use. A nil Policy refuses everything.
type Policy struct {
	sets    []*Set
	rules   []*rule // of all sets, in order; Decision names the first that applies
	owner   []*Set  // of each rule
	byHosts bool    // some rule has hosts

	mu       sync.Mutex
	subjects map[Subject]*View
	views    map[string]*View // by the rules that name the subject
	weight   int              // nodes of all views kept
}

// What the caches keep at most: beyond it they start afresh, connections keep the views they hold.
const (
	maxSubjects = 16384
	maxWeight   = 1 << 20 // nodes, of about 150 bytes with their row
)

// New makes a policy of rule sets. Their order matters only for which of several matching rules a decision names.
func New(sets ...*Set) *Policy {
	p := &Policy{sets: sets, subjects: map[Subject]*View{}, views: map[string]*View{}}
	for _, s := range sets {
		for i := range s.rules {
			p.rules = append(p.rules, &s.rules[i])
			p.owner = append(p.owner, s)
			p.byHosts = p.byHosts || len(s.rules[i].Hosts) > 0
		}
	}
	return p
}

// For is the view of a subject. It is compiled on the first call for a set of rules and shared by all subjects the same
// rules name.
func (p *Policy) For(s Subject) *View {
	if p == nil {
		return nil
	}
	if !p.byHosts {
		s.Host = netip.Addr{}
	}
	if v := p.remembered(s); v != nil {
		return v
	}
	selected, observed := p.selects(&s)
	flags := byte(0)
	for i, set := range []bool{observed, s.anonymous()} {
		if set {
			flags |= 1 << i
		}
	}
	key := []byte{flags}
	for _, i := range selected {
		key = binary.AppendUvarint(key, uint64(i))
	}
	p.mu.Lock()
	v := p.views[string(key)]
	p.mu.Unlock()
	if v == nil {
		v = compile(p.accesses(&s, selected), observed, func(i int) string { return p.rules[i].Name })
	}
	p.remember(s, string(key), v)
	return v
}

// Nobody is the view of a subject whom no rule names any more: it has no right. Sets in observe mode only say so.
func (p *Policy) Nobody(s Subject) *View {
	if p == nil {
		return nil
	}
	return compile(nil, p.observes(&s), func(int) string { return "" })
}

// selects finds the rules that name the subject, and whether only sets in observe mode have rules for its cluster.
func (p *Policy) selects(s *Subject) (selected []int, observed bool) {
	for i, r := range p.rules {
		if scoped(p.owner[i].Cluster, s) && r.excludes(s) == "" {
			selected = append(selected, i)
		}
	}
	return selected, p.observes(s)
}

// observes tells whether only sets in observe mode have rules for the subject's cluster.
func (p *Policy) observes(s *Subject) bool {
	return p.onlyObserved(s, func(set *Set) bool { return set.rules != nil })
}

// onlyObserved tells whether there are such sets for the subject's cluster, and all of them are in observe mode.
func (p *Policy) onlyObserved(s *Subject, such func(*Set) bool) bool {
	observed := false
	for _, set := range p.sets {
		if scoped(set.Cluster, s) && such(set) {
			if set.Mode != Observe {
				return false
			}
			observed = true
		}
	}
	return observed
}

// scoped tells whether a set or rule for this cluster speaks of the subject's.
func scoped(cluster string, s *Subject) bool { return cluster == "" || cluster == s.Cluster }

func (p *Policy) accesses(s *Subject, selected []int) []access {
	var all []access
	for _, i := range selected {
		watch := p.owner[i].Mode == Observe
		for _, e := range p.rules[i].Deny {
			all = append(all, access{entry: e, rule: i, deny: true, watch: watch})
		}
		if !p.rules[i].grants(s) {
			continue
		}
		for _, e := range p.rules[i].Allow {
			all = append(all, access{entry: e, rule: i, watch: watch})
		}
	}
	return all
}

// grants tells whether what is allowed is for the subject too. "*" denies everyone, but allows only who is
// identified: both are the safe side.
func (r *scope) grants(s *Subject) bool {
	return !s.anonymous() || slices.ContainsFunc(r.Principals, func(p principal) bool { return p.kind == anonymous })
}

func (p *Policy) remembered(s Subject) *View {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.subjects[s]
}

func (p *Policy) remember(s Subject, key string, v *View) {
	weight := 0
	for i := range v.trees {
		weight += len(v.trees[i].nodes)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.subjects) >= maxSubjects || p.weight+weight > maxWeight {
		clear(p.subjects)
		clear(p.views)
		p.weight = 0
	}
	if _, kept := p.views[key]; !kept {
		p.views[key] = v
		p.weight += weight
	}
	p.subjects[s] = v
}
