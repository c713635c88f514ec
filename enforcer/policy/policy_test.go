package policy

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/policy/strict"
	"klamm/test/bounds"
)

const (
	topic   = kmsg.ACLResourceTypeTopic
	group   = kmsg.ACLResourceTypeGroup
	txn     = kmsg.ACLResourceTypeTransactionalId
	cluster = kmsg.ACLResourceTypeCluster

	read            = kmsg.ACLOperationRead
	write           = kmsg.ACLOperationWrite
	create          = kmsg.ACLOperationCreate
	remove          = kmsg.ACLOperationDelete
	describe        = kmsg.ACLOperationDescribe
	describeConfigs = kmsg.ACLOperationDescribeConfigs
)

func mustParse(t testing.TB, file, text string) *Set {
	t.Helper()
	s, err := Parse(file, []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func shop(t testing.TB) *Policy {
	t.Helper()
	data, err := os.ReadFile("testdata/shop.yaml")
	if err != nil {
		t.Fatal(err)
	}
	return New(mustParse(t, "shop.yaml", string(data)))
}

func TestDecisions(t *testing.T) {
	p := shop(t)
	orders := Subject{Cluster: "payments", SPIFFE: "spiffe://example.test/ns/shop/sa/orders"}
	analytics := Subject{Cluster: "any", SPIFFE: "spiffe://example.test/ns/analytics/sa/job"}
	alice := Subject{Cluster: "payments", Principal: "User:alice", Host: netip.MustParseAddr("192.0.2.1")}
	office := Subject{Principal: "User:bob", Host: netip.MustParseAddr("::ffff:10.1.2.3")}
	with := func(s Subject, change func(*Subject)) Subject { change(&s); return s }

	const (
		r0 = "orders writes its topics"
		r1 = "analytics reads orders"
		r2 = "nobody deletes"
		r3 = "operators from the office"
		r4 = "the unknown may look at the board"
	)
	for name, c := range map[string]struct {
		who  Subject
		kind kmsg.ACLResourceType
		name string
		op   kmsg.ACLOperation
		want Decision
	}{
		"a prefix matches what begins with it": {
			orders, topic, "orders.placed", write, Decision{Allowed: true, Rule: r0},
		},
		"a prefix matches itself": {
			orders, topic, "orders.", write, Decision{Allowed: true, Rule: r0},
		},
		"a prefix does not match less":               {orders, topic, "orders", write, Decision{}},
		"a prefix does not match another name":       {orders, topic, "payouts", write, Decision{}},
		"an operation that is not listed is refused": {orders, topic, "orders.placed", read, Decision{}},
		"another type of resource is refused":        {orders, group, "orders.placed", describe, Decision{}},
		"a transactional id is a resource": {
			orders, txn, "orders-1", write, Decision{Allowed: true, Rule: r0},
		},
		"the cluster is a resource": {
			orders, cluster, "kafka-cluster", kmsg.ACLOperationIdempotentWrite, Decision{Allowed: true, Rule: r0},
		},
		"another cluster is out of the rule's scope": {
			with(orders, func(s *Subject) { s.Cluster = "logs" }), topic, "orders.placed", write, Decision{},
		},
		"a literal SPIFFE ID is no prefix": {
			with(orders, func(s *Subject) { s.SPIFFE += "-2" }), topic, "orders.placed", write, Decision{},
		},
		"a SPIFFE pattern matches any rest": {
			analytics, topic, "orders.placed", read, Decision{Allowed: true, Rule: r1},
		},
		"a literal topic is no prefix": {analytics, topic, "orders.placed.eu", read, Decision{}},
		"Read implies Describe": {
			analytics, topic, "orders.placed", describe, Decision{Allowed: true, Rule: r1},
		},
		"Read does not imply DescribeConfigs": {
			analytics, topic, "orders.placed", describeConfigs, Decision{},
		},
		"AlterConfigs implies DescribeConfigs": {
			analytics, topic, "a*", describeConfigs, Decision{Allowed: true, Rule: r1},
		},
		"a spelled-out literal with a star is no prefix": {analytics, topic, "ab", describeConfigs, Decision{}},
		"deny wins over allow":                           {office, topic, "x", remove, Decision{Rule: r2}},
		"a deny that comes after the allow wins too": {
			analytics, topic, "secret.plans", read, Decision{Rule: r2},
		},
		"a deny of one operation leaves the others": {
			office, topic, "x", describe, Decision{Allowed: true, Rule: r3},
		},
		"a deny of All denies what is implied": {
			office, topic, "secretary", describe, Decision{Rule: r2},
		},
		"a SASL principal is matched as a whole": {
			alice, topic, "orders.placed", read, Decision{Allowed: true, Rule: r1},
		},
		"a SASL principal is not a prefix": {
			with(alice, func(s *Subject) { s.Principal = "User:alice2" }), topic, "orders.placed", read, Decision{},
		},
		"a host outside the networks is not named": {alice, topic, "x", read, Decision{}},
		"an IPv4 address mapped into IPv6 is the address": {
			office, topic, "x", read, Decision{Allowed: true, Rule: r3},
		},
		"a single host matches": {
			with(office, func(s *Subject) { s.Host = netip.MustParseAddr("2001:db8::7") }), topic,
			"x", read, Decision{Allowed: true, Rule: r3},
		},
		"an unknown host is in no network": {
			with(office, func(s *Subject) { s.Host = netip.Addr{} }), topic, "x", read, Decision{},
		},
		"the first rule of several is named": {
			with(office, func(s *Subject) { s.Principal = "User:alice" }), topic,
			"orders.placed", read, Decision{Allowed: true, Rule: r1},
		},
		"a star allows no one unidentified": {
			Subject{Host: office.Host}, topic, "x", write, Decision{},
		},
		"a star denies the unidentified": {Subject{}, topic, "secret", read, Decision{Rule: r2}},
		"anonymous is who has no identity": {
			Subject{}, topic, "board", read, Decision{Allowed: true, Rule: r4},
		},
		"anonymous is no one who has an identity": {analytics, topic, "board", read, Decision{}},
		"the empty name is matched by the wildcard alone": {
			office, topic, "", read, Decision{Allowed: true, Rule: r3},
		},
		"a delegation token is a resource": {
			office, kmsg.ACLResourceTypeDelegationToken, "t", describe, Decision{Allowed: true, Rule: r3},
		},
		"a user is a resource": {
			office, kmsg.ACLResourceTypeUser,
			"User:bob", kmsg.ACLOperationCreateTokens, Decision{Allowed: true, Rule: r3},
		},
		"a resource type Kafka does not have is refused":     {office, 99, "x", read, Decision{}},
		"a negative resource type is refused":                {office, -1, "x", read, Decision{}},
		"an operation Kafka does not have is refused":        {office, topic, "x", 99, Decision{}},
		"a negative operation is refused":                    {office, topic, "x", -1, Decision{}},
		"the operation All is nothing a request can ask for": {office, topic, "x", kmsg.ACLOperationAll, Decision{}},
	} {
		t.Run(name, func(t *testing.T) {
			if got := p.For(c.who).Decide(c.kind, c.name, c.op); got != c.want {
				t.Errorf("got %+v, want %+v", got, c.want)
			}
			e := p.Explain(c.who, c.kind, c.name, c.op)
			if e.Allowed != c.want.Allowed || e.Rule != c.want.Rule || e.Why == "" {
				t.Errorf("explained as %+v", e)
			}
			for _, r := range e.Rules {
				if r.Rule == c.want.Rule && (!r.Matched || r.Why == "") {
					t.Errorf("the rule that decided is explained as %+v", r)
				}
			}
		})
	}
}

func TestWhatIsEmptyRefusesEverything(t *testing.T) {
	for name, v := range map[string]*View{
		"a nil view": nil, "a zero view": {}, "a nil policy": (*Policy)(nil).For(Subject{Principal: "User:a"}),
		"a policy without sets": New().For(Subject{Principal: "User:a"}),
	} {
		if d := v.Decide(topic, "x", read); d != (Decision{}) {
			t.Errorf("%s decides %+v", name, d)
		}
		if d := v.DecideAny(topic, write); d != (Decision{}) {
			t.Errorf("%s decides %+v on any", name, d)
		}
	}
	if e := (*Policy)(nil).Explain(Subject{}, topic, "x", read); e.Allowed {
		t.Errorf("a nil policy explains %+v", e)
	}
}

func TestSeveralSets(t *testing.T) {
	set := func(head, rules string) string { return "apiVersion: klamm/v1\n" + head + "\nrules:\n" + rules }
	give := func(name, verb, what string) string {
		return "- {name: " + name + ", principals: ['*'], " + verb + ": [{topic: '" + what + "', operations: [All]}]}\n"
	}
	grants := set("", give("grants", "allow", "a*"))
	denies := set("", give("denies", "deny", "ab*"))
	watchesGrant := set("mode: observe", give("watches grant", "allow", "a*"))
	watchesDeny := set("mode: observe", give("watches deny", "deny", "ab*"))
	elsewhere := func(s string) string { return strings.Replace(s, "rules:", "cluster: elsewhere\nrules:", 1) }

	for name, c := range map[string]struct {
		sets  []string
		topic string
		want  Decision
	}{
		"enforced sets are pooled and deny wins": {
			[]string{grants, denies}, "abc", Decision{Rule: "denies"},
		},
		"enforced sets are pooled and an allow counts": {
			[]string{denies, grants}, "ac", Decision{true, false, "grants"},
		},
		"an observed deny lets pass and says so": {
			[]string{grants, watchesDeny}, "abc", Decision{true, true, "watches deny"},
		},
		"an observed deny elsewhere in the names is silent": {
			[]string{grants, watchesDeny}, "ac", Decision{true, false, "grants"},
		},
		"an observed allow widens nothing": {[]string{denies, watchesGrant}, "ac", Decision{}},
		"an observed allow restricts nothing": {
			[]string{grants, watchesGrant}, "ac", Decision{true, false, "grants"},
		},
		"observed sets alone let pass what they refuse": {
			[]string{watchesDeny, watchesGrant}, "abc", Decision{true, true, "watches deny"},
		},
		"observed sets alone let pass what no rule is about": {
			[]string{watchesDeny, watchesGrant}, "x", Decision{true, true, ""},
		},
		"observed sets alone allow what they allow": {
			[]string{watchesDeny, watchesGrant}, "ac", Decision{true, false, "watches grant"},
		},
		"an enforced set for elsewhere does not enforce": {
			[]string{elsewhere(grants), watchesDeny}, "x", Decision{true, true, ""},
		},
		"an observed set for elsewhere lets nothing pass": {[]string{elsewhere(watchesGrant)}, "ac", Decision{}},
	} {
		t.Run(name, func(t *testing.T) {
			var sets []*Set
			for _, text := range c.sets {
				sets = append(sets, mustParse(t, "f", text))
			}
			p, s := New(sets...), Subject{Cluster: "here", Principal: "User:a"}
			if got := p.For(s).Decide(topic, c.topic, read); got != c.want {
				t.Errorf("got %+v, want %+v", got, c.want)
			}
			if e := p.Explain(s, topic, c.topic, read); e.Allowed != c.want.Allowed || e.WouldDeny != c.want.WouldDeny {
				t.Errorf("explained as %+v", e)
			}
		})
	}
}

func TestAnyResource(t *testing.T) {
	for name, c := range map[string]struct {
		mode  string
		allow string
		deny  string
		op    kmsg.ACLOperation
		want  bool
		would bool
	}{
		"an allow of a literal counts":                     {"", "a", "", write, true, false},
		"an allow of a prefix counts":                      {"", "a*", "", write, true, false},
		"an allow of all counts":                           {"", "*", "", write, true, false},
		"nothing allowed is nothing":                       {"", "", "a", write, false, false},
		"a literal deny of the literal covers it":          {"", "a", "a", write, false, false},
		"a literal deny does not cover a prefix":           {"", "a*", "a", write, true, false},
		"a prefix deny covers the same prefix":             {"", "a*", "a*", write, false, false},
		"a prefix deny covers a longer prefix":             {"", "ab*", "a*", write, false, false},
		"a prefix deny covers a literal":                   {"", "ab", "a*", write, false, false},
		"a longer deny does not cover a shorter allow":     {"", "a*", "ab*", write, true, false},
		"a deny of all covers everything":                  {"", "*", "*", write, false, false},
		"a deny of a part does not cover an allow of all":  {"", "*", "a*", write, true, false},
		"one of several allows is enough":                  {"", "a,b", "a*", write, true, false},
		"what is only implied does not count for a prefix": {"", "a*", "", describe, false, false},
		"what is only implied counts for all":              {"", "*", "", describe, true, false},
		"in observe mode the refusal passes":               {"mode: observe", "a", "a", write, true, true},
		"in observe mode the allowed is allowed":           {"mode: observe", "a,b", "a", write, true, false},
	} {
		t.Run(name, func(t *testing.T) {
			var text strings.Builder
			text.WriteString("apiVersion: klamm/v1\n" + c.mode + "\nrules:\n")
			for verb, names := range map[string]string{"allow": c.allow, "deny": c.deny} {
				if names == "" {
					continue
				}
				fmt.Fprintf(&text, "- name: %s\n  principals: ['*']\n  %s:\n", verb, verb)
				for _, n := range strings.Split(names, ",") {
					fmt.Fprintf(&text, "  - {topic: '%s', operations: [Write]}\n", n)
				}
			}
			got := New(mustParse(t, "f", text.String())).For(Subject{Principal: "User:a"}).DecideAny(topic, c.op)
			if got.Allowed != c.want || got.WouldDeny != c.would {
				t.Errorf("got %+v", got)
			}
		})
	}
}

func TestAStarAllowsWhoIsIdentifiedOnly(t *testing.T) {
	p := New(mustParse(t, "f", `apiVersion: klamm/v1
rules: [{name: r, principals: ["*"], allow: [{topic: t, operations: [Read]}]}]`))
	for name, c := range map[string]struct {
		who  Subject
		want Decision
	}{
		"a SPIFFE ID": {Subject{SPIFFE: "spiffe://t/a"}, Decision{Allowed: true, Rule: "r"}},
		"a SASL user": {Subject{Principal: "User:a"}, Decision{Allowed: true, Rule: "r"}},
		"nobody":      {Subject{}, Decision{}},
	} {
		for range 2 { // the second time from the cache
			if got := p.For(c.who).Decide(topic, "t", read); got != c.want {
				t.Errorf("%s: got %+v, want %+v", name, got, c.want)
			}
		}
	}
	if e := p.Explain(Subject{}, topic, "t", read); !strings.Contains(e.Rules[0].Why, "only who is identified") {
		t.Errorf("explained as %+v", e)
	}
}

func TestAnyResourceNamesTheFirstRule(t *testing.T) {
	p := New(mustParse(t, "f", `apiVersion: klamm/v1
rules:
- {name: late in the alphabet, principals: ["*"], allow: [{topic: z, operations: [Write]}]}
- {name: early, principals: ["*"], allow: [{topic: a, operations: [Write]}]}
- {name: later still, principals: ["*"], allow: [{topic: zz, operations: [Write]}]}`))
	want := Decision{Allowed: true, Rule: "late in the alphabet"}
	if got := p.For(Subject{Principal: "User:a"}).DecideAny(topic, write); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

func TestSubjectsOfTheSameRulesShareAView(t *testing.T) {
	p := shop(t)
	a := p.For(Subject{SPIFFE: "spiffe://example.test/ns/analytics/sa/a", Host: netip.MustParseAddr("192.0.2.1")})
	b := p.For(Subject{SPIFFE: "spiffe://example.test/ns/analytics/sa/b", Host: netip.MustParseAddr("192.0.2.2")})
	if a != b {
		t.Error("two views of the same rules")
	}
	if a == p.For(Subject{SPIFFE: "spiffe://example.test/ns/shop/sa/orders"}) {
		t.Error("one view of different rules")
	}
}

func TestTheCachesAreBounded(t *testing.T) {
	p := shop(t)
	s := Subject{Principal: "User:x", Host: netip.MustParseAddr("10.1.0.0")}
	for range maxSubjects + 10 {
		p.For(s)
		s.Host = s.Host.Next()
	}
	if len(p.subjects) > maxSubjects {
		t.Errorf("%d subjects are kept", len(p.subjects))
	}
}

func TestManyGoroutinesMayAskForViews(t *testing.T) {
	p := shop(t)
	done := make(chan bool)
	for i := range 8 {
		go func() {
			s := Subject{Principal: "User:alice", Host: netip.AddrFrom4([4]byte{10, 1, 0, byte(i)})}
			ok := true
			for range 100 {
				ok = ok && p.For(s).Decide(topic, "orders.placed", read).Allowed
				s.Host = s.Host.Next()
			}
			done <- ok
		}()
	}
	for range 8 {
		if !<-done {
			t.Error("refused")
		}
	}
}

// Each file of testdata/errors closes with what is wrong in it, as comments.
func TestWhatIsWrongInAPolicyIsSaidWithItsPosition(t *testing.T) {
	files, err := filepath.Glob("testdata/errors/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("%d files, %v", len(files), err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".yaml"), func(t *testing.T) {
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			_, wrong, _ := strings.Cut(string(data), "# wrong: ")
			want := "f:" + strings.ReplaceAll(strings.TrimSpace(wrong), "# wrong: ", "f:")
			if _, err := Parse("f", data); err == nil || err.Error() != want {
				t.Errorf("got\n%v\nwant\n%s", err, want)
			}
		})
	}
}

func TestWhatIsHardlyMeantIsWarnedOf(t *testing.T) {
	for name, c := range map[string]struct{ in, want string }{
		"a rule for another cluster than its file's": {`
cluster: a
rules:
- {name: r, cluster: b, principals: ["*"], allow: [{topic: t, operations: [Read]}]}`,
			`f:4:3: rule "r" never matches: it is for the cluster "b", its file for "a" only`},
		"a user that looks like a pattern": {`
rules:
- {name: r, principals: ["User:a*"], allow: [{topic: t, operations: [Read]}]}`,
			`f:3:3: rule "r": "User:a*" is one user whose name ends in *, as in Kafka's ACLs, and no pattern`},
		"a topic that cannot exist": {`
rules:
- {name: r, principals: ["*"], allow: [{topic: "a b", operations: [Read]}]}`,
			`f:3:40: no topic matches "a b": Kafka's topic names are up to 249 of a-z A-Z 0-9 . _ -`},
		"All beside another": {`
rules:
- {name: r, principals: ["*"], deny: [{group: g, operations: [All, Read]}]}`,
			`f:3:39: All includes the other operations`},
		"an allow that a deny takes back": {`
rules:
- {name: r, cluster: a, principals: ["spiffe://t/a/b"], hosts: [10.1.0.0/16],
   allow: [{topic: ab, operations: [Create]}]}
- {name: d, principals: ["spiffe://t/a/*"], hosts: [10.0.0.0/8], deny: [{topic: a*, operations: [Create, Write]}]}`,
			`f:4:12: this allow has no effect: rule "d" denies all of it`},
		"an allow of which a deny leaves the implied Describe": {`
rules:
- {name: r, principals: ["*"], allow: [{topic: ab, operations: [Write]}]}
- {name: d, principals: ["*"], deny: [{topic: a*, operations: [Write]}]}`, ``},
		"an allow that a deny takes back on some hosts": {`
rules:
- {name: r, principals: ["*"], hosts: [10.0.0.0/8], allow: [{topic: ab, operations: [Create]}]}
- {name: d, principals: ["*"], hosts: [10.0.0.0/16], deny: [{topic: a*, operations: [Create]}]}`, ``},
		"an allow that a deny takes back from some": {`
rules:
- {name: r, principals: ["*"], allow: [{topic: ab, operations: [Create]}]}
- {name: d, principals: ["User:*"], deny: [{topic: a*, operations: [Create]}]}`, ``},
		"an allow that a deny takes back on a condition": {`
rules:
- {name: r, principals: ["*"], allow: [{topic: ab, operations: [Create]}]}
- {name: d, principals: ["*"], when: claims.a == 1, deny: [{topic: a*, operations: [Create]}]}`, ``},
		"an allow of whoever a condition names that a deny of others takes back": {`
rules:
- {name: r, when: claims.a == 1, allow: [{topic: ab, operations: [Create]}]}
- {name: d, principals: ["User:*"], deny: [{topic: a*, operations: [Create]}]}`, ``},
		"a condition that is always the same": {`
rules:
- {name: r, principals: ["*"], when: "1 < 2", deny: [{topic: ab, operations: [Create]}]}`,
			`f:3:38: the condition is always the same: it looks at nothing`},
		"a condition on no workload": {`
rules:
- {name: r, when: host == "192.0.2.1", allow: [{topic: ab, operations: [Create]}]}
- {name: s, principals: ["*"], when: host == "192.0.2.1", allow: [{topic: ab, operations: [Create]}]}`,
			`f:3:19: the condition looks at nothing of the workload: rule "r" is about everyone, identified or not`},
		"an entry for another cluster than its file's": {`
cluster: a
connections:
- {name: r, cluster: b, principals: ["*"], passthrough: true}`,
			`f:4:3: rule "r" never matches: it is for the cluster "b", its file for "a" only`},
		"a login looked at where none is seen": {`
connections:
- {name: r, when: sasl.principal == "User:a", passthrough: true}
- {name: s, when: sasl.principal == "User:a", sasl: ["User:*"], passthrough: true}`,
			`f:3:19: no login is known of a connection whose TLS passes unread`},
	} {
		t.Run(name, func(t *testing.T) {
			found := mustParse(t, "f", "apiVersion: klamm/v1"+c.in).Warnings()
			if got := strict.Errors(found).Error(); got != c.want {
				t.Errorf("got\n%s\nwant\n%s", got, c.want)
			}
		})
	}
}

func FuzzParse(f *testing.F) {
	data, err := os.ReadFile("testdata/shop.yaml")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add([]byte("apiVersion: klamm/v1\nmode: observe\ncluster: c\nrules: []"))
	f.Add([]byte(`{apiVersion: klamm/v1, rules: [{name: r, principals: ["*"],
		deny: [{topic: {prefix: a}, operations: [All]}]}]}`))
	f.Add([]byte(`{apiVersion: klamm/v1, connections: [{name: c, when: "has(claims.a)", sasl: ["*", "User:*", "User:a"]},
		{name: d, principals: [anonymous], hosts: [10.0.0.0/8], passthrough: true}]}`))
	f.Add([]byte("apiVersion: klamm/v1\nrules:\n- name: r\n  when: |\n    claims.n == 3 &&\n    sources.sasl.claims.sub " +
		"!= ''\n  allow: [{topic: '*', operations: [All]}]"))
	f.Fuzz(func(t *testing.T, data []byte) {
		var s *Set
		var err error
		bounds.Check(t, len(data), 1<<16, func() { s, err = Parse("f", data) })
		var errs strict.Errors
		switch {
		case err != nil && !errors.As(err, &errs):
			t.Fatalf("%T: %v", err, err)
		case err != nil:
			return
		}
		s.Warnings()
		p := New(s)
		for _, who := range []Subject{{}, {Principal: "User:alice"}, {SPIFFE: "spiffe://example.test/ns/analytics/x"},
			somebody()} {
			checkConnectionExplained(t, p.ExplainLogin(who, "User:alice"), p.Login(who, "User:alice"))
			checkConnectionExplained(t, p.ExplainPassthrough(who), p.Passthrough(who))
			d := p.For(who).Decide(topic, "orders.placed", read)
			if e := p.Explain(who, topic, "orders.placed", read); e.Allowed != d.Allowed || e.Rule != d.Rule {
				t.Fatalf("decided %+v, explained %+v", d, e)
			}
		}
	})
}

func TestEveryResourceIsAllowedWhereNoNameIsRefused(t *testing.T) {
	for name, c := range map[string]struct{ allow, deny, rule string }{
		"all":                              {`{topic: "*", operations: [Read]}`, ``, "allows"},
		"a prefix":                         {`{topic: "a*", operations: [Read]}`, ``, ""},
		"all but one":                      {`{topic: "*", operations: [Read]}`, `{topic: a, operations: [Read]}`, "denies"},
		"all but a prefix":                 {`{topic: "*", operations: [Read]}`, `{topic: a*, operations: [All]}`, "denies"},
		"all, and something else refused":  {`{topic: "*", operations: [Read]}`, `{topic: a, operations: [Write]}`, "allows"},
		"all of another operation":         {`{topic: "*", operations: [Write]}`, ``, ""},
		"all groups":                       {`{group: "*", operations: [Read]}`, ``, ""},
		"all, as implied by what is given": {`{topic: "*", operations: [All]}`, ``, "allows"},
	} {
		t.Run(name, func(t *testing.T) {
			rules := `apiVersion: klamm/v1
rules:
- {name: allows, principals: ["*"], allow: [` + c.allow + `]}
- {name: denies, principals: ["*"], deny: [` + c.deny + `], allow: [{topic: b, operations: [Read]}]}`
			got := New(mustParse(t, "f", rules)).For(Subject{Principal: "User:a"}).DecideAll(topic, read)
			if want := (Decision{Allowed: c.rule == "allows", Rule: c.rule}); got != want {
				t.Errorf("got %+v, want %+v", got, want)
			}
		})
	}
	if d := (*View)(nil).DecideAll(topic, read); d != (Decision{}) {
		t.Errorf("no view decides %+v", d)
	}
}
