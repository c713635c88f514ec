package node

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"

	"klamm/bpf"
)

const enrolPort = 19092

// enrolling is a redirect with a process that connects when it is told to.
type enrolling struct {
	*Redirect
	t      *testing.T
	cgroup string
	events chan bpf.Event
}

func newEnrolling(t *testing.T) *enrolling {
	t.Helper()
	e := &enrolling{t: t, cgroup: cgroupOfClients(t), events: make(chan bpf.Event, 1000)}
	e.open()
	return e
}

func (e *enrolling) open() {
	e.t.Helper()
	r, err := OpenRedirect(RedirectOptions{CgroupPath: e.cgroup, Ports: []uint16{enrolPort}, Log: zerolog.Nop(),
		OnEvent: func(event bpf.Event) { e.events <- event }})
	if err != nil {
		e.t.Fatal(err)
	}
	e.Redirect = r
	e.t.Cleanup(func() {
		if err := r.Close(); err != nil {
			e.t.Error(err)
		}
	})
	if err := r.Begin(); err != nil {
		e.t.Fatal(err)
	}
}

// inhabit starts a process in the cgroup and in a network namespace of its own. It has lo up, and ends with the test or
// by end.
func (e *enrolling) inhabit(lo bool) (pid int, end func()) {
	e.t.Helper()
	dir, err := os.Open(e.cgroup)
	if err != nil {
		e.t.Fatal(err)
	}
	defer func() { _ = dir.Close() }()
	cmd := exec.Command("/bin/cat")
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd()), Cloneflags: unix.CLONE_NEWNET}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		e.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		e.t.Fatal(err)
	}
	ended := false
	end = func() {
		if !ended {
			ended = true
			if err := errors.Join(stdin.Close(), cmd.Wait()); err != nil {
				e.t.Error(err)
			}
		}
	}
	e.t.Cleanup(end)
	if lo {
		e.within(cmd.Process.Pid, setLoUp)
	}
	return cmd.Process.Pid, end
}

// within calls f in the network namespace of a process.
func (e *enrolling) within(pid int, f func() error) {
	e.t.Helper()
	ns, err := openNetns(netnsPath(pid))
	if err != nil {
		e.t.Fatal(err)
	}
	defer func() { _ = ns.Close() }()
	if err := ns.do(f); err != nil {
		e.t.Fatal(err)
	}
}

func setLoUp() error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr)
}

// listens tells whether the node listens in the namespace of a process.
func (e *enrolling) listens(pid int) bool {
	e.t.Helper()
	inode, err := netnsInode(pid)
	if err != nil {
		e.t.Fatal(err)
	}
	for _, n := range e.enrolled.status() {
		if n.Inode == inode {
			return true
		}
	}
	return false
}

// connect connects from the namespace of a process.
func (e *enrolling) connect(pid int, to string) error {
	e.t.Helper()
	dir, err := os.Open(e.cgroup)
	if err != nil {
		e.t.Fatal(err)
	}
	defer func() { _ = dir.Close() }()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), clientVariable+"="+to, namespaceVariable+"="+netnsPath(pid))
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w", strings.TrimSpace(string(out)), err)
	}
	return nil
}

func TestANamespaceIsEnrolledBeforeItsProcessesConnect(t *testing.T) {
	e := newEnrolling(t)
	pid, end := e.inhabit(true)
	if e.listens(pid) {
		t.Fatal("the node listens there before anything happened")
	}
	// A first socket, as a resolver makes, is what the node hears of.
	if err := e.connect(pid, "127.0.0.1:1"); err == nil || !strings.Contains(err.Error(), "refused") {
		t.Errorf("somebody listens there: %v", err)
	}
	until(t, "the enrolment", func() bool { return e.listens(pid) })
	go func() {
		if conn, record, err := e.Accept(); err == nil {
			until(t, "a record", func() bool { return record.Destination() == netip.MustParseAddrPort("192.0.2.7:19092") })
			_ = conn.Close()
		}
	}()
	if err := e.connect(pid, "192.0.2.7:19092"); err != nil {
		t.Error(err)
	}
	counters, err := e.Counters()
	if err != nil || counters["refused_not_enrolled"] != 0 || counters["redirected"] != 1 {
		t.Errorf("counters are %v, %v", counters, err)
	}
	netns, err := os.Open(netnsPath(pid))
	if err != nil {
		t.Fatal(err)
	}
	var s unix.Stat_t
	if err := errors.Join(unix.Fstat(int(netns.Fd()), &s), netns.Close()); err != nil {
		t.Fatal(err)
	}
	end()
	until(t, "the node to leave the namespace", func() bool {
		for _, n := range e.enrolled.status() {
			if n.Inode == s.Ino {
				return false
			}
		}
		return true
	})
	if enrolled, err := e.programs.Enrolled(); err != nil || len(enrolled) != 1 {
		t.Errorf("in the kernel are %v, %v", enrolled, err)
	}
}

