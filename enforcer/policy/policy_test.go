package policy

import (
	"errors"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/policy/strict"
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
		"a prefix matches what begins with it":               {orders, topic, "orders.placed", write, Decision{Allowed: true, Rule: r0}},
		"a prefix matches itself":                            {orders, topic, "orders.", write, Decision{Allowed: true, Rule: r0}},
		"a prefix does not match less":                       {orders, topic, "orders", write, Decision{}},
		"a prefix does not match another name":               {orders, topic, "payouts", write, Decision{}},
		"an operation that is not listed is refused":         {orders, topic, "orders.placed", read, Decision{}},
		"another type of resource is refused":                {orders, group, "orders.placed", describe, Decision{}},
		"a transactional id is a resource":                   {orders, txn, "orders-1", write, Decision{Allowed: true, Rule: r0}},
		"the cluster is a resource":                          {orders, cluster, "kafka-cluster", kmsg.ACLOperationIdempotentWrite, Decision{Allowed: true, Rule: r0}},
		"another cluster is out of the rule's scope":         {with(orders, func(s *Subject) { s.Cluster = "logs" }), topic, "orders.placed", write, Decision{}},
		"a literal SPIFFE ID is no prefix":                   {with(orders, func(s *Subject) { s.SPIFFE += "-2" }), topic, "orders.placed", write, Decision{}},
		"a SPIFFE pattern matches any rest":                  {analytics, topic, "orders.placed", read, Decision{Allowed: true, Rule: r1}},
		"a literal topic is no prefix":                       {analytics, topic, "orders.placed.eu", read, Decision{}},
		"Read implies Describe":                              {analytics, topic, "orders.placed", describe, Decision{Allowed: true, Rule: r1}},
		"Read does not imply DescribeConfigs":                {analytics, topic, "orders.placed", describeConfigs, Decision{}},
		"AlterConfigs implies DescribeConfigs":               {analytics, topic, "a*", describeConfigs, Decision{Allowed: true, Rule: r1}},
		"a spelled-out literal with a star is no prefix":     {analytics, topic, "ab", describeConfigs, Decision{}},
		"deny wins over allow":                               {office, topic, "x", remove, Decision{Rule: r2}},
		"a deny that comes after the allow wins too":         {analytics, topic, "secret.plans", read, Decision{Rule: r2}},
		"a deny of one operation leaves the others":          {office, topic, "x", describe, Decision{Allowed: true, Rule: r3}},
		"a deny of All denies what is implied":               {office, topic, "secretary", describe, Decision{Rule: r2}},
		"a SASL principal is matched as a whole":             {alice, topic, "orders.placed", read, Decision{Allowed: true, Rule: r1}},
		"a SASL principal is not a prefix":                   {with(alice, func(s *Subject) { s.Principal = "User:alice2" }), topic, "orders.placed", read, Decision{}},
		"a host outside the networks is not named":           {alice, topic, "x", read, Decision{}},
		"an IPv4 address mapped into IPv6 is the address":    {office, topic, "x", read, Decision{Allowed: true, Rule: r3}},
		"a single host matches":                              {with(office, func(s *Subject) { s.Host = netip.MustParseAddr("2001:db8::7") }), topic, "x", read, Decision{Allowed: true, Rule: r3}},
		"an unknown host is in no network":                   {with(office, func(s *Subject) { s.Host = netip.Addr{} }), topic, "x", read, Decision{}},
		"the first rule of several is named":                 {with(office, func(s *Subject) { s.Principal = "User:alice" }), topic, "orders.placed", read, Decision{Allowed: true, Rule: r1}},
		"a star allows no one unidentified":                  {Subject{Host: office.Host}, topic, "x", write, Decision{}},
		"a star denies the unidentified":                     {Subject{}, topic, "secret", read, Decision{Rule: r2}},
		"anonymous is who has no identity":                   {Subject{}, topic, "board", read, Decision{Allowed: true, Rule: r4}},
		"anonymous is no one who has an identity":            {analytics, topic, "board", read, Decision{}},
		"the empty name is matched by the wildcard alone":    {office, topic, "", read, Decision{Allowed: true, Rule: r3}},
		"a delegation token is a resource":                   {office, kmsg.ACLResourceTypeDelegationToken, "t", describe, Decision{Allowed: true, Rule: r3}},
		"a user is a resource":                               {office, kmsg.ACLResourceTypeUser, "User:bob", kmsg.ACLOperationCreateTokens, Decision{Allowed: true, Rule: r3}},
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
		"enforced sets are pooled and deny wins":             {[]string{grants, denies}, "abc", Decision{Rule: "denies"}},
		"enforced sets are pooled and an allow counts":       {[]string{denies, grants}, "ac", Decision{true, false, "grants"}},
		"an observed deny lets pass and says so":             {[]string{grants, watchesDeny}, "abc", Decision{true, true, "watches deny"}},
		"an observed deny elsewhere in the names is silent":  {[]string{grants, watchesDeny}, "ac", Decision{true, false, "grants"}},
		"an observed allow widens nothing":                   {[]string{denies, watchesGrant}, "ac", Decision{}},
		"an observed allow restricts nothing":                {[]string{grants, watchesGrant}, "ac", Decision{true, false, "grants"}},
		"observed sets alone let pass what they refuse":      {[]string{watchesDeny, watchesGrant}, "abc", Decision{true, true, "watches deny"}},
		"observed sets alone let pass what no rule is about": {[]string{watchesDeny, watchesGrant}, "x", Decision{true, true, ""}},
		"observed sets alone allow what they allow":          {[]string{watchesDeny, watchesGrant}, "ac", Decision{true, false, "watches grant"}},
		"an enforced set for elsewhere does not enforce":     {[]string{elsewhere(grants), watchesDeny}, "x", Decision{true, true, ""}},
		"an observed set for elsewhere lets nothing pass":    {[]string{elsewhere(watchesGrant)}, "ac", Decision{}},
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
			text := "apiVersion: klamm/v1\n" + c.mode + "\nrules:\n"
			for verb, names := range map[string]string{"allow": c.allow, "deny": c.deny} {
				if names == "" {
					continue
				}
				text += "- name: " + verb + "\n  principals: ['*']\n  " + verb + ":\n"
				for _, n := range strings.Split(names, ",") {
					text += "  - {topic: '" + n + "', operations: [Write]}\n"
				}
			}
			got := New(mustParse(t, "f", text)).For(Subject{Principal: "User:a"}).DecideAny(topic, c.op)
			if got.Allowed != c.want || got.WouldDeny != c.would {
				t.Errorf("got %+v", got)
			}
		})
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

