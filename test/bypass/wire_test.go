package bypass

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// wire is everything that comes to the brokers' port in a network namespace, as its devices see it: a packet socket is
// given it before the kernel there has looked at it.
type wire struct {
	fd int

	mu      sync.Mutex
	grown   *sync.Cond
	packets []packet
	err     error
}

// packet is one that came to the brokers' port.
type packet struct {
	from, to netip.AddrPort
	flags    byte
	payload  []byte
	fence    bool // it came to fencePort: no packet of a client
	tail     bool // a fragment other than the first: nothing, unless the first comes too
}

const (
	tcpFIN = 1 << iota
	tcpSYN
	tcpRST
	tcpPSH
	tcpACK
)

// tap listens in the namespace until the test ends.
func tap(t testing.TB, n *namespace) *wire {
	t.Helper()
	w := &wire{}
	w.grown = sync.NewCond(&w.mu)
	err := n.do(func() (err error) {
		w.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, int(network16(unix.ETH_P_ALL)))
		return err
	})
	if err != nil {
		t.Fatalf("listen to the wire: %v", err)
	}
	if err := unix.SetsockoptInt(w.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20); err != nil {
		t.Fatal(err)
	}
	// A read that is under way holds the socket, so it has to end by itself.
	wait := unix.NsecToTimeval(int64(50 * time.Millisecond))
	if err := unix.SetsockoptTimeval(w.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait); err != nil {
		t.Fatal(err)
	}
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		w.listen(stop)
	}()
	t.Cleanup(func() {
		close(stop)
		<-done
		if err := errors.Join(w.lost(), unix.Close(w.fd)); err != nil {
			t.Error(err)
		}
	})
	return w
}

func (w *wire) listen(stop <-chan struct{}) {
	frame := make([]byte, 1<<16)
	for {
		select {
		case <-stop:
			return
		default:
		}
		n, from, err := unix.Recvfrom(w.fd, frame, 0)
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
			continue
		}
		w.mu.Lock()
		if err != nil {
			w.err = err
		} else if sender, ok := from.(*unix.SockaddrLinklayer); ok && sender.Pkttype != unix.PACKET_OUTGOING {
			w.note(frame[:n])
		}
		w.grown.Broadcast()
		w.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// note keeps an IP packet if it goes to the brokers' port, or is a fragment of one that cannot be told.
func (w *wire) note(frame []byte) {
	if p, is := parse(bytes.Clone(frame)); is {
		w.packets = append(w.packets, p)
	}
}

// lost is an error when the kernel could not keep up: then silence proves nothing.
func (w *wire) lost() error {
	s, err := unix.GetsockoptTpacketStats(w.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS)
	if err != nil {
		return err
	}
	if s.Drops != 0 {
		return fmt.Errorf("%d packets were lost at the tap", s.Drops)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.err
}

// mark is the place up to which the wire was heard.
func (w *wire) mark() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.packets)
}

// since is what came after a mark.
func (w *wire) since(mark int) []packet {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.packets[mark:])
}

// fence sends packets to an address, by what runs a function in a namespace, until one was heard: then all that was
// sent before was, too.
func (w *wire) fence(t testing.TB, in func(func() error) error, to netip.Addr) {
	t.Helper()
	text := fmt.Sprintf("fence %d", fences.Add(1))
	mark := w.mark()
	for end := time.Now().Add(patience); ; {
		err := in(func() error {
			conn, err := net.Dial("udp", netip.AddrPortFrom(to, fencePort).String())
			if err != nil {
				return err
			}
			_, err = io.WriteString(conn, text)
			return errors.Join(err, conn.Close())
		})
		if err != nil {
			t.Fatal(err)
		}
		if w.await(mark, func(p packet) bool { return p.fence && string(p.payload) == text }) {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("the tap does not hear what is sent to %v", to)
		}
	}
}

var fences atomic.Uint64

// fenceTime is how long a packet is on its way at most, before another is sent.
const fenceTime = 100 * time.Millisecond

// await waits a moment until something came after a mark.
func (w *wire) await(mark int, is func(packet) bool) bool {
	late := time.AfterFunc(fenceTime, w.grown.Broadcast)
	defer late.Stop()
	end := time.Now().Add(fenceTime)
	w.mu.Lock()
	defer w.mu.Unlock()
	for {
		for _, p := range w.packets[mark:] {
			if is(p) {
				return true
			}
		}
		if w.err != nil || !time.Now().Before(end) {
			return false
		}
		mark = len(w.packets)
		w.grown.Wait()
	}
}

const (
	protocolTCP      = 6
	protocolUDP      = 17
	protocolFragment = 44
	ipv6Header       = 40
)

// parse reads TCP over IPv4 and IPv6 that goes to a broker's port, whatever is in between, and fences. What is in a
// fragment other than the first is kept as it is: it has no port, and could be of anything.
func parse(b []byte) (packet, bool) {
	var p packet
	if len(b) < 20 {
		return p, false
	}
	var from, to netip.Addr
	var protocol byte
	var rest []byte
	later := false // a fragment that is not the first
	switch b[0] >> 4 {
	case 4:
		head, total := int(b[0]&0xf)*4, int(binary.BigEndian.Uint16(b[2:]))
		if head < 20 || total < head || total > len(b) {
			return p, false
		}
		from, to = netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
		protocol, rest = b[9], b[head:total]
		later = binary.BigEndian.Uint16(b[6:])&0x1fff != 0
	case 6:
		if len(b) < ipv6Header {
			return p, false
		}
		from, to = netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
		protocol, rest = b[6], b[ipv6Header:min(len(b), ipv6Header+int(binary.BigEndian.Uint16(b[4:])))]
		for len(rest) >= 8 && protocol != protocolTCP && protocol != protocolUDP && !later {
			size := 8 * (1 + int(rest[1]))
			if protocol == protocolFragment {
				size, later = 8, binary.BigEndian.Uint16(rest[2:])>>3 != 0
			}
			if size > len(rest) {
				break
			}
			protocol, rest = rest[0], rest[size:]
		}
	default:
		return p, false
	}
	p.from, p.to = netip.AddrPortFrom(from, 0), netip.AddrPortFrom(to, 0)
	switch {
	case later && protocol == protocolTCP:
		p.payload, p.tail = rest, true
		return p, true
	case protocol == protocolUDP && len(rest) >= 8:
		p.payload, p.fence = rest[8:], binary.BigEndian.Uint16(rest[2:]) == fencePort
		return p, p.fence
	case protocol != protocolTCP || len(rest) < 20:
		return p, false
	}
	p.from = netip.AddrPortFrom(from, binary.BigEndian.Uint16(rest))
	p.to = netip.AddrPortFrom(to, binary.BigEndian.Uint16(rest[2:]))
	p.flags, p.payload = rest[13], rest[min(len(rest), int(rest[12]>>4)*4):]
	return p, p.to.Port() == brokerPort
}

func (p packet) String() string {
	var flags []byte
	for i, name := range []byte("FSRPA") {
		if p.flags>>i&1 == 1 {
			flags = append(flags, name)
		}
	}
	return fmt.Sprintf("%v -> %v %s, %d bytes %q", p.from, p.to, flags, len(p.payload),
		p.payload[:min(len(p.payload), 48)])
}

func network16(v uint16) uint16 { return v>>8 | v<<8 }
