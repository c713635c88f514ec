package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"klamm/enforcer/policy"
)

const shopPolicy = `apiVersion: klamm/v1
cluster: payments
rules:
  - name: orders writes its topics
    principals: ["spiffe://example.test/ns/shop/sa/orders", "User:orders"]
    hosts: [10.0.0.0/8]
    allow:
      - {topic: "orders.*", operations: [Write]}
      - {cluster: kafka-cluster, operations: [Describe]}
`

const watchPolicy = `apiVersion: klamm/v1
mode: observe
rules:
  - {name: no audits, principals: ["*"], deny: [{topic: "orders.audit*", operations: [Write, All]}]}
`

const agreePolicy = `apiVersion: klamm/v1
rules:
  - name: teams
    when: |
      claims.team ==
        "orders"
    allow: [{topic: t, operations: [Read]}]
  - {name: not root, when: process.uid == 0, deny: [{topic: root, operations: [All]}]}
  - name: of pods
    when: pod.namespace == "shop" && sources["kubernetes"].claims.sub == "orders" && tls.subject == "CN=orders" &&
      sasl.claims.azp == "orders" && sasl.mechanism == "OAUTHBEARER" && spiffe_id != ""
    allow: [{topic: pods, operations: [Read]}]
connections:
  - {name: as itself, principals: ["spiffe://t/orders"], when: identity.source == "spire", sasl: ["User:orders"]}
  - {name: opaque, principals: ["spiffe://t/legacy"], passthrough: true}
`

const someFacts = `
sources: {kubernetes: {spiffe_id: spiffe://t/orders, claims: {sub: orders, n: 1}}}
sasl: {mechanism: OAUTHBEARER, claims: {azp: orders}}
tls: {subject: CN=orders}
process: {uid: 0, gid: 0}
pod: {namespace: shop}
`

