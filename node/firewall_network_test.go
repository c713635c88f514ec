package node

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The ports in these tests. Containers disguise what goes to brokerPort as disguisePort, or as servicePort at
// serviceAddress; hiddenPort is a broker's too, but nobody knows.
const (
	segmentPort  = 9093 // a broker's too
	networkPort4 = 9094 // a broker's at its own addresses only
	foreignPort  = 80
	disguisePort = 8080
	servicePort  = 19092
	hiddenPort   = 19093
	firewallName = "klamm-test"
)

var (
	serviceAddress = netip.MustParseAddr("10.66.9.9")
	hostAddress    = netip.MustParseAddr("10.66.1.1")
)

// inside calls f in a network namespace.
func inside(t testing.TB, n *netns, f func() error) {
	t.Helper()
	if err := n.do(f); err != nil {
		t.Fatal(err)
	}
}

// network is a host with one container and a broker's machine behind it.
type network struct {
	host, pod, broker *netns
	bridge            string           // of the host; "" when it routes
	pod4, pod6        netip.Addr       // the container's
	broker4, broker6  netip.Addr       // the broker's
	podMAC, nextMAC   net.HardwareAddr // of the container's device, and where it sends to
	answers           atomic.Int64     // signs of packets that came to a broker
}

func setSysctl(name, value string) error {
	return os.WriteFile("/proc/sys/net/"+name, []byte(value), 0o600)
}

// addVeth makes a veth of the host with the other end in another namespace.
func addVeth(t testing.TB, host, other *netns, name, peer string) {
	t.Helper()
	inside(t, host, func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = name
		err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: peer,
			PeerNamespace: netlink.NsFd(int(other.file.Fd()))})
		if err != nil {
			return err
		}
		return up(name)
	})
}

// up brings a device up, with addresses.
func up(name string, addresses ...string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	for _, a := range addresses {
		addr, err := netlink.ParseAddr(a)
		if err != nil {
			return err
		}
		addr.Flags = unix.IFA_F_NODAD
		if err := netlink.AddrAdd(l, addr); err != nil {
			return fmt.Errorf("%s on %s: %w", a, name, err)
		}
	}
	return netlink.LinkSetUp(l)
}

// defaultRoutes leads all else to the gateways.
func defaultRoutes(gateways ...string) error {
	for _, g := range gateways {
		if err := netlink.RouteAdd(&netlink.Route{Gw: net.ParseIP(g)}); err != nil {
			return fmt.Errorf("default route by %s: %w", g, err)
		}
	}
	return nil
}

func macOf(t testing.TB, n *netns, name string) (mac net.HardwareAddr) {
	t.Helper()
	inside(t, n, func() error {
		l, err := netlink.LinkByName(name)
		if err == nil {
			mac = l.Attrs().HardwareAddr
		}
		return err
	})
	return mac
}

// routed: container -- host -- broker's machine, which is the host's default gateway.
func routed(t testing.TB) *network {
	n := &network{host: newTestNetns(t), pod: newTestNetns(t), broker: newTestNetns(t),
		pod4: netip.MustParseAddr("10.66.1.2"), pod6: netip.MustParseAddr("fd66:1::2"),
		broker4: netip.MustParseAddr("10.66.2.2"), broker6: netip.MustParseAddr("fd66:2::2")}
	addVeth(t, n.host, n.pod, "pod0", "eth0")
	addVeth(t, n.host, n.broker, "up0", "eth0")
	inside(t, n.host, func() error {
		return errors.Join(setSysctl("ipv4/ip_forward", "1"), setSysctl("ipv6/conf/all/forwarding", "1"),
			up("pod0", "10.66.1.1/24", "fd66:1::1/64"), up("up0", "10.66.2.1/24", "fd66:2::1/64"),
			defaultRoutes("10.66.2.2", "fd66:2::2"))
	})
	inside(t, n.pod, func() error {
		return errors.Join(up("eth0", "10.66.1.2/24", "fd66:1::2/64"), defaultRoutes("10.66.1.1", "fd66:1::1"))
	})
	inside(t, n.broker, func() error {
		return errors.Join(up("eth0", "10.66.2.2/24", "fd66:2::2/64"), defaultRoutes("10.66.2.1", "fd66:2::1"))
	})
	n.podMAC, n.nextMAC = macOf(t, n.pod, "eth0"), macOf(t, n.host, "pod0")
	n.startBroker(t)
	return n
}

