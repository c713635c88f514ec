package bpf

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The test binary is its own client: started again with this variable, it does what the plan says.
const planVariable = "KLAMM_TEST_PLAN"

// plan is what a client process does, step by step; it answers each step with one outcome. Then it keeps its sockets
// until its standard input ends.
type plan struct {
	UID   int // 0 stays root
	Steps []step
	Write bool // then passes its standard input on to its first socket
}

type step struct {
	Do string // a key of actions
	To string // address and port
	// Socket is the index of an earlier step, whose socket is used; by default a new one is made.
	Socket int    `json:",omitempty"`
	V6     bool   `json:",omitempty"` // an AF_INET6 socket, IPv4 addresses are mapped
	Proto  int    `json:",omitempty"` // IPPROTO_
	Device string `json:",omitempty"` // SO_BINDTODEVICE
	V6Only bool   `json:",omitempty"`
	Packet []byte `json:",omitempty"` // for "send a packet", from the IP header on
}

type outcome struct {
	Error string // errno by name; "" is success
	Peer  string // getpeername(2)
}

// actions are what a step can do with its socket.
var actions = map[string]func(fd int, s step) error{
	"connect": func(fd int, s step) error { return unix.Connect(fd, s.address()) },
	"connect without blocking": func(fd int, s step) error {
		if err := unix.SetNonblock(fd, true); err != nil {
			return err
		}
		if err := unix.Connect(fd, s.address()); !errors.Is(err, unix.EINPROGRESS) {
			return err
		}
		if _, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, -1); err != nil {
			return err
		}
		errno, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
		if errno != 0 {
			return unix.Errno(errno)
		}
		return err
	},
	"send with fast open": func(fd int, s step) error {
		return unix.Sendto(fd, []byte("hello"), unix.MSG_FASTOPEN, s.address())
	},
	"disconnect": func(fd int, _ step) error {
		unspecified := make([]byte, unix.SizeofSockaddrInet6)
		_, _, errno := unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(ptr(unspecified)), uintptr(len(unspecified)))
		if errno != 0 {
			return errno
		}
		return nil
	},
	"bind":          func(fd int, s step) error { return unix.Bind(fd, s.address()) },
	"only a socket": func(int, step) error { return nil },
	"close":         func(fd int, _ step) error { return unix.Close(fd) },
	"wait": func(int, step) error { // to be told to proceed
		_, err := os.Stdin.Read(make([]byte, 1))
		return err
	},
	"send a packet": func(_ int, s step) error {
		to := s.address()
		family := unix.AF_INET
		if v6, is := to.(*unix.SockaddrInet6); is {
			family, v6.Port = unix.AF_INET6, 0
		}
		raw, err := unix.Socket(family, unix.SOCK_RAW, unix.IPPROTO_RAW) // with it the sender writes the IP header
		if err != nil {
			return err
		}
		defer func() { _ = unix.Close(raw) }()
		return unix.Sendto(raw, s.Packet, 0, to)
	},
}

func (s step) address() unix.Sockaddr {
	to := netip.MustParseAddrPort(s.To)
	if s.V6 || !to.Addr().Is4() {
		return &unix.SockaddrInet6{Addr: to.Addr().As16(), Port: int(to.Port())}
	}
	return &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())}
}

func (s step) socket() (int, error) {
	family := unix.AF_INET
	if s.V6 || (s.To != "" && !netip.MustParseAddrPort(s.To).Addr().Is4()) {
		family = unix.AF_INET6
	}
	kind := unix.SOCK_STREAM
	if s.Proto == unix.IPPROTO_UDP {
		kind = unix.SOCK_DGRAM
	}
	fd, err := unix.Socket(family, kind, s.Proto)
	if err != nil {
		return -1, err
	}
	if s.V6Only {
		err = unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1)
	}
	if s.Device != "" {
		err = unix.BindToDevice(fd, s.Device)
	}
	return fd, err
}

func (s step) run(fd int) outcome {
	if err := actions[s.Do](fd, s); err != nil {
		return outcome{Error: errorName(err)}
	}
	return outcome{Peer: peerName(fd)}
}

func errorName(err error) string {
	var errno unix.Errno
	if errors.As(err, &errno) {
		return unix.ErrnoName(errno)
	}
	return err.Error()
}

func peerName(fd int) string {
	switch peer, _ := unix.Getpeername(fd); p := peer.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(p.Addr), uint16(p.Port)).String()
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(p.Addr), uint16(p.Port)).String()
	}
	return ""
}

// beClient runs the plan, if this process was started for one.
func beClient() bool {
	text, is := os.LookupEnv(planVariable)
	if !is {
		return false
	}
	if err := runPlan(text); err != nil {
		fmt.Fprintln(os.Stderr, "client:", err)
		os.Exit(1)
	}
	return true
}

