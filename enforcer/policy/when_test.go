package policy

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.yaml.in/yaml/v3"

	"klamm/enforcer/policy/strict"
	"klamm/spiffe"
	"klamm/test/bounds"
)

// somebody is a subject of whom everything is known.
func somebody() Subject {
	id := spiffeid.RequireFromString("spiffe://t/ns/shop/sa/orders")
	var claims map[string]any
	if err := json.Unmarshal([]byte(`{"iss": "https://k8s", "sub": "system:serviceaccount:shop:orders", "n": 3, "no": null,
		"aud": ["kafka", "x"], "kubernetes.io": {"namespace": "shop", "serviceaccount": {"name": "orders"}}}`), &claims,
	); err != nil {
		panic(err)
	}
	claims["many"] = make([]any, 500)
	return Subject{
		Cluster: "main", SPIFFE: id.String(), Principal: "User:orders", Host: netip.MustParseAddr("::ffff:10.1.2.3"),
		Facts: &Facts{
			Identity: &spiffe.Identity{
				ID: id, Source: spiffe.SourceSPIRE, Claims: claims,
				Evidence: []spiffe.Evidence{
					{Source: spiffe.SourceSPIRE, ID: id, Hint: "first"},
					{Source: spiffe.SourceSPIRE, ID: spiffeid.RequireFromString("spiffe://t/second"), Hint: "second"},
					{Source: spiffe.SourceKubernetes, Issuer: "https://k8s", Claims: claims, Subject: claims["sub"].(string)},
					{Source: spiffe.SourceTLS, Issuer: "CN=CA", Subject: "CN=orders,O=shop"},
				},
				Process: spiffe.Process{
					PID: 7, UID: 0, GID: 1000, Exe: "/usr/bin/orders", Comm: "orders", Cgroup: "/kubepods/x", PodUID: "u-1",
					Namespace: "shop", Pod: "orders-0", Container: "app",
				},
			},
			SASL: SASL{Mechanism: "OAUTHBEARER", Principal: "User:orders", Token: &spiffe.Evidence{
				Source: spiffe.SourceSASL, Issuer: "https://idp", Subject: "orders",
				Claims: map[string]any{"azp": "orders", "count": json.Number("4")},
			}},
		},
	}
}

