package bypass

import (
	"errors"
	"fmt"
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

// goesOn lets the SYN go: the kernel sends it again after a second, then after two.
func goesOn(a *attacker) error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	c.FlushRuleset()
	if err := c.Flush(); err != nil {
		return err
	}
	const again = 4000
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(a.fd), Events: unix.POLLOUT}}, again)
	if n == 0 || err != nil {
		return errors.Join(errors.New("not connected"), err)
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
