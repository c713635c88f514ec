// Command attack sends one TCP SYN to an address from a socket that is not TCP's: attack raw|packet IP:PORT. A raw
// socket lets the sender write the transport header, a packet socket the whole IP packet (raw(7), packet(7)); the
// hooks of connect(2) see neither.
package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const sourcePort = 40000

func main() {
	ways := map[string]func(from, to netip.AddrPort) error{"raw": raw, "packet": packet}
	to, err := netip.ParseAddrPort(os.Args[2])
	if err == nil {
		var from netip.AddrPort
		if from, err = source(to); err == nil {
			err = ways[os.Args[1]](from, to)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println("sent")
}

// source is the address packets to a destination have. Asking for it by a datagram also resolves the next hop.
func source(to netip.AddrPort) (netip.AddrPort, error) {
	conn, err := net.Dial("udp", to.String())
	if err != nil {
		return netip.AddrPort{}, err
	}
	defer func() { _ = conn.Close() }()
	if _, err := conn.Write([]byte("who is next?")); err != nil {
		return netip.AddrPort{}, err
	}
	own, err := netip.ParseAddrPort(conn.LocalAddr().String())
	return netip.AddrPortFrom(own.Addr(), sourcePort), err
}

func raw(from, to netip.AddrPort) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_TCP)
	if err != nil {
		return fmt.Errorf("open a raw socket: %w", err)
	}
	return unix.Sendto(fd, syn(from, to), 0, &unix.SockaddrInet4{Addr: to.Addr().As4()})
}

func packet(from, to netip.AddrPort) error {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM, 0)
	if err != nil {
		return fmt.Errorf("open a packet socket: %w", err)
	}
	hop, err := nextHop(to.Addr())
	if err != nil {
		return err
	}
	address := &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_IP), Ifindex: hop.LinkIndex, Halen: 6}
	copy(address.Addr[:], hop.HardwareAddr)
	return unix.Sendto(fd, append(ipv4(from, to), syn(from, to)...), 0, address)
}

// nextHop waits for the kernel to resolve the neighbor on the way to a destination.
func nextHop(to netip.Addr) (netlink.Neigh, error) {
	routes, err := netlink.RouteGet(to.AsSlice())
	if err != nil {
		return netlink.Neigh{}, fmt.Errorf("find the route to %v: %w", to, err)
	}
	hop := routes[0].Gw
	if hop == nil {
		hop = to.AsSlice()
	}
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		neighbors, err := netlink.NeighList(routes[0].LinkIndex, unix.AF_INET)
		if err != nil {
			return netlink.Neigh{}, err
		}
		for _, n := range neighbors {
			if n.IP.Equal(hop) && len(n.HardwareAddr) == 6 {
				return n, nil
			}
		}
	}
	return netlink.Neigh{}, errors.New("the next hop has no hardware address")
}

// ipv4 is the header of RFC 791 before a bare TCP header.
func ipv4(from, to netip.AddrPort) []byte {
	h := make([]byte, 20)
	h[0], h[8], h[9] = 4<<4|5, 64, unix.IPPROTO_TCP
	binary.BigEndian.PutUint16(h[2:], 40)
	copy(h[12:], from.Addr().AsSlice())
	copy(h[16:], to.Addr().AsSlice())
	binary.BigEndian.PutUint16(h[10:], checksum(h))
	return h
}

// syn is the header of RFC 9293, its checksum taken over the pseudo header too.
func syn(from, to netip.AddrPort) []byte {
	h := make([]byte, 20)
	binary.BigEndian.PutUint16(h[0:], from.Port())
	binary.BigEndian.PutUint16(h[2:], to.Port())
	binary.BigEndian.PutUint32(h[4:], 1)
	h[12], h[13] = 5<<4, 1<<1
	binary.BigEndian.PutUint16(h[14:], 65535)
	pseudo := append(from.Addr().AsSlice(), to.Addr().AsSlice()...)
	pseudo = append(pseudo, 0, unix.IPPROTO_TCP, 0, 20)
	binary.BigEndian.PutUint16(h[16:], checksum(append(pseudo, h...)))
	return h
}

func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

func htons(v uint16) uint16 { return binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, v)) }
