package bypass

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strconv"

	"golang.org/x/sys/unix"
)

// sockets: what a socket can be, and how it can connect.
var sockets = []vector{
	{name: "a socket bound to the pod's address", want: intercepted, attack: connects(bindTo(0))},
	{name: "a socket bound to a port", want: intercepted, attack: connects(bindTo(45678))},
	{name: "SO_BINDTODEVICE", as: netRaw, want: intercepted, attack: connects(bindToDevice)},
	{name: "SO_BINDTODEVICE over IPv6", as: netRaw, want: intercepted, attack: connects6(bindToDevice)},
	{name: "IP_FREEBIND, with an address that comes later", as: podRoot, want: intercepted,
		attack: connects(bindAhead(unix.IPPROTO_IP, unix.IP_FREEBIND))},
	{name: "IP_TRANSPARENT, with an address that comes later", as: podRoot, want: intercepted,
		attack: connects(bindAhead(unix.IPPROTO_IP, unix.IP_TRANSPARENT))},
	{name: "SO_MARK of a proxy (0x539)", as: podRoot, want: intercepted,
		attack: connects(option(unix.SOL_SOCKET, unix.SO_MARK, 0x539))},
	{name: "a socket of protocol 0", want: intercepted, attack: unnamed},
	{name: "a non-blocking connect", want: intercepted, attack: nonBlocking},
	{name: "MPTCP over IPv4", want: intercepted, attack: mptcp(unix.AF_INET, broker4)},
	{name: "MPTCP over IPv6", want: intercepted, attack: mptcp(unix.AF_INET6, broker6)},
	{name: "MPTCP to an IPv4-mapped destination", want: intercepted,
		attack: audits(broker4, mptcp(unix.AF_INET6, mapped(broker4)))},
	{name: "SMC over IPv4", want: intercepted, attack: smc},
	{name: "TCP Fast Open by MSG_FASTOPEN", want: intercepted, attack: fastOpen(broker4)},
	{name: "TCP Fast Open by MSG_FASTOPEN over IPv6", want: intercepted, attack: fastOpen(broker6)},
	{name: "TCP Fast Open by TCP_FASTOPEN_CONNECT", want: intercepted,
		attack: connects(option(unix.IPPROTO_TCP, unix.TCP_FASTOPEN_CONNECT, 1))},
	{name: "TCP Fast Open without a cookie, to a listener that takes it", as: podRoot, want: intercepted,
		attack: eagerFastOpen},
	{name: "connect again after AF_UNSPEC, to another broker", want: intercepted, attack: again(true)},
	{name: "connect to a broker after AF_UNSPEC and another service", want: intercepted, attack: again(false)},
	{name: "TCP_REPAIR: established without a handshake", as: podRoot, want: refused, attack: repaired},
	{name: "a loose source route over the host", as: netRaw, want: refused, attack: connects(sourceRoute)},
	{name: "IPv6 destination options", as: netRaw, want: intercepted, attack: connects6(destinationOptions)},
	{name: "a thread with a name of its own", want: intercepted, attack: renamed},
	{name: "option memory so small that no record fits", as: podRoot, want: refused, attack: tinyOptionMemory},
	{name: "no file descriptor left for the node's answer", want: intercepted, attack: fewDescriptors},
}

// connects is a connect to the broker by a prepared socket.
func connects(prepare func(a *attacker, fd int) error) func(*attacker) error {
	return func(a *attacker) error {
		return a.with(unix.AF_INET, func(fd int) error { return prepare(a, fd) })
	}
}

func connects6(prepare func(a *attacker, fd int) error) func(*attacker) error {
	return func(a *attacker) error {
		a.to = at(broker6)
		return a.with(unix.AF_INET6, func(fd int) error { return prepare(a, fd) })
	}
}

func option(level, name, value int) func(*attacker, int) error {
	return func(_ *attacker, fd int) error { return unix.SetsockoptInt(fd, level, name, value) }
}

func bindTo(port uint16) func(*attacker, int) error {
	return func(a *attacker, fd int) error { return unix.Bind(fd, sockaddr(netip.AddrPortFrom(a.Own4, port))) }
}

func bindToDevice(_ *attacker, fd int) error { return unix.BindToDevice(fd, "eth0") }

// bindAhead binds to an address that the pod is given only then.
func bindAhead(level, name int) func(*attacker, int) error {
	return func(a *attacker, fd int) error {
		if err := unix.SetsockoptInt(fd, level, name, 1); err != nil {
			return err
		}
		own := beside(a.Own4)
		if err := unix.Bind(fd, sockaddr(netip.AddrPortFrom(own, 0))); err != nil {
			return err
		}
		return address("eth0", []netip.Prefix{netip.PrefixFrom(own, 24)})
	}
}

// beside is another address in the pod's network.
func beside(own netip.Addr) netip.Addr {
	a := own.As4()
	a[3] = 77
	return netip.AddrFrom4(a)
}

func nonBlocking(a *attacker) error {
	fd, err := socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK, unix.IPPROTO_TCP)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	if err := connect(fd, a.to); err != nil && !errors.Is(err, unix.EINPROGRESS) {
		return err
	}
	if err := awaitConnected(fd, connectTime); err != nil {
		return err
	}
	if err := unix.SetNonblock(fd, false); err != nil {
		return err
	}
	return a.speak(fd)
}

// unnamed leaves the protocol to the kernel.
func unnamed(a *attacker) error {
	fd, err := socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	if err := connect(fd, a.to); err != nil {
		return err
	}
	return a.speak(fd)
}

