package bypass

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

// to is the plain connect to an address.
func to(a netip.Addr) func(*attacker) error {
	return func(at *attacker) error {
		at.to = netip.AddrPortFrom(a, brokerPort)
		return at.plain(at.to)
	}
}

// audits sets the destination that the audit has: IPv4 in whatever form is IPv4.
func audits(as netip.Addr, attack func(*attacker) error) func(*attacker) error {
	return func(a *attacker) error {
		err := attack(a)
		a.to = at(as)
		return err
	}
}

var (
	loopback4 = netip.MustParseAddr("127.0.0.1")
	loopback6 = netip.IPv6Loopback()
)

// addresses: the names a destination has.
var addresses = []vector{
	{name: "a plain connect over IPv4", want: intercepted, attack: to(broker4)},
	{name: "a plain connect over IPv6", want: intercepted, attack: to(broker6)},
	{name: "the first connect of a namespace", cold: true, want: intercepted, attack: persist(to(broker4))},
	{name: "a plain connect on the host over IPv4", from: onHost, want: intercepted, attack: to(broker4)},
	{name: "a plain connect on the host over IPv6", from: onHost, want: intercepted, attack: to(broker6)},
	{name: "a plain connect behind a bridge", from: inBridgedPod, want: intercepted, attack: to(broker4)},
	{name: "a broker on the same bridge over IPv4", from: inBridgedPod, want: intercepted, attack: to(bridged4)},
	{name: "a broker on the same bridge over IPv6", from: inBridgedPod, want: intercepted, attack: to(bridged6)},
	{name: "an IPv4-mapped destination", want: intercepted, attack: audits(broker4, to(mapped(broker4)))},
	{name: "an IPv6 socket that is IPV6_V6ONLY", want: intercepted, attack: onlyIPv6},
	{name: "another address of the broker, in its cluster's network", want: intercepted, attack: to(alias4)},
	{name: "an address of no cluster", want: refused, attack: to(stranger4)},
	{name: "the broker's NAT64 address", want: intercepted, attack: audits(broker4, to(nat64))},
	{name: "127.0.0.1, with a broker in the pod", stage: ownBroker, want: intercepted, attack: to(loopback4)},
	{name: "::1, with a broker in the pod", stage: ownBroker, want: intercepted, attack: to(loopback6)},
	{name: "127.0.0.2, with a broker in the pod", stage: ownBroker, want: intercepted,
		attack: to(netip.MustParseAddr("127.0.0.2"))},
	{name: "::ffff:127.0.0.1, with a broker in the pod", stage: ownBroker, want: intercepted,
		attack: audits(loopback4, to(mapped(loopback4)))},
	{name: "0.0.0.0, with a broker in the pod", stage: ownBroker, want: intercepted,
		attack: audits(loopback4, to(netip.IPv4Unspecified()))},
	{name: "::, with a broker in the pod", stage: ownBroker, want: intercepted,
		attack: audits(loopback6, to(netip.IPv6Unspecified()))},
	{name: "::ffff:0.0.0.0, with a broker in the pod", stage: ownBroker, want: intercepted,
		attack: audits(loopback4, to(mapped(netip.IPv4Unspecified())))},
	{name: "the pod's own address, with a broker in the pod", stage: ownBroker, want: refused, attack: ownAddress},
	{name: "the broker's link-local address", from: inBridgedPod, want: refused, attack: scoped},
}

// persist tries until it is answered, as clients do.
func persist(attack func(*attacker) error) func(*attacker) error {
	return func(a *attacker) (err error) {
		for range 200 {
			if err = attack(a); err == nil || !errors.Is(err, unix.ECONNREFUSED) {
				return err
			}
			pause()
		}
		return fmt.Errorf("200 times: %w", err)
	}
}

func onlyIPv6(a *attacker) error {
	a.to = at(broker6)
	return a.with(unix.AF_INET6, func(fd int) error {
		return unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1)
	})
}

// with makes a socket, prepares it, connects and speaks.
func (a *attacker) with(family int, prepare func(fd int) error) error {
	fd, err := socket(family, unix.SOCK_STREAM, unix.IPPROTO_TCP)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	if err := prepare(fd); err != nil {
		return fmt.Errorf("prepare the socket: %w", unsupported(err))
	}
	if err := connect(fd, a.to); err != nil {
		return err
	}
	return a.speak(fd)
}

func ownAddress(a *attacker) error {
	a.to = at(a.Own4)
	return a.plain(a.to)
}

func scoped(a *attacker) error {
	fd, err := socket(unix.AF_INET6, unix.SOCK_STREAM, unix.IPPROTO_TCP)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	device, err := net.InterfaceByName("eth0")
	if err != nil {
		return err
	}
	to := &unix.SockaddrInet6{Port: brokerPort, Addr: linkLocal6.As16(), ZoneId: uint32(device.Index)}
	if err := unix.Connect(fd, to); err != nil {
		return err
	}
	return a.speak(fd)
}

// ownBroker is a broker within the pod, at all its addresses.
func ownBroker(t testing.TB, s *scene) {
	l, err := s.pod.listen("tcp", at(netip.IPv6Unspecified()).String())
	if err != nil {
		t.Fatal(err)
	}
	serveKafka(t, l)
	s.heard = append(s.heard, listening{wire: tap(t, s.pod), from: s.pod, to: loopback4})
}
