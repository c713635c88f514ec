package bypass

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/vishvananda/netlink"

	"klamm/test/host"
)

// brokerPort is the one that is intercepted.
const brokerPort = 9092

// otherPort is not: brokers do not listen at it.
const otherPort = 5555

// fencePort is that of packets which are sent to be seen after all others.
const fencePort = 9

// Addresses. Pods have 10.98.N.2 and fd98:0:0:N::2 on a network of their own with the host, or 10.97.0.N and fd97::N on
// a bridge with the host and the second device of the brokers.
var (
	broker4     = netip.MustParseAddr("10.98.9.2")
	broker6     = netip.MustParseAddr("fd98:0:0:9::2")
	alias4      = netip.MustParseAddr("10.98.9.3")        // of the broker, and in its cluster's network
	stranger4   = netip.MustParseAddr("10.98.8.3")        // of the broker, but of no cluster
	nat64       = netip.MustParseAddr("64:ff9b::a62:902") // the broker as a NAT64 shows it (RFC 6052)
	bridged4    = netip.MustParseAddr("10.97.0.9")
	bridged6    = netip.MustParseAddr("fd97::9")
	linkLocal6  = netip.MustParseAddr("fe80::9") // of the broker on the bridge
	host4       = netip.MustParseAddr("10.98.9.1")
	host6       = netip.MustParseAddr("fd98:0:0:9::1")
	bridgeHost4 = netip.MustParseAddr("10.97.0.1")
	bridgeHost6 = netip.MustParseAddr("fd97::1")
)

// firstPod is the N of the first pod: those below are taken.
const firstPod = 16

// world is a host with a broker behind it: network namespaces "host", where the node runs, and "broker". Workloads are
// in pods, which are namespaces of their own, or on the host. All of them are in one cgroup; the broker is not.
type world struct {
	host, broker *namespace
	wire         *wire // what comes to the broker
	cgroup       string
	meter        *meter
	dir          string
	node         *klamm // nil: nothing guards this world

	ready       map[string]*pod // of vectors, by name
	pods, tries int             // so far
}

// Cgroups of a world, below its own.
const (
	nodeCgroup = "node"
	podsCgroup = "pods"
)

// newWorld makes a world without a node. It ends with the test.
func newWorld(t testing.TB) *world {
	t.Helper()
	w := &world{host: newNamespace(t), broker: newNamespace(t), dir: t.TempDir(), pods: firstPod}
	var err error
	if w.cgroup, err = host.NewCgroup("klamm-bypass-", nodeCgroup, podsCgroup, nestedCgroup); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := host.RemoveCgroup(w.cgroup); err != nil {
			t.Error(err)
		}
	})
	if err := os.Chmod(w.cgroup, 0o755); err != nil { // as all cgroups are
		t.Fatal(err)
	}
	w.meter = newMeter(t, filepath.Join(w.cgroup, nodeCgroup))
	w.host.sysctl(t, "net/ipv4/ip_forward", "1")
	w.host.sysctl(t, "net/ipv6/conf/all/forwarding", "1")
	if err := w.connectBroker(); err != nil {
		t.Fatal(err)
	}
	w.wire = tap(t, w.broker)
	// Neighbours are to know each other: what takes a second to begin with would be taken for refused.
	for _, a := range []netip.Addr{broker4, broker6, bridged4, bridged6} {
		w.wire.fence(t, w.host.do, a)
	}
	l, err := w.broker.listen("tcp", fmt.Sprintf("[::]:%d", brokerPort))
	if err != nil {
		t.Fatal(err)
	}
	listeners := []net.Listener{l}
	if *realKafka {
		// Where its brokers say they are, for the node's own client.
		b, err := theBackend()
		if err != nil {
			t.Fatal(err)
		}
		if l, err = w.host.listen("tcp", b.address.String()); err != nil {
			t.Fatal(err)
		}
		listeners = append(listeners, l)
	}
	serveKafka(t, listeners...)
	return w
}

func (w *world) connectBroker() error {
	on := func(bits4, bits6 int, addrs ...netip.Addr) (p []netip.Prefix) {
		for _, a := range addrs {
			p = append(p, netip.PrefixFrom(a, map[bool]int{true: bits4, false: bits6}[a.Is4()]))
		}
		return p
	}
	theirs := append(on(24, 64, broker4, alias4, broker6), on(32, 128, stranger4, nat64)...)
	if err := w.host.veth("broker", on(24, 64, host4, host6), "eth0", w.broker.path(), theirs); err != nil {
		return err
	}
	err := w.host.do(func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "bridge"
		return errors.Join(netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}),
			address("bridge", on(24, 64, bridgeHost4, bridgeHost6)), up("bridge"),
			route(netip.PrefixFrom(stranger4, 32), broker4), route(netip.PrefixFrom(nat64, 128), broker6))
	})
	if err != nil {
		return err
	}
	theirs = on(24, 64, bridged4, bridged6, linkLocal6)
	if err := w.host.veth("broker1", nil, "eth1", w.broker.path(), theirs); err != nil {
		return err
	}
	if err := w.host.do(func() error { return enslave("broker1", "bridge") }); err != nil {
		return err
	}
	return w.broker.do(func() error { return defaultRoutes(host4, host6) })
}

