package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
	"golang.org/x/sys/unix"

	"klamm/test/kafka"
	"klamm/test/kubernetes"
)

// Topics at the broker. Clients are permitted the first.
const (
	orders  = "orders"
	payouts = "payouts"
)

func (r *rig) startBroker(ctx context.Context) (err error) {
	if r.cluster, err = kafka.New(ctx, kafka.Options{Hosts: []string{kubernetes.BrokerIP}}); err != nil {
		return err
	}
	if r.admin, err = r.cluster.Admin(); err != nil {
		return err
	}
	return errors.Join(r.cluster.CreateTopic(ctx, orders, 1), r.cluster.CreateTopic(ctx, payouts, 1))
}

// broker is what clients are told.
func (r *rig) broker() string { return r.cluster.Addrs()[0] }

// end returns the end offset of a topic: how many records it was sent.
func (r *rig) end(ctx context.Context, topic string) (int64, error) {
	request := kmsg.NewPtrListOffsetsRequest()
	wanted := kmsg.NewListOffsetsRequestTopic()
	partition := kmsg.NewListOffsetsRequestTopicPartition()
	partition.Timestamp = -1 // latest
	wanted.Topic, wanted.Partitions = topic, append(wanted.Partitions, partition)
	request.Topics = append(request.Topics, wanted)
	answer, err := request.RequestWith(ctx, r.admin)
	if err != nil {
		return 0, fmt.Errorf("find the end of %s: %w", topic, err)
	}
	found := answer.Topics[0].Partitions[0]
	return found.Offset, kerr.ErrorForCode(found.ErrorCode)
}

// wire sees every packet that comes to the broker's host, before its firewall and its sockets do.
type wire struct {
	fd int

	mu      sync.Mutex
	packets map[netip.Addr]int // to a port of the broker, by source
	err     error
}

func listenOnWire(device string) (*wire, error) {
	link, err := net.InterfaceByName(device)
	if err != nil {
		return nil, err
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open a packet socket: %w", err)
	}
	protocol := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_ALL))
	address := &unix.SockaddrLinklayer{Protocol: protocol, Ifindex: link.Index}
	// The buffer holds what comes while this program does not run.
	err = errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20), unix.Bind(fd, address))
	if err != nil {
		return nil, errors.Join(fmt.Errorf("listen on %s: %w", device, err), unix.Close(fd))
	}
	w := &wire{fd: fd, packets: map[netip.Addr]int{}}
	go w.read() // for as long as the program runs: nothing wakes a packet socket
	return w, nil
}

func (w *wire) read() {
	buf := make([]byte, 64<<10)
	for {
		n, from, err := unix.Recvfrom(w.fd, buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		w.mu.Lock()
		if err != nil {
			w.err = errors.Join(w.err, err)
			w.mu.Unlock()
			return
		}
		if link, ok := from.(*unix.SockaddrLinklayer); ok && link.Pkttype != unix.PACKET_OUTGOING {
			w.note(buf[:n])
		}
		w.mu.Unlock()
	}
}

// note counts a packet to a port of the broker, by RFC 791, 8200 and 9293.
func (w *wire) note(ip []byte) {
	var source netip.Addr
	var tcp []byte
	switch {
	case len(ip) >= 20 && ip[0]>>4 == 4 && ip[9] == unix.IPPROTO_TCP:
		source, _ = netip.AddrFromSlice(ip[12:16])
		tcp = ip[min(len(ip), int(ip[0]&15)*4):]
	case len(ip) >= 40 && ip[0]>>4 == 6 && ip[6] == unix.IPPROTO_TCP:
		source, _ = netip.AddrFromSlice(ip[8:24])
		tcp = ip[40:]
	}
	if len(tcp) >= 4 && binary.BigEndian.Uint16(tcp[2:]) == kafka.PlaintextPort {
		w.packets[source]++
	}
}

// seen returns how many packets came to the broker from the node itself and from others, and who those are.
func (w *wire) seen() (node, others int, who []netip.Addr, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for source, n := range w.packets {
		if source == netip.MustParseAddr(kubernetes.NodeIP) {
			node += n
		} else {
			others += n
		}
	}
	who = slices.SortedFunc(maps.Keys(w.packets), netip.Addr.Compare)
	stats, err := unix.GetsockoptTpacketStats(w.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS)
	if err == nil && stats.Drops > 0 {
		err = fmt.Errorf("%d packets were not seen", stats.Drops)
	}
	return node, others, who, errors.Join(w.err, err)
}

// from returns how many packets came to the broker from an address.
func (w *wire) from(source string) (int, error) {
	address, err := netip.ParseAddr(source)
	if err != nil {
		return 0, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.packets[address], w.err
}
