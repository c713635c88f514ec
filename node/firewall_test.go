package node

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/rs/zerolog"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// reaches tells whether the vector reaches the broker where nothing is in its way.
func (n *network) reaches(t *testing.T, v vector) {
	t.Helper()
	before := n.answers.Load()
	v.send(t, n)
	until(t, "the broker's answer", func() bool { return n.answers.Load() > before })
}

func (n *network) options() firewallOptions {
	return firewallOptions{Table: firewallName, Netns: n.host, Ports: []uint16{brokerPort, segmentPort},
		Refined: []networkPort{
			{netip.PrefixFrom(n.broker4, 24), networkPort4}, {netip.PrefixFrom(n.broker4, 32), networkPort4},
			{netip.PrefixFrom(n.broker6, 64), networkPort4}},
		Log: zerolog.Nop()}
}

func (n *network) firewall(t testing.TB) *firewall {
	t.Helper()
	f, err := openFirewall(n.options())
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func counters(t testing.TB, f *firewall) map[string]uint64 {
	t.Helper()
	c, err := f.Counters()
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// settled: all that was sent has arrived or not, as packets of one container keep their order.
func (n *network) settled(t testing.TB) {
	t.Helper()
	at := netip.AddrPortFrom(n.broker4, foreignPort)
	if err := echoes(n.pod, "tcp", at.String(), 1); err != nil {
		t.Fatalf("foreign traffic does not pass: %v", err)
	}
}

var layouts = map[string]func(testing.TB) *network{"routed": routed, "bridged": bridged}

func TestNoPacketOfAContainerReachesABroker(t *testing.T) {
	for name, layout := range layouts {
		t.Run(name, func(t *testing.T) {
			n := layout(t)
			for _, v := range n.vectors() {
				t.Run("without the firewall, "+v.name, func(t *testing.T) { n.reaches(t, v) })
			}
			n.settled(t)
			f := n.firewall(t)
			for _, v := range n.vectors() {
				t.Run(v.name, func(t *testing.T) {
					before, answered := counters(t, f), n.answers.Load()
					v.send(t, n)
					until(t, "a packet dropped as "+v.reason, func() bool {
						now := counters(t, f)
						// Linux 7.3 sees behind a second tag.
						return now[v.reason] > before[v.reason] ||
							v.reason == dropVLAN && now[dropConnection] > before[dropConnection]
					})
					n.settled(t)
					if got := n.answers.Load() - answered; got != 0 {
						t.Errorf("the broker answered %d times", got)
					}
				})
			}
		})
	}
}

// Were a rule or a hook not needed, or no vector aimed at it, these tests could not fail for it.
func TestEachRuleAndHookIsNeeded(t *testing.T) {
	networks := []*network{routed(t), bridged(t)}
	// seesBehind tells whether the kernel finds a broker's port behind these tags, so that no rule about tags is needed.
	seesBehind := func(t *testing.T, v vector) bool {
		n := networks[1]
		f := n.firewall(t)
		before := counters(t, f)[dropConnection]
		v.send(t, n)
		n.settled(t)
		return counters(t, f)[dropConnection] > before
	}
	needed := func(t *testing.T) {
		// More than once: on a busy host an answer may be later than what settles the network.
		for range 5 {
			for _, n := range networks {
				n.firewall(t)
				before := n.answers.Load()
				for _, v := range n.vectors() {
					v.send(t, n)
				}
				n.settled(t)
				if n.answers.Load() > before {
					return
				}
			}
		}
		t.Error("nothing gets through without it either")
	}
	for name, chain := range map[string]*[][]expr.Any{"frames": &firewallFamilies[0].frames,
		"container": &fromContainer, "destination": &toBroker} {
		rules := *chain
		for i := range rules {
			t.Run(fmt.Sprintf("rule %d of %s", i, name), func(t *testing.T) {
				*chain = slices.Delete(slices.Clone(rules), i, i+1)
				defer func() { *chain = rules }()
				if name == "frames" && seesBehind(t, doublyTagged(i)) { // and drops it all the same, as the counter says
					return
				}
				needed(t)
			})
		}
	}
	families := firewallFamilies
	defer func() { firewallFamilies = families }()
	for i, f := range families {
		for j, h := range f.hooks {
			t.Run(fmt.Sprintf("hook %s of family %d", h.name, f.family), func(t *testing.T) {
				firewallFamilies = slices.Clone(families)
				firewallFamilies[i].hooks = slices.Delete(slices.Clone(f.hooks), j, j+1)
				needed(t)
			})
		}
	}
}

func TestForeignTrafficPasses(t *testing.T) {
	for name, layout := range layouts {
		t.Run(name, func(t *testing.T) {
			n := layout(t)
			f := n.firewall(t)
			serve(t, n.pod, brokerPort)
			inside(t, n.broker, func() error {
				dns, err := net.ListenPacket("udp", ":53")
				if err != nil {
					return err
				}
				t.Cleanup(func() { _ = dns.Close() })
				go func() {
					buffer := make([]byte, 1<<16)
					for {
						size, from, err := dns.ReadFrom(buffer)
						if err != nil {
							return
						}
						_, _ = dns.WriteTo(buffer[:size], from)
					}
				}()
				return nil
			})
			clients := map[string]*netns{"host": n.host}
			if n.bridge == "" {
				clients["broker's machine"] = n.broker
			}
			for i, broker := range []netip.Addr{n.broker4, n.broker6} {
				pod := []netip.Addr{n.pod4, n.pod6}[i]
				if err := echoes(n.pod, "tcp", netip.AddrPortFrom(broker, foreignPort).String(), 1<<20); err != nil {
					t.Errorf("TCP to %s: %v", broker, err)
				}
				// More than a packet holds, so in fragments.
				if err := echoes(n.pod, "udp", netip.AddrPortFrom(broker, 53).String(), 4000); err != nil {
					t.Errorf("UDP to %s: %v", broker, err)
				}
				for from, client := range clients {
					if err := echoes(client, "tcp", netip.AddrPortFrom(pod, brokerPort).String(), 1<<20); err != nil {
						t.Errorf("from the %s to a server in the container at %s: %v", from, pod, err)
					}
				}
			}
			// What belongs to another network at that port is no broker's.
			if err := f.SetDestinations(nil, []networkPort{
				{netip.MustParsePrefix("192.0.2.0/24"), brokerPort}, {netip.MustParsePrefix("2001:db8::/32"), brokerPort},
			}); err != nil {
				t.Fatal(err)
			}
			for _, broker := range []netip.Addr{n.broker4, n.broker6} {
				if err := echoes(n.pod, "tcp", netip.AddrPortFrom(broker, brokerPort).String(), 1); err != nil {
					t.Errorf("TCP to %s: %v", broker, err)
				}
			}
			for reason, packets := range counters(t, f) {
				if packets != 0 {
					t.Errorf("%d packets were dropped as %s", packets, reason)
				}
			}
		})
	}
}

func TestAnswersToAClientWithABrokersPortPass(t *testing.T) {
	n := routed(t)
	f := n.firewall(t)
	serve(t, n.pod, foreignPort)
	const high = firstEphemeralPort + 100
	if err := f.SetDestinations([]uint16{high}, nil); err != nil {
		t.Fatal(err)
	}
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{Port: high}, Timeout: redirectPatience}
	inside(t, n.broker, func() error {
		conn, err := dialer.Dial("tcp", netip.AddrPortFrom(n.pod4, foreignPort).String())
		if err != nil {
			return err
		}
		return conn.Close()
	})
	before := counters(t, f)[dropConnection]
	connect(func(n *network) netip.AddrPort { return netip.AddrPortFrom(n.broker4, high) })(t, n)
	if got := counters(t, f)[dropConnection]; got == before {
		t.Error("a connection to the broker's port was not dropped")
	}
}

func TestConnectionsThatExistPassIfToldSo(t *testing.T) {
	n := bridged(t)
	var conn net.Conn
	inside(t, n.pod, func() (err error) {
		conn, err = net.Dial("tcp", netip.AddrPortFrom(n.broker4, brokerPort).String())
		return err
	})
	defer conn.Close()
	hello := func() error {
		if err := conn.SetDeadline(time.Now().Add(redirectPatience)); err != nil {
			return err
		}
		if _, err := io.WriteString(conn, "hello"); err != nil {
			return err
		}
		_, err := io.ReadFull(conn, make([]byte, len("hello")))
		return err
	}
	options := n.options()
	options.Established = true
	f, err := openFirewall(options)
	if err != nil {
		t.Fatal(err)
	}
	if err := hello(); err != nil {
		t.Fatal(err)
	}
	if got := counters(t, f); got[dropSegment]+got[dropConnection] != 0 {
		t.Errorf("dropped: %v", got)
	}
	connect(func(n *network) netip.AddrPort { return netip.AddrPortFrom(n.broker4, brokerPort) })(t, n)
	if got := counters(t, f); got[dropConnection] == 0 {
		t.Errorf("a new connection was not dropped: %v", got)
	}
	if err := f.SetEstablished(false); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(conn, "hello"); err != nil {
		t.Fatal(err)
	}
	until(t, "a segment dropped", func() bool { return counters(t, f)[dropSegment] > 0 })
}

// addContainer gives the network's host a second container; the first is no more looked at.
func (n *network) addContainer(t *testing.T) {
	t.Helper()
	n.pod = newTestNetns(t)
	n.pod4, n.pod6 = netip.MustParseAddr("10.66.3.2"), netip.MustParseAddr("fd66:3::2")
	addVeth(t, n.host, n.pod, "pod1", "eth0")
	inside(t, n.host, func() error { return up("pod1", "10.66.3.1/24", "fd66:3::1/64") })
	inside(t, n.pod, func() error {
		return errors.Join(up("eth0", "10.66.3.2/24", "fd66:3::2/64"), defaultRoutes("10.66.3.1", "fd66:3::1"))
	})
	n.podMAC, n.nextMAC = macOf(t, n.pod, "eth0"), macOf(t, n.host, "pod1")
}

// blocked: no answer to the first vector, which is dropped.
func (n *network) blocked(t *testing.T, f *firewall) {
	t.Helper()
	dropped, answered := counters(t, f)[dropConnection], n.answers.Load()
	vectors[0].send(t, n)
	until(t, "a packet dropped", func() bool { return counters(t, f)[dropConnection] > dropped })
	n.settled(t)
	if n.answers.Load() != answered {
		t.Error("the broker answered")
	}
}

func TestANewContainerIsCoveredThoughNobodyFollows(t *testing.T) {
	n := routed(t)
	f := n.firewall(t)
	n.addContainer(t)
	n.blocked(t, f)
}

func TestAContainerCannotLeaveTheFirewallByItsOwnEnd(t *testing.T) {
	n := routed(t)
	f := n.firewall(t)
	elsewhere := newTestNetns(t)
	inside(t, n.pod, func() error {
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return errors.Join(netlink.LinkSetDown(l), netlink.LinkSetName(l, "up0"),
			netlink.LinkSetNsFd(l, int(elsewhere.file.Fd())))
	})
	n.pod = elsewhere
	inside(t, n.pod, func() error {
		l, err := netlink.LinkByName("up0")
		if err != nil {
			return err
		}
		return errors.Join(netlink.LinkSetName(l, "eth0"), up("eth0", "10.66.1.2/24", "fd66:1::2/64"),
			defaultRoutes("10.66.1.1", "fd66:1::1"))
	})
	if err := f.refresh(); err != nil {
		t.Fatal(err)
	}
	n.blocked(t, f)
}

func TestAnExemptContainerReachesBrokers(t *testing.T) {
	for name, layout := range layouts {
		t.Run(name, func(t *testing.T) {
			n := layout(t)
			f := n.firewall(t)
			if err := f.SetExempt([]*netns{n.pod}); err != nil {
				t.Fatal(err)
			}
			n.reaches(t, vectors[0])
			if err := f.SetExempt(nil); err != nil {
				t.Fatal(err)
			}
			n.settled(t)
			n.blocked(t, f)
		})
	}
}

// follows runs Follow until the test ends.
func follows(t *testing.T, f *firewall) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		f.Follow(ctx)
		close(done)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
}