// enslave makes a device a port of a bridge.
func enslave(name, bridge string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	master, err := netlink.LinkByName(bridge)
	if err != nil {
		return err
	}
	return netlink.LinkSetMaster(link, master)
}

func defaultRoutes(gateways ...netip.Addr) error {
	var errs []error
	for _, g := range gateways {
		everything := netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		if g.Is4() {
			everything = netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		}
		errs = append(errs, route(everything, g))
	}
	return errors.Join(errs...)
}

// pod is a namespace with a way to the broker.
type pod struct {
	*namespace
	outlet
}

func (w *world) newPod(t testing.TB, v vector) *pod {
	t.Helper()
	p := &pod{namespace: newNamespace(t)}
	var err error
	if v.from == onMacvlan {
		p.outlet, err = w.plugUplink(p.namespace)
	} else {
		p.outlet, err = w.plug(p.path(), v.from == inBridgedPod)
	}
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// makePods makes those of all vectors that have no world of their own. At once: the kernel takes up to a second until
// it uses the IPv6 addresses of a device that has come up, but the same second for all.
func (w *world) makePods(t testing.TB) {
	t.Helper()
	w.ready = map[string]*pod{}
	for _, v := range vectors() {
		if !v.own && v.from <= onMacvlan {
			w.ready[v.name] = w.newPod(t, v)
		}
	}
}

// outlet is what a namespace has to reach the broker by.
type outlet struct {
	Device                         string
	Own4, Own6, Gateway4, Gateway6 netip.Addr
}

// plugUplink gives a pod a device on that by which the host reaches the broker, beside the host's network.
func (w *world) plugUplink(n *namespace) (outlet, error) {
	o := outlet{Device: "eth0", Own4: netip.MustParseAddr("10.98.9.66"), Own6: netip.MustParseAddr("fd98:0:0:9::66"),
		Gateway4: broker4, Gateway6: broker6}
	there, err := os.Open(n.path())
	if err != nil {
		return o, err
	}
	defer func() { _ = there.Close() }()
	err = w.host.do(func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.ParentIndex, attrs.Namespace = o.Device, indexOf(hostOutlet.Device), netlink.NsFd(int(there.Fd()))
		return netlink.LinkAdd(&netlink.Macvlan{LinkAttrs: attrs, Mode: netlink.MACVLAN_MODE_BRIDGE})
	})
	if err != nil {
		return o, err
	}
	return o, n.do(func() error {
		return errors.Join(address(o.Device, []netip.Prefix{netip.PrefixFrom(o.Own4, 24), netip.PrefixFrom(o.Own6, 64)}),
			up(o.Device))
	})
}

// hostOutlet is that of the host itself: the brokers are neighbours.
var hostOutlet = outlet{Device: "broker", Own4: host4, Own6: host6, Gateway4: broker4, Gateway6: broker6}

// plug connects the namespace of path to the host by a pair of devices, eth0 there. On a bridge the host and the broker
// are neighbours.
func (w *world) plug(path string, bridged bool) (o outlet, err error) {
	n := w.pods
	w.pods++
	name := fmt.Sprintf("pod%d", n)
	o.Device = "eth0"
	var here, there []netip.Prefix
	if bridged {
		o.Own4, o.Own6 = netip.AddrFrom4([4]byte{10, 97, 0, byte(n)}), netip.MustParseAddr(fmt.Sprintf("fd97::%x", n))
		o.Gateway4, o.Gateway6 = bridgeHost4, bridgeHost6
	} else {
		o.Own4, o.Gateway4 = netip.AddrFrom4([4]byte{10, 98, byte(n), 2}), netip.AddrFrom4([4]byte{10, 98, byte(n), 1})
		o.Own6 = netip.MustParseAddr(fmt.Sprintf("fd98:0:0:%x::2", n))
		o.Gateway6 = netip.MustParseAddr(fmt.Sprintf("fd98:0:0:%x::1", n))
		here = []netip.Prefix{netip.PrefixFrom(o.Gateway4, 24), netip.PrefixFrom(o.Gateway6, 64)}
	}
	there = []netip.Prefix{netip.PrefixFrom(o.Own4, 24), netip.PrefixFrom(o.Own6, 64)}
	if err := w.host.veth(name, here, "eth0", path, there); err != nil {
		return o, err
	}
	if bridged {
		if err := w.host.do(func() error { return enslave(name, "bridge") }); err != nil {
			return o, err
		}
	}
	return o, inside(path, func() error { return defaultRoutes(o.Gateway4, o.Gateway6) })
}
