package policy

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/spiffe"
)

// acl is an ACL as Kafka keeps it: one principal, one pattern, one operation.
type acl struct {
	rule      string
	set       int
	principal string // "*" or a user
	deny      bool
	name      string
	prefix    bool
	op        string
	when      int // index into conditions
}

// claimed are the claims a and b of a subject; 0 is none.
type claimed struct{ a, b int }

// conditions of rules, and what they come to: yes, no, or untold.
var conditions = []struct {
	text string
	is   func(claimed) string
}{
	{"", func(claimed) string { return "yes" }},
	{"claims.a == 1", func(c claimed) string { return tell(c.a, c.a == 1) }},
	{"has(claims.a) && claims.a == 1", func(c claimed) string { return tell(1, c.a == 1) }},
	{"claims.a != 1 || claims.b == 1", func(c claimed) string {
		a, b := tell(c.a, c.a != 1), tell(c.b, c.b == 1)
		switch {
		case a == "yes" || b == "yes":
			return "yes"
		case a == "untold" || b == "untold":
			return "untold"
		}
		return "no"
	}},
}

func tell(claim int, is bool) string {
	switch {
	case claim == 0:
		return "untold"
	case is:
		return "yes"
	}
	return "no"
}

// counts tells whether the ACL is to be looked at: what cannot be told denies, and does not allow.
func (a acl) counts(c claimed) bool {
	is := conditions[a.when].is(c)
	return is == "yes" || is == "untold" && a.deny
}

func (a acl) wildcard() bool { return a.name == "*" && !a.prefix }

func (a acl) appliesTo(name string) bool {
	return a.wildcard() || a.name == name && !a.prefix || a.prefix && strings.HasPrefix(name, a.name)
}

// impliedBy lists the operations an ALLOW of which gives this one.
var impliedBy = map[string][]string{
	"Describe":        {"Describe", "Read", "Write", "Delete", "Alter", "All"},
	"DescribeConfigs": {"DescribeConfigs", "AlterConfigs", "All"},
}

// authorize is the plain reading of StandardAuthorizerData: look at every ACL, deny wins.
func authorize(acls []acl, name, op string) (allowed, denied bool) {
	for _, a := range acls {
		if !a.appliesTo(name) {
			continue
		}
		gives := []string{op, "All"}
		if implied, ok := impliedBy[op]; ok && !a.deny {
			gives = implied
		}
		if slices.Contains(gives, a.op) {
			allowed = allowed || !a.deny
			denied = denied || a.deny
		}
	}
	return allowed, denied
}

// authorizeByResourceType is the plain reading of the default method in Kafka's Authorizer.
func authorizeByResourceType(acls []acl, op string) bool {
	if allowed, denied := authorize(acls, "\x00 a name no pattern matches", op); allowed && !denied {
		return true
	}
	var written []acl
	for _, a := range acls {
		if a.op == op || a.op == "All" {
			written = append(written, a)
		}
	}
	for _, allow := range written {
		if allow.deny {
			continue
		}
		dominated := slices.ContainsFunc(written, func(d acl) bool {
			switch {
			case !d.deny:
				return false
			case d.wildcard() || allow.wildcard():
				return d.wildcard()
			case d.prefix:
				return strings.HasPrefix(allow.name, d.name)
			default:
				return !allow.prefix && d.name == allow.name
			}
		})
		if !dominated {
			return true
		}
	}
	return false
}

// world is a random policy in both forms.
type world struct {
	acls     []acl
	sets     []*Set
	observed []bool
}

func randomName(r *rand.Rand) string {
	b := make([]byte, 1+r.IntN(5))
	for i := range b {
		b[i] = "ab."[r.IntN(3)]
	}
	return string(b)
}

var topicOperations = resources[topic].supported.names()