func (f *firewall) skips(t *testing.T, name string) bool {
	t.Helper()
	var index int
	inside(t, f.Netns, func() error {
		l, err := netlink.LinkByName(name)
		if err == nil {
			index = l.Attrs().Index
		}
		return err
	})
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Contains(f.skip, uint32(index))
}

func TestANewDeviceOfAnExemptContainerIsLeftOut(t *testing.T) {
	n := routed(t)
	f := n.firewall(t)
	if err := f.SetExempt([]*netns{n.pod}); err != nil {
		t.Fatal(err)
	}
	follows(t, f)
	addVeth(t, n.host, n.pod, "pod2", "eth1")
	until(t, "pod2 left out", func() bool { return f.skips(t, "pod2") })
	if f.skips(t, "pod2") != f.skips(t, "pod0") {
		t.Error("the first device is left out no more")
	}
}

func TestAPairWithinTheHostIsLeftOutUntilAnEndIsMoved(t *testing.T) {
	n := routed(t)
	f := n.firewall(t)
	follows(t, f)
	addVeth(t, n.host, n.host, "left", "right")
	if f.skips(t, "left") {
		t.Error("an end whose peer is down is left out")
	}
	inside(t, n.host, func() error { return up("right") })
	until(t, "left out", func() bool { return f.skips(t, "left") && f.skips(t, "right") })
	inside(t, n.host, func() error {
		l, err := netlink.LinkByName("right")
		if err != nil {
			return err
		}
		return netlink.LinkSetNsFd(l, int(n.pod.file.Fd()))
	})
	until(t, "covered", func() bool { return !f.skips(t, "left") })
}