// bridged: the host's bridge has the container and the broker's machine.
func bridged(t testing.TB) *network {
	n := &network{host: newTestNetns(t), pod: newTestNetns(t), broker: newTestNetns(t), bridge: "br0",
		pod4: netip.MustParseAddr("10.66.1.2"), pod6: netip.MustParseAddr("fd66:1::2"),
		broker4: netip.MustParseAddr("10.66.1.3"), broker6: netip.MustParseAddr("fd66:1::3")}
	addVeth(t, n.host, n.pod, "pod0", "eth0")
	addVeth(t, n.host, n.broker, "up0", "eth0")
	inside(t, n.host, func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = n.bridge
		if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
			return err
		}
		return errors.Join(n.join("pod0"), n.join("up0"), up(n.bridge, "10.66.1.1/24", "fd66:1::1/64"))
	})
	inside(t, n.pod, func() error { return up("eth0", "10.66.1.2/24", "fd66:1::2/64") })
	inside(t, n.broker, func() error { return up("eth0", "10.66.1.3/24", "fd66:1::3/64") })
	n.podMAC, n.nextMAC = macOf(t, n.pod, "eth0"), macOf(t, n.broker, "eth0")
	n.startBroker(t)
	return n
}

// join makes a device of the calling thread's namespace a port of the bridge.
func (n *network) join(name string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	b, err := netlink.LinkByName(n.bridge)
	if err != nil {
		return err
	}
	return netlink.LinkSetMaster(l, b)
}

// serve echoes on a TCP port of a namespace.
func serve(t testing.TB, in *netns, port uint16) {
	t.Helper()
	inside(t, in, func() error {
		l, err := net.Listen("tcp", fmt.Sprintf(":%d", port))
		if err != nil {
			return err
		}
		t.Cleanup(func() { _ = l.Close() })
		go func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					_, _ = io.Copy(conn, conn)
					_ = conn.Close()
				}()
			}
		}()
		return nil
	})
}

// echoes says hello over a connection from a namespace.
func echoes(from *netns, network, address string, size int) error {
	var conn net.Conn
	err := from.do(func() (err error) {
		conn, err = net.DialTimeout(network, address, redirectPatience)
		return err
	})
	if err != nil {
		return err
	}
	defer conn.Close()
	if err = conn.SetDeadline(time.Now().Add(redirectPatience)); err != nil {
		return err
	}
	hello := make([]byte, size)
	if _, err = conn.Write(hello); err != nil {
		return err
	}
	_, err = io.ReadFull(conn, hello)
	return err
}

// packetSocket is an AF_PACKET socket of a namespace's device.
func packetSocket(t testing.TB, n *netns, device string, protocol uint16) int {
	t.Helper()
	var fd int
	inside(t, n, func() error {
		l, err := netlink.LinkByName(device)
		if err != nil {
			return err
		}
		big := protocol<<8 | protocol>>8
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC,
			int(big)); err != nil {
			return err
		}
		return unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: big, Ifindex: l.Attrs().Index})
	})
	return fd
}

var brokerPorts = []uint16{brokerPort, segmentPort, networkPort4, hiddenPort}

// startBroker listens as a broker and as something else, on the broker's machine and the host, and counts what they say
// from a broker's port: that a packet came as far as their TCP.
func (n *network) startBroker(t testing.TB) {
	for _, port := range append(brokerPorts, foreignPort, disguisePort) {
		if port != segmentPort {
			serve(t, n.broker, port)
		}
	}
	serve(t, n.host, brokerPort)
	for _, machine := range []*netns{n.broker, n.host} {
		// An answer that comes again would count for what was sent later.
		inside(t, machine, func() error { return setSysctl("ipv4/tcp_synack_retries", "0") })
	}
	n.listen(t, n.broker, "eth0", arrived)
	n.listen(t, n.host, "pod0", answered)
}