func randomWorld(t *testing.T, r *rand.Rand) world {
	var w world
	for set := range 1 + r.IntN(3) {
		mode := []string{"enforce", "observe"}[r.IntN(2)]
		w.observed = append(w.observed, mode == "observe")
		var text strings.Builder
		text.WriteString("apiVersion: klamm/v1\nmode: " + mode + "\nrules:\n")
		for i := range 1 + r.IntN(6) {
			a := acl{
				rule: fmt.Sprintf("set %d rule %d", set, i), set: set, deny: r.IntN(3) == 0,
				principal: []string{"*", "User:a", "User:b"}[r.IntN(3)], when: r.IntN(2) * r.IntN(len(conditions)),
			}
			verb := map[bool]string{true: "deny", false: "allow"}[a.deny]
			fmt.Fprintf(&text, "- name: %s\n  principals: [%q]\n", a.rule, a.principal)
			if a.when > 0 {
				fmt.Fprintf(&text, "  when: %q\n", conditions[a.when].text)
			}
			fmt.Fprintf(&text, "  %s:\n", verb)
			for range 1 + r.IntN(4) {
				a.name, a.prefix = randomName(r), r.IntN(2) == 0
				form := fmt.Sprintf("{literal: %q}", a.name)
				switch {
				case r.IntN(8) == 0:
					a.name, a.prefix, form = "*", false, `"*"`
				case a.prefix:
					form = fmt.Sprintf("{prefix: %q}", a.name)
				}
				ops := make([]string, 1+r.IntN(3))
				for j := range ops {
					a.op = topicOperations[r.IntN(len(topicOperations))]
					ops[j] = a.op
					w.acls = append(w.acls, a)
				}
				fmt.Fprintf(&text, "  - {topic: %s, operations: [%s]}\n", form, strings.Join(ops, ", "))
			}
		}
		w.sets = append(w.sets, mustParse(t, fmt.Sprint(set), text.String()))
	}
	return w
}

// person is a subject of a world.
type person struct {
	principal string
	claimed
}

func (p person) subject() Subject {
	claims := map[string]any{}
	for name, n := range map[string]int{"a": p.a, "b": p.b} {
		if n != 0 {
			claims[name] = n
		}
	}
	return Subject{Principal: p.principal, Facts: &Facts{Identity: &spiffe.Identity{Claims: claims}}}
}

func (w world) of(who person, observed bool) []acl {
	var acls []acl
	for _, a := range w.acls {
		if w.observed[a.set] == observed && (a.principal == "*" || a.principal == who.principal) && a.counts(who.claimed) {
			acls = append(acls, a)
		}
	}
	return acls
}

// decide is the reference for several sets: enforced ones decide, observed ones comment.
func (w world) decide(who person, name, op string) Decision {
	allowed, denied := authorize(w.of(who, false), name, op)
	watchAllowed, watchDenied := authorize(w.of(who, true), name, op)
	if !slices.Contains(w.observed, false) {
		return Decision{Allowed: true, WouldDeny: watchDenied || !watchAllowed}
	}
	pass := allowed && !denied
	return Decision{Allowed: pass, WouldDeny: pass && watchDenied}
}

func (w world) decideAny(who person, op string) Decision {
	enforced, watched := w.of(who, false), w.of(who, true)
	if !slices.Contains(w.observed, false) {
		return Decision{Allowed: true, WouldDeny: !authorizeByResourceType(watched, op)}
	}
	pass := authorizeByResourceType(enforced, op)
	withWatched := slices.Clone(enforced)
	for _, a := range watched {
		if a.deny {
			withWatched = append(withWatched, a)
		}
	}
	return Decision{Allowed: pass, WouldDeny: pass && !authorizeByResourceType(withWatched, op)}
}

// checkRandomWorld compares views, explanations and the reference on one random policy.
func checkRandomWorld(t *testing.T, seed uint64) {
	r := rand.New(rand.NewPCG(seed, 0))
	w := randomWorld(t, r)
	p := New(w.sets...)
	for i := range 4 {
		user := person{"User:" + string("abc"[i%3]), claimed{r.IntN(3), r.IntN(3)}}
		s := user.subject()
		v := p.For(s)
		for op := kmsg.ACLOperationRead; op < operationCodes; op++ {
			opName := operationNames[op]
			got, want := v.DecideAny(topic, op), w.decideAny(user, opName)
			if got.Allowed != want.Allowed || got.WouldDeny != want.WouldDeny {
				t.Fatalf("seed %d: %+v %s any topic: got %+v, want %+v of\n%+v", seed, user, opName, got, want, w.acls)
			}
			for range 4 {
				name := randomName(r)
				got, want := v.Decide(topic, name, op), w.decide(user, name, opName)
				if got.Allowed != want.Allowed || got.WouldDeny != want.WouldDeny {
					t.Fatalf("seed %d: %+v %s %q: got %+v, want %+v of\n%+v", seed, user, opName, name, got, want, w.acls)
				}
				checkExplained(t, p, s, name, op, got)
			}
		}
	}
}

