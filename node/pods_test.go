package node_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/containerd/nri/pkg/adaptation"
	"github.com/containerd/nri/pkg/api"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"klamm/test/kafka"
	"klamm/test/stage"
)

const podUID = "2f1d6a0e-93c4-4b0e-8f55-0123456789ab"

var containerID = strings.Repeat("0123456789abcdef", 4)

// startRuntime serves NRI, as containerd does, with one container in one pod.
func startRuntime(t *testing.T, pod *api.PodSandbox, container *api.Container) (*adaptation.Adaptation, string) {
	t.Helper()
	socket, none := filepath.Join(t.TempDir(), "nri.sock"), t.TempDir()
	synchronize := func(ctx context.Context, tell adaptation.SyncCB) error {
		_, err := tell(ctx, []*api.PodSandbox{pod}, []*api.Container{container})
		return err
	}
	update := func(context.Context, []*api.ContainerUpdate) ([]*api.ContainerUpdate, error) {
		return nil, errors.New("the node must not change containers")
	}
	r, err := adaptation.New("containerd", "v2.4.2", synchronize, update, adaptation.WithSocketPath(socket),
		adaptation.WithPluginPath(none), adaptation.WithPluginConfigPath(none))
	if err != nil {
		t.Fatal(err)
	}
	if err = r.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Stop)
	return r, socket
}

// inPod is the place of the processes of the container.
func inPod(t *testing.T, n *stage.Node) kafka.Place {
	t.Helper()
	dir := filepath.Join(n.Cgroup, "kubepods", "burstable", "pod"+podUID, containerID)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return kafka.Place{Cgroup: dir, UID: stage.OrdersUID, GID: stage.OrdersUID}
}

func intercept(t *testing.T, address, socket string) string {
	t.Helper()
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("{firewall: false, ports: [%s], nri: %q}", port, socket)
}

func TestAContainerIsKnownByWhatItsRuntimeCallsIt(t *testing.T) {
	_, socket := startRuntime(t, &api.PodSandbox{Id: "s1", Uid: podUID, Namespace: "shop", Name: "orders-1",
		Linux: &api.LinuxPodSandbox{Namespaces: []*api.LinuxNamespace{{Type: "mount"}}}},
		&api.Container{Id: containerID, PodSandboxId: "s1", Name: "app"})
	broker := stage.StartBroker(t)
	n := stage.Start(t, broker.Addr(), stage.OrdersOnly, stage.Config{
		"intercept":  intercept(t, broker.Addr(), socket),
		"identities": fmt.Sprintf("[{spiffe-id: %q, namespace: shop, pod: orders-*, container: app}]", stage.Orders)})
	orders, stranger := stage.StartWorkload(t, inPod(t, n), ""), n.Workload(stage.OrdersUID)

	if err := write(t, orders.Client(t, broker.Addr()), "orders"); err != nil {
		t.Errorf("the pod's container: %v", err)
	}
	err := write(t, stranger.Client(t, broker.Addr()), "orders")
	if !errors.Is(err, kerr.TopicAuthorizationFailed) {
		t.Errorf("the same user outside of the pod: %v", err)
	}
	l := n.AwaitAudit(1, "a produce", func(l stage.Line) bool { return produced(l) && l.Verdict == "allow" })[0]
	if l.SPIFFE != stage.Orders || l.ContainerID != containerID || l.PodUID != podUID || l.Namespace != "shop" ||
		l.Pod != "orders-1" || l.Container != "app" {
		t.Errorf("the audit says %+v", l)
	}
}

// newNetns makes a network namespace with its loopback device up, and calls f on a thread in it. The thread, and with
// it what f started there, lives as long as the test.
func newNetns(t *testing.T, f func(path string)) {
	t.Helper()
	done, end, ended := make(chan error, 1), make(chan struct{}), make(chan struct{})
	t.Cleanup(func() {
		close(end)
		<-ended
	})
	go func() {
		defer close(ended)
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		func() {
			err := unix.Unshare(unix.CLONE_NEWNET)
			defer func() { done <- err }() // when f ends the goroutine, too
			if err == nil {
				err = netlink.LinkSetUp(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Name: "lo"}})
			}
			if err == nil {
				f(fmt.Sprintf("/proc/%d/task/%d/ns/net", os.Getpid(), unix.Gettid()))
			}
		}()
		<-end
	}()
	if err := <-done; err != nil || t.Failed() {
		t.Fatal(err)
	}
}

func TestTheFirstConnectOfAPodIsRedirected(t *testing.T) {
	host := &api.PodSandbox{Id: "s1", Uid: "u1", Namespace: "kube-system", Name: "agent",
		Linux: &api.LinuxPodSandbox{Namespaces: []*api.LinuxNamespace{{Type: "mount"}}}}
	cri, socket := startRuntime(t, host, &api.Container{Id: "c1", PodSandboxId: "s1", Name: "agent"})
	const nowhere = "192.0.2.1:19092" // RFC 5737: nobody's
	n := stage.Start(t, nowhere, stage.OrdersOnly, stage.Config{
		"intercept": intercept(t, nowhere, socket), "clusters": stage.Clusters("192.0.2.2:19092")})
	stage.Await(t, "the node to listen to the runtime", func() bool { return n.Metric("klamm_nri_connected") == 1 })
	place := inPod(t, n)
	var pod *stage.Workload
	newNetns(t, func(path string) {
		request := &adaptation.RunPodSandboxRequest{Pod: &api.PodSandbox{Id: "s2", Uid: podUID, Namespace: "shop",
			Name: "orders-1", Linux: &api.LinuxPodSandbox{Namespaces: []*api.LinuxNamespace{{Type: "network", Path: path}}}}}
		stage.Await(t, "the runtime to tell the node", func() bool {
			if err := cri.RunPodSandbox(t.Context(), request); err != nil {
				t.Error(err)
			}
			return n.Metric(`klamm_nri_enrolments_total{outcome="enrolled"}`) > 0
		})
		pod = stage.StartWorkload(t, place, "")
	})
	// No listener would be ECONNREFUSED; the node's own refusal is a reset.
	wantReset(t, pod, nowhere)
	l := n.AwaitRefusals(1, "no_cluster")[0]
	if l.PID != uint32(pod.PID()) || l.Pod != "orders-1" {
		t.Errorf("the audit says %+v", l)
	}
	if refused := n.Audit(stage.Refusal("not_enrolled")); len(refused) > 0 {
		t.Errorf("refused before: %+v", refused)
	}
}
