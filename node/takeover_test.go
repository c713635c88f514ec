package node

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"klamm/bpf"
	"klamm/test/bounds"
)

// brokerPort is a broker's in the namespaces of these tests.
const brokerPort = 9092

// nat64Broker is what the DNS64 of a host makes of the broker at 192.0.2.1.
const nat64Broker = "64:ff9b::c000:201"

// silent is an address that nobody has: packets to it are lost.
const silent = "192.0.2.99"

// testNetns is a network namespace with the addresses that tests need.
func testNetns(t testing.TB) *netns {
	t.Helper()
	n := newTestNetns(t)
	within(t, n, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		broker, err := netlink.ParseAddr(nat64Broker + "/128")
		if err != nil {
			return err
		}
		_, lost, err := net.ParseCIDR(silent + "/32")
		if err != nil {
			return err
		}
		route := &netlink.Route{LinkIndex: lo.Attrs().Index, Dst: lost, Scope: netlink.SCOPE_LINK}
		// 1: clients may, 4: without a cookie of the server.
		return errors.Join(netlink.AddrAdd(lo, broker), netlink.RouteAdd(route),
			os.WriteFile("/proc/sys/net/ipv4/tcp_fastopen", []byte("5"), 0),
			os.WriteFile("/proc/sys/net/core/somaxconn", []byte("16384"), 0))
	})
	await(t, "the IPv6 address, which the kernel adds in the background", func() (there bool) {
		within(t, n, func() error {
			routes, err := netlink.RouteGet(net.ParseIP(nat64Broker))
			there = err == nil && len(routes) == 1 && routes[0].Type == unix.RTN_LOCAL
			return nil
		})
		return there
	})
	return n
}

func within(t testing.TB, n *netns, f func() error) {
	t.Helper()
	if err := n.do(f); err != nil {
		t.Fatal(err)
	}
}

// listenIn listens, accepts nothing, and ends with the test.
func listenIn(t testing.TB, n *netns, at string) *net.TCPListener {
	t.Helper()
	var l net.Listener
	config := net.ListenConfig{}
	config.SetMultipathTCP(false)
	within(t, n, func() (err error) {
		l, err = config.Listen(context.Background(), "tcp", at)
		return err
	})
	t.Cleanup(func() { _ = l.Close() })
	return l.(*net.TCPListener)
}

func acceptIn(t *testing.T, l *net.TCPListener) *net.TCPConn {
	t.Helper()
	conn, err := l.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// connector says what socket connects, and how.
type connector struct {
	family, protocol int
	fastOpen         bool
	from             uint16 // bound port
	stamp            func(fd int) error
}

// connect connects a socket that ends with the test. It does not wait for an answer.
func (c connector) connect(t testing.TB, n *netns, to string) (fd int) {
	t.Helper()
	if c.family == 0 {
		c.family = unix.AF_INET
	}
	within(t, n, func() (err error) {
		if fd, err = unix.Socket(c.family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, c.protocol); err != nil {
			return err
		}
		t.Cleanup(func() { _ = unix.Close(fd) })
		if c.stamp != nil {
			if err := c.stamp(fd); err != nil {
				return err
			}
		}
		if c.fastOpen {
			if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_FASTOPEN_CONNECT, 1); err != nil {
				return err
			}
		}
		if c.from != 0 {
			err := errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1),
				unix.Bind(fd, &unix.SockaddrInet4{Port: int(c.from), Addr: [4]byte{127, 0, 0, 1}}))
			if err != nil {
				return err
			}
		}
		dst := netip.MustParseAddrPort(to)
		var address unix.Sockaddr = &unix.SockaddrInet6{Port: int(dst.Port()), Addr: dst.Addr().As16()}
		if c.family == unix.AF_INET {
			address = &unix.SockaddrInet4{Port: int(dst.Port()), Addr: dst.Addr().As4()}
		}
		if dst.Addr().String() != silent {
			return unix.Connect(fd, address)
		}
		if err := errors.Join(unix.SetNonblock(fd, true), unix.Connect(fd, address)); !errors.Is(err, unix.EINPROGRESS) {
			return fmt.Errorf("connecting to an address that does not answer: %w", err)
		}
		return nil
	})
	return fd
}