// listen counts the frames of a device that are signs.
func (n *network) listen(t testing.TB, in *netns, device string, sign func(frame []byte) bool) {
	sniffer := os.NewFile(uintptr(packetSocket(t, in, device, unix.ETH_P_ALL)), "sniffer")
	t.Cleanup(func() { _ = sniffer.Close() })
	go func() {
		frame := make([]byte, 1<<16)
		for {
			size, err := sniffer.Read(frame)
			if err != nil {
				return
			}
			if sign(append(frame[:size:size], make([]byte, 64)...)) { // so that no header is cut
				n.answers.Add(1)
			}
		}
	}()
}

const etherSize = 14

func etherTypeOf(frame []byte) uint16 { return binary.BigEndian.Uint16(frame[12:]) }

// answered: a broker's TCP answers.
func answered(frame []byte) bool {
	ip := frame[etherSize:]
	protocol, port := ip[9], binary.BigEndian.Uint16(ip[20:])
	switch etherTypeOf(frame) {
	case unix.ETH_P_IPV6:
		protocol, port = ip[6], binary.BigEndian.Uint16(ip[40:])
	case unix.ETH_P_IP:
	default:
		return false
	}
	return protocol == unix.IPPROTO_TCP && (port == servicePort || slices.Contains(brokerPorts, port))
}

// arrived: that, or a fragment of IPv6 came. Linux does not answer where a header is cut; other systems might.
func arrived(frame []byte) bool {
	ip := frame[etherSize:]
	return answered(frame) ||
		etherTypeOf(frame) == unix.ETH_P_IPV6 && ip[6] == unix.IPPROTO_FRAGMENT && ip[40] != unix.IPPROTO_UDP
}