func TestANamespaceThatIsThereAtStartIsEnrolled(t *testing.T) {
	e := newEnrolling(t)
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	pid, _ := e.inhabit(true)
	e.open()
	if !e.listens(pid) {
		t.Error("the node does not listen there")
	}
}

// Containers get their lo while they are set up: the node need not wait for it.
func TestANamespaceIsEnrolledBeforeItsLoIsUp(t *testing.T) {
	e := newEnrolling(t)
	pid, _ := e.inhabit(false)
	if err := e.enrolled.enrol(netnsPath(pid), 0); err != nil {
		t.Fatal(err)
	}
	e.within(pid, setLoUp)
	for _, to := range []string{"192.0.2.7:19092", "[2001:db8::7]:19092"} {
		go func() {
			if conn, _, err := e.Accept(); err == nil {
				_ = conn.Close()
			}
		}()
		if err := e.connect(pid, to); err != nil {
			t.Error(err)
		}
	}
}

func TestAnotherNamespaceIsNotTakenForTheOneThatWasMeant(t *testing.T) {
	e := newEnrolling(t)
	pid, _ := e.inhabit(true)
	if err := e.enrolled.enrol(netnsPath(pid), e.enrolled.host); !errors.Is(err, errOther) {
		t.Errorf("got %v", err)
	}
	if err := e.enrolled.enrol("/proc/self/ns/uts", 0); err == nil {
		t.Error("a namespace of another kind was enrolled")
	}
	if e.listens(pid) {
		t.Error("the node listens there")
	}
}

func TestANamespaceIsEnrolledOnceHoweverManyAskForIt(t *testing.T) {
	e := newEnrolling(t)
	pid, _ := e.inhabit(true)
	done := make(chan error)
	const many = 20
	for range many {
		go func() { done <- e.enrolled.enrol(netnsPath(pid), 0) }()
	}
	for range many {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	if n := len(e.enrolled.status()); n != 2 {
		t.Errorf("the node listens in %d namespaces, not in its own and one more", n)
	}
}

// A loopback destination is the client's own: the node dials it from there.
func TestALoopbackDestinationIsDialledInTheClientsNamespace(t *testing.T) {
	e := newEnrolling(t)
	pid, _ := e.inhabit(true)
	if err := e.enrolled.enrol(netnsPath(pid), 0); err != nil {
		t.Fatal(err)
	}
	var l net.Listener
	e.within(pid, func() (err error) {
		l, err = net.Listen("tcp", "127.7.7.7:0") // where nothing of the host listens
		return err
	})
	defer func() { _ = l.Close() }()
	to := netip.MustParseAddrPort(l.Addr().String())
	ns, err := openNetns(netnsPath(pid))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ns.Close() }()
	conn, err := e.Dial(t.Context(), recordOf(ns.cookie, to), nil, false)
	if err != nil {
		t.Fatal(err)
	}
	_ = conn.Close()
	if conn, err = e.Dial(t.Context(), recordOf(e.enrolled.host, to), nil, false); err == nil {
		_ = conn.Close()
		t.Error("the host's loopback is the client's")
	}
	_, err = e.Dial(t.Context(), recordOf(4711, to), nil, false)
	if err == nil || !strings.Contains(err.Error(), "has ended") {
		t.Errorf("a namespace that is gone: %v", err)
	}
}

