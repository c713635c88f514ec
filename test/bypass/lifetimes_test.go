package bypass

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// lifetimes: the node comes and goes; each has a world for itself.
var lifetimes = []vector{
	{name: "a connection older than the node", own: true, unguarded: true, cold: true, want: refused,
		before: isOlder, help: startsNode, attack: speaks},
	{name: "an IPv6 connection older than the node", own: true, unguarded: true, cold: true, want: refused,
		before: isOlder6, help: startsNode, attack: speaks},
	{name: "a connection older than the node, on the host", from: onHost, own: true, unguarded: true, cold: true,
		want: refused, before: isOlder, help: startsNode, attack: speaks},
	{name: "a connection whose SYN was under way when the node started", as: podRoot, own: true, unguarded: true,
		cold: true, want: refused, before: begins, meanwhile: started, attack: goesOn},
	{name: "a socket made before the node started", own: true, unguarded: true, cold: true, want: intercepted,
		before: makes, meanwhile: started, attack: connectsMade},
	{name: "a connect while the node is killed", own: true, want: refused, meanwhile: killed, attack: to(broker4)},
	{name: "a raw socket while the node is killed", as: podRoot, own: true, want: refused, meanwhile: killed,
		attack: by(rawTCP)},
	{name: "packet sockets while the node is killed", as: podRoot, own: true, want: refused, meanwhile: killed,
		attack: by(packetDgram)},
	{name: "a new namespace while the node is killed", as: root, own: true, want: refused, meanwhile: killed,
		attack: unshares},
	{name: "a connect just after the node was stopped (SIGSTOP)", own: true, want: refused, meanwhile: stopped,
		attack: to(broker4)},
	{name: "a connect when the node has been stopped for longer than its heartbeat", own: true, want: refused,
		meanwhile: stopped, attack: untilRefused},
	{name: "a connect after the node was killed and started again", own: true, want: intercepted, meanwhile: restarted,
		attack: persist(to(broker4))},
	{name: "a connection of before the node was killed, when it is started again", own: true, want: refused,
		before: opens, meanwhile: restarted, attack: speaks,
		uncontrolled: "without a node nothing ends the connection"},
	// More than one: on a slow host the first may come when half of it is back, and is refused.
	{name: "a connect when the node has put back what root of the host detached", own: true, want: intercepted,
		meanwhile: severed, attack: persist(to(broker4))},
	{name: "68,000 connects under way in one pod, and one in another", as: root, own: true, want: intercepted,
		attack: exhausts,
		help:   map[string]func(testing.TB, *scene, string) string{"other": otherPod}},
}

func started(t testing.TB, s *scene) {
	if s.guarded {
		s.guard(t, "")
	}
}

var startsNode = map[string]func(testing.TB, *scene, string) string{
	"start": func(t testing.TB, s *scene, _ string) string {
		started(t, s)
		return ""
	},
}

// isOlder connects, has the node started, and uses the connection until it is ended, which the node does by and by.
func isOlder(a *attacker) error {
	if err := opens(a); err != nil {
		return err
	}
	if _, err := a.ask("start"); err != nil {
		return err
	}
	for end := time.Now().Add(takeOverTime); a.speak(a.fd) == nil && time.Now().Before(end); {
		pause()
	}
	return nil
}

func isOlder6(a *attacker) error {
	a.to = at(broker6)
	return isOlder(a)
}

// takeOverTime is how long a connection older than the node may last.
const takeOverTime = 3 * time.Second

func stopped(t testing.TB, s *scene) {
	if s.node != nil {
		s.node.signal(t, syscall.SIGSTOP)
	}
}

// severed returns when the audit has that somebody severed the programs, which is within a second.
func severed(t testing.TB, s *scene) {
	if s.node == nil {
		return
	}
	var cgroup unix.Stat_t
	if err := unix.Stat(s.cgroup, &cgroup); err != nil {
		t.Fatal(err)
	}
	detachLinks(cgroup.Ino)
	for end := time.Now().Add(time.Second); !s.node.audit(t, func(l line) bool { return l.Reason == "tampered" }); {
		if time.Now().After(end) {
			t.Fatal("nothing was put back within a second")
		}
		pause()
	}
}

func restarted(t testing.TB, s *scene) {
	if s.node != nil {
		s.node.kill(t)
		s.node.start(t)
	}
}

