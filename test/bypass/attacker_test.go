package bypass

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/twmb/franz-go/pkg/kmsg"
	"golang.org/x/sys/unix"
)

// attackVariable makes this binary an attacker; it holds the orders.
const attackVariable = "KLAMM_BYPASS_ATTACK"

// workloadUID is the user of workloads.
const workloadUID = 61001

// orders are what an attacker is told.
type orders struct {
	Vector string // its name
	Marker string // in what it says to the broker
	outlet        // of its namespace
	Cgroup string // of the world
	// Listener is the port of the node's listener, found after the warm-up.
	Listener uint16
	// Descriptor is one of the parent's, for a second process.
	Descriptor int
}

// attacker is the process that attacks: this binary, started again in a pod, in the cgroup, with the rights of the
// vector and no more.
type attacker struct {
	orders
	in  *bufio.Reader
	out *os.File

	// What the audit must say of an attack that is intercepted.
	pid int            // of the process that connected
	to  netip.AddrPort // the destination that was asked for

	fd  int    // of the socket that was made before the attack
	got []byte // of what the node sends or is sent
}

// report is what an attacker says at its end. It is shown, and where the attack was intercepted it says what to look
// for in the audit; that an attack failed is never taken from it.
type report struct {
	PID         int
	Destination string
	Got         []byte // of what is not its own
	Error       string
	Unsupported bool
}

// errUnsupported is that of an attack that this kernel does not have the means for. It counts only in a world without a
// node.
var errUnsupported = errors.New("not on this kernel")

// unsupported adds to an error that the kernel lacks a thing where that is what it says.
func unsupported(err error) error {
	for _, e := range []error{unix.ENOSYS, unix.EOPNOTSUPP, unix.EPROTONOSUPPORT, unix.EAFNOSUPPORT, unix.ENOPROTOOPT,
		unix.ESOCKTNOSUPPORT, unix.ENOTSUP} {
		if errors.Is(err, e) {
			return fmt.Errorf("%w: %w", errUnsupported, err)
		}
	}
	return err
}

func newAttacker(text string) (*attacker, error) {
	a := &attacker{in: bufio.NewReader(os.Stdin), out: os.Stdout, pid: os.Getpid(), to: at(broker4)}
	return a, json.Unmarshal([]byte(text), &a.orders)
}

// attack is main of an attacker.
func attack(text string) error {
	a, err := newAttacker(text)
	if err != nil {
		return err
	}
	v := find(a.Vector)
	if v == nil {
		return fmt.Errorf("no vector %q", a.Vector)
	}
	if v.from == inUserNamespace {
		answer, err := a.ask("plug " + netnsOf(os.Getpid()))
		if err != nil {
			return err
		}
		if err := errors.Join(json.Unmarshal([]byte(answer), &a.outlet), up("lo")); err != nil {
			return err
		}
	}
	if !v.cold {
		if err := a.warm(); err != nil {
			return err
		}
	}
	if a.Listener, err = listenerPort(); err != nil {
		return err
	}
	if v.before != nil {
		if err := v.before(a); err != nil {
			return fmt.Errorf("before the attack: %w", err)
		}
	}
	if _, err := a.ask("begin"); err != nil {
		return err
	}
	err = v.attack(a)
	r := report{PID: a.pid, Destination: a.to.String(), Got: a.got, Unsupported: errors.Is(err, errUnsupported)}
	if err != nil {
		r.Error = err.Error()
	}
	return json.NewEncoder(a.out).Encode(r)
}

// ask has the test do something and returns what it answers when it is done.
func (a *attacker) ask(what string) (string, error) {
	if _, err := fmt.Fprintln(a.out, what); err != nil {
		return "", err
	}
	answer, err := a.in.ReadString('\n')
	if err != nil {
		return "", fmt.Errorf("ask to %s: %w", what, err)
	}
	return strings.TrimSpace(answer), nil
}

// warm connects as every client does, again and again while it is refused, until the broker answers.
func (a *attacker) warm() error {
	marker := a.Marker
	a.Marker = "warm-" + marker
	defer func() { a.Marker = marker }()
	for end := time.Now().Add(warmTime); ; time.Sleep(5 * time.Millisecond) {
		err := a.plain(a.to)
		if err == nil || time.Now().After(end) {
			return err
		}
	}
}

