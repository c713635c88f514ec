package spiffe_test

import (
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"klamm/spiffe"
	"klamm/test/spire"
	"klamm/test/spire/fake"
)

// TestJWTBundlesAreTheAgentsLastWord: the agent comes late, goes away, and takes the node's identity away.
func TestJWTBundlesAreTheAgentsLastWord(t *testing.T) {
	t.Parallel()
	agent, err := fake.New(fake.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := agent.Stop(); err != nil {
			t.Error(err)
		}
	}()
	if err := agent.StopAgent(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	bundles := spiffe.OpenJWTBundles(agent.WorkloadAPI())
	defer func() {
		if err := bundles.Close(); err != nil {
			t.Error(err)
		}
	}()
	own := spiffeid.RequireTrustDomainFromString(spire.TrustDomain)
	stranger := spiffeid.RequireTrustDomainFromString("x.test")
	await := func(what string, is func() bool) {
		t.Helper()
		for late := time.Now().Add(20 * time.Second); !is(); time.Sleep(5 * time.Millisecond) {
			if time.Now().After(late) {
				t.Fatalf("in vain for %s: %+v", what, bundles.State(own))
			}
		}
	}
	await("an error that names the socket", func() bool {
		err := bundles.State(own).Err
		return err != nil && strings.Contains(err.Error(), agent.WorkloadAPI())
	})
	if err := agent.StartAgent(t.Context()); err != nil {
		t.Fatal(err)
	}
	await("the bundle", func() bool { return bundles.State(own).Ready() })
	if _, err := bundles.GetJWTBundleForTrustDomain(stranger); err == nil {
		t.Error("a trust domain that is not federated is trusted")
	}
	if err := agent.StopAgent(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(agent.WorkloadAPI()); err == nil {
		t.Error("the agent is still there")
	}
	if !bundles.State(own).Ready() {
		t.Errorf("while the agent is away: %+v", bundles.State(own))
	}
	node, err := agent.NodeEntry(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := agent.Remove(t.Context(), node); err != nil {
		t.Fatal(err)
	}
	if err := agent.StartAgent(t.Context()); err != nil {
		t.Fatal(err)
	}
	await("the loss of the node's identity", func() bool { return !bundles.State(own).Ready() })
}