func TestARouterAdvertisementMakesNoUplink(t *testing.T) {
	n := routed(t)
	f := n.firewall(t)
	if !f.skips(t, "up0") || f.skips(t, "pod0") {
		t.Fatal("the default route does not make the uplink")
	}
	inside(t, n.host, func() error {
		l, err := netlink.LinkByName("pod0")
		if err != nil {
			return err
		}
		return netlink.RouteAppend(&netlink.Route{Gw: net.ParseIP("fd66:1::2"), LinkIndex: l.Attrs().Index,
			Protocol: unix.RTPROT_RA, Priority: 7})
	})
	if err := f.refresh(); err != nil {
		t.Fatal(err)
	}
	if f.skips(t, "pod0") {
		t.Error("the container made itself an uplink")
	}
}

func TestWhatSomebodyDidToTheTablesIsSeenAndUndone(t *testing.T) {
	n := routed(t)
	f := n.firewall(t)
	table := &nftables.Table{Name: firewallName, Family: nftables.TableFamilyINet}
	chain := &nftables.Chain{Name: "refused", Table: table}
	for name, change := range map[string]func(*nftables.Conn) error{
		"the rule set was flushed": func(c *nftables.Conn) error { c.FlushRuleset(); return nil },
		"a table was deleted":      func(c *nftables.Conn) error { c.DelTable(table); return nil },
		"a rule was deleted": func(c *nftables.Conn) error {
			rules, err := c.GetRules(table, chain)
			if err != nil {
				return err
			}
			return c.DelRule(rules[0])
		},
		"a rule was put before ours": func(c *nftables.Conn) error {
			c.InsertRule(&nftables.Rule{Table: table, Chain: chain,
				Exprs: []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}}})
			return nil
		},
		"a port was taken out": func(c *nftables.Conn) error {
			return c.SetDeleteElements(&nftables.Set{Table: table, Name: "ports"},
				[]nftables.SetElement{{Key: []byte{brokerPort >> 8, brokerPort & 0xff}}})
		},
		"a device was left out": func(c *nftables.Conn) error {
			return c.SetAddElements(&nftables.Set{Table: table, Name: "skip"},
				[]nftables.SetElement{{Key: []byte{99, 0, 0, 0}}})
		},
	} {
		t.Run(name, func(t *testing.T) {
			if err := f.Check(); err != nil {
				t.Fatal(err)
			}
			inside(t, n.host, func() error {
				c, err := nftables.New()
				if err != nil {
					return err
				}
				return errors.Join(change(c), c.Flush())
			})
			if err := f.Check(); !errors.Is(err, errFirewallChanged) {
				t.Errorf("got %v", err)
			}
			if err := f.Restore(); err != nil {
				t.Fatal(err)
			}
			if err := f.Check(); err != nil {
				t.Error(err)
			}
			n.blocked(t, f)
		})
	}
	t.Run("tables of others are theirs", func(t *testing.T) {
		undo := dnat(t, n.host, nftables.ChainHookPrerouting, netip.AddrPortFrom(serviceAddress, servicePort),
			netip.AddrPortFrom(n.broker4, foreignPort))
		defer undo()
		if err := f.Check(); err != nil {
			t.Error(err)
		}
	})
}