func TestConditions(t *testing.T) {
	const no, yes = "false", "true"
	nobody, all := Subject{Cluster: "main"}, somebody()
	for expression, c := range map[string]struct {
		who  Subject
		want string // or how the error begins
	}{
		`spiffe_id == "spiffe://t/ns/shop/sa/orders"`:                   {all, yes},
		`spiffe_id.startsWith("spiffe://t/ns/shop/")`:                   {all, yes},
		`spiffe_id.matches("^spiffe://t/ns/[^/]+/sa/pay$")`:             {all, no},
		`spiffe_id.split("/")[4] == claims["kubernetes.io"].namespace`:  {all, yes},
		`cluster == "main" && host == "10.1.2.3"`:                       {all, yes},
		`identity.source == "spire" && identity.spiffe_id == spiffe_id`: {all, yes},
		`identity.rule == "x"`:                                          {all, "identity.rule is not known"},
		`has(identity.rule)`:                                            {all, no},
		`claims.n == 3 && claims.n < 4`:                                 {all, yes},
		`claims.no == null && has(claims.no)`:                           {all, yes},
		`"kafka" in claims.aud && claims.aud.exists(a, a == "x")`:       {all, yes},
		`claims.team == "x"`:                                            {all, "no such key: team"},
		`has(claims.team) && claims.team == "x"`:                        {all, no},
		`has(claims.sub) && !has(claims.team)`:                          {all, yes},
		`claims.team == "x" || cluster == "main"`:                       {all, yes},
		`claims.n` + ` == "3"`:                                          {all, no},
		`claims.n + 1 == 4`:                                             {all, "no such overload"},
		`sources["kubernetes"].claims.iss == "https://k8s"`:             {all, yes},
		`sources.kubernetes.issuer == "https://k8s"`:                    {all, yes},
		`sources["spire"].hint == "first"`:                              {all, yes},
		`sources["token-file"].claims.sub == "x"`:                       {all, "no such key: token-file"},
		`has(sources.kubernetes) && !("token-file" in sources)`:         {all, yes},
		`evidence.exists(e, e.source == "spire" && e.hint == "second")`: {all, yes},
		`evidence.filter(e, has(e.spiffe_id)).size() == 2 && size(evidence) == 5`: {
			all, yes,
		},
		`evidence[1].spiffe_id == "spiffe://t/second" && evidence[0] != evidence[1]`: {
			all, yes,
		},
		`sources["sasl"].claims.azp == sasl.claims.azp`: {all, yes},
		`sasl.mechanism == "OAUTHBEARER" && sasl.principal == "User:" + sasl.claims.azp`: {
			all, yes,
		},
		`sasl.claims.count == 4 && sasl.issuer == "https://idp"`:       {all, yes},
		`process.uid == 0 && process.gid == 1000`:                      {all, yes},
		`has(process.uid) && !has(process.unit)`:                       {all, yes},
		`process.exe == "/usr/bin/orders" && process.comm == "orders"`: {all, yes},
		`process.cgroup.startsWith("/kubepods/")`:                      {all, yes},
		`process.exe_sha256 == "00"`:                                   {all, "process.exe_sha256 is not known"},
		`pod.namespace + "/" + pod.name + "/" + pod.container == "shop/orders-0/app" && pod.uid == "u-1"`: {
			all, yes,
		},
		`tls.subject == "CN=orders,O=shop" && tls.issuer == "CN=CA"`: {all, yes},
		`dyn(process).uid == 0 && has(dyn(process).uid)`:             {all, yes},
		`klamm.Process{exe: "a"}.exe == "a"`:                         {all, "unknown type 'klamm.Process'"},
		`["a", "b"].map(a, a + "x").exists(a, a == "bx")`:            {all, yes},
		`claims.many.all(a, claims.many.all(b, a == b))`: {
			all, "operation cancelled: actual cost limit exceeded"},

		`spiffe_id != "x"`:                         {nobody, "spiffe_id is not known"},
		`spiffe_id != "x" `:                        {Subject{}, "spiffe_id is not known"},
		`host != "x"`:                              {nobody, "host is not known"},
		`cluster == "main"`:                        {nobody, yes},
		`has(identity.spiffe_id)`:                  {nobody, no},
		`claims.sub != "x"`:                        {nobody, "no such key: sub"},
		`has(claims.sub)`:                          {nobody, no},
		`process.uid == 0`:                         {nobody, "process.uid is not known"},
		`has(process.uid)`:                         {nobody, no},
		`pod.namespace != "x"`:                     {nobody, "pod.namespace is not known"},
		`sasl.principal != "x"`:                    {nobody, "sasl.principal is not known"},
		`has(sasl.claims.sub) || has(tls.subject)`: {nobody, no},
		`tls.subject != "x"`:                       {nobody, "tls.subject is not known"},
		`sources.size() == 0 && evidence == []`:    {nobody, yes},
	} {
		t.Run(expression, func(t *testing.T) {
			p := New(mustParse(t, "f", fmt.Sprintf("apiVersion: klamm/v1\nrules:\n- {name: r, when: %q, deny: "+
				"[{topic: t, operations: [Read]}], allow: [{topic: t, operations: [Write]}]}", expression)))
			got, err := p.rules[0].When.holds(newKnown(&c.who))
			if err == nil && fmt.Sprint(got) != c.want || err != nil && (got || !strings.HasPrefix(err.Error(), c.want)) {
				t.Fatalf("got %v, %v", got, err)
			}
			v := p.For(c.who)
			if d := v.Decide(topic, "t", read); (d.Rule == "r") != (got || err != nil) {
				t.Errorf("its deny: %+v", d)
			}
			if d := v.Decide(topic, "t", write); d.Allowed != got {
				t.Errorf("its allow: %+v", d)
			}
		})
	}
}