// wantAborted fails unless the socket is told ECONNABORTED.
func wantAborted(t *testing.T, fd int) {
	t.Helper()
	wait := []unix.PollFd{{Fd: int32(fd), Events: 0}} // of errors poll(2) tells always
	_, err := unix.Poll(wait, int(redirectPatience.Milliseconds()))
	told, optErr := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err = errors.Join(err, optErr); err != nil || unix.Errno(told) != unix.ECONNABORTED {
		t.Errorf("the client is told %v, %v", unix.Errno(told), err)
	}
}

// wantAlive fails unless the socket is connected.
func wantAlive(t *testing.T, fd int) {
	t.Helper()
	if s := stateOf(t, fd); s != stateEstablished {
		t.Errorf("the connection is %s, not ESTABLISHED", s)
	}
}

func stateOf(t *testing.T, fd int) tcpState {
	t.Helper()
	info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	if err != nil {
		t.Fatal(err)
	}
	return tcpState(info.State)
}

func await(t testing.TB, what string, condition func() bool) {
	t.Helper()
	for end := time.Now().Add(redirectPatience); !condition(); {
		if time.Now().After(end) {
			t.Fatalf("waited %v in vain for %s", redirectPatience, what)
		}
	}
}

func localPort(t *testing.T, fd int) uint16 {
	t.Helper()
	name, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	return uint16(name.(*unix.SockaddrInet4).Port)
}

// trial is a take-over whose reports and waits are on record.
type trial struct {
	takeOver
	reports []established
	events  []any // takeOverAction or time.Duration, as they came
}

func newTrial() *trial {
	tr := new(trial)
	tr.takeOver = takeOver{mode: TakeOver, rate: 50, stamps: noStamps,
		broker: func(to netip.AddrPort) bool { return to.Port() == brokerPort },
		exempt: func(established) bool { return false },
		report: func(e established) {
			tr.reports = append(tr.reports, e)
			tr.events = append(tr.events, e.action)
		},
		wait: func(ctx context.Context, d time.Duration) error {
			tr.events = append(tr.events, d)
			return ctx.Err()
		}}
	return tr
}

// want runs the take-over and fails unless so many connections met each action.
func (tr *trial) want(t *testing.T, n *netns, want takeOverSummary) {
	t.Helper()
	got, err := tr.run(t.Context(), []*netns{n})
	if err != nil {
		t.Error(err)
	}
	if !maps.Equal(got, want) {
		t.Errorf("the summary is %v, not %v", got, want)
	}
}

