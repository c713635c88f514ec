package policy

import (
	"net/netip"
	"testing"
)

const (
	ordersID = "spiffe://t/orders"
	otherID  = "spiffe://t/other"
)

// connectionSets are policy files by name, to be put together.
var connectionSets = map[string]string{
	"rules": `
rules: [{name: r, principals: ["*"], allow: [{topic: t, operations: [Read]}]}]`,
	"observed rules": `
mode: observe
rules: [{name: watches, principals: ["*"], allow: [{topic: t, operations: [Read]}]}]`,
	"logins": `
connections:
- {name: as itself, principals: ["spiffe://t/orders"], sasl: ["User:orders", "User:orders-2"]}
- {name: anybody, cluster: here, principals: ["spiffe://t/admin/*"], sasl: ["User:*"]}
- {name: Kerberos too, principals: ["spiffe://t/legacy"], sasl: ["*"]}
- {name: from afar, principals: ["*"], hosts: [192.0.2.0/24], sasl: ["User:far"]}
- {name: the unknown, principals: [anonymous], sasl: ["User:nobody"]}`,
	"other logins": `
connections: [{name: also, principals: ["spiffe://t/orders"], sasl: ["User:b", "User:orders"]}]`,
	"logins elsewhere": `
cluster: elsewhere
connections: [{name: elsewhere, principals: ["*"], sasl: ["User:x"]}]`,
	"entry for elsewhere": `
connections: [{name: elsewhere, cluster: elsewhere, principals: ["*"], sasl: ["User:x"]}]`,
	"observed logins": `
mode: observe
connections: [{name: seen, principals: ["spiffe://t/other"], sasl: ["User:other"]}]`,
	"passthrough": `
connections: [{name: opaque, principals: ["spiffe://t/orders"], passthrough: true}]`,
	"observed passthrough": `
mode: observe
connections: [{name: seen opaque, principals: ["spiffe://t/orders"], passthrough: true}]`,
	"passthrough elsewhere": `
cluster: elsewhere
connections: [{name: opaque elsewhere, principals: ["*"], passthrough: true}]`,
}

func connectionPolicy(t *testing.T, names []string) *Policy {
	t.Helper()
	var sets []*Set
	for _, name := range names {
		sets = append(sets, mustParse(t, name, "apiVersion: klamm/v1"+connectionSets[name]))
	}
	return New(sets...)
}

func TestLogins(t *testing.T) {
	logins := []string{"rules", "logins"}
	pass := Decision{Allowed: true}
	for name, c := range map[string]struct {
		sets []string
		who  Subject
		sasl string
		want Decision
	}{
		"every login is allowed where no entry is about one": {
			[]string{"rules", "passthrough"}, Subject{}, "User:a", pass,
		},
		"a hidden one too":          {[]string{"rules"}, Subject{}, "", pass},
		"every login without a set": {nil, Subject{}, "User:a", pass},
		"an entry elsewhere restricts nothing here": {
			[]string{"logins elsewhere", "entry for elsewhere"}, Subject{SPIFFE: otherID}, "User:a", pass,
		},
		"the workload may log in as itself": {
			logins, Subject{SPIFFE: ordersID}, "User:orders", Decision{true, false, "as itself"},
		},
		"and as the second": {
			logins, Subject{SPIFFE: ordersID}, "User:orders-2", Decision{true, false, "as itself"},
		},
		"and as no one else": {
			logins, Subject{SPIFFE: ordersID}, "User:orders-3", Decision{},
		},
		"and not as the unknown": {logins, Subject{SPIFFE: ordersID}, "", Decision{}},
		"another workload may not": {
			logins, Subject{SPIFFE: otherID}, "User:orders", Decision{},
		},
		"User:* is any": {
			logins, Subject{SPIFFE: "spiffe://t/admin/a"}, "User:x", Decision{true, false, "anybody"},
		},
		"User:* is none that is hidden": {
			logins, Subject{SPIFFE: "spiffe://t/admin/a"}, "", Decision{},
		},
		"* is one that is hidden": {
			logins, Subject{SPIFFE: "spiffe://t/legacy"}, "", Decision{true, false, "Kerberos too"},
		},
		"* is any": {
			logins, Subject{SPIFFE: "spiffe://t/legacy"}, "User:x", Decision{true, false, "Kerberos too"},
		},
		"* is another type of principal": {
			logins, Subject{SPIFFE: "spiffe://t/legacy"}, "Group:x", Decision{true, false, "Kerberos too"},
		},
		"an entry's hosts count": {
			logins, Subject{SPIFFE: otherID, Host: netip.MustParseAddr("192.0.2.7")}, "User:far",
			Decision{true, false, "from afar"},
		},
		"a star does not allow the unidentified": {
			logins, Subject{Host: netip.MustParseAddr("192.0.2.7")}, "User:far", Decision{},
		},
		"several files are pooled": {
			[]string{"logins", "other logins"}, Subject{SPIFFE: ordersID}, "User:b", Decision{true, false, "also"},
		},
		"the first entry is named": {
			[]string{"other logins", "logins"}, Subject{SPIFFE: ordersID}, "User:orders", Decision{true, false, "also"},
		},
		"an observing file refuses nothing and says so": {
			[]string{"rules", "observed logins"}, Subject{SPIFFE: ordersID}, "User:other",
			Decision{Allowed: true, WouldDeny: true},
		},
		"an observing file names what it allows": {
			[]string{"observed logins"}, Subject{SPIFFE: otherID}, "User:other", Decision{true, false, "seen"},
		},
		"an observing file grants nothing": {
			[]string{"logins", "observed logins"}, Subject{SPIFFE: otherID}, "User:other", Decision{},
		},
		"an observing file would restrict nothing that is allowed": {
			[]string{"logins", "observed logins"}, Subject{SPIFFE: ordersID}, "User:orders", Decision{true, false, "as itself"},
		},
		"an earlier login identifies nobody": {
			logins, Subject{Principal: "User:x"}, "User:nobody", Decision{true, false, "the unknown"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			c.who.Cluster = "here"
			p := connectionPolicy(t, c.sets)
			if got := p.Login(c.who, c.sasl); got != c.want {
				t.Errorf("got %+v, want %+v", got, c.want)
			}
			checkConnectionExplained(t, p.ExplainLogin(c.who, c.sasl), c.want)
		})
	}
}