func TestWhatIsNotKnownOfASubjectIsNoPartOfItsView(t *testing.T) {
	p := New(mustParse(t, "f", `apiVersion: klamm/v1
rules:
- {name: all, principals: ["User:*"], allow: [{topic: a, operations: [Read]}]}
- {name: two, principals: ["User:b"], when: claims.n == 2, allow: [{topic: b, operations: [Read]}]}
- {name: untold, principals: ["User:b"], when: claims.m == 2, allow: [{topic: c, operations: [Read]}]}`))
	facts := func(n int) *Facts { return &Facts{Identity: &spiffe.Identity{Claims: map[string]any{"n": n}}} }

	a := p.For(Subject{Principal: "User:a", Facts: facts(1)})
	if a != p.For(Subject{Principal: "User:a", Facts: facts(2)}) || len(p.subjects) != 1 {
		t.Errorf("one view of a subject no condition is about: %d subjects are kept", len(p.subjects))
	}
	one, two := p.For(Subject{Principal: "User:b", Facts: facts(1)}), p.For(Subject{Principal: "User:b", Facts: facts(2)})
	if one != a || two == a {
		t.Error("the views are not those of the rules that hold")
	}
	if two != p.For(Subject{Principal: "User:b", Facts: facts(2)}) {
		t.Error("two views of the same rules")
	}
	if len(p.subjects) != 1 || len(p.views) != 2 {
		t.Errorf("%d subjects, %d views are kept", len(p.subjects), len(p.views))
	}
	if d := two.Decide(topic, "b", read); !d.Allowed || d.Rule != "two" {
		t.Errorf("decided %+v", d)
	}
}

func TestConditionsWithManyOutcomesKeepTheCachesBounded(t *testing.T) {
	var text strings.Builder
	text.WriteString("apiVersion: klamm/v1\nrules:\n")
	const rules = 400
	for i := range rules {
		fmt.Fprintf(&text, "- {name: r%d, when: '%d in claims.set', allow: [{topic: '*', operations: [Read]}]}\n", i, i)
	}
	p := New(mustParse(t, "f", text.String()))
	for seed := range 300 {
		r := rand.New(rand.NewPCG(uint64(seed), 0))
		var set []any
		for i := range rules {
			if r.IntN(2) == 0 {
				set = append(set, i)
			}
		}
		v := p.For(Subject{Facts: &Facts{Identity: &spiffe.Identity{Claims: map[string]any{"set": set}}}})
		if d := v.Decide(topic, "t", read); d.Allowed != (len(set) > 0) {
			t.Fatalf("decided %+v of %v", d, set)
		}
	}
	size := 0
	for key := range p.views {
		size += len(key)
	}
	if len(p.subjects) != 0 || p.weight > maxWeight || p.weight < size/nodeSize {
		t.Errorf("%d subjects, views of weight %d with keys of %d bytes", len(p.subjects), p.weight, size)
	}
}

func TestWhoeverIsLostHasNoRight(t *testing.T) {
	const rules = `
rules:
- {name: r, principals: ["User:a"], allow: [{topic: t, operations: [Read]}]}
- {name: w, when: process.uid == 7, allow: [{topic: t, operations: [Read]}]}
connections:
- {name: c, principals: ["*"], sasl: ["User:a"], passthrough: true}`
	lost := Subject{SPIFFE: ordersID, Principal: "User:a", Facts: &Facts{Identity: &spiffe.Identity{
		Process: spiffe.Process{PID: 1, UID: 7}, Lost: errors.New("it exited")}}}
	for mode, want := range map[string]Decision{"enforce": {}, "observe": {Allowed: true, WouldDeny: true}} {
		p := New(mustParse(t, "f", "apiVersion: klamm/v1\nmode: "+mode+rules))
		if d := p.For(Subject{SPIFFE: ordersID, Principal: "User:a"}).Decide(topic, "t", read); d.Rule != "r" {
			t.Errorf("before: %+v", d)
		}
		for name, got := range map[string]Decision{
			"an access":  p.For(lost).Decide(topic, "t", read),
			"a login":    p.Login(lost, "User:a"),
			"unread TLS": p.Passthrough(lost),
		} {
			if got != want {
				t.Errorf("%s in %s mode: got %+v, want %+v", name, mode, got, want)
			}
		}
		if e := p.Explain(lost, topic, "t", read); !strings.Contains(e.Rules[0].Why, "it exited") {
			t.Errorf("explained as %+v", e)
		}
	}
}