func checksum(data []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(data); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(data[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// Flags of TCP.
const (
	synFlag = 0x02
	ackFlag = 0x10
)

// segment is TCP with 20 bytes of data, so that it can be cut.
func segment(src, dst netip.Addr, port uint16, flags byte) []byte {
	const from = 20001
	s := make([]byte, 40)
	binary.BigEndian.PutUint16(s[0:], from)
	binary.BigEndian.PutUint16(s[2:], port)
	s[12], s[13] = 5<<4, flags
	binary.BigEndian.PutUint16(s[14:], 1000)
	pseudo := slices.Concat(src.AsSlice(), dst.AsSlice(), []byte{0, unix.IPPROTO_TCP, 0, byte(len(s))}, s)
	binary.BigEndian.PutUint16(s[16:], checksum(pseudo))
	return s
}

// ipv4 is a packet, or a fragment when field is given (flags and offset). Options fill whole words.
func ipv4(src, dst netip.Addr, field uint16, options, payload []byte) []byte {
	h := slices.Concat(make([]byte, 20), options)
	h[0] = 4<<4 | byte(len(h)/4)
	binary.BigEndian.PutUint16(h[2:], uint16(len(h)+len(payload)))
	binary.BigEndian.PutUint16(h[4:], 0x6b6b)
	binary.BigEndian.PutUint16(h[6:], field)
	h[8], h[9] = 64, unix.IPPROTO_TCP
	copy(h[12:], src.AsSlice())
	copy(h[16:], dst.AsSlice())
	binary.BigEndian.PutUint16(h[10:], checksum(h))
	return slices.Concat(h, payload)
}

func ipv6(src, dst netip.Addr, next byte, payload []byte) []byte {
	h := make([]byte, 40)
	h[0] = 6 << 4
	binary.BigEndian.PutUint16(h[4:], uint16(len(payload)))
	h[6], h[7] = next, 64
	copy(h[8:], src.AsSlice())
	copy(h[24:], dst.AsSlice())
	return slices.Concat(h, payload)
}

// fragment6 is the payload of an IPv6 packet whose next header is the fragment header.
func fragment6(next byte, field uint16, payload []byte) []byte {
	return slices.Concat([]byte{next, 0, byte(field >> 8), byte(field), 0, 0, 0x6b, 0x6b}, payload)
}

// vector is a way around socket hooks that a container's root has.
type vector struct {
	name   string
	reason string // that counts it
	send   func(*testing.T, *network)
}

// frames are sent by a packet socket, as Ethernet with VLAN tags of these types before the packet's own.
func frames(etherType uint16, tags []uint16, packets func(*network) [][]byte) func(*testing.T, *network) {
	return func(t *testing.T, n *network) {
		fd := packetSocket(t, n.pod, "eth0", 0)
		defer func() { _ = unix.Close(fd) }()
		for _, p := range packets(n) {
			f := slices.Concat(n.nextMAC, n.podMAC)
			for _, tag := range tags {
				f = append(f, byte(tag>>8), byte(tag), 0, 0)
			}
			f = slices.Concat(f, []byte{byte(etherType >> 8), byte(etherType)}, p)
			if _, err := unix.Write(fd, f); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// connect tries to connect from the container with a socket.
func connect(to func(*network) netip.AddrPort) func(*testing.T, *network) {
	return func(_ *testing.T, n *network) {
		_ = n.pod.do(func() error {
			// Shorter than the second after which TCP sends the first segment again.
			conn, err := net.DialTimeout("tcp", to(n).String(), 100*time.Millisecond)
			if err == nil {
				err = conn.Close()
			}
			return err
		})
	}
}

// dnat rewrites TCP to an address (any when it is not valid) and port at a hook of the namespace.
func dnat(t *testing.T, in *netns, hook *nftables.ChainHook, from, to netip.AddrPort) (undo func()) {
	t.Helper()
	table := &nftables.Table{Name: "dnat", Family: nftables.TableFamilyIPv4}
	inside(t, in, func() error {
		conn, err := nftables.New()
		if err != nil {
			return err
		}
		conn.AddTable(table)
		chain := conn.AddChain(&nftables.Chain{Name: "dnat", Table: table, Type: nftables.ChainTypeNAT, Hooknum: hook,
			Priority: nftables.ChainPriorityNATDest})
		conn.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
			meta(expr.MetaKeyL4PROTO), equal(unix.IPPROTO_TCP),
			header(expr.PayloadBaseNetworkHeader, 16, 4, regFirst), equal(from.Addr().AsSlice()...),
			header(expr.PayloadBaseTransportHeader, 2, 2, regFirst), equal(byte(from.Port()>>8), byte(from.Port())),
			&expr.Immediate{Register: 1, Data: to.Addr().AsSlice()},
			&expr.Immediate{Register: 2, Data: []byte{byte(to.Port() >> 8), byte(to.Port())}},
			&expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: 1, RegProtoMin: 2},
		}})
		return conn.Flush()
	})
	return func() {
		inside(t, in, func() error {
			conn, err := nftables.New()
			if err != nil {
				return err
			}
			conn.DelTable(table)
			return conn.Flush()
		})
	}
}

// disguise makes the container's device rewrite the port behind all of its own hooks.
func disguise(t *testing.T, n *network) (undo func()) {
	t.Helper()
	const port = 14 + 20 + 2 // in the frame
	big := func(p uint16) int32 { return int32(p<<8 | p>>8) }
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "GPL", Instructions: asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.StoreImm(asm.RFP, -8, 0, asm.Word),
		asm.Mov.Imm(asm.R2, port), asm.Mov.Reg(asm.R3, asm.RFP), asm.Add.Imm(asm.R3, -8), asm.Mov.Imm(asm.R4, 2),
		asm.FnSkbLoadBytes.Call(),
		asm.LoadMem(asm.R7, asm.RFP, -8, asm.Half),
		asm.JNE.Imm(asm.R7, big(disguisePort), "out"),
		asm.StoreImm(asm.RFP, -8, int64(big(brokerPort)), asm.Half),
		asm.Mov.Reg(asm.R1, asm.R6), asm.Mov.Imm(asm.R2, port), asm.Mov.Reg(asm.R3, asm.RFP),
		asm.Add.Imm(asm.R3, -8), asm.Mov.Imm(asm.R4, 2), asm.Mov.Imm(asm.R5, 0),
		asm.FnSkbStoreBytes.Call(),
		asm.Mov.Imm(asm.R0, 0).WithSymbol("out"), asm.Mov.Imm(asm.R0, 0), asm.Return(),
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer program.Close()
	var qdisc *netlink.Clsact
	inside(t, n.pod, func() error {
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		qdisc = &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: l.Attrs().Index,
			Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}}
		if err := netlink.QdiscAdd(qdisc); err != nil {
			return err
		}
		return netlink.FilterAdd(&netlink.BpfFilter{FilterAttrs: netlink.FilterAttrs{LinkIndex: l.Attrs().Index,
			Parent: netlink.HANDLE_MIN_EGRESS, Handle: 1, Protocol: unix.ETH_P_ALL, Priority: 1},
			Fd: program.FD(), Name: "disguise", DirectAction: true})
	})
	return func() { inside(t, n.pod, func() error { return netlink.QdiscDel(qdisc) }) }
}