func TestAnOldConnectionIsTakenOver(t *testing.T) {
	all := fmt.Sprintf("[::]:%d", brokerPort)
	for name, c := range map[string]struct {
		connector
		listen, to string
		after      func(t *testing.T, fd int, l *net.TCPListener)
		state      tcpState
		broker     string // where it differs from to
	}{
		"of IPv4":                {listen: all, to: "127.0.0.1:9092", state: stateEstablished},
		"of IPv6":                {connector{family: unix.AF_INET6}, all, "[::1]:9092", nil, stateEstablished, ""},
		"of a v4-mapped address": {connector{family: unix.AF_INET6}, all, "127.0.0.1:9092", nil, stateEstablished, ""},
		"of NAT64": {connector{family: unix.AF_INET6}, all, "[" + nat64Broker + "]:9092", nil, stateEstablished,
			"192.0.2.1:9092"},
		"of MPTCP":             {connector{protocol: unix.IPPROTO_MPTCP}, all, "127.0.0.1:9092", nil, stateEstablished, ""},
		"that is not answered": {listen: all, to: silent + ":9092", state: stateSynSent},
		"of TCP Fast Open that has sent nothing": {connector{fastOpen: true}, all, "127.0.0.1:9092", nil,
			stateSynSent, ""},
		"that the broker has closed": {listen: all, to: "127.0.0.1:9092", state: stateCloseWait,
			after: func(t *testing.T, fd int, l *net.TCPListener) {
				_ = acceptIn(t, l).Close()
				if n, err := unix.Read(fd, make([]byte, 1)); n != 0 || err != nil {
					t.Errorf("read %d bytes, %v", n, err)
				}
			}},
		"that the client has closed for writing": {listen: all, to: "127.0.0.1:9092", state: stateFinWait2,
			after: func(t *testing.T, fd int, l *net.TCPListener) {
				if err := unix.Shutdown(fd, unix.SHUT_WR); err != nil {
					t.Error(err)
				}
				acceptIn(t, l)
				await(t, "the broker's ACK", func() bool { return stateOf(t, fd) == stateFinWait2 })
			}},
	} {
		t.Run(name, func(t *testing.T) {
			n := testNetns(t)
			l := listenIn(t, n, c.listen)
			fd := c.connect(t, n, c.to)
			if c.after != nil {
				c.after(t, fd, l)
			}
			tr := newTrial()
			var asked []netip.AddrPort
			tr.broker = func(to netip.AddrPort) bool {
				if to.Port() == brokerPort {
					asked = append(asked, to)
				}
				return to.Port() == brokerPort
			}
			tr.want(t, n, takeOverSummary{takenDestroyed: 1})
			wantAborted(t, fd)

			to := netip.MustParseAddrPort(c.to)
			broker := to
			if c.broker != "" {
				broker = netip.MustParseAddrPort(c.broker)
			}
			if len(asked) != 1 || asked[0] != broker {
				t.Errorf("asked whether %v are brokers, not %s", asked, broker)
			}
			r := tr.reports[0]
			if r.netns != n.inode || r.remote != to || r.broker != broker || r.state != c.state || r.err != nil ||
				r.uid != uint32(os.Getuid()) || !r.local.IsValid() {
				t.Errorf("the report is %+v", r)
			}
			exe, err := os.Executable()
			if err != nil {
				t.Fatal(err)
			}
			comm := filepath.Base(exe)
			if want := []owner{{os.Getpid(), comm[:min(len(comm), 15)], exe}}; !slices.Equal(r.owners, want) {
				t.Errorf("the owners are %+v, not %+v", r.owners, want)
			}
			root, err := Cgroup2Mount()
			if err != nil {
				t.Fatal(err)
			}
			if id, err := cgroupID(ownCgroup(root)); err != nil || r.cgroup != id {
				t.Errorf("the socket's cgroup is %d, not %d: %v", r.cgroup, id, err)
			}
		})
	}
}

func TestWhatIsNoOldConnectionToABrokerIsLeftAlone(t *testing.T) {
	n := testNetns(t)
	listenIn(t, n, fmt.Sprintf("127.0.0.1:%d", brokerPort))
	elsewhere := listenIn(t, n, "127.0.0.1:0")
	foreign := connector{}.connect(t, n, elsewhere.Addr().String())
	notABroker := connector{}.connect(t, n, "127.0.0.1:9092")
	tr := newTrial()
	tr.broker = func(to netip.AddrPort) bool { return to == netip.MustParseAddrPort("192.0.2.1:9092") }
	tr.want(t, n, takeOverSummary{})
	wantAlive(t, foreign)
	wantAlive(t, notABroker)
}

