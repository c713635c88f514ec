package node_test

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"klamm/enforcer/policy"
	"klamm/node"
)

var yamlBlock = regexp.MustCompile("(?ms)^ *```yaml\n(.*?)^ *```")

// A block is a policy, the part of a pod, or of klamm.yaml, and then perhaps without a cluster.
func TestTheExamplesInDocsIdentityAreValid(t *testing.T) {
	text, err := os.ReadFile("../docs/identity.md")
	if err != nil {
		t.Fatal(err)
	}
	blocks := yamlBlock.FindAllSubmatch(text, -1)
	if len(blocks) < 7 {
		t.Fatalf("%d blocks of YAML: the test does not find them", len(blocks))
	}
	for _, m := range blocks {
		block := string(m[1])
		switch {
		case strings.HasPrefix(block, "apiVersion:"):
			if _, err := policy.Parse("docs/identity.md", m[1]); err != nil {
				t.Errorf("%v in\n%s", err, block)
			}
		case strings.Contains(block, "containers:"):
		default:
			if !strings.Contains(block, "clusters:") {
				block += "clusters: [{name: main, bootstrap: [\"broker.example.org:9092\"]}]\n"
			}
			file := filepath.Join(t.TempDir(), "klamm.yaml")
			if err := os.WriteFile(file, []byte(block), 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := node.Load(file); err != nil {
				t.Errorf("%v in\n%s", err, block)
			}
		}
	}
}
