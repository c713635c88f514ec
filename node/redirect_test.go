package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"klamm/bpf"
)

// The test binary is its own client: started again with this variable, it connects to the address in it, prints what
// the other side sends, and ends.
const (
	clientVariable    = "KLAMM_TEST_CONNECT"
	namespaceVariable = "KLAMM_TEST_NAMESPACE" // a network namespace to do it in
)

func init() {
	to, is := os.LookupEnv(clientVariable)
	if !is {
		return
	}
	if path := os.Getenv(namespaceVariable); path != "" {
		if err := enterNamespace(path); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	if err := readAll(to, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// enterNamespace moves the main thread, in which init functions run, for good.
func enterNamespace(path string) error {
	runtime.LockOSThread()
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(unix.Setns(int(file.Fd()), unix.CLONE_NEWNET), file.Close())
}

func readAll(address string, out io.Writer) error {
	conn, err := net.Dial("tcp", address)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	_, err = io.Copy(out, conn)
	return err
}

// redirectPatience bounds every wait, so that a failure ends in a message.
const redirectPatience = 20 * time.Second

// cgroupOfClients makes a cgroup that has no process yet.
func cgroupOfClients(t *testing.T) string {
	t.Helper()
	root, err := Cgroup2Mount()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp(root, "klamm-node-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// Busy until the kernel has let go of the last process, shortly after it was waited for.
		for end := time.Now().Add(redirectPatience); ; {
			if err := os.Remove(dir); err == nil || time.Now().After(end) {
				return
			}
		}
	})
	return dir
}

// openRedirect redirects port for the processes in a new cgroup.
func openRedirect(t *testing.T, port uint16) (r *Redirect, cgroup string) {
	t.Helper()
	cgroup = cgroupOfClients(t)
	r, err := OpenRedirect(RedirectOptions{CgroupPath: cgroup, Ports: []uint16{port}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := r.Begin(); err != nil {
		t.Fatal(err)
	}
	return r, cgroup
}

// ownListener is the one of the network namespace that the test is in.
func ownListener(r *Redirect) listener {
	r.enrolled.mu.Lock()
	defer r.enrolled.mu.Unlock()
	return r.enrolled.known[r.enrolled.host].listener
}

// recordOf is that of a connect to an address.
func recordOf(netns uint64, to netip.AddrPort) bpf.Record {
	return bpf.Record{NetnsCookie: netns, DAddr: to.Addr().As16(), DPort: to.Port()}
}

// startReader starts a client in the cgroup; wait returns what it read.
func startReader(t *testing.T, cgroup, address string) (pid int, wait func() (string, error)) {
	t.Helper()
	dir, err := os.Open(cgroup)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = dir.Close() }()
	ctx, cancel := context.WithTimeout(context.Background(), redirectPatience)
	t.Cleanup(cancel)
	var out bytes.Buffer
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Env = append(os.Environ(), clientVariable+"="+address)
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd.Process.Pid, func() (string, error) {
		err := cmd.Wait()
		return out.String(), err
	}
}

// accepted is what Accept returned.
type accepted struct {
	conn   net.Conn
	record bpf.Record
	err    error
}

func acceptOne(t *testing.T, r *Redirect) accepted {
	t.Helper()
	got := make(chan accepted, 1)
	go func() {
		conn, record, err := r.Accept()
		got <- accepted{conn, record, err}
	}()
	select {
	case a := <-got:
		return a
	case <-time.After(redirectPatience):
		t.Fatal("nothing was accepted")
		return accepted{}
	}
}

// startBroker greets each connection and closes it.
func startBroker(t *testing.T, at string) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(conn, "the broker")
			_ = conn.Close()
		}
	}()
	return netip.MustParseAddrPort(l.Addr().String())
}