const (
	// patience bounds every wait of the test, so that a failure ends in a message.
	patience = 20 * time.Second
	warmTime = 3 * time.Second
	// connectTime bounds a connect(2) whose packets go nowhere, with room for a second SYN; answerTime the wait for what
	// the broker says.
	connectTime = 1500 * time.Millisecond
	answerTime  = 2 * time.Second
)

// plain connects and speaks.
func (a *attacker) plain(to netip.AddrPort) error {
	fd, err := a.connected(to)
	if err != nil {
		return err
	}
	return errors.Join(a.speak(fd), unix.Close(fd))
}

// connected is a socket of the address' family that is connected.
func (a *attacker) connected(to netip.AddrPort) (int, error) {
	fd, err := socket(familyOf(to), unix.SOCK_STREAM, unix.IPPROTO_TCP)
	if err != nil {
		return -1, err
	}
	if err := connect(fd, to); err != nil {
		return -1, errors.Join(err, unix.Close(fd))
	}
	return fd, nil
}

// frame is the request that is sent: ApiVersions v0, with the marker as client id. Any broker answers it, to anybody.
func (a *attacker) frame() []byte {
	return kmsg.NewRequestFormatter(kmsg.FormatterClientID(a.Marker)).
		AppendRequest(nil, kmsg.NewPtrApiVersionsRequest(), 4711)
}

// speak sends the request on a connected socket and reads an answer.
func (a *attacker) speak(fd int) error {
	if _, err := unix.Write(fd, a.frame()); err != nil {
		return fmt.Errorf("send: %w", err)
	}
	return hear(fd)
}

// hear reads an answer, all of it.
func hear(fd int) error {
	head := make([]byte, 4)
	if _, err := io.ReadFull(descriptor(fd), head); err != nil {
		return fmt.Errorf("receive: %w", err)
	}
	if _, err := io.CopyN(io.Discard, descriptor(fd), int64(binary.BigEndian.Uint32(head))); err != nil {
		return fmt.Errorf("receive: %w", err)
	}
	return nil
}

// descriptor reads from a file descriptor.
type descriptor int

// Read implements io.Reader.
func (d descriptor) Read(p []byte) (int, error) {
	n, err := unix.Read(int(d), p)
	for errors.Is(err, unix.EINTR) { // a ring's work for this thread interrupts too
		n, err = unix.Read(int(d), p)
	}
	if n == 0 && err == nil {
		err = io.EOF
	}
	return max(n, 0), err
}

// socket makes one whose calls end in time.
func socket(family, kind, protocol int) (int, error) {
	fd, err := unix.Socket(family, kind|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return -1, unsupported(os.NewSyscallError("socket", err))
	}
	return fd, errors.Join(timeouts(fd), err)
}

func timeouts(fd int) error {
	send, receive := unix.NsecToTimeval(int64(connectTime)), unix.NsecToTimeval(int64(answerTime))
	return errors.Join(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &send),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &receive))
}

func connect(fd int, to netip.AddrPort) error {
	err := unix.Connect(fd, sockaddr(to))
	for errors.Is(err, unix.EINTR) { // a signal of Go's, where there is a timeout; this waits on
		err = unix.Connect(fd, sockaddr(to))
	}
	return os.NewSyscallError("connect", err)
}

// awaitConnected waits for a connect that is under way, or is another process'.
func awaitConnected(fd int, patience time.Duration) error {
	for end := time.Now().Add(patience); ; pause() {
		_, err := unix.Getpeername(fd)
		if err == nil || time.Now().After(end) {
			return os.NewSyscallError("not connected: getpeername", err)
		}
	}
}

func familyOf(to netip.AddrPort) int {
	if to.Addr().Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

func sockaddr(to netip.AddrPort) unix.Sockaddr {
	if to.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()}
}

// at is an address with the brokers' port.
func at(a netip.Addr) netip.AddrPort { return netip.AddrPortFrom(a, brokerPort) }

// mapped is an IPv4 address as IPv6 sockets have it.
func mapped(a netip.Addr) netip.Addr { return netip.AddrFrom16(a.As16()) }

// pause is between two tries of the same.
func pause() { time.Sleep(5 * time.Millisecond) }
