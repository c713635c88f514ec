package bypass

import (
	"bufio"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// listeners: the node's own, in the pod.
var listeners = []vector{
	{name: "a direct connect to the node's listener", want: refused, uncontrolled: noListener, attack: direct(loopback4)},
	{name: "a direct connect to the node's listener over IPv6", want: refused, uncontrolled: noListener,
		attack: direct(loopback6)},
	{name: "a direct connect to the node's listener by 0.0.0.0", want: refused, uncontrolled: noListener,
		attack: direct(netip.IPv4Unspecified())},
	{name: "a direct connect to the node's listener by ::ffff:127.0.0.1", want: refused, uncontrolled: noListener,
		attack: direct(mapped(loopback4))},
	{name: "a direct connect to the node's listener by Fast Open", want: refused, uncontrolled: noListener,
		attack: directFastOpen},
	{name: "a direct connect to the node's listener by MPTCP", want: refused, uncontrolled: noListener,
		attack: directMPTCP},
	{name: "a direct connect to the node's listener behind DNAT", as: podRoot, want: refused, uncontrolled: noListener,
		attack: directDNAT},
	{name: "packets made by hand to the node's listener", as: podRoot, want: refused, uncontrolled: noListener,
		attack: directPackets},
	{name: "binding the listener's port", want: intercepted, attack: squat(nothing)},
	{name: "binding the listener's port with SO_REUSEADDR", want: intercepted, attack: squat(unix.SO_REUSEADDR)},
	{name: "binding the listener's port with SO_REUSEPORT", as: root, want: intercepted, attack: squat(unix.SO_REUSEPORT)},
	{name: "binding the listener's port while the node is down", as: root, own: true, want: refused,
		meanwhile: killed, attack: squat(unix.SO_REUSEPORT)},
}

const (
	noListener = "there is no listener without the node"
	nothing    = 0
)

// listenerPort is where the node listens, as everybody in the pod can see; 0 without a node.
func listenerPort() (uint16, error) {
	file, err := os.Open("/proc/thread-self/net/tcp")
	if err != nil {
		return 0, err
	}
	defer func() { _ = file.Close() }()
	for lines := bufio.NewScanner(file); lines.Scan(); {
		const listening = "0A"
		f := strings.Fields(lines.Text())
		if digits, is := strings.CutPrefix(f[1], "0100007F:"); is && f[3] == listening {
			var p uint16
			_, err := fmt.Sscanf(digits, "%X", &p)
			return p, err
		}
	}
	return 0, nil
}

// listener is where the node listens, at one of its addresses or names.
func listener(address netip.Addr) (netip.AddrPort, error) {
	p, err := listenerPort()
	if err == nil && p == 0 {
		err = errors.New("nobody listens")
	}
	return netip.AddrPortFrom(address, p), err
}

func direct(address netip.Addr) func(*attacker) error {
	return func(a *attacker) error {
		to, err := listener(address)
		if err != nil {
			return err
		}
		return a.plain(to)
	}
}

func directFastOpen(a *attacker) error {
	to, err := listener(loopback4)
	if err != nil {
		return err
	}
	fd, err := socket(unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_TCP)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	if err := unix.Sendto(fd, a.frame(), unix.MSG_FASTOPEN, sockaddr(to)); err != nil {
		return err
	}
	return hear(fd)
}

func directMPTCP(a *attacker) error {
	to, err := listener(loopback4)
	if err != nil {
		return err
	}
	fd, err := socket(unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_MPTCP)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	if err := connect(fd, to); err != nil {
		return err
	}
	return a.speak(fd)
}

// directDNAT connects to another port of loopback, which becomes that of the listener behind the hook.
func directDNAT(a *attacker) error {
	to, err := listener(loopback4)
	if err != nil {
		return err
	}
	if err := redirectPort(otherPort, to.Port()); err != nil {
		return err
	}
	return a.plain(netip.AddrPortFrom(loopback4, otherPort))
}

// directPackets speaks TCP with the listener over lo, without a socket that could have a record.
func directPackets(a *attacker) error {
	to, err := listener(loopback4)
	if err != nil {
		return err
	}
	// What did not come from the kernel itself is a martian, unless this is set.
	err = errors.Join(sysctl("net/ipv4/conf/all/route_localnet", "1"), sysctl("net/ipv4/conf/lo/route_localnet", "1"),
		sysctl("net/ipv4/conf/all/accept_local", "1"))
	if err != nil {
		return err
	}
	return a.handmade(onLoopback, loopback4, to)
}

func onLoopback(*attacker) (func([]byte) error, error) {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM, 0)
	return func(p []byte) error {
		return unix.Sendto(fd, p, 0, &unix.SockaddrLinklayer{Protocol: network16(unix.ETH_P_IP), Ifindex: indexOf("lo"),
			Halen: 6})
	}, err
}

// squat listens where the node does, and connects as others do: who is accepted is lost to the attacker.
func squat(sockopt int) func(*attacker) error {
	return func(a *attacker) error {
		p, err := listenerPort()
		if err != nil {
			return err
		}
		if p == 0 {
			p = a.Listener // the node is gone, or was never there
		}
		fd, err := socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK, unix.IPPROTO_TCP)
		if err != nil {
			return err
		}
		defer func() { _ = unix.Close(fd) }()
		if sockopt != nothing {
			if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, sockopt, 1); err != nil {
				return err
			}
		}
		squatted := unix.Bind(fd, sockaddr(netip.AddrPortFrom(loopback4, p)))
		if squatted == nil {
			squatted = unix.Listen(fd, 16)
		}
		err = a.plain(a.to)
		if squatted != nil {
			return errors.Join(err, fmt.Errorf("listen at the node's port: %w", squatted))
		}
		if accepted, _, aerr := unix.Accept(fd); aerr == nil {
			b := make([]byte, 256)
			n, _ := unix.Read(accepted, b)
			a.got = b[:max(n, 0)]
		}
		return err
	}
}

func killed(t testing.TB, s *scene) {
	if s.node != nil {
		s.node.kill(t)
	}
}