// klamm runs one command line in a directory with policies, broken ones among them, and facts.
func klamm(t *testing.T, args ...string) (code int, out, errOut string) {
	t.Helper()
	t.Chdir(t.TempDir())
	for name, text := range map[string]string{
		"shop.yaml": shopPolicy, "watch.yaml": watchPolicy, "empty.yaml": "",
		"agree.yaml": agreePolicy, "facts.yaml": someFacts, "token.json": `{"iss": "x", "team": "orders"}`,
		"list.json": `["a"]`, "half.yaml": "process: {uid: 1}", "bad.yaml": "pot: {}\nclaims: {1: 2, ? [a] : b}",
		"broken.yaml": "apiVersion: klamm/v1\nmode: watch\nrules: []\nguards: []\n",
	} {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var stdout, stderr bytes.Buffer
	code = run(t.Context(), args, &stdout, &stderr)
	return code, stdout.String(), stderr.String()
}

func TestCommandLines(t *testing.T) {
	const (
		ask  = "policy explain -f shop.yaml "
		here = " --cluster payments"
		user = " --principal User:orders"
		who  = here + user + " --host 10.1.2.3"
	)
	for name, c := range map[string]struct {
		args   string
		code   int
		out    string // what stdout begins with
		errOut string // what stderr begins with
	}{
		"no command prints the help": {"", 0, "Policy, identity and audit", ""},
		"a mistyped command": {
			"polcy", 1, "", "klamm: unknown command \"polcy\", did you mean \"policy\"? (allowed: ",
		},
		"a mistyped flag": {"version --fo", 1, "", "klamm: unknown flag: --fo; see klamm version --help\n"},
		"an unknown output format": {
			"version -o xml", 1, "",
			"klamm: invalid argument \"xml\" for \"-o, --output\" flag: want text or json; see klamm version --help\n",
		},
		"the version": {"version", 0, "klamm ", ""},

		"a good file is ok": {
			"policy check shop.yaml", 0, "ok: shop.yaml: rules 1, connections 0, mode enforce, cluster \"payments\"\n", "",
		},
		"a warning does not fail": {"policy check watch.yaml", 0,
			"ok: watch.yaml: rules 1, connections 0, mode observe, every cluster\n",
			"warning: watch.yaml:4:49: All includes the other operations\n"},
		"all errors of all files are printed": {"policy check broken.yaml empty.yaml missing.yaml shop.yaml", 1,
			"ok: shop.yaml: rules 1, connections 0, mode enforce, cluster \"payments\"\n",
			"broken.yaml:2:7: unknown mode \"watch\" (allowed: enforce, observe)\n" +
				"broken.yaml:4:1: unknown key \"guards\" (allowed: apiVersion, mode, cluster, rules, connections)\n" +
				"empty.yaml:1: the file is empty\n" +
				"missing.yaml: cannot read it: no such file or directory\n"},
		"a file is needed": {"policy check", 1, "", "klamm: requires at least 1 arg(s), only received 0\n"},

		"an allowed access": {ask + "--topic orders.placed --operation Write" + who, 0,
			"allow: a rule allows it and none denies it (\"orders writes its topics\")\n" +
				"* shop.yaml:4  orders writes its topics  allows topic \"orders.*\": Write (line 8)\n", ""},
		"an access nothing allows": {ask + "--topic payouts --operation Write" + who, 3,
			"deny: no rule allows it (default deny)\n" +
				"  shop.yaml:4  orders writes its topics  none of its entries is for the topic \"payouts\"\n", ""},
		"an access that would be denied passes": {ask + "-f watch.yaml --topic orders.audit --operation Write" + who, 0,
			"would deny: a rule denies it; it passes because that rule's file is in observe mode (\"no audits\")\n", ""},
		"an access to the cluster": {
			ask + "--kafka-cluster --operation Describe" + who, 0, "allow: ", "",
		},
		"an access from elsewhere": {ask + "--topic orders.placed --operation Write" + here + user, 3,
			"deny: no rule allows it (default deny)\n  shop.yaml:4  orders writes its topics  none of its hosts matches\n", ""},
		"an access on another cluster": {ask + "--topic orders.placed --operation Write" + user, 3,
			"deny: no policy file has rules for this cluster: everything is refused\n", ""},
		"an access of a SPIFFE ID": {ask + "--topic orders.placed --operation Describe --host 10.0.0.1 " +
			"--spiffe-id spiffe://example.test/ns/shop/sa/orders" + here, 0, "allow: ", ""},
		"a question with a broken policy": {
			"policy explain -f empty.yaml --topic t --operation Read", 1, "",
			"klamm: empty.yaml:1: the file is empty\n",
		},
		"a question without a resource": {ask + "--operation Read", 1, "",
			"klamm: at least one of the flags in the group " +
				"[kafka-cluster login passthrough topic group transactional-id delegation-token user] is required\n"},
		"a question without an operation": {
			ask + "--topic t", 1, "", "klamm: required flag(s) \"operation\" not set\n",
		},
		"an operation the resource does not have": {ask + "--transactional-id t --operation Read", 1, "",
			"klamm: --operation: there is no operation Read on a transactional-id " +
				"(allowed: All, Write, Describe, TwoPhaseCommit)\n"},
		"all operations at once": {ask + "--topic t --operation All", 1, "",
			"klamm: --operation: a request asks for one operation at a time, All is for rules\n"},
		"a SPIFFE ID that is none": {ask + "--topic t --operation Read --spiffe-id orders", 1, "",
			"klamm: --spiffe-id \"orders\": scheme is missing or invalid\n"},
		"a principal without a type": {ask + "--topic t --operation Read --principal orders", 1, "",
			"klamm: --principal \"orders\": write it as Kafka does, User:orders\n"},
		"a rule whose condition holds": {
			"policy explain -f agree.yaml --topic t --operation Read --claims token.json", 0,
			"allow: a rule allows it and none denies it (\"teams\")\n" +
				"* agree.yaml:3  teams     allows topic \"t\": Read (line 7)\n" +
				"                          when claims.team == \"orders\": true\n" +
				"  agree.yaml:8  not root  none of its entries is for the topic \"t\"\n" +
				"                          when process.uid == 0: cannot be told: process.uid is not known\n", "",
		},
		"a rule whose condition cannot be told": {
			"policy explain -f agree.yaml --topic t --operation Read", 3,
			"deny: no rule allows it (default deny)\n" +
				"  agree.yaml:3  teams     allows topic \"t\": Read (line 7), but not where its condition cannot be told\n" +
				"                          when claims.team == \"orders\": cannot be told: no such key: team\n", "",
		},
		"a deny whose condition cannot be told": {
			"policy explain -f agree.yaml --topic root --operation Read", 3, "deny: a rule denies it", "",
		},
		"all facts": {
			"policy explain -f agree.yaml --topic pods --operation Read --facts facts.yaml --spiffe-id spiffe://t/orders", 0,
			"allow: a rule allows it and none denies it (\"of pods\")\n", "",
		},
		"a login": {
			"policy explain -f agree.yaml --login User:orders --spiffe-id spiffe://t/orders --source spire", 0,
			"allow: an entry allows it (\"as itself\")\n* agree.yaml:14  as itself  allows it\n" +
				"                            when identity.source == \"spire\": true\n" +
				"  agree.yaml:15  opaque     none of its principals matches\n", "",
		},
		"a login as another": {
			"policy explain -f agree.yaml --login User:pay --spiffe-id spiffe://t/orders --source spire", 3,
			"deny: there are entries about logins, and none allows it\n", "",
		},
		"unread TLS": {
			"policy explain -f agree.yaml --passthrough --spiffe-id spiffe://t/legacy", 0,
			"allow: an entry allows it (\"opaque\")\n", "",
		},
		"a login without a type": {
			"policy explain -f agree.yaml --login orders", 1, "",
			"klamm: --login \"orders\": write it as Kafka does, User:orders\n",
		},
		"a login with an operation": {"policy explain -f agree.yaml --login User:a --operation Read", 1, "",
			"klamm: if any flags in the group [login operation] are set none of the others can be; "},
		"facts that are none": {ask + "--topic t --operation Read --facts bad.yaml", 1, "",
			"klamm: bad.yaml:1:1: unknown key \"pot\", did you mean \"pod\"? " +
				"(allowed: claims, identity, sources, sasl, tls, process, pod)\n"},
		"facts of half a process": {ask + "--topic t --operation Read --facts half.yaml", 1, "",
			"klamm: half.yaml:1:10: want both of uid and gid, or none\n"},
		"claims that are none": {ask + "--topic t --operation Read --claims list.json", 1, "",
			"klamm: list.json:1:1: want a mapping of claims\n"},
		"no claims": {ask + "--topic t --operation Read --claims missing.json", 1, "",
			"klamm: --claims: open missing.json: no such file or directory\n"},
		"standard input twice": {ask + "--topic t --operation Read --claims - --facts -", 1, "",
			"klamm: --facts and --claims: only one of them can be standard input\n"},
		"a host name": {ask + "--topic t --operation Read --host localhost", 1, "",
			"klamm: --host \"localhost\": want an IP address\n"},
	} {
		t.Run(name, func(t *testing.T) {
			code, out, errOut := klamm(t, strings.Fields(c.args)...)
			begins := func(s, with string) bool { return strings.HasPrefix(s, with) && (with != "" || s == "") }
			if code != c.code || !begins(out, c.out) || !begins(errOut, c.errOut) {
				t.Errorf("exit code %d, stdout\n%s\nstderr\n%s\nwant %d,\n%s…\n%s", code, out, errOut, c.code, c.out, c.errOut)
			}
		})
	}
}

func TestPolicyCheckAsData(t *testing.T) {
	code, out, errOut := klamm(t, "policy", "check", "-o", "json", "watch.yaml", "broken.yaml")
	var got []checkedFile
	if err := json.Unmarshal([]byte(out), &got); err != nil || code != 1 || errOut != "" || len(got) != 2 {
		t.Fatalf("exit code %d, %v, stdout\n%s\nstderr\n%s", code, err, out, errOut)
	}
	if w := got[0]; !w.OK || w.Mode != policy.Observe || len(w.Warnings) != 1 || w.Warnings[0].Line != 4 {
		t.Errorf("watch.yaml: %+v", w)
	}
	if b := got[1]; b.OK || len(b.Errors) != 2 || b.Errors[0].Line != 2 || b.Errors[0].Column != 7 {
		t.Errorf("broken.yaml: %+v", b)
	}
}

func TestPolicyExplainAsData(t *testing.T) {
	code, out, _ := klamm(t, "policy", "explain", "-o", "json", "-f", "shop.yaml", "--topic", "x", "--operation", "Read")
	var got policy.Explanation
	if err := json.Unmarshal([]byte(out), &got); err != nil || code != 3 {
		t.Fatalf("exit code %d, %v, stdout\n%s", code, err, out)
	}
	if got.Allowed || len(got.Rules) != 1 || got.Rules[0].Matched || got.Rules[0].File != "shop.yaml" {
		t.Errorf("%+v", got)
	}
}

func TestAConditionAsData(t *testing.T) {
	in, out, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	stdin := os.Stdin
	os.Stdin = in
	defer func() { os.Stdin = stdin; _ = in.Close() }()
	if _, err := out.WriteString(`{"team": "orders", "iss": "https://k8s", "sub": "s"}`); err != nil {
		t.Fatal(err)
	}
	_ = out.Close()
	code, text, errOut := klamm(t, strings.Fields("policy explain -o json -f agree.yaml --claims - --source kubernetes "+
		"--topic t --operation Read")...)
	var got policy.Explanation
	if err := json.Unmarshal([]byte(text), &got); err != nil || code != 0 {
		t.Fatalf("exit code %d, %v, stdout\n%s\nstderr\n%s", code, err, text, errOut)
	}
	if w := got.Rules[0].When; !w.Holds || w.Error != "" || !strings.HasPrefix(w.Expression, "claims.team ==") {
		t.Errorf("the condition that holds: %+v", w)
	}
	if w := got.Rules[1].When; w.Holds || w.Error != "process.uid is not known" {
		t.Errorf("the condition that cannot be told: %+v", w)
	}
}

func TestVersionAsData(t *testing.T) {
	code, out, _ := klamm(t, "version", "-o", "json")
	var got versionInfo
	if err := json.Unmarshal([]byte(out), &got); err != nil || code != 0 || got.Version == "" || got.Platform == "" {
		t.Errorf("exit code %d, %v, stdout\n%s", code, err, out)
	}
}

func TestTheHelpOfEveryCommandNamesItsExitCodes(t *testing.T) {
	for _, args := range []string{"--help", "policy check --help", "policy explain --help", "policy import-acls --help"} {
		if code, out, _ := klamm(t, strings.Fields(args)...); code != 0 || !strings.Contains(out, "Exit codes: 0") {
			t.Errorf("%s: exit code %d\n%s", args, code, out)
		}
	}
}

func TestAFolderIsNoPolicyFile(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "policies")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	code, _, errOut := klamm(t, "policy", "check", dir)
	if want := dir + ": cannot read it: is a directory\n"; code != 1 || errOut != want {
		t.Errorf("exit code %d, stderr %q, want %q", code, errOut, want)
	}
}
