package acls

import (
	"bytes"
	"flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/policy"
	"klamm/spiffe"
)

var update = flag.Bool("update", false, "write the policies to testdata instead of comparing them")

func TestPoliciesAreTheOnesInTestdata(t *testing.T) {
	for name, o := range map[string]Options{
		"shop":    {Cluster: "payments"},
		"odd-3.9": {},
		"shop-migrated": {Cluster: "payments", Mode: policy.Observe, SuperUsers: []string{"User:admin", anonymous},
			Principals: map[string][]string{
				"User:orders": {"spiffe://example.org/ns/shop/sa/orders", "User:orders"},
				"User:admin":  {"spiffe://example.org/ns/ops/*"}, "User:gone": {"User:gone"},
			}},
	} {
		list := "testdata/" + strings.TrimSuffix(name, "-migrated") + ".acls"
		o.Source = list
		p, err := Translate(mustRead(t, list), o)
		if err != nil {
			t.Fatal(err)
		}
		file := "testdata/" + name + ".yaml"
		if *update {
			if err := os.WriteFile(file, p.YAML, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(file)
		if err != nil || !bytes.Equal(want, p.YAML) {
			t.Errorf("%s: %v\n%s\nis not\n%s", file, err, p.YAML, want)
		}
		set, err := policy.Parse(file, p.YAML)
		if err != nil || set.Rules() != p.Rules {
			t.Errorf("%s: %v, %d rules", file, err, p.Rules)
		}
	}
}

func TestTheOrderOfACLsDoesNotMatter(t *testing.T) {
	all := withoutLines(mustRead(t, "testdata/shop.acls"))
	want, err := Translate(all, Options{})
	if err != nil {
		t.Fatal(err)
	}
	for seed := range uint64(20) {
		rand.New(rand.NewPCG(seed, 0)).Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
		if got, err := Translate(all, Options{}); err != nil || !bytes.Equal(got.YAML, want.YAML) {
			t.Fatalf("%v: %s is not\n%s", err, got.YAML, want.YAML)
		}
	}
}

func TestWhatAPolicyCannotSayIsRefused(t *testing.T) {
	read := ACL{Line: 7, Type: kmsg.ACLResourceTypeTopic, Name: "t", Principal: "User:a", Host: "*",
		Operation: kmsg.ACLOperationRead}
	team, local := read, read
	team.Principal, local.Host = "Group:team", "fe80:0:0:0:0:0:0:1%2"
	const line7 = `line 7: ALLOW READ of LITERAL TOPIC "t" by `
	to := func(name string, of ...string) Options { return Options{Principals: map[string][]string{name: of}} }
	super := func(name string) Options { return Options{SuperUsers: []string{name}} }
	for _, c := range []struct {
		a    ACL
		o    Options
		want string
	}{
		{team, Options{}, line7 + `Group:team from *: the principal Group:team is no User`},
		{local, Options{}, line7 + `User:a from fe80:0:0:0:0:0:0:1%2: link-local addresses`},
		{read, super("admin"), `super user "admin": want one principal`},
		{read, super("User:*"), `super user "User:*": want one principal`},
		{read, super("Group:x"), `super user Group:x: the principal`},
		{read, to("User:a", "spiffe://x*"), `principals: User:a: "spiffe://x*": write the trust domain out`},
		{read, to("User:a", "*"), `principals: User:a: "*" is more than one`},
		{read, to("User:a", "User:*"), `principals: User:a: "User:*" is more than one`},
		{read, to("User:*", "User:b"), `principals: User:*: want one or more`},
		{read, to("User:b"), `principals: User:b: want one or more`},
	} {
		if p, err := Translate([]ACL{c.a}, c.o); err == nil || !strings.HasPrefix(err.Error(), c.want) {
			t.Errorf("%v, want %s\n%s", err, c.want, p.YAML)
		}
	}
	p, err := Translate([]ACL{team}, to("Group:team", "spiffe://x/team/*"))
	if err != nil || !strings.Contains(string(p.YAML), `principals: ["spiffe://x/team/*"]`) {
		t.Errorf("%v\n%s", err, p.YAML)
	}
}

// client is who asks a broker, as the broker and as a policy sees him.
type client struct {
	principal string // of the KafkaPrincipal
	host      string // as Java writes it
	subject   policy.Subject
}

var clients = func() (all []client) {
	tls := &policy.Facts{Identity: &spiffe.Identity{
		Evidence: []spiffe.Evidence{{Source: spiffe.SourceTLS, Subject: "CN=app,O=x"}}}}
	hidden := func(f policy.Facts) *policy.Facts {
		f.SASL.Mechanism = "GSSAPI"
		return &f
	}
	for java, host := range map[string]string{"10.0.0.1": "10.0.0.1", "10.0.0.2": "::ffff:10.0.0.2",
		"2001:db8:0:0:0:0:0:1": "2001:db8::1"} {
		for _, who := range []client{
			{principal: "User:a", subject: policy.Subject{Principal: "User:a"}},
			{principal: "User:b", subject: policy.Subject{Principal: "User:b", SPIFFE: "spiffe://t/b"}},
			{principal: "User:a*", subject: policy.Subject{Principal: "User:a*"}},
			{principal: "User:CN=app,O=x", subject: policy.Subject{Facts: tls}},
			{principal: "User:CN=app,O=x", subject: policy.Subject{Principal: "User:CN=app,O=x"}},
			{principal: "User:a", subject: policy.Subject{Principal: "User:a", Facts: tls}},
			{principal: anonymous, subject: policy.Subject{}},
			{principal: anonymous, subject: policy.Subject{SPIFFE: "spiffe://t/a"}},
			{principal: "User:seen-by-brokers-alone", subject: policy.Subject{Facts: hidden(policy.Facts{})}},
			{principal: "User:seen-by-brokers-alone", subject: policy.Subject{Facts: hidden(*tls)}},
			{principal: "User:m", subject: policy.Subject{SPIFFE: "spiffe://t/m/1"}},
			{principal: "User:m", subject: policy.Subject{SPIFFE: "spiffe://t/n"}},
		} {
			who.host, who.subject.Host = java, netip.MustParseAddr(host)
			all = append(all, who)
		}
	}
	return all
}()

// applies is StandardAuthorizerData.findResult, and the match of names before it.
func (a ACL) applies(c client, kind kmsg.ACLResourceType, name string, op kmsg.ACLOperation) bool {
	switch {
	case a.Type != kind,
		a.Principal != c.principal && a.Principal != "User:*",
		a.Host != c.host && a.Host != "*":
		return false
	case a.Prefixed && !strings.HasPrefix(name, a.Name), !a.Prefixed && a.Name != name && a.Name != "*":
		return false
	}
	gives := []kmsg.ACLOperation{op, kmsg.ACLOperationAll}
	if !a.Deny && op == kmsg.ACLOperationDescribe {
		gives = append(gives, kmsg.ACLOperationRead, kmsg.ACLOperationWrite, kmsg.ACLOperationDelete,
			kmsg.ACLOperationAlter)
	}
	if !a.Deny && op == kmsg.ACLOperationDescribeConfigs {
		gives = append(gives, kmsg.ACLOperationAlterConfigs)
	}
	return slices.Contains(gives, a.Operation)
}

// authorized is StandardAuthorizerData.authorize.
func authorized(all []ACL, super []string, c client, kind kmsg.ACLResourceType, name string,
	op kmsg.ACLOperation) bool {
	if slices.Contains(super, c.principal) {
		return true
	}
	allowed := false
	for _, a := range all {
		if a.applies(c, kind, name, op) {
			if a.Deny {
				return false
			}
			allowed = true
		}
	}
	return allowed
}

// authorizedOnAny is Authorizer.authorizeByResourceType (KIP-679) for an operation that nothing implies.
func authorizedOnAny(all []ACL, super []string, c client, kind kmsg.ACLResourceType, op kmsg.ACLOperation) bool {
	if authorized(all, super, c, kind, "\x00nobody's", op) {
		return true
	}
	var deny, allow []ACL
	for _, a := range all {
		if a.Type != kind || a.Principal != c.principal && a.Principal != "User:*" || a.Host != c.host && a.Host != "*" ||
			a.Operation != op && a.Operation != kmsg.ACLOperationAll {
			continue
		}
		if a.Deny {
			deny = append(deny, a)
		} else {
			allow = append(allow, a)
		}
	}
	denied := func(a ACL) bool {
		return slices.ContainsFunc(deny, func(d ACL) bool {
			wildcard := !d.Prefixed && d.Name == "*"
			return wildcard || d.Prefixed && strings.HasPrefix(a.Name, d.Name) && (a.Prefixed || a.Name != "*") ||
				!d.Prefixed && !a.Prefixed && d.Name == a.Name
		})
	}
	return slices.ContainsFunc(allow, func(a ACL) bool { return !denied(a) })
}

// random ACLs about few names, so that they meet.
func random(r *rand.Rand) ACL {
	one := func(words ...string) string { return words[r.IntN(len(words))] }
	a := ACL{
		Type:     types[r.IntN(len(types))],
		Name:     one("*", "o", "or", "orders", "orders*", "kafka-cluster", "kafka", "ü\"`\\", "User:a", "tab\t\u2028"),
		Prefixed: r.IntN(3) == 0,
		Principal: one("User:*", "User:a", "User:a", "User:b", "User:a*", "User:m", "User:CN=app,O=x", anonymous,
			"User:"),
		Host: one("*", "*", "*", "10.0.0.1", "10.0.0.2", "::ffff:10.0.0.2", "2001:db8:0:0:0:0:0:1", "2001:db8::1",
			"10.0.0.0/8", "", "broker.example.org"),
		Operation: kmsg.ACLOperationAll + kmsg.ACLOperation(r.IntN(len(operations))),
		Deny:      r.IntN(4) == 0,
	}
	return a
}

func checkRandom(t *testing.T, seed uint64) {
	r := rand.New(rand.NewPCG(seed, 0))
	all := make([]ACL, r.IntN(12))
	for i := range all {
		all[i] = random(r)
	}
	var super []string
	for _, name := range []string{"User:b", "User:m", anonymous, "User:CN=app,O=x"} {
		if r.IntN(4) == 0 {
			super = append(super, name)
		}
	}
	p, err := Translate(all, Options{SuperUsers: super,
		Principals: map[string][]string{"User:m": {"spiffe://t/m/*", "spiffe://t/n"}}})
	if err != nil {
		t.Fatalf("seed %d: %v", seed, err)
	}
	set, err := policy.Parse("random", p.YAML)
	if err != nil {
		t.Fatalf("seed %d: %v\n%s", seed, err, p.YAML)
	}
	rules := policy.New(set)
	for _, c := range clients {
		view := rules.For(c.subject)
		for _, kind := range types {
			for op := kmsg.ACLOperationRead; policy.OperationName(op) != ""; op++ {
				if !policy.Supports(kind, op) {
					continue
				}
				for range 3 {
					name := random(r).Name + []string{"", "", "x", "ders"}[r.IntN(4)]
					if kind == kmsg.ACLResourceTypeCluster {
						name = "kafka-cluster"
					}
					want := authorized(all, super, c, kind, name, op)
					if got := view.Decide(kind, name, op); got.Allowed != want {
						t.Fatalf("seed %d: %+v, %s of %v %q: %+v, want %v of\n%s\nsuper users %v\n%s", seed, c,
							policy.OperationName(op), kind, name, got, want, lines(all), super, p.YAML)
					}
				}
			}
		}
		const topic, write = kmsg.ACLResourceTypeTopic, kmsg.ACLOperationWrite // what InitProducerId asks
		want := authorizedOnAny(all, super, c, topic, write)
		if got := view.DecideAny(topic, write); got.Allowed != want {
			t.Fatalf("seed %d: %+v, %v of any %v: %+v, want %v of\n%s\nsuper users %v\n%s", seed, c, write, topic, got, want,
				lines(all), super, p.YAML)
		}
	}
}

func lines(all []ACL) string {
	var s strings.Builder
	for _, a := range all {
		fmt.Fprintln(&s, a)
	}
	return s.String()
}

func TestAPolicyDecidesAsStandardAuthorizerDoesWithTheACLs(t *testing.T) {
	for seed := range uint64(2000) {
		checkRandom(t, seed)
	}
}

func FuzzAPolicyDecidesAsStandardAuthorizerDoesWithTheACLs(f *testing.F) {
	f.Add(uint64(1 << 40))
	f.Fuzz(checkRandom)
}

func TestTheExampleInTheDocsIsATranslation(t *testing.T) {
	text, err := os.ReadFile("../../../docs/policy.md")
	if err != nil {
		t.Fatal(err)
	}
	p, err := Translate(mustRead(t, "testdata/shop.acls"),
		Options{Cluster: "payments", Mode: policy.Observe, SuperUsers: []string{"User:admin"}})
	if err != nil {
		t.Fatal(err)
	}
	_, example, _ := strings.Cut(string(p.YAML), "apiVersion: ")
	example = "   ```yaml\n   apiVersion: " + strings.ReplaceAll(strings.TrimSpace(example), "\n", "\n   ") + "\n   ```\n"
	if !strings.Contains(string(text), example) {
		t.Errorf("docs/policy.md does not have\n%s", example)
	}
}