func TestAClientIsAcceptedWithItsDestinationWhichDialReaches(t *testing.T) {
	for _, at := range []string{"127.0.0.1:0", "[::1]:0"} {
		t.Run(at, func(t *testing.T) {
			broker := startBroker(t, at)
			r, cgroup := openRedirect(t, broker.Port())
			pid, wait := startReader(t, cgroup, broker.String())
			a := acceptOne(t, r)
			if a.err != nil {
				t.Fatal(a.err)
			}
			if a.record.Destination() != broker || a.record.TGID != uint32(pid) {
				t.Errorf("the record says process %d to %s, want %d to %s",
					a.record.TGID, a.record.Destination(), pid, broker)
			}
			if now, err := r.Task(uint32(pid)); err != nil || !now.SameProgram(a.record.TaskFacts) {
				t.Errorf("the client is %+v, the record says %+v: %v", now, a.record.TaskFacts, err)
			}

			ctx, cancel := context.WithTimeout(t.Context(), redirectPatience)
			defer cancel()
			upstream, err := r.Dial(ctx, a.record, nil, false)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.WriteString(a.conn, "by way of the node: "); err != nil {
				t.Error(err)
			}
			if _, err := io.Copy(a.conn, upstream); err != nil {
				t.Error(err)
			}
			if err := errors.Join(upstream.Close(), a.conn.Close()); err != nil {
				t.Error(err)
			}
			if got, err := wait(); err != nil || got != "by way of the node: the broker" {
				t.Errorf("the client read %q, %v", got, err)
			}
		})
	}
}

// enterCgroup moves this process, because only sockets made within the cgroup are redirected.
func enterCgroup(t *testing.T, cgroup string) {
	t.Helper()
	root, err := Cgroup2Mount()
	if err != nil {
		t.Fatal(err)
	}
	home := ownCgroup(root)
	enter := func(dir string) {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte("0"), 0); err != nil {
			t.Fatal(err)
		}
	}
	enter(cgroup)
	t.Cleanup(func() { enter(home) })
}

func TestTheNodesOwnSocketsAreNotRedirected(t *testing.T) {
	broker := startBroker(t, "127.0.0.1:0")
	r, cgroup := openRedirect(t, broker.Port())
	enterCgroup(t, cgroup)
	for _, dial := range []func() (net.Conn, error){
		func() (net.Conn, error) { return r.Dial(t.Context(), recordOf(r.enrolled.host, broker), nil, false) },
		func() (net.Conn, error) { return r.Dialer().DialContext(t.Context(), "tcp", broker.String()) },
	} {
		conn, err := dial()
		if err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(conn); err != nil || string(got) != "the broker" {
			t.Errorf("read %q, %v", got, err)
		}
		_ = conn.Close()
	}
	if counters, err := r.Counters(); err != nil || counters["passed_stamped"] != 2 || counters["redirected"] != 0 {
		t.Errorf("counters are %v, %v", counters, err)
	}
}

func TestAThousandConnectsAtOnceKeepTheirRecords(t *testing.T) {
	const clients, firstPort = 1000, 20000
	ports := make([]uint16, clients)
	for i := range ports {
		ports[i] = uint16(firstPort + i)
	}
	r, cgroup := openRedirect(t, 0)
	if err := r.SetDestinations(ports, nil); err != nil {
		t.Fatal(err)
	}
	enterCgroup(t, cgroup)

	// Each client asks for another port, is told which one its record names, and compares.
	var wrong sync.Map
	var running sync.WaitGroup
	for _, port := range ports {
		running.Go(func() {
			var got bytes.Buffer
			to := netip.AddrPortFrom(netip.MustParseAddr("192.0.2.7"), port).String()
			if err := readAll(to, &got); err != nil || got.String() != to {
				wrong.Store(to, fmt.Sprintf("%s %v", got.String(), err))
			}
		})
	}
	for range clients {
		a := acceptOne(t, r)
		if a.err != nil {
			t.Fatal(a.err)
		}
		_, _ = io.WriteString(a.conn, a.record.Destination().String())
		_ = a.conn.Close()
	}
	running.Wait()
	wrong.Range(func(to, got any) bool {
		t.Errorf("the client of %v read %v", to, got)
		return true
	})
	counters, err := r.Counters()
	if err != nil || counters["handed_over"] != clients || counters["accept_refused"] != 0 {
		t.Errorf("counters are %v, %v", counters, err)
	}
}

