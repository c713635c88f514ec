package bpf

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// segment is the beginning of a TCP segment; flags are as in the header.
func segment(to uint16, flags byte) []byte {
	b := make([]byte, 20)
	binary.BigEndian.PutUint16(b, 40000)
	binary.BigEndian.PutUint16(b[2:], to)
	b[12], b[13] = 5<<4, flags
	return b
}

const (
	syn = 0x02
	rst = 0x04
	ack = 0x10

	tcp, udp, fragmentHeader, destinationOptions = 6, 17, 44, 60
)

// ip4 is an IPv4 packet on loopback; the kernel fills in what is 0.
func ip4(protocol byte, fragment uint16, options int, payload []byte) []byte {
	b := make([]byte, 20+options)
	b[0] = 0x45 + byte(options/4)
	for i := range options {
		b[20+i] = 1 // no operation
	}
	binary.BigEndian.PutUint16(b[6:], fragment)
	b[8], b[9] = 64, protocol
	copy(b[12:], []byte{127, 0, 0, 1, 127, 0, 0, 1})
	return slices.Concat(b, payload)
}

// ip6 is an IPv6 packet on loopback.
func ip6(next byte, payload ...[]byte) []byte {
	header := make([]byte, 40)
	header[0], header[6], header[7], header[23], header[39] = 0x60, next, 64, 1, 1
	b := slices.Concat(append([][]byte{header}, payload...)...)
	binary.BigEndian.PutUint16(b[4:], uint16(len(b)-40))
	return b
}

func options(next byte) []byte { return []byte{next, 0, 1, 4, 0, 0, 0, 0} }

func fragment(next byte, offset uint16, more byte) []byte {
	return []byte{next, 0, byte(offset >> 5), byte(offset<<3) | more, 0, 0, 0, 1}
}

func TestTheSecondLineDropsHandMadePackets(t *testing.T) {
	broker, other := segment(brokerPort, syn), segment(80, syn)
	many := func(next byte) []byte {
		b := [][]byte{}
		for range 9 {
			b = append(b, options(destinationOptions))
		}
		return ip6(destinationOptions, append(b, options(next), broker)...)
	}
	for _, c := range []struct {
		name    string
		packet  []byte
		counter string // "" passes
	}{
		{"a SYN", ip4(tcp, 0, 0, broker), "dropped_egress"},
		{"a SYN behind IP options", ip4(tcp, 0, 8, broker), "dropped_egress"},
		{"a segment of no connection", ip4(tcp, 0, 0, segment(brokerPort, ack)), "dropped_egress"},
		{"a first fragment", ip4(tcp, 0x2000, 0, broker[:8]), "dropped_fragment"},
		{"a later fragment", ip4(tcp, 1, 0, broker[8:]), "dropped_fragment"},
		{"half a header", ip4(tcp, 0, 0, broker[:8]), "dropped_unreadable"},
		{"a SYN by IPv6", ip6(tcp, broker), "dropped_egress"},
		{"a SYN behind IPv6 options", ip6(destinationOptions, options(destinationOptions), options(tcp), broker),
			"dropped_egress"},
		{"a SYN in a fragment that is whole", ip6(fragmentHeader, fragment(tcp, 0, 0), broker), "dropped_egress"},
		{"a first IPv6 fragment", ip6(fragmentHeader, fragment(tcp, 0, 1), broker), "dropped_fragment"},
		{"a later IPv6 fragment", ip6(fragmentHeader, fragment(destinationOptions, 1, 0), broker), "dropped_fragment"},
		{"more IPv6 headers than are read", many(tcp), "dropped_unreadable"},
		{"IPv6 options without an end", ip6(destinationOptions, options(tcp)[:2]), "dropped_unreadable"},

		{"a reset", ip4(tcp, 0, 0, segment(brokerPort, rst)), ""},
		{"a SYN to another port", ip4(tcp, 0, 0, other), ""},
		{"a SYN to another port by IPv6", ip6(tcp, other), ""},
		{"UDP to a broker's port", ip4(udp, 0, 0, broker[:8]), ""},
		{"a later fragment of UDP", ip4(udp, 1, 0, broker[:8]), ""},
		{"a later IPv6 fragment of UDP", ip6(fragmentHeader, fragment(udp, 1, 0), broker[:8]), ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			enterNewNetns(t)
			r := newRig(t)
			want, passed := map[string]uint64{}, ""
			if c.counter != "" {
				want[c.counter], passed = 1, "EPERM"
			}
			if err := r.programs.CutEstablished(true); err != nil {
				t.Fatal(err)
			}
			to := "127.0.0.1:0"
			if c.packet[0]>>4 == 6 {
				to = "[::1]:0"
			}
			if got := r.run(step{Do: "send a packet", To: to, Packet: c.packet}).outcome(); got.Error != passed {
				t.Errorf("the sender got %q, want %q", got.Error, passed)
			}
			r.programs.count(t, want)
			if c.counter == "" || t.Failed() { // what was not dropped has no event
				return
			}
			if e := r.event(0); e.Reason() != c.counter || e.CgroupID != cgroupID(t, r.clients) {
				t.Errorf("the event is %+v (%s)", e, e.Reason())
			}
		})
	}
}

