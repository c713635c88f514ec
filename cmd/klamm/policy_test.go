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

// klamm runs one command line in a directory with two policies and two broken ones.
func klamm(t *testing.T, args ...string) (code int, out, errOut string) {
	t.Helper()
	t.Chdir(t.TempDir())
	for name, text := range map[string]string{
		"shop.yaml": shopPolicy, "watch.yaml": watchPolicy, "empty.yaml": "",
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
		"a warning does not fail": {"policy check watch.yaml", 0, "ok: watch.yaml: rules 1, connections 0, mode observe, every cluster\n",
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
			"deny: no policy file is for this cluster: everything is refused\n", ""},
		"an access of a SPIFFE ID": {ask + "--topic orders.placed --operation Describe --host 10.0.0.1 " +
			"--spiffe-id spiffe://example.test/ns/shop/sa/orders" + here, 0, "allow: ", ""},
		"a question with a broken policy": {
			"policy explain -f empty.yaml --topic t --operation Read", 1, "",
			"klamm: empty.yaml:1: the file is empty\n",
		},
		"a question without a resource": {ask + "--operation Read", 1, "",
			"klamm: at least one of the flags in the group " +
				"[kafka-cluster topic group transactional-id delegation-token user] is required\n"},
		"a question without an operation": {
			ask + "--topic t", 1, "", "klamm: required flag(s) \"operation\" not set\n",
		},
		"an operation the resource does not have": {ask + "--transactional-id t --operation Read", 1, "",
			"klamm: --operation: there is no operation Read on a transactional-id (allowed: All, Write, Describe)\n"},
		"all operations at once": {ask + "--topic t --operation All", 1, "",
			"klamm: --operation: a request asks for one operation at a time, All is for rules\n"},
		"a SPIFFE ID that is none": {ask + "--topic t --operation Read --spiffe-id orders", 1, "",
			"klamm: --spiffe-id \"orders\": scheme is missing or invalid\n"},
		"a principal without a type": {ask + "--topic t --operation Read --principal orders", 1, "",
			"klamm: --principal \"orders\": write it as Kafka does, User:orders\n"},
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

func TestVersionAsData(t *testing.T) {
	code, out, _ := klamm(t, "version", "-o", "json")
	var got versionInfo
	if err := json.Unmarshal([]byte(out), &got); err != nil || code != 0 || got.Version == "" || got.Platform == "" {
		t.Errorf("exit code %d, %v, stdout\n%s", code, err, out)
	}
}

func TestTheHelpOfEveryCommandNamesItsExitCodes(t *testing.T) {
	for _, args := range []string{"--help", "policy check --help", "policy explain --help"} {
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