func TestAConnectionWithoutARecordIsReset(t *testing.T) {
	r, _ := openRedirect(t, 19092)
	// This process is outside the cgroup, so its connect to the listener is not refused in the kernel.
	var out bytes.Buffer
	err := readAll(ownListener(r).tcp[0].Addr().String(), &out)
	if !errors.Is(err, unix.ECONNRESET) || out.Len() > 0 {
		t.Errorf("read %q, %v", out.String(), err)
	}
	if counters, err := r.Counters(); err != nil || counters["accept_refused"] != 1 {
		t.Errorf("counters are %v, %v", counters, err)
	}
}

func TestAcceptOutlivesAWantOfFileDescriptors(t *testing.T) {
	r, _ := openRedirect(t, 19092)
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(fd) }()
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 0, Max: limit.Max}); err != nil {
		t.Fatal(err)
	}
	restore := sync.OnceValue(func() error { return unix.Setrlimit(unix.RLIMIT_NOFILE, &limit) })
	defer func() { _ = restore() }()

	to := &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: int(ownListener(r).port)}
	if err := unix.Connect(fd, to); err != nil {
		t.Fatal(err)
	}
	counted := func(name string) bool {
		for end := time.Now().Add(redirectPatience); time.Now().Before(end); {
			if counters, err := r.Counters(); err != nil || counters[name] > 0 {
				return err == nil
			}
		}
		return false
	}
	if !counted("accept_failed") {
		t.Error("accept(2) did not fail without file descriptors")
	}
	if err := restore(); err != nil {
		t.Fatal(err)
	}
	if !counted("accept_refused") {
		t.Error("the waiting connection was not accepted when there were file descriptors again")
	}
}

func TestCloseEndsAcceptAndTheRedirect(t *testing.T) {
	broker := startBroker(t, "127.0.0.1:0")
	r, cgroup := openRedirect(t, broker.Port())
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if _, _, err := r.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept says %v", err)
	}
	_, wait := startReader(t, cgroup, broker.String())
	if got, err := wait(); err != nil || got != "the broker" {
		t.Errorf("the client read %q, %v", got, err)
	}
}

func TestOpenRedirectSaysWhatIsWrong(t *testing.T) {
	for _, c := range []struct{ name, cgroup, want string }{
		{"a cgroup that is not there", "/nowhere", "/nowhere: no such file"},
		{"a directory that is no cgroup", "/proc", "is it a directory of cgroup2?"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := OpenRedirect(RedirectOptions{CgroupPath: c.cgroup})
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestCgroup2IsFound(t *testing.T) {
	root, err := Cgroup2Mount()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(root, "cgroup.controllers")); err != nil {
		t.Error(err)
	}
	if own := ownCgroup(root); !strings.HasPrefix(own, root) {
		t.Errorf("this process is in %s, which is not below %s", own, root)
	}
}

func TestBPFFSIsMountedOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "bpf")
	for range 2 {
		if err := MountBPFFS(path); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Unmount(path, 0); err != nil {
		t.Fatal(err)
	}
	if err := unix.Unmount(path, 0); !errors.Is(err, unix.EINVAL) {
		t.Errorf("it was mounted twice: %v", err)
	}
}

func TestAnAddressThatTheRedirectGaveIsNotTheClients(t *testing.T) {
	for _, c := range []struct{ client, to, want string }{
		{"127.0.0.1:1", "10.0.0.9:9092", "invalid AddrPort"},
		{"10.0.0.5:1", "10.0.0.9:9092", "10.0.0.5:0"},
		{"127.0.0.2:1", "127.0.0.9:9092", "127.0.0.2:0"},
		{"[::ffff:10.0.0.5]:1", "10.0.0.9:9092", "10.0.0.5:0"},
		{"[::1]:1", "[2001:db8::9]:9092", "invalid AddrPort"},
		{"[2001:db8::5]:1", "[2001:db8::9]:9092", "[2001:db8::5]:0"},
		{"[::1]:1", "10.0.0.9:9092", "invalid AddrPort"},
	} {
		client := net.TCPAddrFromAddrPort(netip.MustParseAddrPort(c.client))
		if got := boundTo(client, netip.MustParseAddrPort(c.to).Addr()); got.String() != c.want {
			t.Errorf("%s to %s: %s, want %s", c.client, c.to, got, c.want)
		}
	}
	if got := boundTo(nil, netip.MustParseAddr("10.0.0.9")); got.IsValid() {
		t.Errorf("without a client: %s", got)
	}
}