func TestWhatRemainsOfAClosedConnectionIsNotFound(t *testing.T) {
	for name, closes := range map[string]func(client, broker net.Conn) error{
		"in TIME_WAIT": func(client, broker net.Conn) error { return errors.Join(client.Close(), broker.Close()) },
		"in FIN_WAIT2": func(client, _ net.Conn) error { return client.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			n := testNetns(t)
			l := listenIn(t, n, fmt.Sprintf("127.0.0.1:%d", brokerPort))
			var client net.Conn
			within(t, n, func() (err error) {
				client, err = net.Dial("tcp", l.Addr().String())
				return err
			})
			if err := closes(client, acceptIn(t, l)); err != nil {
				t.Fatal(err)
			}
			d, err := openDiag(n, noStamps)
			if err != nil {
				t.Fatal(err)
			}
			defer d.Close()
			await(t, "the broker's ACK", func() bool {
				unacked, err := d.dump(func(tcpSocket) bool { return true }, stateFinWait1, stateLastAck, stateClosing)
				return err == nil && len(unacked) == 0
			})
			newTrial().want(t, n, takeOverSummary{})
		})
	}
}

func TestAServerWhoseClientHasABrokersPortKeepsItsConnection(t *testing.T) {
	for _, at := range []string{"127.0.0.1:0", "0.0.0.0:0", "[::]:0"} {
		t.Run(at, func(t *testing.T) {
			n := testNetns(t)
			server := listenIn(t, n, at)
			to := fmt.Sprintf("127.0.0.1:%d", netip.MustParseAddrPort(server.Addr().String()).Port())
			client := connector{from: brokerPort}.connect(t, n, to)
			tr := newTrial()
			tr.want(t, n, takeOverSummary{takenPassive: 1}) // in the queue of the listener
			acceptIn(t, server)
			tr.want(t, n, takeOverSummary{takenPassive: 1})
			wantAlive(t, client)
		})
	}
}

func TestAListenerAtAnotherAddressIsNoExcuse(t *testing.T) {
	n := testNetns(t)
	listenIn(t, n, fmt.Sprintf("127.0.0.1:%d", brokerPort))
	client := connector{}.connect(t, n, "127.0.0.1:9092")
	for _, at := range []string{"127.0.0.2", "::1"} {
		listenIn(t, n, netip.AddrPortFrom(netip.MustParseAddr(at), localPort(t, client)).String())
	}
	newTrial().want(t, n, takeOverSummary{takenDestroyed: 1})
	wantAborted(t, client)
}

func TestTheNodesOwnSocketsAndExemptOnesAreLeft(t *testing.T) {
	n := testNetns(t)
	listenIn(t, n, fmt.Sprintf("127.0.0.1:%d", brokerPort))
	r, _ := openRedirect(t, 19092)
	stamped := connector{stamp: r.programs.Stamp}.connect(t, n, "127.0.0.1:9092")
	exempt := connector{}.connect(t, n, "127.0.0.1:9092")
	other := connector{stamp: func(fd int) error {
		return r.programs.Stamps().Put(int32(fd), uint8(bpf.StampOwn+1)) // what connect4/6 let go has it
	}}.connect(t, n, "127.0.0.1:9092")
	tr := newTrial()
	tr.stamps = r.programs.Stamps().FD()
	tr.exempt = func(e established) bool { return e.local.Port() == localPort(t, exempt) }
	tr.want(t, n, takeOverSummary{takenDestroyed: 1, takenExempt: 1})
	wantAlive(t, stamped)
	wantAlive(t, exempt)
	wantAborted(t, other)
}

func TestTheModeDecides(t *testing.T) {
	for mode, want := range map[EstablishedMode]takeOverSummary{Observe: {takenLeft: 2}, RefuseNewOnly: {}} {
		t.Run(string(mode), func(t *testing.T) {
			n := testNetns(t)
			listenIn(t, n, fmt.Sprintf("127.0.0.1:%d", brokerPort))
			clients := []int{connector{}.connect(t, n, "127.0.0.1:9092"), connector{}.connect(t, n, "127.0.0.1:9092")}
			tr := newTrial()
			tr.mode = mode
			tr.want(t, n, want)
			for _, fd := range clients {
				wantAlive(t, fd)
			}
			if len(tr.reports) != want[takenLeft] {
				t.Errorf("%d reports: %v", len(tr.reports), tr.reports)
			}
		})
	}
}

