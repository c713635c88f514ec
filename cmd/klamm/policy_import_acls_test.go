package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/policy"
	"klamm/test/kafka"
)

const shopACLs = "Current ACLs for resource " +
	"`ResourcePattern(resourceType=TOPIC, name=orders, patternType=PREFIXED)`:\n" +
	"\t(principal=User:orders, host=*, operation=WRITE, permissionType=ALLOW)\n" +
	"\t(principal=User:orders, host=::1, operation=READ, permissionType=DENY)\n\n"

const shopPrincipals = `principals: {"User:orders": ["spiffe://example.test/ns/shop/sa/orders"]}`

func TestACLsOfAListAreImported(t *testing.T) {
	const unsaid = "warning: Where brokers have allow.everyone.if.no.acl.found=true"
	for name, c := range map[string]struct {
		args   string
		code   int
		out    string // what stdout holds
		errOut string // what stderr holds
	}{
		"to standard output": {"shop.acls", 0, "principals: [\"User:orders\"]\n", unsaid},
		"what brokers never apply is left out, and said": {"shop.acls", 0,
			"\n#   line 3: DENY READ of PREFIXED TOPIC \"orders\" by User:orders from ::1: brokers compare the host",
			"left out, since brokers never apply it either: line 3: DENY READ"},
		"that super users are not in it is said": {"shop.acls", 0, "apiVersion: klamm/v1\n", "warning: Super users"},
		"with super users": {
			"shop.acls --super-user User:admin", 0, `principals: ["User:admin"]`, unsaid,
		},
		"for one cluster": {"shop.acls --cluster payments", 0, "\ncluster: payments\n", unsaid},
		"to be observed":  {"shop.acls --mode observe", 0, "\nmode: observe\n", unsaid},
		"with SPIFFE IDs": {"shop.acls --principals shop.principals", 0,
			`principals: ["spiffe://example.test/ns/shop/sa/orders"]`, unsaid},
		"to a file": {"shop.acls --to new.yaml", 0, "new.yaml: rules 1, from ACLs 2\n", unsaid},

		"what is not there":     {"missing.acls", 1, "", "klamm: open missing.acls: no such file or directory\n"},
		"what is no list":       {"shop.principals", 1, "", "klamm: shop.principals: line 1: this is no line of kafka-acls"},
		"to a file that is one": {"shop.acls --to shop.acls", 1, "", "klamm: --to: shop.acls is there already: remove it"},
		"to a folder that is not": {"shop.acls --to no/where.yaml", 1, "",
			"klamm: --to: open no/where.yaml: no such file or directory\n"},
		"in a mode there is not": {"shop.acls --mode watch", 1, "", "klamm: --mode: unknown mode \"watch\""},
		"with principals that are none": {"shop.acls --principals shop.acls", 1, "",
			"klamm: shop.acls:2: not YAML"},
		"with no principals": {
			"shop.acls --principals missing", 1, "", "klamm: --principals: open missing: no such file or directory\n",
		},
		"of a cluster of no node": {"--config missing.yaml", 1, "", "klamm: read the configuration: open missing.yaml"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Chdir(t.TempDir())
			for name, text := range map[string]string{"shop.acls": shopACLs, "shop.principals": shopPrincipals} {
				if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			code, out, errOut := inProcess(t, append([]string{"policy", "import-acls"}, strings.Fields(c.args)...)...)
			if code != c.code || !strings.Contains(string(out), c.out) || !strings.Contains(errOut, c.errOut) ||
				c.out == "" && len(out) > 0 {
				t.Fatalf("exit code %d, stdout\n%s\nstderr\n%s\nwant %d,\n%s\n%s", code, out, errOut, c.code, c.out, c.errOut)
			}
			file := "new.yaml"
			if code == 0 && !strings.Contains(c.args, "--to") {
				file = "stdout.yaml"
				if err := os.WriteFile(file, out, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if code == 0 {
				if code, out, errOut := inProcess(t, "policy", "check", file); code != 0 || errOut != "" {
					t.Errorf("policy check: exit code %d\n%s%s", code, out, errOut)
				}
			}
		})
	}
}

func TestImportedACLsAsData(t *testing.T) {
	list := filepath.Join(t.TempDir(), "list")
	if err := os.WriteFile(list, []byte(shopACLs), 0o600); err != nil {
		t.Fatal(err)
	}
	code, out, errOut := inProcess(t, "policy", "import-acls", list, "-o", "json")
	var got imported
	if err := json.Unmarshal(out, &got); err != nil || code != 0 || errOut != "" {
		t.Fatalf("exit code %d, %v\n%s%s", code, err, out, errOut)
	}
	if _, err := policy.Parse("", []byte(got.Policy)); err != nil || got.ACLs != 2 || got.Rules != 1 ||
		len(got.Idle) != 1 || len(got.Warnings) != 2 {
		t.Errorf("%v, %+v", err, got)
	}
}

// aclCommand is the class of kafka-acls.
const aclCommand = "org.apache.kafka.tools.AclCommand"

// kafkaACLs runs Kafka's own kafka-acls as the super user.
func kafkaACLs(t *testing.T, c *kafka.Cluster, login string, args ...string) []byte {
	t.Helper()
	tool, err := kafka.Tool(t.Context(), aclCommand, append([]string{
		"--bootstrap-server", c.SASLAddrs()[0], "--command-config", login}, args...)...)
	if err != nil {
		t.Fatal(err)
	}
	return output(t, tool)
}

func output(t *testing.T, cmd *exec.Cmd) []byte {
	t.Helper()
	var errOut bytes.Buffer
	cmd.Stderr = &errOut
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %v\n%s%s", cmd.Args, err, out, errOut.Bytes())
	}
	return out
}

func TestACLsOfARealClusterAreTheSameLiveAndByList(t *testing.T) {
	for _, version := range []string{kafka.Newest, kafka.Previous} {
		t.Run(version, func(t *testing.T) { importLive(t, version) })
	}
}

func importLive(t *testing.T, version string) {
	c := kafka.Start(t, kafka.Options{Version: version, Authorizer: true, Users: map[string]string{"eve": "drop"}})
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	login := write("login", fmt.Sprintf("security.protocol=SASL_PLAINTEXT\nsasl.mechanism=PLAIN\nsasl.jaas.config="+
		"org.apache.kafka.common.security.plain.PlainLoginModule required username=%q password=%q;\n", kafka.Admin,
		kafka.AdminPassword))
	config := func(user, password string) string {
		return write(user+".yaml", fmt.Sprintf("node: {socket: \"\"}\nclusters: [{name: main, bootstrap: [%q], credentials: "+
			"{mechanism: PLAIN, username: %s, password-file: %q}}]\n", c.SASLAddrs()[0], user,
			write(user+".password", password)))
	}
	live := []string{"policy", "import-acls", "-c", config(kafka.Admin, kafka.AdminPassword)}
	if code, out, errOut := inProcess(t, live...); code != 0 || !bytes.HasSuffix(out, []byte("\nrules: []\n")) {
		t.Errorf("without ACLs: exit code %d\n%s%s", code, out, errOut)
	}
	for _, args := range [][]string{
		{"--topic", "orders.", "--resource-pattern-type", "prefixed", "--group", "readers", "--consumer",
			"--allow-principal", "User:CN=orders,O=shop", "--allow-principal", "User:o'neil"},
		{"--topic", "*", "--operation", "Delete", "--operation", "AlterConfigs", "--deny-principal", "User:*",
			"--deny-host", "10.0.0.7"},
		{"--cluster", "--transactional-id", "*", "--operation", "Describe", "--allow-principal", "User:`eve`, (the \"spy\")"},
		{"--user-principal", "User:alice", "--operation", "CreateTokens", "--allow-principal", "User:alice"},
	} {
		kafkaACLs(t, c, login, append([]string{"--add", "--force"}, args...)...)
	}
	list := kafkaACLs(t, c, login, "--list")
	code, byList, errOut := inProcess(t, "policy", "import-acls", write("list", string(list)), "--cluster", "main")
	if code != 0 {
		t.Fatalf("exit code %d, stderr\n%s", code, errOut)
	}
	code, byCluster, errOut := inProcess(t, live...)
	if code != 0 || !strings.Contains(string(byCluster), "from cluster main, 11 ACLs.\n") {
		t.Fatalf("exit code %d\n%s%s", code, byCluster, errOut)
	}
	if a, b := withoutComments(byList), withoutComments(byCluster); !slices.Equal(a, b) {
		t.Errorf("the list gives\n%s\nthe cluster\n%s", strings.Join(a, "\n"), strings.Join(b, "\n"))
	}
	code, _, errOut = inProcess(t, "policy", "import-acls", "-c", config("eve", "drop"))
	if want := "allow it to Describe the cluster\n"; code != 1 || !strings.HasSuffix(errOut, want) {
		t.Errorf("as eve: exit code %d, stderr %q, want %q", code, errOut, want)
	}
	if version == kafka.Previous {
		importListOfThatVersion(t, c, login, byList)
	}
	// What a list cannot tell, the cluster can.
	odd := "User:a, host=b"
	if err := c.Allow(t.Context(), odd, kmsg.ACLResourceTypeGroup, "a\nb", kmsg.ACLOperationRead); err != nil {
		t.Fatal(err)
	}
	if code, out, errOut := inProcess(t, live...); code != 0 || !strings.Contains(string(out), `{group: "a\x0ab", oper`) {
		t.Errorf("exit code %d\n%s%s", code, out, errOut)
	}
	code, _, errOut = inProcess(t, "policy", "import-acls", write("list", string(kafkaACLs(t, c, login, "--list"))))
	if want := "a name with a line break can only be read from the cluster itself\n"; code != 1 ||
		!strings.HasSuffix(errOut, want) {
		t.Errorf("exit code %d, stderr %q, want %q", code, errOut, want)
	}
}

// importListOfThatVersion reads what kafka-acls of Kafka 3 prints, which is in another format.
func importListOfThatVersion(t *testing.T, c *kafka.Cluster, login string, want []byte) {
	t.Helper()
	cache, err := kafka.Cache()
	if err != nil {
		t.Fatal(err)
	}
	list := output(t, exec.CommandContext(t.Context(), "java", "-cp",
		filepath.Join(cache, "kafka", "broker-"+kafka.Previous, "*"), "kafka.admin.AclCommand",
		"--bootstrap-server", c.SASLAddrs()[0], "--command-config", login, "--list"))
	if !bytes.Contains(list, []byte("`: \n \t(principal=")) {
		t.Fatalf("this is no format of its own:\n%s", list)
	}
	path := filepath.Join(t.TempDir(), "list")
	if err := os.WriteFile(path, list, 0o600); err != nil {
		t.Fatal(err)
	}
	code, out, errOut := inProcess(t, "policy", "import-acls", path, "--cluster", "main")
	if a, b := withoutComments(out), withoutComments(want); code != 0 || !slices.Equal(a, b) {
		t.Errorf("exit code %d\n%s\nthat of Kafka 3 gives\n%s\nthat of Kafka 4\n%s", code, errOut, out, want)
	}
}

// withoutComments are the lines of a policy without those about where it is from.
func withoutComments(policy []byte) []string {
	return slices.DeleteFunc(strings.Split(string(policy), "\n"), func(line string) bool {
		return strings.HasPrefix(line, "#")
	})
}
