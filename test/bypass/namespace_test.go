package bypass

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// namespace is a network namespace with a thread of ours in it. It ends when that thread, all processes in it and all
// its sockets have.
type namespace struct {
	calls chan func()
	tid   int
}

// newNamespace makes one, with lo up, that lasts as long as the test.
func newNamespace(t testing.TB) *namespace {
	t.Helper()
	n := &namespace{calls: make(chan func())}
	made := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		n.tid = unix.Gettid()
		made <- unix.Unshare(unix.CLONE_NEWNET)
		for call := range n.calls {
			call()
		}
	}()
	if err := <-made; err != nil {
		close(n.calls)
		t.Fatalf("make a network namespace (run as root): %v", err)
	}
	t.Cleanup(func() { close(n.calls) })
	if err := n.do(func() error { return up("lo") }); err != nil {
		t.Fatal(err)
	}
	// Before there is a device.
	for _, where := range []string{"all", "default"} {
		// Addresses are to be of use at once, not when no neighbour has claimed them.
		n.sysctl(t, "net/ipv6/conf/"+where+"/accept_dad", "0")
		// As careless hosts have it: the suite is not to pass for what a careful one refuses anyway.
		n.sysctl(t, "net/ipv4/conf/"+where+"/accept_source_route", "1")
		n.sysctl(t, "net/ipv4/conf/"+where+"/rp_filter", "0")
	}
	return n
}

// do runs f on the thread in the namespace.
func (n *namespace) do(f func() error) error {
	done := make(chan error, 1)
	n.calls <- func() { done <- f() }
	return <-done
}

// path opens the namespace for others.
func (n *namespace) path() string { return netnsOf(n.tid) }

// netnsOf is the network namespace of a thread, or that of a process by its first thread.
func netnsOf(tid int) string { return fmt.Sprintf("/proc/%d/ns/net", tid) }

// sysctl sets a file below /proc/sys: of net, that of the namespace.
func (n *namespace) sysctl(t testing.TB, name, value string) {
	t.Helper()
	if err := n.do(func() error { return sysctl(name, value) }); err != nil {
		t.Fatal(err)
	}
}

func sysctl(name, value string) error { return os.WriteFile("/proc/sys/"+name, []byte(value), 0) }

// start starts a process in the namespace. The thread is there as long as the namespace is, so that the parent death
// signal comes when this process ends and not before.
func (n *namespace) start(cmd *exec.Cmd) error { return n.do(cmd.Start) }

// listen listens in the namespace; accepted connections are of the namespace whoever accepts them.
func (n *namespace) listen(network, address string) (l net.Listener, err error) {
	err = n.do(func() (err error) {
		l, err = net.Listen(network, address)
		return err
	})
	return l, err
}

// veth makes a pair of devices, one end here, the other in the namespace of path or file, both up and with addresses.
func (n *namespace) veth(name string, here []netip.Prefix, peer string, path string, there []netip.Prefix) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { _ = file.Close() }()
	err = n.do(func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = name
		pair := &netlink.Veth{LinkAttrs: attrs, PeerName: peer, PeerNamespace: netlink.NsFd(int(file.Fd()))}
		if err := netlink.LinkAdd(pair); err != nil {
			return fmt.Errorf("make the devices %s and %s: %w", name, peer, err)
		}
		return errors.Join(address(name, here), up(name))
	})
	if err != nil {
		return err
	}
	return inside(path, func() error { return errors.Join(address(peer, there), up(peer)) })
}

// inside runs f on a thread of its own in the namespace of path.
func inside(path string, f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		done <- func() error {
			fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer func() { _ = unix.Close(fd) }()
			if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("enter %s: %w", path, err)
			}
			return f()
		}()
	}()
	return <-done
}

// What follows acts on the namespace of the calling thread.

func up(name string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find the device %s: %w", name, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("set the device %s up: %w", name, err)
	}
	return nil
}

func address(name string, addresses []netip.Prefix) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find the device %s: %w", name, err)
	}
	for _, a := range addresses {
		to := &netlink.Addr{IPNet: prefix(a), Flags: unix.IFA_F_NODAD}
		if err := netlink.AddrAdd(link, to); err != nil {
			return fmt.Errorf("give the device %s the address %v: %w", name, a, err)
		}
	}
	return nil
}

// route sends what goes to a network over a gateway.
func route(to netip.Prefix, gateway netip.Addr) error {
	if err := netlink.RouteAdd(&netlink.Route{Dst: prefix(to), Gw: gateway.AsSlice()}); err != nil {
		return fmt.Errorf("route %v over %v: %w", to, gateway, err)
	}
	return nil
}

func prefix(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