func whole4(port uint16, flags byte) func(*network) [][]byte {
	return func(n *network) [][]byte {
		return [][]byte{ipv4(n.pod4, n.broker4, 0, nil, segment(n.pod4, n.broker4, port, flags))}
	}
}

func whole6(port uint16, flags byte) func(*network) [][]byte {
	return func(n *network) [][]byte {
		return [][]byte{ipv6(n.pod6, n.broker6, unix.IPPROTO_TCP, segment(n.pod6, n.broker6, port, flags))}
	}
}

var moreFragments = uint16(0x2000)

func fragments4(n *network) [][]byte {
	s := segment(n.pod4, n.broker4, brokerPort, synFlag)
	return [][]byte{
		ipv4(n.pod4, n.broker4, moreFragments, nil, s[:8]),
		ipv4(n.pod4, n.broker4, 1, nil, s[8:]),
	}
}

func fragments6(n *network) [][]byte {
	s := segment(n.pod6, n.broker6, brokerPort, synFlag)
	return [][]byte{
		ipv6(n.pod6, n.broker6, unix.IPPROTO_FRAGMENT, fragment6(unix.IPPROTO_TCP, 1, s[:24])),
		ipv6(n.pod6, n.broker6, unix.IPPROTO_FRAGMENT, fragment6(unix.IPPROTO_TCP, 24, s[24:])),
	}
}

// hidden6 has the TCP header behind the first fragment.
func hidden6(n *network) [][]byte {
	s := segment(n.pod6, n.broker6, brokerPort, synFlag)
	return [][]byte{
		ipv6(n.pod6, n.broker6, unix.IPPROTO_FRAGMENT,
			fragment6(unix.IPPROTO_DSTOPTS, 1, options6(unix.IPPROTO_DSTOPTS))),
		ipv6(n.pod6, n.broker6, unix.IPPROTO_FRAGMENT,
			fragment6(unix.IPPROTO_DSTOPTS, 8, slices.Concat(options6(unix.IPPROTO_TCP), s))),
	}
}

// options6 are destination options that are only padding.
func options6(next byte) []byte { return []byte{next, 0, 1, 4, 0, 0, 0, 0} }