func runPlan(text string) error {
	var p plan
	if err := json.Unmarshal([]byte(text), &p); err != nil {
		return err
	}
	if p.UID != 0 {
		if err := syscall.Setresgid(p.UID, p.UID, p.UID); err != nil {
			return err
		}
		if err := syscall.Setresuid(p.UID, p.UID, p.UID); err != nil {
			return err
		}
	}
	out := json.NewEncoder(os.Stdout)
	var sockets []int
	for i, s := range p.Steps {
		if s.Do == "execute again" {
			return executeAgain(plan{Steps: p.Steps[i+1:]})
		}
		if s.Do == "fork" {
			if err := fork(); err != nil {
				return err
			}
			continue
		}
		if s.Do == "load the programs" {
			_, err := Load(Options{CgroupPath: s.To})
			if err := out.Encode(outcome{Error: fmt.Sprint(errors.Is(err, ErrPrivilege), err)}); err != nil {
				return err
			}
			continue
		}
		var fd int
		if s.Socket > 0 {
			fd = sockets[s.Socket-1]
		} else {
			var err error
			if fd, err = s.socket(); err != nil {
				return err
			}
		}
		sockets = append(sockets, fd)
		if err := out.Encode(s.run(fd)); err != nil {
			return err
		}
	}
	to := io.Discard
	if p.Write {
		to = os.NewFile(uintptr(sockets[0]), "socket")
	}
	_, err := io.Copy(to, os.Stdin)
	return err
}

// fork starts a child that is the same program image and has the same sockets, until standard input ends. It makes
// nothing but system calls: the Go runtime does not survive a fork.
//
//go:norace
//go:nosplit
func fork() error {
	pid, _, errno := syscall.RawSyscall(syscall.SYS_CLONE, uintptr(syscall.SIGCHLD), 0, 0)
	if errno != 0 {
		return errno
	}
	if pid > 0 {
		return nil
	}
	var b byte
	for {
		n, _, errno := syscall.RawSyscall(syscall.SYS_READ, 0, uintptr(unsafe.Pointer(&b)), 1)
		if n == 0 || errno != 0 && errno != syscall.EINTR {
			_, _, _ = syscall.RawSyscall(syscall.SYS_EXIT_GROUP, 0, 0, 0)
		}
	}
}

func executeAgain(rest plan) error {
	text, err := json.Marshal(rest)
	if err != nil {
		return err
	}
	if err := os.Setenv(planVariable, string(text)); err != nil {
		return err
	}
	return unix.Exec("/proc/self/exe", os.Args[:1], os.Environ())
}

// client is a running client process.
type client struct {
	t        testing.TB
	cmd      *exec.Cmd
	stdin    io.WriteCloser
	outcomes *json.Decoder
	killed   bool
	pidFD    int
}

// startClient starts a process in a cgroup, and in the network namespace of the calling thread.
func startClient(t testing.TB, cgroup string, p plan, namespaces uintptr) *client {
	t.Helper()
	text, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.Open(cgroup)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = dir.Close() }()

	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	c := &client{t: t, pidFD: -1}
	c.cmd = exec.CommandContext(ctx, "/proc/self/exe")
	// With -race a process would otherwise take a second to end.
	c.cmd.Env = append(os.Environ(), planVariable+"="+string(text), "GORACE=atexit_sleep_ms=0")
	c.cmd.Stderr = os.Stderr
	c.cmd.SysProcAttr = &syscall.SysProcAttr{
		UseCgroupFD: true, CgroupFD: int(dir.Fd()), Cloneflags: namespaces, PidFD: &c.pidFD,
	}
	if c.stdin, err = c.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	stdout, err := c.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	c.outcomes = json.NewDecoder(stdout)
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.end)
	return c
}

// outcome waits for the next step's outcome.
func (c *client) outcome() outcome {
	c.t.Helper()
	var o outcome
	if err := c.outcomes.Decode(&o); err != nil {
		c.t.Fatalf("the client gave no outcome: %v", err)
	}
	return o
}

// proceed ends a step "wait".
func (c *client) proceed() {
	c.t.Helper()
	if _, err := c.stdin.Write([]byte{0}); err != nil {
		c.t.Fatal(err)
	}
}

// kill makes the client a zombie.
func (c *client) kill() {
	c.t.Helper()
	c.killed = true
	if err := c.cmd.Process.Kill(); err != nil {
		c.t.Fatal(err)
	}
	exited := []unix.PollFd{{Fd: int32(c.pidFD), Events: unix.POLLIN}}
	if _, err := unix.Poll(exited, int(patience.Milliseconds())); err != nil {
		c.t.Fatal(err)
	}
}

// end lets the client exit, with all its sockets, and waits for that.
func (c *client) end() {
	if c.pidFD < 0 {
		return
	}
	_ = c.stdin.Close()
	if err := c.cmd.Wait(); err != nil && !c.killed {
		c.t.Errorf("the client: %v", err)
	}
	_ = unix.Close(c.pidFD)
	c.pidFD = -1
}
