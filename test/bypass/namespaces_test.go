package bypass

import (
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// namespaces: network namespaces that come, change and hide.
var namespaces = []vector{
	{name: "a new namespace, and connect at once", as: root, want: intercepted, attack: unshares},
	{name: "setns into the namespace of another pod", as: root, want: intercepted, attack: entersOther,
		help: map[string]func(testing.TB, *scene, string) string{"other": otherPod}},
	{name: "setns into the host's namespace", as: root, want: intercepted, attack: entersHost,
		help: map[string]func(testing.TB, *scene, string) string{"host": theHost}},
	{name: "a namespace that only a descriptor kept", as: root, want: intercepted, attack: entersKept},
	{name: "a user namespace in the pod's network", want: intercepted, attack: inUsers},
	{name: "a user namespace with a network of its own", from: inUserNamespace, want: intercepted, attack: to(broker4)},
	{name: "the first connect in a user namespace's network", from: inUserNamespace, cold: true, want: intercepted,
		attack: persist(to(broker4))},
	{name: "a namespace whose loopback device is down", as: podRoot, want: refused, attack: withoutLoopback},
	{name: "a namespace without a loopback address", as: podRoot, want: refused, attack: withoutLoopbackAddress},
	{name: "a namespace that routes loopback elsewhere", as: podRoot, want: refused, attack: routesLoopback},
}

func unshares(a *attacker) error {
	return a.inNew(func() error { return persist(to(broker4))(a) })
}

// inNew runs f on a thread in a network namespace of its own that has a way to the broker.
func (a *attacker) inNew(f func() error) error {
	return onOwnThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		answer, err := a.ask("plug " + netnsOf(unix.Gettid()))
		if err != nil {
			return err
		}
		if err := errors.Join(json.Unmarshal([]byte(answer), &a.outlet), up("lo")); err != nil {
			return err
		}
		return f()
	})
}

func onOwnThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		done <- f()
	}()
	return <-done
}

func otherPod(t testing.TB, s *scene, _ string) string {
	other := newNamespace(t)
	if _, err := s.plug(other.path(), false); err != nil {
		t.Fatal(err)
	}
	s.wire.fence(t, other.do, broker4)
	return other.path()
}

func theHost(_ testing.TB, s *scene, _ string) string { return s.host.path() }

func entersOther(a *attacker) error { return a.enters("other") }

func entersHost(a *attacker) error { return a.enters("host") }

func (a *attacker) enters(whose string) error {
	path, err := a.ask(whose)
	if err != nil {
		return err
	}
	return inside(path, func() error { return persist(to(broker4))(a) })
}

// entersKept leaves a namespace that was enrolled, so that no thread is in it, and comes back.
func entersKept(a *attacker) error {
	var kept *os.File
	err := a.inNew(func() (err error) {
		if err = a.warm(); err != nil {
			return err
		}
		kept, err = os.Open(netnsOf(unix.Gettid()))
		return err
	})
	if err != nil {
		return err
	}
	defer func() { _ = kept.Close() }()
	return onOwnThread(func() error {
		if err := unix.Setns(int(kept.Fd()), unix.CLONE_NEWNET); err != nil {
			return err
		}
		return persist(to(broker4))(a)
	})
}

// inUsers has all capabilities over a user namespace, and none over the network.
func inUsers(a *attacker) error {
	cmd := startableSecond("connect to the broker and speak")
	cmd.SysProcAttr = userNamespace(0)
	if err := cmd.Start(); err != nil {
		return err
	}
	a.pid = cmd.Process.Pid
	return cmd.Wait()
}

func withoutLoopback(a *attacker) error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetDown(lo); err != nil {
		return err
	}
	return a.plain(a.to)
}

func withoutLoopbackAddress(a *attacker) error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := netlink.AddrDel(lo, &netlink.Addr{IPNet: prefix(netip.PrefixFrom(loopback4, 8))}); err != nil {
		return err
	}
	return a.plain(a.to)
}

// routesLoopback sends what goes to loopback to the host.
func routesLoopback(a *attacker) error {
	if err := withoutLoopback(a); err == nil {
		return nil // without a node
	}
	if err := route(netip.MustParsePrefix("127.0.0.0/8"), a.Gateway4); err != nil {
		return err
	}
	return a.plain(a.to)
}

// userNamespace makes the workloads' user root of a user namespace, and of those of the flags.
func userNamespace(flags uintptr) *syscall.SysProcAttr {
	id := []syscall.SysProcIDMap{{HostID: workloadUID, Size: 1}}
	return &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER | flags, UidMappings: id, GidMappings: id}
}

// startableSecond is a second process of an attacker, in a role, that is not started yet.
func startableSecond(role string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), secondVariable+"="+role)
	cmd.Stderr = os.Stderr
	return cmd
}