func TestAConnectionOfTheSameAddressesIsNotMeant(t *testing.T) {
	n := testNetns(t)
	listenIn(t, n, fmt.Sprintf("127.0.0.1:%d", brokerPort))
	d, err := openDiag(n, noStamps)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	const port = 20001
	connector{from: port}.connect(t, n, "127.0.0.1:9092")
	find := func() []tcpSocket {
		t.Helper()
		found, err := d.dump(func(s tcpSocket) bool { return s.local.Port() == port }, stateEstablished)
		if err != nil || len(found) != 1 {
			t.Fatalf("found %v, %v", found, err)
		}
		return found
	}
	old := find()[0]
	if err := d.destroy(old); err != nil {
		t.Fatal(err)
	}
	if err := d.destroy(old); !errors.Is(err, errSocketGone) {
		t.Errorf("ending it twice says %v", err)
	}
	other := connector{from: port}.connect(t, n, "127.0.0.1:9092")
	if now := find()[0]; now.local != old.local || now.remote != old.remote || now.id == old.id {
		t.Fatalf("the other connection is %+v, the first was %+v", now, old)
	}
	if err := d.destroy(old); !errors.Is(err, errSocketGone) {
		t.Errorf("ending what is gone says %v", err)
	}
	wantAlive(t, other)
}

func TestAConnectUnderWayWhileTheProgramsWereAttachedIsFoundLater(t *testing.T) {
	n := testNetns(t)
	listenIn(t, n, fmt.Sprintf("127.0.0.1:%d", brokerPort))
	tr := newTrial()
	var late int
	tr.wait = func(context.Context, time.Duration) error {
		if late == 0 {
			late = connector{}.connect(t, n, "127.0.0.1:9092")
		}
		return nil
	}
	tr.want(t, n, takeOverSummary{takenDestroyed: 1})
	wantAborted(t, late)
}

func TestConnectionsThatKeepComingAreAnError(t *testing.T) {
	n := testNetns(t)
	listenIn(t, n, fmt.Sprintf("127.0.0.1:%d", brokerPort))
	again := func() { connector{}.connect(t, n, "127.0.0.1:9092") }
	again()
	tr := newTrial()
	tr.report = func(established) { again() }
	done, err := tr.run(t.Context(), []*netns{n})
	if err == nil || !strings.Contains(err.Error(), "still new connections") || done[takenDestroyed] != takeOverPasses-1 {
		t.Errorf("%v, %v", done, err)
	}
}

func TestTheRateIsKeptWithJitter(t *testing.T) {
	const clients, rate = 40, 10
	n := testNetns(t)
	listenIn(t, n, fmt.Sprintf("127.0.0.1:%d", brokerPort))
	for range clients {
		connector{}.connect(t, n, "127.0.0.1:9092")
	}
	tr := newTrial()
	tr.rate = rate
	tr.want(t, n, takeOverSummary{takenDestroyed: clients})

	// Ended, wait, ended, wait ... ended, and then a wait before the second look.
	if len(tr.events) != 2*clients || tr.events[2*clients-1] != takeOverSettle {
		t.Fatalf("%d events, the last is %v", len(tr.events), tr.events[len(tr.events)-1])
	}
	var total time.Duration
	different := map[time.Duration]bool{}
	for i, e := range tr.events[:2*clients-1] {
		d, isWait := e.(time.Duration)
		if isWait != (i%2 == 1) || isWait && (d < time.Second/rate/2 || d > 3*time.Second/rate/2) {
			t.Errorf("event %d is %v", i, e)
		}
		if isWait {
			total += d
			different[d] = true
		}
	}
	if mean := total / (clients - 1); mean < 70*time.Millisecond || mean > 130*time.Millisecond || len(different) < 2 {
		t.Errorf("a connection is ended every %v on average, %d different waits", mean, len(different))
	}
}