func TestAChangeThatFailsLeavesTheTablesAndIsSeen(t *testing.T) {
	n := routed(t)
	f := n.firewall(t)
	f.Table = strings.Repeat("x", 300)
	if err := f.SetDestinations(nil, nil); err == nil {
		t.Fatal("a name too long for the kernel was taken")
	}
	f.Table = firewallName
	if err := f.Check(); !errors.Is(err, errFirewallChanged) {
		t.Errorf("got %v", err)
	}
	n.blocked(t, f)
	if err := f.SetDestinations([]uint16{brokerPort}, nil); err != nil {
		t.Fatal(err)
	}
	if err := f.Check(); err != nil {
		t.Error(err)
	}
}

func TestNoPacketSlipsByWhileTheTablesAreReplaced(t *testing.T) {
	const changes = 50
	n := routed(t)
	f := n.firewall(t)
	fd := packetSocket(t, n.pod, "eth0", 0)
	defer func() { _ = unix.Close(fd) }()
	frame := slices.Concat(n.nextMAC, n.podMAC, []byte{8, 0}, whole4(brokerPort, synFlag)(n)[0])
	var sent atomic.Int64
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			default:
			}
			if _, err := unix.Write(fd, frame); err == nil {
				sent.Add(1)
			}
		}
	}()
	for i := range changes {
		err := f.SetDestinations([]uint16{brokerPort, 10000 + uint16(i)}, nil)
		if err == nil && i%10 == 0 {
			f, err = openFirewall(n.options()) // as a node that was restarted
		}
		if err != nil {
			t.Fatal(err)
		}
		before := sent.Load()
		until(t, "more packets", func() bool { return sent.Load() > before+10 })
	}
	close(stop)
	<-stopped
	n.settled(t)
	if got := n.answers.Load(); got != 0 {
		t.Errorf("the broker answered %d of %d packets", got, sent.Load())
	}
	counted := counters(t, f)[dropConnection]
	if counted == 0 || counted > uint64(sent.Load()) {
		t.Errorf("%d packets were sent, %d counted", sent.Load(), counted)
	}
	t.Logf("%d packets during %d changes, %d counted", sent.Load(), changes, counted)
}