func TestAnAddressHasItsPortsForEachBroker(t *testing.T) {
	e := newEnrolling(t)
	pid, _ := e.inhabit(true)
	if err := e.enrolled.enrol(netnsPath(pid), 0); err != nil {
		t.Fatal(err)
	}
	var brokers [2]net.Listener
	e.within(pid, func() (err error) {
		if err = os.WriteFile("/proc/sys/net/ipv4/ip_local_port_range",
			[]byte("40000 40009"), 0o644); err != nil {
			return err
		}
		for i := range brokers {
			if brokers[i], err = net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", 9092+i)); err != nil {
				return err
			}
		}
		return nil
	})
	ns, err := openNetns(netnsPath(pid))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ns.Close() }()
	client := net.TCPAddrFromAddrPort(netip.MustParseAddrPort("127.0.0.2:1"))
	for _, broker := range brokers {
		t.Cleanup(func() { _ = broker.Close() })
		to := netip.MustParseAddrPort(broker.Addr().String())
		for i := range 9 {
			conn, err := e.Dial(t.Context(), recordOf(ns.cookie, to), client, false)
			if err != nil {
				t.Fatalf("connection %d to %s, of 10 ports: %v", i, to, err)
			}
			t.Cleanup(func() { _ = conn.Close() })
		}
	}
}

func TestABrokerIsDialledFromTheClientsNetworkWhereThatIsConfigured(t *testing.T) {
	e := newEnrolling(t)
	pid, _ := e.inhabit(true)
	if err := e.enrolled.enrol(netnsPath(pid), 0); err != nil {
		t.Fatal(err)
	}
	ns, err := openNetns(netnsPath(pid))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ns.Close() }()
	// The new namespace has no way to anywhere: there a dial fails at once.
	to := netip.MustParseAddrPort("192.0.2.1:9092")
	if _, err := e.Dial(t.Context(), recordOf(ns.cookie, to), nil, true); !errors.Is(err, unix.ENETUNREACH) {
		t.Errorf("from the client's: %v", err)
	}
}

func TestListenersAreLeftToTheNextNode(t *testing.T) {
	e := newEnrolling(t)
	pid, _ := e.inhabit(true)
	if err := e.enrolled.enrol(netnsPath(pid), 0); err != nil {
		t.Fatal(err)
	}
	before := e.enrolled.status()
	files := e.enrolled.listeners()
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	odd, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	r, err := OpenRedirect(RedirectOptions{CgroupPath: e.cgroup, Ports: []uint16{enrolPort}, Log: zerolog.Nop(),
		Before: inheritance{listeners: append(files, odd)}})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	}()
	if after := r.enrolled.status(); fmt.Sprint(after) != fmt.Sprint(before) {
		t.Errorf("before %v, after %v", before, after)
	}
}

func TestTheServiceManagerKeepsListeners(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "notify")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	told := func() (state string, fds int) {
		b, rights := make([]byte, 200), make([]byte, 200)
		if err := l.SetReadDeadline(time.Now().Add(redirectPatience)); err != nil {
			t.Fatal(err)
		}
		n, m, _, _, err := l.ReadMsgUnix(b, rights)
		if err != nil {
			t.Fatal(err)
		}
		messages, err := unix.ParseSocketControlMessage(rights[:m])
		if err != nil {
			t.Fatal(err)
		}
		for _, message := range messages {
			got, err := unix.ParseUnixRights(&message)
			if err != nil {
				t.Fatal(err)
			}
			for _, fd := range got {
				fds++
				_ = unix.Close(fd)
			}
		}
		return string(b[:n]), fds
	}
	r, err := OpenRedirect(RedirectOptions{CgroupPath: cgroupOfClients(t), Log: zerolog.Nop(),
		Manager: serviceManager{socket}})
	if err != nil {
		t.Fatal(err)
	}
	if state, fds := told(); state != fmt.Sprintf("FDSTORE=1\nFDNAME=netns-%d", r.enrolled.host) || fds != 2 {
		t.Errorf("told %q with %d descriptors", state, fds)
	}
	go func() { _, _, _ = r.Accept() }()
	if state, _ := told(); state != "WATCHDOG=1" {
		t.Errorf("told %q", state)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
}