// checkExplained wants the rule a decision names to be the first that is explained as having that effect.
func checkExplained(t *testing.T, p *Policy, s Subject, name string, op kmsg.ACLOperation, d Decision) {
	e := p.Explain(s, topic, name, op)
	refused := !d.Allowed || d.WouldDeny
	mode := Enforce
	if d.WouldDeny || p.observes(&s) {
		mode = Observe
	}
	first := ""
	for _, c := range e.Rules {
		if first == "" && c.Mode == mode && c.Matched && strings.HasPrefix(c.Why, "denies") == refused {
			first = c.Rule
		}
	}
	if e.Allowed != d.Allowed || e.WouldDeny != d.WouldDeny || first != d.Rule {
		t.Fatalf("decided %+v, explained %+v", d, e)
	}
}

func TestDecisionsAreThoseOfAPlainEvaluator(t *testing.T) {
	for seed := range uint64(250) {
		checkRandomWorld(t, seed)
	}
}

func FuzzDecisionsAreThoseOfAPlainEvaluator(f *testing.F) {
	f.Add(uint64(1 << 40))
	f.Fuzz(checkRandomWorld)
}

// bigPolicy names one subject in n rules, each with a prefix and a literal of its own.
func bigPolicy(b *testing.B, n int) (*Policy, []string) {
	text := strings.Builder{}
	text.WriteString("apiVersion: klamm/v1\nrules:\n")
	names := make([]string, 0, 3*n)
	for i := range n {
		domain := []string{"orders", "payments", "shipping", "billing", "search"}[i%5]
		fmt.Fprintf(&text, "- {name: rule %d, principals: [User:a], allow: [{topic: %s.team-%d.*, operations: [Write]}, "+
			"{topic: %s.shared.%d, operations: [Read]}]}\n", i, domain, i, domain, i)
		names = append(names, fmt.Sprintf("%s.team-%d.events.v1", domain, i), fmt.Sprintf("%s.shared.%d", domain, i),
			fmt.Sprintf("%s.team-%dx", domain, i))
	}
	s, err := Parse("big", []byte(text.String()))
	if err != nil {
		b.Fatal(err)
	}
	r := rand.New(rand.NewPCG(1, 2))
	r.Shuffle(len(names), func(i, j int) { names[i], names[j] = names[j], names[i] })
	return New(s), names
}

func BenchmarkDecideAt10000Rules(b *testing.B) {
	p, names := bigPolicy(b, 10_000)
	v := p.For(Subject{Principal: "User:a"})
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		v.Decide(topic, names[i], write)
		if i++; i == len(names) {
			i = 0
		}
	}
}

func BenchmarkForOfAKnownSubject(b *testing.B) {
	p, _ := bigPolicy(b, 10_000)
	b.ReportAllocs()
	for b.Loop() {
		p.For(Subject{Principal: "User:a"})
	}
}

// conditionalPolicy has n rules with a condition, of which the subject meets every tenth.
func conditionalPolicy(b *testing.B, n int) (*Policy, Subject) {
	text := strings.Builder{}
	text.WriteString("apiVersion: klamm/v1\nrules:\n")
	for i := range n {
		fmt.Fprintf(&text, "- {name: rule %d, principals: ['spiffe://t/*'], when: 'claims.team == \"team-%d\" && "+
			"process.uid >= 1000', allow: [{topic: team-%d.*, operations: [Write]}]}\n", i, i%10, i)
	}
	s, err := Parse("conditions", []byte(text.String()))
	if err != nil {
		b.Fatal(err)
	}
	return New(s), Subject{SPIFFE: "spiffe://t/a", Facts: &Facts{Identity: &spiffe.Identity{
		Claims: map[string]any{"team": "team-1"}, Process: spiffe.Process{PID: 1, UID: 1000}}}}
}

func BenchmarkForWith1000Conditions(b *testing.B) {
	p, s := conditionalPolicy(b, 1000)
	b.ReportAllocs()
	for b.Loop() {
		p.For(s)
	}
}

func BenchmarkForWithOneCondition(b *testing.B) {
	p, s := conditionalPolicy(b, 1)
	b.ReportAllocs()
	for b.Loop() {
		p.For(s)
	}
}

func BenchmarkParse1000Conditions(b *testing.B) {
	for b.Loop() {
		conditionalPolicy(b, 1000)
	}
}

func BenchmarkCompile10000Rules(b *testing.B) {
	p, _ := bigPolicy(b, 10_000)
	s := Subject{Principal: "User:a"}
	b.ReportAllocs()
	for b.Loop() {
		selected, _ := p.selects(&s)
		compile(p.accesses(selected), p.observes(&s), func(i int) string { return p.rules[i].Name })
	}
}

func TestADecisionAllocatesNothing(t *testing.T) {
	v := shop(t).For(Subject{Principal: "User:alice"})
	if n := testing.AllocsPerRun(100, func() {
		v.Decide(topic, "orders.placed", read)
		v.DecideAny(topic, write)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
