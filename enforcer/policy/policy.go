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
	subjects map[Subject]*View // without their facts
	views    map[string]*View  // by the rules that name the subject
	weight   int               // of all views kept, in nodes
}

// What the caches keep at most: beyond it they start afresh, connections keep the views they hold.
const (
	maxSubjects = 16384
	maxWeight   = 1 << 20 // nodes
	nodeSize    = 150     // bytes of a node with its row, about
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
// rules name. Conditions are evaluated in each call; where none of the rules that could name the subject has one, a
// subject is remembered.
func (p *Policy) For(s Subject) *View {
	if p == nil {
		return nil
	}
	key := s
	key.Facts = nil
	if !p.byHosts {
		key.Host = netip.Addr{}
	}
	if s.lost() == nil {
		if v := p.remembered(key); v != nil {
			return v
		}
	}
	return p.look(s, key)
}

// look finds the view by the rules that name the subject, and remembers it by key where that is all there is to it.
func (p *Policy) look(s, key Subject) *View {
	selected, conditional := p.selects(&s)
	if conditional || s.lost() != nil {
		return p.view(selected, p.observes(&s), nil)
	}
	return p.view(selected, p.observes(&s), &key)
}

// Nobody is the view of a subject whom no rule names any more: it has no right. Sets in observe mode only say so.
func (p *Policy) Nobody(s Subject) *View {
	if p == nil {
		return nil
	}
	return p.view(nil, p.observes(&s), nil)
}

// view is shared by all subjects whom the same rules name. Where a subject is given it is remembered.
func (p *Policy) view(selected []choice, observed bool, of *Subject) *View {
	rules := []byte{0}
	if observed {
		rules[0] = 1
	}
	for _, c := range selected {
		rules = binary.AppendUvarint(rules, c.code())
	}
	p.mu.Lock()
	v := p.views[string(rules)]
	p.mu.Unlock()
	if v == nil {
		v = compile(p.accesses(selected), observed, func(i int) string { return p.rules[i].Name })
	}
	p.keep(string(rules), v, of)
	return v
}

// choice is a rule that names a subject.
type choice struct {
	rule    int  // index
	granted bool // its allows count, and not its denies alone
}

func (c choice) code() uint64 {
	code := uint64(c.rule) << 1
	if c.granted {
		code |= 1
	}
	return code
}

// selects finds the rules that name the subject, and whether conditions had a part in it. Where it cannot be told
// whether a condition holds, the rule denies and does not allow: both are the safe side.
func (p *Policy) selects(s *Subject) (selected []choice, conditional bool) {
	facts := newKnown(s)
	for i, r := range p.rules {
		if !scoped(p.owner[i].Cluster, s) || r.excludes(s) != "" {
			continue
		}
		conditional = conditional || r.When != nil
		holds, err := r.When.holds(facts)
		granted := holds && r.grants(s)
		if granted || (holds || err != nil) && len(r.Deny) > 0 {
			selected = append(selected, choice{i, granted})
		}
	}
	return selected, conditional
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

func (p *Policy) accesses(selected []choice) []access {
	var all []access
	for _, c := range selected {
		watch := p.owner[c.rule].Mode == Observe
		for _, e := range p.rules[c.rule].Deny {
			all = append(all, access{entry: e, rule: c.rule, deny: true, watch: watch})
		}
		if !c.granted {
			continue
		}
		for _, e := range p.rules[c.rule].Allow {
			all = append(all, access{entry: e, rule: c.rule, watch: watch})
		}
	}
	return all
}

// grants tells whether what is allowed is for the subject too. "*" denies everyone, but allows only who is identified:
// both are the safe side.
func (r *scope) grants(s *Subject) bool {
	return r.Principals == nil || !s.anonymous() ||
		slices.ContainsFunc(r.Principals, func(p principal) bool { return p.kind == anonymous })
}

func (p *Policy) remembered(s Subject) *View {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.subjects[s]
}

// keep puts a view, and the subject that is given, into the cache.
func (p *Policy) keep(rules string, v *View, of *Subject) {
	weight := 1 + len(rules)/nodeSize
	for i := range v.trees {
		weight += len(v.trees[i].nodes)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	isNew := p.views[rules] == nil
	if len(p.subjects) >= maxSubjects || isNew && p.weight+weight > maxWeight {
		clear(p.subjects)
		clear(p.views)
		p.weight = 0
	}
	if p.views[rules] == nil {
		p.views[rules] = v
		p.weight += weight
	}
	if of != nil {
		p.subjects[*of] = v
	}
}