var vectors = []vector{
	{"a packet socket, IPv4", dropConnection, frames(unix.ETH_P_IP, nil, whole4(brokerPort, synFlag))},
	{"a packet socket, IPv6", dropConnection, frames(unix.ETH_P_IPV6, nil, whole6(brokerPort, synFlag))},
	{"a SYN with other flags", dropConnection, frames(unix.ETH_P_IP, nil, whole4(brokerPort, synFlag|0xc8))},
	{"a segment of no connection, IPv4", dropSegment, frames(unix.ETH_P_IP, nil, whole4(segmentPort, ackFlag))},
	{"a segment of no connection, IPv6", dropSegment, frames(unix.ETH_P_IPV6, nil, whole6(segmentPort, ackFlag))},
	{"a port of some networks, IPv4", dropConnection, frames(unix.ETH_P_IP, nil, whole4(networkPort4, synFlag))},
	{"a port of some networks, IPv6", dropConnection, frames(unix.ETH_P_IPV6, nil, whole6(networkPort4, synFlag))},
	{"IPv4 options", dropConnection, frames(unix.ETH_P_IP, nil, func(n *network) [][]byte {
		return [][]byte{ipv4(n.pod4, n.broker4, 0, []byte{1, 1, 1, 0}, segment(n.pod4, n.broker4, brokerPort, synFlag))}
	})},
	{"IPv6 extension headers", dropConnection, frames(unix.ETH_P_IPV6, nil, func(n *network) [][]byte {
		return [][]byte{ipv6(n.pod6, n.broker6, unix.IPPROTO_DSTOPTS, slices.Concat(options6(unix.IPPROTO_DSTOPTS),
			options6(unix.IPPROTO_TCP), segment(n.pod6, n.broker6, brokerPort, synFlag)))}
	})},
	{"IPv4 fragments, the flags in the second", dropFragment, frames(unix.ETH_P_IP, nil, fragments4)},
	{"IPv6 fragments", dropFragment, frames(unix.ETH_P_IPV6, nil, fragments6)},
	{"IPv6 fragments, TCP in the second", dropFragment, frames(unix.ETH_P_IPV6, nil, hidden6)},
	{"an IPv6 packet with a fragment header that is whole", dropConnection,
		frames(unix.ETH_P_IPV6, nil, func(n *network) [][]byte {
			return [][]byte{ipv6(n.pod6, n.broker6, unix.IPPROTO_FRAGMENT,
				fragment6(unix.IPPROTO_TCP, 0, segment(n.pod6, n.broker6, brokerPort, synFlag)))}
		})},
	{"a VLAN tag", dropConnection,
		frames(unix.ETH_P_IP, []uint16{unix.ETH_P_8021Q}, whole4(brokerPort, synFlag))},
	{"two VLAN tags", dropVLAN,
		frames(unix.ETH_P_IP, []uint16{unix.ETH_P_8021Q, unix.ETH_P_8021Q}, whole4(brokerPort, synFlag))},
	{"two VLAN tags, the inner a service provider's", dropVLAN,
		frames(unix.ETH_P_IPV6, []uint16{unix.ETH_P_8021Q, unix.ETH_P_8021AD}, whole6(brokerPort, synFlag))},
	{"a raw socket with its own header", dropConnection, func(t *testing.T, n *network) {
		inside(t, n.pod, func() error {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
			if err != nil {
				return err
			}
			defer func() { _ = unix.Close(fd) }()
			return unix.Sendto(fd, whole4(brokerPort, synFlag)(n)[0], 0, &unix.SockaddrInet4{Addr: n.broker4.As4()})
		})
	}},
	{"NAT in the container", dropConnection, func(t *testing.T, n *network) {
		undo := dnat(t, n.pod, nftables.ChainHookOutput, netip.AddrPortFrom(n.broker4, disguisePort),
			netip.AddrPortFrom(n.broker4, brokerPort))
		defer undo()
		connect(func(n *network) netip.AddrPort { return netip.AddrPortFrom(n.broker4, disguisePort) })(t, n)
	}},
	{"tc at the container's device", dropConnection, func(t *testing.T, n *network) {
		undo := disguise(t, n)
		defer undo()
		connect(func(n *network) netip.AddrPort { return netip.AddrPortFrom(n.broker4, disguisePort) })(t, n)
	}},
}

// service has the host lead a service's port to another address, as kube-proxy does.
func service(port uint16, to func(*network) netip.AddrPort) func(*testing.T, *network) {
	return func(t *testing.T, n *network) {
		at := netip.AddrPortFrom(serviceAddress, port)
		undo := dnat(t, n.host, nftables.ChainHookPrerouting, at, to(n))
		defer undo()
		connect(func(*network) netip.AddrPort { return at })(t, n)
	}
}

// routedVectors are only for a host that routes: on a bridge the packet comes from the bridge when its NAT is done.
var routedVectors = []vector{
	{"a service with another port", dropConnection, service(servicePort,
		func(n *network) netip.AddrPort { return netip.AddrPortFrom(n.broker4, brokerPort) })},
	{"a service with another port, the broker on this host", dropConnection, service(servicePort,
		func(*network) netip.AddrPort { return netip.AddrPortFrom(hostAddress, brokerPort) })},
	{"a service with a broker's port, which the broker itself has not", dropConnection, service(brokerPort,
		func(n *network) netip.AddrPort { return netip.AddrPortFrom(n.broker4, hiddenPort) })},
}

// doublyTagged is the vector that rule i about frames drops.
func doublyTagged(i int) vector {
	return slices.DeleteFunc(slices.Clone(vectors), func(v vector) bool { return v.reason != dropVLAN })[i]
}

// vectors of a network.
func (n *network) vectors() []vector {
	if n.bridge != "" {
		return vectors
	}
	all := slices.Concat(vectors, routedVectors)
	for i := range all {
		// A router takes off tags of VLAN 0 before it looks at the packet.
		if all[i].reason == dropVLAN {
			all[i].reason = dropConnection
		}
	}
	return all
}
