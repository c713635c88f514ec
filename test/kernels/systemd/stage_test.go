//go:build guest

package systemd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kmsg"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"klamm/test/kafka"
	"klamm/test/stage"
)

// The broker is on the host, the workloads are in a network namespace behind a veth pair, and the node dials from the
// host: so the broker sees by the address who came directly.
var (
	host, pod  = netip.MustParsePrefix("192.0.2.1/30"), netip.MustParsePrefix("192.0.2.2/30")
	brokerAddr = netip.AddrPortFrom(host.Addr(), 9092).String() // as in klamm.yaml

	broker *arrivals
)

// inPod is set for a process that is in the pod's network namespace.
const inPod = "KLAMM_TEST_IN_POD"

func TestMain(m *testing.M) {
	stage.Main()
	if os.Getenv(inPod) == "" {
		fmt.Fprintln(os.Stderr, "enter the pod:", enterPod())
		os.Exit(1)
	}
	var err error
	if broker, err = startBroker(); err != nil {
		fmt.Fprintln(os.Stderr, "start the broker:", err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// enterPod makes the pod and executes this program again inside. It returns only if that fails.
func enterPod() error {
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return err
	}
	veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "pod", PeerNamespace: netlink.NsPid(1)}
	if err := netlink.LinkAdd(veth); err != nil {
		return err
	}
	err := errors.Join(up("lo", netip.Prefix{}), up("eth0", pod), onHost(func() error { return up("pod", host) }))
	if err != nil {
		return err
	}
	return unix.Exec("/proc/self/exe", os.Args, append(os.Environ(), inPod+"=1"))
}

func up(name string, address netip.Prefix) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	if address.IsValid() {
		a, err := netlink.ParseAddr(address.String())
		if err := errors.Join(err, netlink.AddrAdd(link, a)); err != nil {
			return err
		}
	}
	return netlink.LinkSetUp(link)
}

// onHost calls f on a thread in the host's network namespace.
func onHost(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // ends with the goroutine
		ns, err := os.Open("/proc/1/ns/net")
		if err == nil {
			err = errors.Join(unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET), ns.Close())
		}
		if err == nil {
			err = f()
		}
		done <- err
	}()
	return <-done
}

// arrivals is the broker's listener, which notes who comes.
type arrivals struct {
	net.Listener
	mu   sync.Mutex
	from map[netip.Addr]int
}

func startBroker() (*arrivals, error) {
	a := &arrivals{from: map[netip.Addr]int{}}
	listen := func(network, _ string) (net.Listener, error) {
		err := onHost(func() (err error) {
			a.Listener, err = net.Listen(network, brokerAddr)
			return err
		})
		return a, err
	}
	_, err := kfake.NewCluster(kfake.NumBrokers(1), kfake.ListenFn(listen),
		kfake.SeedTopics(1, "orders", "payroll", "public"))
	return a, err
}

// Accept implements net.Listener.
func (a *arrivals) Accept() (net.Conn, error) {
	conn, err := a.Listener.Accept()
	if err == nil {
		a.mu.Lock()
		defer a.mu.Unlock()
		a.from[netip.MustParseAddrPort(conn.RemoteAddr().String()).Addr()]++
	}
	return conn, err
}

func (a *arrivals) arrivedFrom(who netip.Prefix) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.from[who.Addr()]
}

func nobodyCameDirectly(t *testing.T) {
	t.Helper()
	if n := broker.arrivedFrom(pod); n > 0 {
		t.Errorf("%d connections reached the broker directly", n)
	}
}

// orders is the workload of that name.
func orders(t *testing.T) *stage.Workload {
	t.Helper()
	return stage.StartWorkload(t, kafka.Place{UID: stage.OrdersUID, GID: stage.OrdersUID}, "")
}

func dial(w *stage.Workload) (net.Conn, error) {
	return w.DialContext(context.Background(), "tcp", brokerAddr)
}

// only is nil if the workload sees these topics and no others.
func only(w *stage.Workload, topics ...string) error {
	conn, err := dial(w)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	return sees(conn, topics...)
}

func sees(conn net.Conn, topics ...string) error {
	resp, err := stage.Ask(conn, stage.AllTopics())
	if err != nil {
		return err
	}
	var seen []string
	for _, topic := range resp.(*kmsg.MetadataResponse).Topics {
		seen = append(seen, *topic.Topic)
	}
	slices.Sort(seen)
	if fmt.Sprint(seen) != fmt.Sprint(topics) {
		return fmt.Errorf("the client sees %v, not %v", seen, topics)
	}
	return nil
}

func refused(w *stage.Workload) error {
	conn, err := dial(w)
	if err == nil {
		return errors.Join(errors.New("a connect succeeds"), conn.Close())
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return err
	}
	return nil
}

func await(t *testing.T, what string, try func() error) {
	t.Helper()
	var err error
	for end := time.Now().Add(2 * time.Minute); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if err = try(); err == nil {
			return
		}
	}
	t.Fatalf("waited in vain for %s: %v\n%s", what, err, journal())
}

// klamm runs the product on the host.
func klamm(args ...string) (out []byte, err error) {
	return out, onHost(func() (err error) {
		out, err = exec.Command("klamm", args...).CombinedOutput()
		return err
	})
}

func systemctl(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command("systemctl", args...).CombinedOutput(); err != nil {
		t.Fatalf("systemctl %v: %v\n%s\n%s", args, err, out, journal())
	}
}

func property(t *testing.T, unit, name string) string {
	t.Helper()
	out, err := exec.Command("systemctl", "show", "--value", "--property="+name, unit).Output()
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}

// moment is a property of systemd that is in microseconds since boot.
func moment(t *testing.T, unit, name string) time.Duration {
	t.Helper()
	n, err := strconv.Atoi(property(t, unit, name))
	if err != nil {
		t.Fatal(err)
	}
	return time.Duration(n) * time.Microsecond
}

// journal is what systemd and the node have said of the unit.
func journal() string {
	out, err := exec.Command("journalctl", "--boot", "--no-pager", "--output=short-monotonic",
		"--unit="+unit).CombinedOutput()
	return fmt.Sprintf("%s%v", out, err)
}
