package stage

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"testing"

	"github.com/twmb/franz-go/pkg/kgo"
	"golang.org/x/sys/unix"

	"klamm/test/kafka"
)

// Workload is a process that connects for the test: the kernel sees its user, its executable and its cgroup, and the
// test has the connected socket.
type Workload struct {
	cmd *exec.Cmd

	mu     sync.Mutex // of one question and its answer
	orders int        // the socket to the process
	end    func() error
}

// ordersVariable makes a test binary a workload; see Main.
const ordersVariable = "KLAMM_TEST_WORKLOAD"

// ordersFD is where a workload has the socket of its orders: the first of exec.Cmd.ExtraFiles.
const ordersFD = 3

// Main is called by TestMain. In a process that was started as a workload it does not return.
func Main() {
	if os.Getenv(ordersVariable) == "" {
		return
	}
	if err := obey(ordersFD); err != nil {
		fmt.Fprintln(os.Stderr, "workload:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// obey connects to each address that is asked for and answers with errno and, if that is 0, the socket.
func obey(orders int) error {
	address := make([]byte, 64)
	for {
		n, err := unix.Read(orders, address)
		if n == 0 || err != nil {
			return err
		}
		to, err := netip.ParseAddrPort(string(address[:n]))
		if err != nil {
			return err
		}
		fd, err := connect(to)
		var errno syscall.Errno
		var rights []byte
		switch {
		case err == nil:
			rights = unix.UnixRights(fd)
		case !errors.As(err, &errno):
			return err
		}
		err = unix.Sendmsg(orders, binary.NativeEndian.AppendUint32(nil, uint32(errno)), rights, nil, 0)
		if rights != nil {
			err = errors.Join(err, unix.Close(fd))
		}
		if err != nil {
			return err
		}
	}
}

func connect(to netip.AddrPort) (fd int, err error) {
	family, port := unix.AF_INET6, int(to.Port())
	var address unix.Sockaddr = &unix.SockaddrInet6{Port: port, Addr: to.Addr().As16()}
	if to.Addr().Is4() {
		family, address = unix.AF_INET, &unix.SockaddrInet4{Port: port, Addr: to.Addr().As4()}
	}
	if fd, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return -1, err
	}
	if err = unix.Connect(fd, address); err != nil {
		return -1, errors.Join(err, unix.Close(fd))
	}
	return fd, nil
}

// StartWorkload starts a workload that ends with the test. exe is the test binary or a copy of it; "" is itself.
func StartWorkload(t testing.TB, place kafka.Place, exe string) *Workload {
	t.Helper()
	if exe == "" {
		exe = "/proc/self/exe" // by this link a user who may not enter the binary's directory can run it
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	theirs := os.NewFile(uintptr(pair[1]), "orders")
	defer func() { _ = theirs.Close() }()
	w := &Workload{orders: pair[0], cmd: exec.Command(exe)}
	w.cmd.Env = append(os.Environ(), ordersVariable+"=1")
	w.cmd.Stderr, w.cmd.ExtraFiles = os.Stderr, []*os.File{theirs}
	if err := place.Start(w.cmd); err != nil {
		t.Fatal(errors.Join(err, unix.Close(w.orders)))
	}
	// The end of its orders is what it waits for.
	w.end = sync.OnceValue(func() error { return errors.Join(unix.Close(w.orders), w.cmd.Wait()) })
	t.Cleanup(func() {
		if err := w.end(); err != nil {
			t.Errorf("a workload: %v", err)
		}
	})
	return w
}

// End ends the workload. The connections that it made are the test's, which has them still.
func (w *Workload) End() error { return w.end() }

// PID is the workload's process id.
func (w *Workload) PID() int { return w.cmd.Process.Pid }

// DialContext has the workload connect to an IP address and port by TCP. It is a kgo.Dialer.
func (w *Workload) DialContext(_ context.Context, _, address string) (net.Conn, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if _, err := unix.Write(w.orders, []byte(address)); err != nil {
		return nil, fmt.Errorf("tell the workload to connect to %s: %w", address, err)
	}
	answer, rights := make([]byte, 4), make([]byte, unix.CmsgSpace(4))
	n, m, _, _, err := unix.Recvmsg(w.orders, answer, rights, unix.MSG_CMSG_CLOEXEC)
	if err != nil || n != len(answer) {
		return nil, fmt.Errorf("the workload does not answer: %d bytes, %w", n, err)
	}
	if errno := syscall.Errno(binary.NativeEndian.Uint32(answer)); errno != 0 {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("connect", errno)}
	}
	messages, err := unix.ParseSocketControlMessage(rights[:m])
	if err != nil {
		return nil, err
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		return nil, err
	}
	socket := os.NewFile(uintptr(fds[0]), address)
	defer func() { _ = socket.Close() }()
	return net.FileConn(socket)
}

// Dial is DialContext for a test that goes no further without a connection. It ends with the test.
func (w *Workload) Dial(t testing.TB, address string) net.Conn {
	t.Helper()
	conn, err := w.DialContext(t.Context(), "tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// Client is a Kafka client whose connections are the workload's.
func (w *Workload) Client(t testing.TB, broker string, opts ...kgo.Opt) *kgo.Client {
	t.Helper()
	opts = append([]kgo.Opt{kgo.SeedBrokers(broker), kgo.Dialer(w.DialContext), kgo.ClientID("workload"),
		kgo.DisableClientMetrics(), kgo.DisableIdempotentWrite(), kgo.UnknownTopicRetries(0)}, opts...)
	client, err := kgo.NewClient(opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Close)
	return client
}