// opens connects and speaks, with another marker.
func opens(a *attacker) (err error) {
	marker := a.Marker
	a.Marker = "before-" + marker
	defer func() { a.Marker = marker }()
	if a.fd, err = a.connected(a.to); err != nil {
		return err
	}
	return a.speak(a.fd)
}

func speaks(a *attacker) error { return a.speak(a.fd) }

func makes(a *attacker) (err error) {
	a.fd, err = socket(unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_TCP)
	return err
}

func connectsMade(a *attacker) (err error) {
	for range 200 {
		if err = connect(a.fd, a.to); err == nil {
			return a.speak(a.fd)
		}
		pause()
	}
	return err
}

// begins connects, with its SYN held back.
func begins(a *attacker) (err error) {
	drop := append(hasPort(destinationPort, brokerPort), &expr.Verdict{Kind: expr.VerdictDrop})
	err = rules(nftables.TableFamilyIPv4, nftables.Chain{Name: "output", Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookPostrouting, Priority: nftables.ChainPriorityFilter}, drop)
	if err != nil {
		return err
	}
	if a.fd, err = socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK, unix.IPPROTO_TCP); err != nil {
		return err
	}
	if err := connect(a.fd, a.to); !errors.Is(err, unix.EINPROGRESS) {
		return err
	}
	return nil
}

// goesOn lets the SYN go: the kernel sends it again after a second, then after two, then four.
func goesOn(a *attacker) error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	c.FlushRuleset()
	if err := c.Flush(); err != nil {
		return err
	}
	const again = 8 * time.Second
	if err := awaitConnected(a.fd, again); err != nil {
		return err
	}
	if err := unix.SetNonblock(a.fd, false); err != nil {
		return err
	}
	return a.speak(a.fd)
}

// untilRefused connects until the kernel refuses by itself.
func untilRefused(a *attacker) error {
	var err error
	for end := time.Now().Add(2 * patience / 3); time.Now().Before(end); pause() {
		if err = a.plain(a.to); err == nil || errors.Is(err, unix.ECONNREFUSED) {
			return err
		}
	}
	return fmt.Errorf("never refused: %w", err)
}

// Of one address and process there are not as many ports and descriptors as it takes.
const (
	holders     = 4
	connectsFor = 17_000
)

// exhausts keeps so many connects of its pod's under way that the kernel would have to remember more than it has room
// for, and connects in another pod.
func exhausts(a *attacker) error {
	drop := append(isTCP(), &expr.Verdict{Kind: expr.VerdictDrop})
	err := rules(nftables.TableFamilyIPv4, nftables.Chain{Name: "input", Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookInput, Priority: nftables.ChainPriorityFilter}, drop)
	if err != nil {
		return err
	}
	for range holders {
		if err := a.startHolder(); err != nil {
			return err
		}
	}
	return a.enters("other")
}

// startHolder returns when all connects of a process are under way. It is of the attacker's process group, and ends
// with it.
func (a *attacker) startHolder() error {
	done, theirs, err := os.Pipe()
	if err != nil {
		return err
	}
	if _, err := a.startSecond("keep connecting", theirs); err != nil {
		return err
	}
	if err := theirs.Close(); err != nil {
		return err
	}
	if text, err := io.ReadAll(done); err != nil || string(text) != "done" {
		return fmt.Errorf("a process that keeps connecting ends: %w", errors.Join(errors.New(string(text)), err))
	}
	return nil
}

// keepsConnecting leaves connects under way until it is killed.
func keepsConnecting(a *attacker) error {
	pid := os.Getpid()
	from := netip.AddrFrom4([4]byte{127, 1 + byte(pid>>16), byte(pid >> 8), byte(pid)})
	for i := range connectsFor {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		err = errors.Join(unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1),
			unix.Bind(fd, sockaddr(netip.AddrPortFrom(from, 0))))
		if err != nil {
			return err
		}
		err = connect(fd, a.to)
		if errors.Is(err, unix.EINVAL) {
			break // without a node nothing leads from loopback to the broker
		}
		if !errors.Is(err, unix.EINPROGRESS) {
			return fmt.Errorf("connect %d: %w", i, err)
		}
	}
	if _, err := unix.Write(secondFD, []byte("done")); err != nil {
		return err
	}
	if err := unix.Close(secondFD); err != nil {
		return err
	}
	_, err := unix.Poll(nil, -1)
	return err
}