func TestCountersOutliveTheNodeAndAFlush(t *testing.T) {
	n := routed(t)
	f := n.firewall(t)
	n.blocked(t, f)
	want := counters(t, f)[dropConnection]
	f = n.firewall(t)
	if got := counters(t, f)[dropConnection]; got != want {
		t.Errorf("after a restart: %d, want %d", got, want)
	}
	inside(t, n.host, func() error {
		c, err := nftables.New()
		if err != nil {
			return err
		}
		c.FlushRuleset()
		return c.Flush()
	})
	if got := counters(t, f)[dropConnection]; got != want {
		t.Errorf("after a flush: %d, want %d", got, want)
	}
	if err := f.Restore(); err != nil {
		t.Fatal(err)
	}
	if got := counters(t, f)[dropConnection]; got != want {
		t.Errorf("after it was restored: %d, want %d", got, want)
	}
}

func TestRemovedIsGone(t *testing.T) {
	n := routed(t)
	f := n.firewall(t)
	for range 2 { // nothing there is no error
		inside(t, n.host, func() error { return RemoveFirewall(firewallName) })
	}
	if err := f.Check(); !errors.Is(err, errFirewallChanged) {
		t.Errorf("got %v", err)
	}
	n.reaches(t, vectors[0])
}

// The networks take turns, so that what else the machine does falls on both.
func BenchmarkFirewall(b *testing.B) {
	const burst = 200
	hole := netip.MustParseAddr("192.0.2.1")
	type sender struct {
		name  string
		fd    int
		frame []byte
		spent []time.Duration // a burst
	}
	var senders []*sender
	for name, on := range map[string]bool{"without": false, "with": true} {
		n := routed(b)
		inside(b, n.host, func() error {
			to := &net.IPNet{IP: hole.AsSlice(), Mask: net.CIDRMask(32, 32)}
			return netlink.RouteAdd(&netlink.Route{Dst: to, Type: unix.RTN_BLACKHOLE})
		})
		if on {
			n.firewall(b)
		}
		tcp := ipv4(n.pod4, hole, 0, nil, segment(n.pod4, hole, foreignPort, ackFlag))
		udp := slices.Clone(tcp)
		udp[9], udp[10], udp[11] = unix.IPPROTO_UDP, 0, 0
		binary.BigEndian.PutUint16(udp[10:], checksum(udp[:20]))
		fd := packetSocket(b, n.pod, "eth0", 0)
		b.Cleanup(func() { _ = unix.Close(fd) })
		for protocol, packet := range map[string][]byte{"tcp": tcp, "udp": udp} {
			frame := slices.Concat(n.nextMAC, n.podMAC, []byte{8, 0}, packet)
			senders = append(senders, &sender{name: protocol + "-" + name, fd: fd, frame: frame})
		}
	}
	for b.Loop() {
		for _, s := range senders {
			start := time.Now()
			for range burst {
				if _, err := unix.Write(s.fd, s.frame); err != nil {
					b.Fatal(err)
				}
			}
			s.spent = append(s.spent, time.Since(start))
		}
	}
	for _, s := range senders {
		slices.Sort(s.spent)
		b.ReportMetric(float64(s.spent[len(s.spent)/10])/burst, "p10-ns/"+s.name)
		b.ReportMetric(float64(s.spent[len(s.spent)/2])/burst, "p50-ns/"+s.name)
	}
}