func TestConditionsOnConnections(t *testing.T) {
	p := New(mustParse(t, "f", `apiVersion: klamm/v1
connections:
- name: as its service account
  when: |
    claims.iss == "https://k8s" &&
    sasl.principal == "User:" + claims["kubernetes.io"].serviceaccount.name && sasl.mechanism == "OAUTHBEARER"
  sasl: ["User:*"]
- {name: of a pod, principals: ["spiffe://t/ns/*"], when: has(pod.uid), passthrough: true}`))
	who, unknown := somebody(), Subject{SPIFFE: "spiffe://t/ns/x"}
	who.Principal = "User:before"
	for name, c := range map[string]struct{ got, want Decision }{
		"a login in agreement": {
			p.Login(who, "User:orders"), Decision{true, false, "as its service account"},
		},
		"a login in disagreement":   {p.Login(who, "User:pay"), Decision{}},
		"a login that is not known": {p.Login(who, ""), Decision{}},
		"a login without claims":    {p.Login(unknown, "User:orders"), Decision{}},
		"unread TLS of a pod":       {p.Passthrough(who), Decision{true, false, "of a pod"}},
		"unread TLS of no pod":      {p.Passthrough(unknown), Decision{}},
	} {
		if c.got != c.want {
			t.Errorf("%s: got %+v, want %+v", name, c.got, c.want)
		}
	}
}

func TestConditionsAreExplained(t *testing.T) {
	p := New(mustParse(t, "f", `apiVersion: klamm/v1
rules:
- {name: holds, when: claims.a == 1, allow: [{topic: t, operations: [Read]}]}
- {name: does not, when: claims.a == 2, allow: [{topic: t, operations: [Read]}]}
- {name: untold, when: claims.b == 2, allow: [{topic: t, operations: [Read]}]}
- {name: denies, when: claims.c == 2, deny: [{topic: t, operations: [Read]}]}
- {name: for others, principals: ["User:x"], when: claims.a == 1, deny: [{topic: t, operations: [Read]}]}
- {name: without, principals: ["*"], deny: [{topic: x, operations: [Read]}]}
connections:
- {name: login, principals: ["*"], when: claims.a == 1, sasl: ["User:a"]}
- {name: no login, principals: ["*"], when: claims.a == 2, sasl: ["User:a"]}
- {name: untold login, principals: ["*"], when: claims.b == 1, sasl: ["User:a"]}
- {name: another login, principals: ["*"], sasl: ["User:b"]}
- {name: opaque, principals: ["*"], passthrough: true}
- {name: elsewhere, cluster: x, principals: ["*"], sasl: ["User:a"], passthrough: true}`))
	who := Subject{SPIFFE: "spiffe://t/a", Facts: &Facts{Identity: &spiffe.Identity{Claims: map[string]any{"a": 1}}}}
	for name, c := range map[string]struct {
		got  Explanation
		why  string
		want string
	}{
		"an access": {p.Explain(who, topic, "t", read), "a rule denies it, and deny wins over allow", `
holds: [claims.a == 1 is true] allows topic "t": Read (line 3)
does not: [claims.a == 2 is false] its condition does not hold
untold: [claims.b == 2: no such key: b] allows topic "t": Read (line 5), but not where its condition cannot be told
denies: [claims.c == 2: no such key: c] denies topic "t": Read (line 6), as it does where its condition cannot be told
for others: [claims.a == 1 is true] none of its principals matches
without: none of its entries is for the topic "t"
`},
		"a login": {p.ExplainLogin(who, "User:a"), "an entry allows it", `
login: [claims.a == 1 is true] allows it
no login: [claims.a == 2 is false] its condition does not hold
untold login: [claims.b == 1: no such key: b] its condition cannot be told, and then it does not allow
another login: it is about other logins
opaque: it is not about logins
elsewhere: it is for the cluster "x" only
`},
		"unread TLS": {p.ExplainPassthrough(Subject{}), "no entry allows it (default deny)", `
login: [claims.a == 1: no such key: a] it is not about unread TLS
no login: [claims.a == 2: no such key: a] it is not about unread TLS
untold login: [claims.b == 1: no such key: b] it is not about unread TLS
another login: it is not about unread TLS
opaque: "*" allows only who is identified
elsewhere: it is for the cluster "x" only
`},
	} {
		t.Run(name, func(t *testing.T) {
			got := "\n"
			for _, r := range c.got.Rules {
				got += r.Rule + ": "
				switch w := r.When; {
				case w == nil:
				case w.Error != "":
					got += fmt.Sprintf("[%s: %s] ", w.Expression, w.Error)
				default:
					got += fmt.Sprintf("[%s is %v] ", w.Expression, w.Holds)
				}
				got += r.Why + "\n"
			}
			if got != c.want || c.got.Why != c.why {
				t.Errorf("%s\n%s", c.got.Why, got)
			}
		})
	}
}

