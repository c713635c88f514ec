package host

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"klamm/test/kafka"
)

// Dialer is a process that connects for its parent: the kernel sees its user, its executable and its cgroup, and the
// parent has the connected socket.
type Dialer struct {
	cmd *exec.Cmd

	mu     sync.Mutex // of one question and its answer
	orders int        // the socket to the process
	end    func() error
}

// ordersVariable makes a binary a dialer; see BeDialer.
const ordersVariable = "KLAMM_TEST_WORKLOAD"

// ordersFD is where a dialer has the socket of its orders: the first of exec.Cmd.ExtraFiles.
const ordersFD = 3

// BeDialer is called first by programs that start dialers. In a process that was started as one it does not return.
func BeDialer() {
	if os.Getenv(ordersVariable) == "" {
		return
	}
	if err := obey(ordersFD); err != nil {
		fmt.Fprintln(os.Stderr, "dialer:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// obey connects from and to each pair of addresses that is asked for and answers with errno and, if that is 0, the
// socket.
func obey(orders int) error {
	pair := make([]byte, 128)
	for {
		n, err := unix.Read(orders, pair)
		if n == 0 || err != nil {
			return err
		}
		from, to, _ := strings.Cut(string(pair[:n]), " ")
		fd, err := connect(from, to)
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

func connect(from, to string) (fd int, err error) {
	address, family, err := sockaddr(to)
	if err != nil {
		return -1, err
	}
	if fd, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return -1, err
	}
	if from != "" {
		var bound unix.Sockaddr
		if bound, _, err = sockaddr(net.JoinHostPort(from, "0")); err == nil {
			err = unix.Bind(fd, bound)
		}
	}
	if err == nil {
		err = unix.Connect(fd, address)
	}
	if err != nil {
		return -1, errors.Join(err, unix.Close(fd))
	}
	return fd, nil
}

func sockaddr(address string) (unix.Sockaddr, int, error) {
	a, err := netip.ParseAddrPort(address)
	if err != nil {
		return nil, 0, err
	}
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}, unix.AF_INET, nil
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}, unix.AF_INET6, nil
}

// StartDialer starts a dialer. exe is a binary that calls BeDialer; "" is the running one.
func StartDialer(place kafka.Place, exe string) (*Dialer, error) {
	if exe == "" {
		exe = "/proc/self/exe" // by this link a user who may not enter the binary's directory can run it
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	theirs := os.NewFile(uintptr(pair[1]), "orders")
	defer func() { _ = theirs.Close() }()
	d := &Dialer{orders: pair[0], cmd: exec.Command(exe)}
	d.cmd.Env = append(os.Environ(), ordersVariable+"=1")
	d.cmd.Stderr, d.cmd.ExtraFiles = os.Stderr, []*os.File{theirs}
	if err := place.Start(d.cmd); err != nil {
		return nil, errors.Join(err, unix.Close(d.orders))
	}
	// The end of its orders is what it waits for.
	d.end = sync.OnceValue(func() error { return errors.Join(unix.Close(d.orders), d.cmd.Wait()) })
	return d, nil
}

// End ends the dialer. The connections that it made are the parent's, which has them still.
func (d *Dialer) End() error { return d.end() }

// PID is the dialer's process id.
func (d *Dialer) PID() int { return d.cmd.Process.Pid }

// Dial has the dialer connect to an IP address and port by TCP; from an IP address, if that is not "".
func (d *Dialer) Dial(from, to string) (net.Conn, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, err := unix.Write(d.orders, []byte(from+" "+to)); err != nil {
		return nil, fmt.Errorf("tell the dialer to connect to %s: %w", to, err)
	}
	answer, rights := make([]byte, 4), make([]byte, unix.CmsgSpace(4))
	n, m, _, _, err := unix.Recvmsg(d.orders, answer, rights, unix.MSG_CMSG_CLOEXEC)
	if err != nil || n != len(answer) {
		return nil, fmt.Errorf("the dialer does not answer: %d bytes, %w", n, err)
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
	socket := os.NewFile(uintptr(fds[0]), to)
	defer func() { _ = socket.Close() }()
	return net.FileConn(socket)
}