// Whole streams, as segmentation offload has them pass: one packet of 64 KiB.
func BenchmarkFirewallStream(b *testing.B) {
	const size = 4 << 20
	var spent [2][]time.Duration // without, with
	var conns [2]net.Conn
	for i := range conns {
		n := routed(b)
		if i == 1 {
			n.firewall(b)
		}
		inside(b, n.pod, func() (err error) {
			conns[i], err = net.Dial("tcp", netip.AddrPortFrom(n.broker4, foreignPort).String())
			return err
		})
		b.Cleanup(func() { _ = conns[i].Close() })
	}
	out, in := make([]byte, size), make([]byte, size)
	for b.Loop() {
		for i, conn := range conns {
			start := time.Now()
			sent := make(chan error, 1)
			go func() {
				_, err := conn.Write(out)
				sent <- err
			}()
			if _, err := io.ReadFull(conn, in); err != nil {
				b.Fatal(err)
			}
			if err := <-sent; err != nil {
				b.Fatal(err)
			}
			spent[i] = append(spent[i], time.Since(start))
		}
	}
	for i, name := range []string{"without", "with"} {
		slices.Sort(spent[i])
		b.ReportMetric(float64(spent[i][len(spent[i])/10].Microseconds()), "p10-us/"+name)
		b.ReportMetric(float64(spent[i][len(spent[i])/2].Microseconds()), "p50-us/"+name)
	}
}