func TestTheEndOfTheNodeEndsATakeOver(t *testing.T) {
	n := testNetns(t)
	listenIn(t, n, fmt.Sprintf("127.0.0.1:%d", brokerPort))
	for range 3 {
		connector{}.connect(t, n, "127.0.0.1:9092")
	}
	ctx, cancel := context.WithCancel(t.Context())
	tr := newTrial()
	tr.wait = sleep
	tr.report = func(established) { cancel() }
	done, err := tr.run(ctx, []*netns{n})
	if !errors.Is(err, context.Canceled) || done[takenDestroyed] != 1 {
		t.Errorf("%v, %v", done, err)
	}
}

func TestThousandsOfForeignConnectionsAreNotTouched(t *testing.T) {
	n := testNetns(t)
	listenIn(t, n, fmt.Sprintf("127.0.0.1:%d", brokerPort))
	foreign := connectForeign(t, n, 2000)
	client := connector{}.connect(t, n, "127.0.0.1:9092")
	newTrial().want(t, n, takeOverSummary{takenDestroyed: 1})
	wantAborted(t, client)
	for _, fd := range foreign {
		wantAlive(t, fd)
	}
}

func connectForeign(t testing.TB, n *netns, count int) (fds []int) {
	t.Helper()
	to := listenIn(t, n, "127.0.0.1:0").Addr().String()
	for range count {
		fds = append(fds, connector{}.connect(t, n, to))
	}
	return fds
}

func TestEveryNamespaceIsTakenAndOneThatCannotBeEnteredIsTold(t *testing.T) {
	var namespaces []*netns
	var clients []int
	for range 3 {
		n := testNetns(t)
		listenIn(t, n, fmt.Sprintf("127.0.0.1:%d", brokerPort))
		clients = append(clients, connector{}.connect(t, n, "127.0.0.1:9092"))
		namespaces = append(namespaces, n)
	}
	closed, err := makeNetns()
	if err != nil {
		t.Fatal(err)
	}
	if err := closed.Close(); err != nil {
		t.Fatal(err)
	}
	done, err := newTrial().run(t.Context(), append(namespaces, closed))
	if err == nil || !strings.Contains(err.Error(), fmt.Sprint(closed.inode)) || done[takenDestroyed] != 3 {
		t.Errorf("%v, %v", done, err)
	}
	for _, fd := range clients {
		wantAborted(t, fd)
	}
}

func TestWithoutThePrivilegeEveryConnectionIsReportedAsFailed(t *testing.T) {
	n := testNetns(t)
	listenIn(t, n, fmt.Sprintf("127.0.0.1:%d", brokerPort))
	client := connector{}.connect(t, n, "127.0.0.1:9092")
	tr := newTrial()
	d, err := openDiag(n, noStamps)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	found, err := tr.look(&outlook{diag: d, netns: n.inode, known: map[uint64]bool{}})
	if err != nil {
		t.Fatal(err)
	}
	done := takeOverSummary{}
	// On a thread of its own, which ends without the privilege.
	err = n.do(func() error {
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var none [2]unix.CapUserData
		return errors.Join(unix.Capset(&header, &none[0]), tr.take(t.Context(), found, done))
	})
	if !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "CAP_NET_ADMIN") {
		t.Errorf("the error is %v", err)
	}
	if done[takenFailed] != 1 || len(tr.reports) != 1 || !errors.Is(tr.reports[0].err, unix.EPERM) {
		t.Errorf("%v, reports %+v", done, tr.reports)
	}
	wantAlive(t, client)
}

func TestAKernelThatCannotEndConnectionsIsSaidSo(t *testing.T) {
	if err := explainDestroy(tcpSocket{}, unix.EOPNOTSUPP); !errors.Is(err, errNoDestroy) {
		t.Error(err)
	}
	if err := CheckTakeOver(); err != nil {
		t.Errorf("this kernel: %v", err)
	}
}