// checkConnectionExplained wants the entry a decision names to be explained as allowing it.
func checkConnectionExplained(t *testing.T, e Explanation, d Decision) {
	t.Helper()
	named := d.Rule == ""
	for _, r := range e.Rules {
		named = named || r.Matched && r.Rule == d.Rule
	}
	if got := (Decision{e.Allowed, e.WouldDeny, e.Rule}); got != d || e.Why == "" || !named {
		t.Errorf("decided %+v, explained %+v", d, e)
	}
}

func TestPassthrough(t *testing.T) {
	for name, c := range map[string]struct {
		sets []string
		who  Subject
		want Decision
	}{
		"nothing passes without a set": {nil, Subject{SPIFFE: ordersID}, Decision{}},
		"nothing passes by rules": {
			[]string{"rules"}, Subject{SPIFFE: ordersID}, Decision{},
		},
		"nothing passes by an entry for logins": {
			[]string{"rules", "logins"}, Subject{SPIFFE: ordersID}, Decision{},
		},
		"what is named passes": {
			[]string{"rules", "passthrough"}, Subject{SPIFFE: ordersID}, Decision{true, false, "opaque"},
		},
		"another workload does not": {
			[]string{"passthrough"}, Subject{SPIFFE: otherID}, Decision{},
		},
		"an entry elsewhere lets nothing pass": {
			[]string{"passthrough elsewhere"}, Subject{SPIFFE: otherID}, Decision{},
		},
		"an observing file alone lets pass": {
			[]string{"observed rules"}, Subject{}, Decision{Allowed: true, WouldDeny: true},
		},
		"and says what it allows": {
			[]string{"observed passthrough"}, Subject{SPIFFE: ordersID}, Decision{true, false, "seen opaque"},
		},
		"an observing file beside rules does not": {
			[]string{"rules", "observed passthrough"}, Subject{SPIFFE: ordersID}, Decision{},
		},
		"an observing file beside entries does not": {
			[]string{"passthrough", "observed rules"}, Subject{SPIFFE: otherID}, Decision{},
		},
		"what is enforced elsewhere is not here": {
			[]string{"passthrough elsewhere", "observed rules"}, Subject{SPIFFE: otherID},
			Decision{Allowed: true, WouldDeny: true},
		},
	} {
		t.Run(name, func(t *testing.T) {
			c.who.Cluster = "here"
			p := connectionPolicy(t, c.sets)
			if got := p.Passthrough(c.who); got != c.want {
				t.Errorf("got %+v, want %+v", got, c.want)
			}
			checkConnectionExplained(t, p.ExplainPassthrough(c.who), c.want)
		})
	}
}

func TestWithoutAPolicyNoConnectionMayDoAnything(t *testing.T) {
	var p *Policy
	who := Subject{SPIFFE: ordersID}
	if d := p.Login(who, "User:orders"); d != (Decision{}) {
		t.Errorf("a login: %+v", d)
	}
	if d := p.Passthrough(who); d != (Decision{}) {
		t.Errorf("passthrough: %+v", d)
	}
	checkConnectionExplained(t, p.ExplainLogin(who, "User:orders"), Decision{})
	checkConnectionExplained(t, p.ExplainPassthrough(who), Decision{})
}

func TestEntriesForConnectionsDecideNoAccess(t *testing.T) {
	who := Subject{Cluster: "here", SPIFFE: ordersID}
	for name, c := range map[string]struct {
		sets []string
		want Decision
	}{
		"alone they refuse": {[]string{"logins"}, Decision{}},
		"beside rules the rules decide": {
			[]string{"logins", "rules"}, Decision{true, false, "r"},
		},
		"beside observed rules those observe as ever": {
			[]string{"logins", "observed rules"}, Decision{true, false, "watches"},
		},
	} {
		if got := connectionPolicy(t, c.sets).For(who).Decide(topic, "t", read); got != c.want {
			t.Errorf("%s: got %+v, want %+v", name, got, c.want)
		}
	}
}