func FuzzCondition(f *testing.F) {
	for _, seed := range []string{
		`spiffe_id == "x"`,
		`claims["a"].b.exists(x, x == 1)`,
		`sources["kubernetes"].claims.iss.matches("^https")`,
		`has(pod.uid)`,
		`evidence.filter(e, has(e.hint)).size() > 1`,
		"process.uid == 1 &&\n\n\t(",
		`[1, 2].map(x, x * 2) == [2, 4]`,
		`'\u00e9' == "ä`,
		`"a".matches("(")`,
		`claims.aud.all(a, claims.many.all(b, a != b))`,
		`{"a": 1}.a == 1`,
		`klamm.Process{exe: "a"} == process`,
		`"%s".format([claims]) == ""`,
		`timestamp("x") < timestamp(0)`,
		`b'' == bytes("")`,
	} {
		f.Add(seed)
	}
	who := somebody()
	f.Fuzz(func(t *testing.T, expression string) {
		var c condition
		node := yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Value: expression, Line: 1, Column: 1}
		var err error
		bounds.Check(t, len(expression), 1<<16, func() { err = c.UnmarshalYAML(&node) })
		if err != nil {
			var errs strict.Errors
			if !errors.As(strict.Join(&node, err), &errs) || len(errs) == 0 {
				t.Fatalf("%T: %v", err, err)
			}
			return
		}
		var holds bool
		bounds.Check(t, len(expression), 1<<16, func() { holds, err = c.holds(newKnown(&who)) })
		if again, _ := c.holds(newKnown(&who)); again != holds || holds && err != nil {
			t.Fatalf("%v, %v, then %v", holds, err, again)
		}
	})
}

func TestEveryNameOfConditionsIsDocumented(t *testing.T) {
	data, err := os.ReadFile("../../docs/policy.md")
	if err != nil {
		t.Fatal(err)
	}
	docs := string(data)
	for name, v := range variables {
		if !strings.Contains(docs, "| `"+name) {
			t.Errorf("%s is not in docs/policy.md", name)
		}
		for field := range fields[v.is] {
			if !strings.Contains(docs, "`"+name+"."+field+"`") && !strings.Contains(docs, "`."+field+"`") {
				t.Errorf("%s.%s is not in docs/policy.md", name, field)
			}
		}
	}
	for field := range fields[evidenceType] {
		if !strings.Contains(docs, "`."+field+"`") {
			t.Errorf("%s of evidence is not in docs/policy.md", field)
		}
	}
}