func mptcp(family int, to netip.Addr) func(*attacker) error {
	return func(a *attacker) error {
		fd, err := socket(family, unix.SOCK_STREAM, unix.IPPROTO_MPTCP)
		if err != nil {
			return err
		}
		defer func() { _ = unix.Close(fd) }()
		a.to = at(to)
		if err := connect(fd, a.to); err != nil {
			return err
		}
		return a.speak(fd)
	}
}

func smc(a *attacker) error {
	const smcTCP = 0 // SMCPROTO_SMC: over IPv4
	fd, err := socket(unix.AF_SMC, unix.SOCK_STREAM, smcTCP)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	if err := connect(fd, a.to); err != nil {
		return err
	}
	return a.speak(fd)
}

func fastOpen(to netip.Addr) func(*attacker) error {
	return func(a *attacker) error {
		a.to = at(to)
		fd, err := socket(familyOf(a.to), unix.SOCK_STREAM, unix.IPPROTO_TCP)
		if err != nil {
			return err
		}
		defer func() { _ = unix.Close(fd) }()
		if err := unix.Sendto(fd, a.frame(), unix.MSG_FASTOPEN, sockaddr(a.to)); err != nil {
			return unsupported(os.NewSyscallError("sendto MSG_FASTOPEN", err))
		}
		return hear(fd)
	}
}

// eagerFastOpen has all listeners of the pod take Fast Open, and none ask for a cookie: data comes with the SYN.
func eagerFastOpen(a *attacker) error {
	if err := sysctl("net/ipv4/tcp_fastopen", strconv.Itoa(0x1|0x2|0x4|0x200|0x400)); err != nil {
		return err
	}
	return fastOpen(broker4)(a)
}

// again connects a socket a second time: first to a broker or to a service of the attacker's own.
func again(firstToBroker bool) func(*attacker) error {
	return func(a *attacker) error {
		first := at(broker4)
		if !firstToBroker {
			l, err := net.Listen("tcp4", "127.0.0.1:0")
			if err != nil {
				return err
			}
			defer func() { _ = l.Close() }()
			first = netip.MustParseAddrPort(l.Addr().String())
		}
		fd, err := a.connected(first)
		if err != nil {
			return err
		}
		defer func() { _ = unix.Close(fd) }()
		if err := disconnect(fd); err != nil {
			return err
		}
		a.to = at(alias4)
		if err := connect(fd, a.to); err != nil {
			return err
		}
		return a.speak(fd)
	}
}

// disconnect is connect(AF_UNSPEC).
func disconnect(fd int) error {
	var unspecified [16]byte
	return rawConnect(fd, unspecified[:])
}

// repaired is a socket that takes itself for connected, as a restored process has it, and sends. The broker does not
// know it, but got its bytes.
func repaired(a *attacker) error {
	fd, err := socket(unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_TCP)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_REPAIR, 1); err != nil {
		return unsupported(err)
	}
	if err := unix.Bind(fd, sockaddr(netip.AddrPortFrom(a.Own4, 45000))); err != nil {
		return err
	}
	if err := connect(fd, a.to); err != nil {
		return err
	}
	// Without a window of the other side's nothing is sent: struct tcp_repair_window.
	window := binary.NativeEndian.AppendUint32(nil, 0)
	for _, v := range []uint32{1 << 15, 1 << 15, 1 << 15, 0} {
		window = binary.NativeEndian.AppendUint32(window, v)
	}
	if err := unix.SetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_REPAIR_WINDOW, string(window)); err != nil {
		return os.NewSyscallError("TCP_REPAIR_WINDOW", err)
	}
	const offWithoutProbe = -1 // TCP_REPAIR_OFF_NO_WP: or the answer to the probe would end it
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_REPAIR, offWithoutProbe); err != nil {
		return err
	}
	return a.speak(fd)
}

// sourceRoute has packets go over the pod's gateway, which is their destination until there (RFC 791).
func sourceRoute(a *attacker, fd int) error {
	const loose, header, pointer = 131, 3, 4
	gateway := a.Gateway4.As4()
	options := append([]byte{loose, header + 4, pointer}, gateway[:]...)
	return unix.SetsockoptString(fd, unix.IPPROTO_IP, unix.IP_OPTIONS, string(append(options, 0)))
}

// destinationOptions puts a header between those of IPv6 and TCP.
func destinationOptions(_ *attacker, fd int) error {
	padding := []byte{0, 0, 1, 4, 0, 0, 0, 0} // next header, length, PadN
	return unix.SetsockoptString(fd, unix.IPPROTO_IPV6, unix.IPV6_DSTOPTS, string(padding))
}

func renamed(a *attacker) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		done <- errors.Join(os.WriteFile("/proc/thread-self/comm", []byte("klamm"), 0), a.plain(a.to))
	}()
	return <-done
}

// tinyOptionMemory leaves the sockets of the pod no memory for what the node keeps at them.
func tinyOptionMemory(a *attacker) error {
	err := sysctl("net/core/optmem_max", "64")
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%w: net.core.optmem_max of a network namespace", errUnsupported)
	}
	if err != nil {
		return err
	}
	return a.plain(a.to)
}

func fewDescriptors(a *attacker) error {
	fd, err := socket(unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_TCP)
	if err != nil {
		return err
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 1, Max: 1}); err != nil {
		return err
	}
	if err := connect(fd, a.to); err != nil {
		return fmt.Errorf("with no descriptor left: %w", err)
	}
	return a.speak(fd)
}
