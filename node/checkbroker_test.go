package node_test

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/node"
	"klamm/test/kafka"
	"klamm/test/spire"
	"klamm/test/stage"
)

// findings are those of a check, by name.
func findings(t *testing.T, c node.Config, what node.BrokerCheck) map[string]node.Finding {
	t.Helper()
	list, err := node.CheckBrokers(t.Context(), c, what)
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]node.Finding{}
	for _, f := range list {
		all[f.Check] = f
		if f.Detail == "" || !f.OK && f.Remedy == "" {
			t.Errorf("%+v", f)
		}
	}
	return all
}

// load is a configuration that reaches brokers as the section upstream says, and answers at a socket if there is one.
func (w *world) load(t *testing.T, broker, upstream string) node.Config {
	t.Helper()
	return stage.Load(t, t.TempDir(), stage.NewCgroup(t), broker, stage.OrdersOnly, w.config(broker, upstream))
}

func TestBrokersAreCheckedForWaysPastTheNode(t *testing.T) {
	w := newWorld(t, 0)
	host := strings.TrimSuffix(w.TLSAddrs()[0], ":9096")
	direct := func(port string) string { return "direct " + host + ":" + port }
	mtls := w.load(t, w.TLSAddrs()[0], w.tls(", certificate: workload")+"}")

	t.Run("what the node may not ask for is said", func(t *testing.T) {
		all := findings(t, mtls, node.BrokerCheck{})
		if f := all["listeners of main"]; !f.OK || !strings.Contains(f.Remedy, "DescribeConfigs") {
			t.Errorf("%+v", f)
		}
		if f := all[direct("9096")]; !f.OK || !strings.Contains(f.Detail, "plaintext: ") ||
			!strings.Contains(f.Detail, "TLS without a certificate: ") {
			t.Errorf("%+v", f)
		}
		if f := all["upstream "+host+":9096"]; !f.OK || !strings.Contains(f.Detail, spire.Node) {
			t.Errorf("%+v", f)
		}
		if f := all["principal at main"]; !f.OK || !strings.Contains(f.Detail, "CN=klamm,O=SPIRE,C=US") {
			t.Errorf("%+v", f)
		}
	})
	if err := w.Allow(t.Context(), "User:klamm", kmsg.ACLResourceTypeCluster, "kafka-cluster",
		kmsg.ACLOperationDescribeConfigs); err != nil {
		t.Fatal(err)
	}
	t.Run("every listener is tried", func(t *testing.T) {
		all := findings(t, mtls, node.BrokerCheck{Cluster: "main"})
		for _, port := range []string{"9092", "9093", "9094", "9095", "9096", "9097"} {
			if f := all[direct(port)]; !f.OK {
				t.Errorf("%+v", f)
			}
		}
		if f := all[direct("9092")]; !strings.Contains(f.Detail, "its principal has no right") {
			t.Errorf("%+v", f)
		}
		if f := all["principal at main"]; !f.OK || !strings.Contains(f.Detail, "User:klamm") {
			t.Errorf("%+v", f)
		}
	})
	t.Run("a workload is known by its own name", func(t *testing.T) {
		orders := stage.StartWorkload(t, place(stage.OrdersUID), "")
		all := findings(t, mtls, node.BrokerCheck{PID: int32(orders.PID())})
		if f := all["principal at main"]; !f.OK || !strings.Contains(f.Detail, "User:orders.shop") {
			t.Errorf("%+v", f)
		}
		if f := all["upstream "+host+":9096"]; !f.OK || !strings.Contains(f.Detail, stage.Orders) {
			t.Errorf("%+v", f)
		}
	})
	t.Run("or by that of all", func(t *testing.T) {
		w.register(t, spire.Entry{ID: stage.Report, Selectors: []string{fmt.Sprint("unix:uid:", stage.ReportUID)}})
		report := stage.StartWorkload(t, place(stage.ReportUID), "")
		all := findings(t, mtls, node.BrokerCheck{PID: int32(report.PID())})
		if f := all["principal at main"]; f.OK || !strings.Contains(f.Detail, "O=SPIRE,C=US") ||
			!strings.Contains(f.Remedy, "-dns") || !strings.Contains(f.Remedy, "jwt-svid") ||
			!strings.Contains(f.Remedy, "principal.builder.class") {
			t.Errorf("%+v", f)
		}
		if f := all["upstream "+host+":9096"]; f.OK {
			t.Errorf("the broker takes a certificate that no rule maps: %+v", f)
		}
	})
	t.Run("or by none", func(t *testing.T) {
		stranger := stage.StartWorkload(t, place(stage.StrangerUID), "")
		all := findings(t, mtls, node.BrokerCheck{PID: int32(stranger.PID())})
		if f := all[fmt.Sprint("SVID of ", stranger.PID())]; f.OK || !strings.Contains(f.Detail, "no entry") {
			t.Errorf("%+v", f)
		}
	})
	t.Run("a wrong name of the brokers is found", func(t *testing.T) {
		all := findings(t, w.load(t, w.TLSAddrs()[0], w.tls(", server-name: other.example")+"}"), node.BrokerCheck{})
		if f := all["cluster main"]; f.OK || !strings.Contains(f.Detail, "other.example") {
			t.Errorf("%+v", f)
		}
	})
	t.Run("a login in cleartext is said", func(t *testing.T) {
		login := "{login: {jwt-svid: {audience: kafka}}, cleartext: true}"
		all := findings(t, w.load(t, w.SASLAddrs()[0], login), node.BrokerCheck{})
		if f := all["login of main"]; !f.OK || !strings.Contains(f.Detail, "cleartext") || f.Remedy == "" {
			t.Errorf("%+v", f)
		}
		if f := all["upstream "+host+":9093"]; !f.OK || !strings.Contains(f.Detail, "OAUTHBEARER") {
			t.Errorf("%+v", f)
		}
	})
	t.Run("the node that runs does it", func(t *testing.T) {
		config := w.config(w.TLSAddrs()[0], w.tls(", certificate: workload")+"}")
		socket := filepath.Join(t.TempDir(), "klamm.sock")
		config["node"] = fmt.Sprintf("{name: node-1, cgroup: %s, pins: \"\", socket: %q}", stage.NewCgroup(t), socket)
		n := stage.Start(t, w.TLSAddrs()[0], stage.OrdersOnly, config)
		n.AwaitReady()
		loaded, err := node.Load(filepath.Join(n.Dir, "klamm.yaml"))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(filepath.Join(w.dir, "brokers.pem")); err != nil { // so that nobody else could
			t.Fatal(err)
		}
		all := findings(t, loaded, node.BrokerCheck{Cluster: "main"})
		if f := all["cluster main"]; f.OK || !strings.Contains(f.Detail, "brokers.pem") {
			t.Errorf("%+v", f)
		}
		if _, err := node.ACLs(t.Context(), loaded, "main"); err == nil || !strings.Contains(err.Error(), "brokers.pem") {
			t.Errorf("ACLs are not read by the node that runs: %v", err)
		}
		w.file(t, "brokers.pem", w.brokers.PEM())
		if f := findings(t, loaded, node.BrokerCheck{})["upstream "+host+":9096"]; !f.OK {
			t.Errorf("%+v", f)
		}
		if _, err := node.ACLs(t.Context(), loaded, "main"); err == nil ||
			!strings.Contains(err.Error(), "allow it to Describe the cluster") {
			t.Errorf("without the right: %v", err)
		}
		if err := w.Allow(t.Context(), "User:klamm", kmsg.ACLResourceTypeCluster, "kafka-cluster",
			kmsg.ACLOperationDescribe); err != nil {
			t.Fatal(err)
		}
		if all, err := node.ACLs(t.Context(), loaded, "main"); err != nil || len(all) == 0 {
			t.Errorf("%v, %v", all, err)
		}
	})
	if err := w.Allow(t.Context(), "User:ANONYMOUS", kmsg.ACLResourceTypeTopic, "orders",
		kmsg.ACLOperationDescribe); err != nil {
		t.Fatal(err)
	}
	t.Run("a right of anybody is found", func(t *testing.T) {
		if f := findings(t, mtls, node.BrokerCheck{})[direct("9092")]; f.OK || !strings.Contains(f.Detail, "is served") {
			t.Errorf("%+v", f)
		}
	})
	if _, err := node.CheckBrokers(t.Context(), mtls, node.BrokerCheck{Cluster: "other"}); err == nil {
		t.Error("a cluster that is not there is checked")
	}
}