func TestADumpThatWasInterruptedIsRepeated(t *testing.T) {
	times := 0
	dump := func(interrupted int) func() ([]tcpSocket, error) {
		times = 0
		return func() ([]tcpSocket, error) {
			if times++; times <= interrupted {
				return make([]tcpSocket, 5), nl.ErrDumpInterrupted
			}
			return make([]tcpSocket, 7), nil
		}
	}
	if got, err := uninterrupted(dump(2)); err != nil || len(got) != 7 || times != 3 {
		t.Errorf("%d sockets after %d times, %v", len(got), times, err)
	}
	got, err := uninterrupted(dump(1 << 30))
	if !errors.Is(err, nl.ErrDumpInterrupted) || got != nil || times != dumpAttempts {
		t.Errorf("%d sockets after %d times, %v", len(got), times, err)
	}
}

func TestOwnersAreFoundBesideProcessesThatCannotBeRead(t *testing.T) {
	proc := t.TempDir()
	write := func(path, text string) {
		path = filepath.Join(proc, path)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	link := func(path, to string) {
		path = filepath.Join(proc, path)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.Symlink(to, path)); err != nil {
			t.Fatal(err)
		}
	}
	write("1/fd", "no directory")
	write("2/comm", "ended\n")
	write("self/fd/0", "no process id")
	write("3/comm", "orders\n")
	write("3/fd/0", "no link")
	link("3/exe", "/usr/bin/orders")
	link("3/fd/1", "socket:[41]")
	link("3/fd/2", "socket:[41]")
	link("3/fd/3", "socket:[99999999999999999999]")
	link("3/fd/4", "pipe:[42]")
	link("4/fd/5", "socket:[41]")
	link("4/fd/6", "socket:[43]")
	want := map[uint32][]owner{41: {{3, "orders", "/usr/bin/orders"}, {pid: 4}}}
	if got := socketOwners(proc, map[uint32]bool{41: true, 42: true, 0: true}); !reflect.DeepEqual(got, want) {
		t.Errorf("got %v", got)
	}
}

func FuzzSockDiagAnswers(f *testing.F) {
	m := make([]byte, sizeofDiagMessage)
	m[0], m[1] = unix.AF_INET6, byte(stateEstablished)
	f.Add(m)
	for _, cgroup := range [][]byte{nil, binary.NativeEndian.AppendUint64(nil, 7)} {
		f.Add(slices.Concat(m, nl.NewRtAttr(netlink.INET_DIAG_CGROUP_ID, cgroup).Serialize()))
	}
	storages := nl.NewRtAttr(netlink.INET_DIAG_SK_BPF_STORAGES, nil)
	storages.AddRtAttr(diagStorage, nil).AddRtAttr(diagStorageValue, []byte{bpf.StampOwn})
	f.Add(slices.Concat(m, storages.Serialize()))
	f.Fuzz(func(t *testing.T, m []byte) {
		bounds.Check(t, len(m), 256, func() {
			if s, ok, err := parseSocket(m); ok && (err != nil || s.local.Addr().Is4In6()) {
				t.Errorf("%+v, %v", s, err)
			}
		})
	})
}

// One look at a namespace with 10,000 sockets of foreign connections, both ends of each.
func BenchmarkLookPast10000ForeignSockets(b *testing.B) {
	n := testNetns(b)
	connectForeign(b, n, 5000)
	tr := newTrial()
	d, err := openDiag(n, noStamps)
	if err != nil {
		b.Fatal(err)
	}
	defer d.Close()
	o := &outlook{diag: d, netns: n.inode, known: map[uint64]bool{}}
	for b.Loop() {
		if found, err := tr.look(o); err != nil || len(found) > 0 {
			b.Fatal(found, err)
		}
	}
}