func TestWhatIsWrongInAPolicyIsSaidWithItsPosition(t *testing.T) {
	rule := func(rest string) string {
		return "apiVersion: klamm/v1\nrules:\n- name: r\n  principals: [User:a]\n  " + rest
	}
	const ok = "  allow: [{topic: t, operations: [Read]}]\n"
	who := func(p string) string {
		return "apiVersion: klamm/v1\nrules:\n- name: r\n  principals: [" + p + "]\n" + ok
	}
	for name, c := range map[string]struct{ in, want string }{
		"the version is missing": {"rules: []", `f:1:1: the key "apiVersion" is missing`},
		"the version is another": {"apiVersion: v2\nrules: []", `f:1:13: apiVersion "v2" is not supported: this version reads "klamm/v1"`},
		"the rules are missing":  {"apiVersion: klamm/v1", `f:1:1: the key "rules" is missing`},
		"the mode is unknown":    {"apiVersion: klamm/v1\nmode: observed\nrules: []", `f:2:7: unknown mode "observed", did you mean "observe"? (allowed: enforce, observe)`},
		"a key of a later version": {rule("mask: []\n" + ok),
			`f:5:3: unknown key "mask" (allowed: name, cluster, principals, hosts, allow, deny)`},
		"a top-level key of a later version": {"apiVersion: klamm/v1\nguards: []\nrules: []",
			`f:2:1: unknown key "guards" (allowed: apiVersion, mode, cluster, rules)`},
		"two rules of one name": {"apiVersion: klamm/v1\nrules:\n" + strings.Repeat("- name: r\n  principals: ['*']\n"+ok, 2),
			`f:6:3: the rule name "r" is taken by the rule in line 3: the audit could not tell them apart`},
		"a rule that says nothing":  {rule("hosts: ['*']"), `f:3:3: the rule neither allows nor denies anything`},
		"a rule without principals": {"apiVersion: klamm/v1\nrules:\n- name: r\n" + ok, `f:3:3: the key "principals" is missing`},
		"no principals": {"apiVersion: klamm/v1\nrules:\n- name: r\n  principals: []\n" + ok,
			`f:3:3: principals is empty: list who the rule is about, ["*"] for everyone identified`},
		"no hosts": {rule("hosts: []\n" + ok), `f:3:3: hosts is empty: leave the key out for every host`},
		"an operation the resource does not have": {rule("allow: [{group: g, operations: [Read, Write]}]"),
			`f:5:41: Kafka has no operation Write on a group (allowed: All, Read, Delete, Describe, DescribeConfigs, AlterConfigs)`},
		"an operation Kafka does not have": {rule("allow: [{user: u, operations: [CreateToken]}]"),
			`f:5:34: unknown operation "CreateToken", did you mean "CreateTokens"? (allowed: All, CreateTokens, DescribeTokens)`},
		"no operations":        {rule("allow: [{group: g, operations: []}]"), `f:5:11: operations is empty: list what the entry is about, [All] for every operation`},
		"operations missing":   {rule("allow: [{group: g}]"), `f:5:11: the key "operations" is missing`},
		"no resource":          {rule("allow: [{operations: [Read]}]"), `f:5:11: 0 resources in one entry: want exactly one of topic, group, cluster, transactional-id, delegation-token, user`},
		"two resources":        {rule("deny: [{topic: t, group: g, operations: [Read]}]"), `f:5:10: 2 resources in one entry: want exactly one of topic, group, cluster, transactional-id, delegation-token, user`},
		"a star in the middle": {rule("deny: [{topic: a*b, operations: [Read]}]"), `f:5:18: "a*b": a * stands for the rest of a name and only at the end; where it is part of the name write {literal: …} or {prefix: …}`},
		"an empty name":        {rule("deny: [{topic: '', operations: [Read]}]"), `f:5:18: the name is empty: write "*" for any`},
		"an empty prefix":      {rule("deny: [{topic: {prefix: ''}, operations: [Read]}]"), `f:5:18: the name is empty: write "*" for any`},
		"a literal star":       {rule("deny: [{topic: {literal: '*'}, operations: [Read]}]"), `f:5:18: {literal: "*"} means any name in Kafka's ACLs: write "*" for that`},
		"literal and prefix":   {rule("deny: [{topic: {literal: a, prefix: a}, operations: [Read]}]"), `f:5:18: want exactly one of literal, prefix`},
		"a cluster's own name as resource": {rule("allow: [{cluster: payments, operations: [Create]}]"),
			`f:5:21: the cluster as a resource is always named "kafka-cluster"; which cluster a rule is about is said by the rule's own key cluster, beside its name`},
		"a principal that is none":              {who("alice"), `f:4:16: "alice" is no principal: want "spiffe://domain/path" (a * at the end stands for any rest), "User:name", "User:*", "*" or "anonymous"`},
		"a user without a name":                 {who("'User:'"), `f:4:16: "User:" is no principal: want "spiffe://domain/path" (a * at the end stands for any rest), "User:name", "User:*", "*" or "anonymous"`},
		"a SPIFFE ID that is none":              {who("'spiffe://Example.test/x'"), `f:4:16: "spiffe://Example.test/x" is no SPIFFE ID: trust domain characters are limited to lowercase letters, numbers, dots, dashes, and underscores`},
		"a star in the trust domain":            {who("'spiffe://example*'"), `f:4:16: "spiffe://example*": write the trust domain out, the * can only stand in the path: spiffe://domain/*`},
		"a star in the middle of a SPIFFE ID":   {who("'spiffe://example/*/x'"), `f:4:16: "spiffe://example/*/x": a * stands for any rest and only at the end`},
		"two stars at the end of a SPIFFE ID":   {who("'spiffe://example/**'"), `f:4:16: "spiffe://example/**": a * stands for any rest and only at the end`},
		"a SPIFFE ID with an empty segment":     {who("'spiffe://example//x'"), `f:4:16: "spiffe://example//x" is no SPIFFE ID: path cannot contain empty segments`},
		"a host name":                           {rule("hosts: [localhost]\n" + ok), `f:5:11: "localhost" is no host: want an IP address, a network like 10.1.0.0/16, or "*" (names are not resolved)`},
		"a network with bits beyond its length": {rule("hosts: [10.1.2.3/16]\n" + ok), `f:5:11: "10.1.2.3/16" has bits set beyond its length: did you mean 10.1.0.0/16?`},
		"a mapped network":                      {rule("hosts: ['::ffff:10.0.0.0/104']\n" + ok), `f:5:11: write an IPv4 network as one, not mapped into IPv6`},
		"a host with a zone":                    {rule("hosts: ['fe80::1%eth0']\n" + ok), `f:5:11: "fe80::1%eth0": leave the zone (%eth0) out`},
		"an empty rule name":                    {"apiVersion: klamm/v1\nrules:\n- name: ''\n  principals: [User:a]\n" + ok, `f:3:3: the name is empty: the audit names rules by it`},
		"several things": {rule("allow: [{topic: t, operations: [Raed]}]\n  hosts: [x]\nrulez: 1"),
			`f:5:35: unknown operation "Raed", did you mean "Read"? (allowed: All, Read, Write, Create, Delete, Alter, Describe, DescribeConfigs, AlterConfigs)` + "\n" +
				`f:6:11: "x" is no host: want an IP address, a network like 10.1.0.0/16, or "*" (names are not resolved)` + "\n" +
				`f:7:1: unknown key "rulez", did you mean "rules"? (allowed: apiVersion, mode, cluster, rules)`},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Parse("f", []byte(c.in))
			if err == nil || err.Error() != c.want {
				t.Errorf("got\n%v\nwant\n%s", err, c.want)
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
- {name: r, cluster: a, principals: ["spiffe://t/a/b"], hosts: [10.1.0.0/16], allow: [{topic: ab, operations: [Create]}]}
- {name: d, principals: ["spiffe://t/a/*"], hosts: [10.0.0.0/8], deny: [{topic: a*, operations: [Create, Write]}]}`,
			`f:3:87: this allow has no effect: rule "d" denies all of it`},
		"an allow of which a deny leaves the implied Describe": {`
rules:
- {name: r, principals: ["*"], allow: [{topic: ab, operations: [Write]}]}
- {name: d, principals: ["*"], deny: [{topic: a*, operations: [Write]}]}`, ``},
		"an allow that a deny takes back from some": {`
rules:
- {name: r, principals: ["*"], allow: [{topic: ab, operations: [Create]}]}
- {name: d, principals: ["User:*"], deny: [{topic: a*, operations: [Create]}]}`, ``},
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
	f.Add([]byte("apiVersion: klamm/v1\nrules: [{name: r, principals: ['*'], deny: [{topic: {prefix: a}, operations: [All]}]}]"))
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := Parse("f", data)
		var errs strict.Errors
		switch {
		case err != nil && !errors.As(err, &errs):
			t.Fatalf("%T: %v", err, err)
		case err != nil:
			return
		}
		s.Warnings()
		p := New(s)
		for _, who := range []Subject{{}, {Principal: "User:alice"}, {SPIFFE: "spiffe://example.test/ns/analytics/x"}} {
			d := p.For(who).Decide(topic, "orders.placed", read)
			if e := p.Explain(who, topic, "orders.placed", read); e.Allowed != d.Allowed || e.Rule != d.Rule {
				t.Fatalf("decided %+v, explained %+v", d, e)
			}
		}
	})
}