func TestABrokerThatTakesUnsignedTokensIsFound(t *testing.T) {
	k := kafka.Start(t, kafka.Options{Authorizer: true, SuperUsers: []string{"User:klamm-doctor"},
		Config: map[string]string{
			"listener.name.sasl.sasl.enabled.mechanisms": "OAUTHBEARER",
			"listener.name.sasl.oauthbearer.sasl.jaas.config": "org.apache.kafka.common.security.oauthbearer." +
				`OAuthBearerLoginModule required unsecuredLoginStringClaim_sub="x";`}})
	c := stage.Load(t, t.TempDir(), stage.NewCgroup(t), k.Addrs()[0], stage.OrdersOnly,
		stage.Config{"intercept": "{firewall: false, ports: [9092, 9093]}"})
	all := findings(t, c, node.BrokerCheck{})
	if f := all["direct "+k.SASLAddrs()[0]]; f.OK || !strings.Contains(f.Detail, "unsigned token") {
		t.Errorf("%+v", f)
	}
	if f := all["direct "+k.Addrs()[0]]; !f.OK {
		t.Errorf("%+v", f)
	}
}

func TestAListenerThatDoesNotAnswerIsNoProof(t *testing.T) {
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = silent.Close() })
	broker := stage.StartBroker(t)
	_, port, err := net.SplitHostPort(silent.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	c := stage.Load(t, t.TempDir(), stage.NewCgroup(t), broker.Addr(), stage.OrdersOnly,
		stage.Config{"intercept": "{firewall: false, ports: [" + port + "]}"})
	if f := findings(t, c, node.BrokerCheck{})["direct "+silent.Addr().String()]; f.OK ||
		!strings.Contains(f.Detail, "not known") {
		t.Errorf("%+v", f)
	}
}

func TestAClusterThatServesAnybodyIsFound(t *testing.T) {
	broker := stage.StartBroker(t)
	c := stage.Load(t, t.TempDir(), stage.NewCgroup(t), broker.Addr(), stage.OrdersOnly, nil)
	if f := findings(t, c, node.BrokerCheck{})["direct "+broker.Addr()]; f.OK {
		t.Errorf("%+v", f)
	}
}
