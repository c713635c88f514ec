package bpf

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/moby/sys/mountinfo"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// patience bounds every wait, so that a failure ends in a message.
const patience = 20 * time.Second

// testCgroup is where the programs are attached, and where this process lives meanwhile: an accepted socket belongs to
// the cgroup in which its listener was made, and only there the sockops program sees it.
var testCgroup string

func TestMain(m *testing.M) {
	if beClient() {
		return
	}
	code, err := inTestCgroup(m.Run)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func inTestCgroup(run func() int) (code int, err error) {
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup2"))
	if err != nil || len(mounts) == 0 {
		return 0, fmt.Errorf("find cgroup2: %d mounts, %w", len(mounts), err)
	}
	root := mounts[0].Mountpoint
	home, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return 0, err
	}
	_, own, _ := strings.Cut(string(home), "0::")
	own, _, _ = strings.Cut(own, "\n")

	if testCgroup, err = os.MkdirTemp(root, "klamm-bpf-test-"); err != nil {
		return 0, err
	}
	if err := os.Chmod(testCgroup, 0o755); err != nil {
		return 0, err
	}
	if err := enterCgroup(testCgroup); err != nil {
		return 0, err
	}
	defer func() {
		err = errors.Join(err, enterCgroup(filepath.Join(root, own)), os.Remove(testCgroup))
	}()
	return run(), nil
}

func enterCgroup(dir string) error {
	return os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte("0"), 0)
}

func makeCgroup(t testing.TB, path ...string) string {
	t.Helper()
	dir := filepath.Join(append([]string{testCgroup}, path...)...)
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// A cgroup is busy until the kernel has let go of the last process, shortly after it was waited for.
		eventually(t, func() error { return os.Remove(dir) })
	})
	return dir
}

func cgroupID(t testing.TB, dir string) uint64 {
	t.Helper()
	var s unix.Stat_t
	if err := unix.Stat(dir, &s); err != nil {
		t.Fatal(err)
	}
	return s.Ino
}

// eventually calls until it gets no error.
func eventually(t testing.TB, call func() error) {
	t.Helper()
	var err error
	for start := time.Now(); time.Since(start) < patience; runtime.Gosched() {
		if err = call(); err == nil {
			return
		}
	}
	t.Fatal(err)
}

// enterNewNetns moves the rest of the test to a network namespace of its own, with lo up. The thread ends with the
// test's goroutine, because it stays locked to it.
func enterNewNetns(t testing.TB) {
	t.Helper()
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatal(err)
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		t.Fatal(err)
	}
}

func writeSysctl(t testing.TB, name, value string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join("/proc/sys", name), []byte(value), 0); err != nil {
		t.Fatal(err)
	}
}

// brokerPort is a broker's in all tests. Nobody listens there unless a test does.
const brokerPort = 19092

// rig is the loaded programs with listeners in the current network namespace.
type rig struct {
	t         testing.TB
	programs  *Programs
	cookie    uint64
	port      uint16
	listeners [2]*net.TCPListener // IPv4, IPv6
	clients   string              // a cgroup
}

func loaded(t testing.TB) *Programs {
	t.Helper()
	p, err := Load(Options{CgroupPath: testCgroup})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := errors.Join(p.SetDestinations([]uint16{brokerPort}, nil), p.Beat(time.Hour)); err != nil {
		t.Fatal(err)
	}
	return p
}

func newRig(t testing.TB) *rig {
	t.Helper()
	r := &rig{t: t, programs: loaded(t), clients: makeCgroup(t, "clients")}
	r.listeners[0] = listen(t, "127.0.0.1:0")
	r.port = portOf(r.listeners[0])
	r.listeners[1] = listen(t, netip.AddrPortFrom(netip.IPv6Loopback(), r.port).String())
	r.cookie = netnsCookie(t, r.listeners[0])
	if err := r.programs.Enrol(r.cookie, r.port); err != nil {
		t.Fatal(err)
	}
	return r
}

func listen(t testing.TB, at string) *net.TCPListener {
	t.Helper()
	var config net.ListenConfig
	config.SetMultipathTCP(false)
	l, err := config.Listen(context.Background(), "tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l.(*net.TCPListener)
}

func portOf(l *net.TCPListener) uint16 { return netip.MustParseAddrPort(l.Addr().String()).Port() }

func onFD[T any](t testing.TB, c syscall.Conn, call func(fd int) (T, error)) (T, error) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var got T
	var callErr error
	if err := raw.Control(func(fd uintptr) { got, callErr = call(int(fd)) }); err != nil {
		t.Fatal(err)
	}
	return got, callErr
}

func netnsCookie(t testing.TB, c syscall.Conn) uint64 {
	t.Helper()
	cookie, err := onFD(t, c, func(fd int) (uint64, error) {
		return unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	})
	if err != nil {
		t.Fatal(err)
	}
	return cookie
}

// accept returns the next connection of one of the listeners.
func (r *rig) accept(listener int) *net.TCPConn {
	r.t.Helper()
	return acceptFrom(r.t, r.listeners[listener])
}

func acceptFrom(t testing.TB, l *net.TCPListener) *net.TCPConn {
	t.Helper()
	if err := l.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	conn, err := l.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// record accepts a connection and returns its record.
func (r *rig) record(listener int) Record {
	r.t.Helper()
	record, err := onFD(r.t, r.accept(listener), r.programs.Record)
	if err != nil {
		r.t.Fatal(err)
	}
	return record
}

// run starts a client with steps in the clients' cgroup.
func (r *rig) run(steps ...step) *client {
	r.t.Helper()
	return startClient(r.t, r.clients, plan{Steps: steps}, 0)
}

// count fails the test unless the counters have moved as given since Load; those not given must be 0, except what
// always moves along with others.
func (p *Programs) count(t testing.TB, want map[string]uint64) {
	t.Helper()
	got, err := p.Counters()
	if err != nil {
		t.Fatal(err)
	}
	for name, n := range got {
		if n != want[name] {
			t.Errorf("counter %s is %d, want %d", name, n, want[name])
		}
	}
}

// handshakes is the number of records on their way.
func (r *rig) handshakes() int {
	r.t.Helper()
	var tuple redirectKlammTuple
	var record redirectKlammRecord
	n := 0
	all := r.programs.objects.KlammHandshake.Iterate()
	for all.Next(&tuple, &record) {
		n++
	}
	if err := all.Err(); err != nil {
		r.t.Fatal(err)
	}
	return n
}

func ptr(b []byte) unsafe.Pointer { return unsafe.Pointer(unsafe.SliceData(b)) }