// event is the next one of a process.
func (r *rig) event(tgid uint32) Event {
	r.t.Helper()
	for {
		e, err := r.programs.Event()
		if err != nil {
			r.t.Fatal(err)
		}
		if e.TGID == tgid {
			return e
		}
	}
}

// older starts a client that connects before the programs are there, and returns the broker's end.
func older(t *testing.T, cgroup string) (*client, *net.TCPConn) {
	t.Helper()
	broker := listen(t, at("127.0.0.1", brokerPort))
	c := startClient(t, cgroup, plan{Steps: []step{{Do: "connect", To: broker.Addr().String()}}, Write: true}, 0)
	if got := c.outcome(); got.Error != "" {
		t.Fatalf("the client got %s", got.Error)
	}
	conn := acceptFrom(t, broker)
	_ = broker.Close() // nobody listens there any more
	return c, conn
}

// writes tells whether what the client writes arrives; otherwise a packet of it was dropped.
func writes(t *testing.T, p *Programs, c *client, at *net.TCPConn) bool {
	t.Helper()
	dropped := func() uint64 {
		counters, err := p.Counters()
		if err != nil {
			t.Fatal(err)
		}
		return counters["dropped_egress"]
	}
	before := dropped()
	if _, err := io.WriteString(c.stdin, "x"); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 1)
	for end := time.Now().Add(patience); time.Now().Before(end); {
		if err := at.SetReadDeadline(time.Now().Add(10 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		_, err := at.Read(b)
		switch {
		case err == nil:
			return true
		case !errors.Is(err, os.ErrDeadlineExceeded):
			t.Fatal(err)
		case dropped() > before:
			return false
		}
	}
	t.Fatal("what the client wrote neither arrived nor was dropped")
	return false
}

func TestAConnectionOlderThanTheProgramsIsCutWhenThatIsWanted(t *testing.T) {
	enterNewNetns(t)
	clients := makeCgroup(t, "older")
	c, conn := older(t, clients)
	p := loaded(t)
	if !writes(t, p, c, conn) {
		t.Error("it was cut before that was wanted")
	}
	if err := p.CutEstablished(true); err != nil {
		t.Fatal(err)
	}
	if writes(t, p, c, conn) {
		t.Error("it was not cut")
	}
	// The packet is sent again, and arrives once the cgroup is exempt.
	if err := p.Exempt(cgroupID(t, clients)); err != nil {
		t.Fatal(err)
	}
	if err := conn.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	if n, err := conn.Read(make([]byte, 1)); n != 1 {
		t.Errorf("of an exempt cgroup it was cut too: %v", err)
	}
}

func TestAServerAnswersAClientWhosePortIsABrokers(t *testing.T) {
	enterNewNetns(t)
	p := loaded(t)
	if err := errors.Join(p.CutEstablished(true), enterCgroup(testCgroup)); err != nil {
		t.Fatal(err)
	}
	for _, address := range []string{"127.0.0.1", "::1"} {
		server := listen(t, at(address, 0)) // in the cgroup of the programs
		from := net.TCPAddrFromAddrPort(netip.MustParseAddrPort(at(address, brokerPort)))
		d := net.Dialer{LocalAddr: from}
		conn, err := d.DialContext(t.Context(), "tcp", server.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		served := acceptFrom(t, server)
		if _, err := io.WriteString(served, "x"); err != nil {
			t.Fatal(err)
		}
		if err := conn.SetReadDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		if n, err := conn.Read(make([]byte, 1)); n != 1 {
			t.Errorf("%s: %v", address, err)
		}
	}
	p.count(t, map[string]uint64{"passed_foreign": 2})
}

func TestWhatConnectLetsGoMayLeave(t *testing.T) {
	for _, c := range []struct {
		name    string
		prepare func(*rig) error
		counter string
	}{
		{"of an exempt cgroup", func(r *rig) error { return r.programs.Exempt(cgroupID(r.t, r.clients)) }, "passed_exempt"},
		{"where the enforcer is down and that may pass", func(r *rig) error {
			return errors.Join(r.programs.SetFailModes(FailModes{PassDown: true}), r.programs.Beat(-1))
		}, "passed_enforcer_down"},
		{"where nobody listens and that may pass", func(r *rig) error {
			return errors.Join(r.programs.SetFailModes(FailModes{PassUnenrolled: true}), r.programs.Unenrol(r.cookie))
		}, "passed_not_enrolled"},
	} {
		t.Run(c.name, func(t *testing.T) {
			enterNewNetns(t)
			r := newRig(t)
			if err := errors.Join(r.programs.CutEstablished(true), c.prepare(r)); err != nil {
				t.Fatal(err)
			}
			broker := listen(t, at("127.0.0.1", brokerPort))
			client := startClient(t, r.clients,
				plan{Steps: []step{{Do: "connect", To: broker.Addr().String()}}, Write: true}, 0)
			if got := client.outcome(); got.Error != "" {
				t.Fatalf("the client got %s", got.Error)
			}
			conn := acceptFrom(t, broker)
			_ = broker.Close()
			if !writes(t, r.programs, client, conn) {
				t.Error("its packets were dropped")
			}
			r.programs.count(t, map[string]uint64{c.counter: 1})
		})
	}
}

func TestAnEnforcerWithoutAHeartbeatIsDown(t *testing.T) {
	r := newRig(t)
	if err := r.programs.Beat(-1); err != nil {
		t.Fatal(err)
	}
	if up, err := r.programs.Up(); up || err != nil {
		t.Errorf("it is up, %v", err)
	}
	if got := r.run(step{Do: "connect", To: at("192.0.2.7", brokerPort)}).outcome(); got.Error != "ECONNREFUSED" {
		t.Errorf("the client got %q", got.Error)
	}
	r.programs.count(t, map[string]uint64{"refused_enforcer_down": 1})
}

func TestASharedPortIsABrokersInItsNetworksOnly(t *testing.T) {
	const shared = 443
	enterNewNetns(t) // has no route but to loopback
	r := newRig(t)
	network := func(s string) Network { return Network{netip.MustParsePrefix(s), shared} }
	set := func(networks ...Network) {
		t.Helper()
		if err := r.programs.SetDestinations([]uint16{brokerPort}, networks); err != nil {
			t.Fatal(err)
		}
	}
	counters := func() (redirected, foreign uint64) {
		t.Helper()
		all, err := r.programs.Counters()
		if err != nil {
			t.Fatal(err)
		}
		return all["redirected"], all["passed_foreign"]
	}
	try := func(address string) bool {
		t.Helper()
		before, foreign := counters()
		_ = r.run(step{Do: "connect", To: at(address, shared)}).outcome()
		after, foreignAfter := counters()
		if after+foreignAfter != before+foreign+1 {
			t.Fatalf("%s: %d redirected, %d foreign", address, after-before, foreignAfter-foreign)
		}
		return after > before
	}
	set(network("192.0.2.0/24"), network("2001:db8::7/128"))
	for address, want := range map[string]bool{
		"192.0.2.7": true, "127.0.0.3": false, "2001:db8::7": true, "::1": false,
		"64:ff9b::192.0.2.7": true, // RFC 6052
	} {
		if got := try(address); got != want {
			t.Errorf("%s is redirected: %v", address, got)
		}
	}
	set(network("127.0.0.3/32"))
	if !try("127.0.0.3") {
		t.Error("an address that was added is not redirected")
	}
	if ports, err := r.programs.Ports(); err != nil || len(ports) != 1 || ports[0] != brokerPort {
		t.Errorf("the ports are %v, %v", ports, err)
	}
}

func TestANetworkNamespaceIsNoticedAtItsFirstSocket(t *testing.T) {
	r := newRig(t)
	c := startClient(t, r.clients, plan{Steps: []step{
		{Do: "only a socket", To: at("192.0.2.7", 53), Proto: unix.IPPROTO_UDP},
		{Do: "connect", To: at("192.0.2.7", brokerPort)},
	}}, unix.CLONE_NEWNET)
	for range 2 {
		_ = c.outcome()
	}
	for _, want := range []struct {
		reason, to string
	}{{"", "[::]:0"}, {"refused_not_enrolled", at("192.0.2.7", brokerPort)}} {
		e := r.event(uint32(c.cmd.Process.Pid))
		if e.Reason() != want.reason || !e.Unenrolled() || e.NetnsCookie == r.cookie || e.Destination().String() != want.to {
			t.Errorf("the event is %+v: %q to %s", e, e.Reason(), e.Destination())
		}
	}
}
