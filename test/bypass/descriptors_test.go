package bypass

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// descriptors: sockets that more than one process has.
var descriptors = []vector{
	{name: "an unconnected socket by SCM_RIGHTS, connected by who got it", want: intercepted, attack: connectsAnothers},
	{name: "an unconnected socket by pidfd_getfd, connected by who took it", want: intercepted, attack: takesUnconnected},
	{name: "a child that shares descriptors (CLONE_FILES) connects", want: intercepted,
		attack: childConnects(unix.CLONE_FILES)},
	{name: "a forked child connects, its parent speaks", want: intercepted, attack: childConnects(0)},
	{name: "a socket made before its process changed the cgroup", as: root, want: intercepted, attack: moves},
	{name: "execve between socket and connect", want: intercepted, attack: executes},
	{name: "a connected socket by SCM_RIGHTS, used by who got it", want: intercepted, attack: usesAnothers,
		hole: "identity is that of the process that connected; separate users, so that sockets are not shared"},
}

// secondVariable makes this binary the second process of an attacker, with a role. Descriptor 3 is what it is given.
const secondVariable = "KLAMM_BYPASS_SECOND"

const secondFD = 3

// seconds are the roles. They have the orders of the attacker, which are in the environment still.
func second(role string) error {
	a, err := newAttacker(os.Getenv(attackVariable))
	if err != nil {
		return err
	}
	run, has := map[string]func() error{
		"connect and speak": func() error {
			return errors.Join(connect(secondFD, a.to), a.speak(secondFD))
		},
		"connect to the broker and speak": func() error { return a.plain(a.to) },
		"connect what comes": func() error {
			fd, err := receive(secondFD)
			if err != nil {
				return err
			}
			return errors.Join(connect(fd, a.to), a.speak(fd))
		},
		"speak by what comes": func() error {
			fd, err := receive(secondFD)
			if err != nil {
				return err
			}
			return a.speak(fd)
		},
		"keep connecting":                     func() error { return keepsConnecting(a) },
		"connect to the other port and speak": func() error { return fromBehind(a) },
		"connect what the parent has": func() error {
			fd, err := take(os.Getppid(), a.Descriptor)
			if err != nil {
				return err
			}
			return errors.Join(connect(fd, a.to), a.speak(fd))
		},
		"speak by what the parent has": func() error {
			fd, err := take(os.Getppid(), a.Descriptor)
			if err != nil {
				return err
			}
			return a.speak(fd)
		},
	}[role]
	if !has {
		return fmt.Errorf("no role %q", role)
	}
	return run()
}

// startSecond starts another process where the attacker is, with a file.
func (a *attacker) startSecond(role string, file *os.File) (*exec.Cmd, error) {
	cmd := startableSecond(role)
	cmd.ExtraFiles = []*os.File{file}
	return cmd, cmd.Start()
}

func send(over, fd int) error { return unix.Sendmsg(over, []byte{0}, unix.UnixRights(fd), nil, 0) }

func receive(over int) (int, error) {
	b, rights := make([]byte, 1), make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(over, b, rights, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return -1, err
	}
	messages, err := unix.ParseSocketControlMessage(rights[:n])
	if err != nil || len(messages) == 0 {
		return -1, fmt.Errorf("no descriptor came: %w", err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		return -1, err
	}
	return fds[0], nil
}

// handOver sends a socket to a second process with a role; the identity is that of the connector.
func (a *attacker) handOver(fd int, role string, itConnects bool) error {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	theirs := os.NewFile(uintptr(pair[1]), "pair")
	cmd, err := a.startSecond(role, theirs)
	if err != nil {
		return err
	}
	if itConnects {
		a.pid = cmd.Process.Pid
	}
	return errors.Join(theirs.Close(), send(pair[0], fd), unix.Close(fd), cmd.Wait(), unix.Close(pair[0]))
}

func connectsAnothers(a *attacker) error {
	fd, err := socket(unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_TCP)
	if err != nil {
		return err
	}
	return a.handOver(fd, "connect what comes", true)
}

func usesAnothers(a *attacker) error {
	fd, err := a.connected(a.to)
	if err != nil {
		return err
	}
	return a.handOver(fd, "speak by what comes", false)
}

func takesUnconnected(a *attacker) error {
	fd, err := socket(unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_TCP)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	a.pid = 0 // it is the child that connects
	return a.takenBy(fd, "connect what the parent has")
}

// takenBy has a child take a descriptor of ours, and do what its role says.
func (a *attacker) takenBy(fd int, role string) error {
	a.Descriptor = fd
	// Who has, or had, capabilities may be looked into by those who have them only, unless it says otherwise.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 1, 0, 0, 0); err != nil {
		return err
	}
	text, err := json.Marshal(a.orders)
	if err != nil {
		return err
	}
	if err := os.Setenv(attackVariable, string(text)); err != nil {
		return err
	}
	cmd := startableSecond(role)
	if err := cmd.Start(); err != nil {
		return err
	}
	if a.pid == 0 {
		a.pid = cmd.Process.Pid
	}
	return cmd.Wait()
}

func take(pid, fd int) (int, error) {
	process, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return -1, unsupported(err)
	}
	defer func() { _ = unix.Close(process) }()
	taken, err := unix.PidfdGetfd(process, fd, 0)
	return taken, unsupported(os.NewSyscallError("pidfd_getfd", err))
}

// childConnects has a child of clone(2) connect the socket; the parent speaks.
func childConnects(flags uintptr) func(*attacker) error {
	return func(a *attacker) error {
		fd, err := socket(unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_TCP)
		if err != nil {
			return err
		}
		defer func() { _ = unix.Close(fd) }()
		to := rawAddress(a.to)
		pid, errno := cloneAndConnect(flags, fd, to)
		if errno != 0 {
			return os.NewSyscallError("clone", errno)
		}
		a.pid = pid
		err = awaitConnected(fd, connectTime)
		if err == nil {
			err = a.speak(fd)
		}
		if kerr := unix.Kill(pid, unix.SIGKILL); kerr != nil {
			return kerr
		}
		_, werr := unix.Wait4(pid, nil, 0, nil)
		return errors.Join(err, werr)
	}
}

// cloneAndConnect is fork as far as the Go runtime is concerned: the child has one thread and may do nothing but raw
// system calls. It stays, so that there is somebody to identify, until it is killed.
//
//go:norace
//go:nocheckptr
func cloneAndConnect(flags uintptr, fd int, to []byte) (int, syscall.Errno) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	address, size := uintptr(unsafe.Pointer(&to[0])), uintptr(len(to))
	syscall.ForkLock.Lock()
	pid, _, errno := syscall.RawSyscall6(unix.SYS_CLONE, flags|uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
	if pid == 0 && errno == 0 {
		_, _, _ = syscall.RawSyscall(unix.SYS_CONNECT, uintptr(fd), address, size)
		for {
			_, _, _ = syscall.RawSyscall6(unix.SYS_PPOLL, 0, 0, 0, 0, 0, 0)
		}
	}
	syscall.ForkLock.Unlock()
	runtime.KeepAlive(to)
	return int(pid), errno
}

// rawAddress is a sockaddr as the kernel has it.
func rawAddress(to netip.AddrPort) []byte {
	p := to.Port()
	if to.Addr().Is4() {
		a := to.Addr().As4()
		b := append([]byte{unix.AF_INET, 0, byte(p >> 8), byte(p)}, a[:]...)
		return append(b, make([]byte, 8)...)
	}
	a := to.Addr().As16()
	b := append([]byte{unix.AF_INET6, 0, byte(p >> 8), byte(p), 0, 0, 0, 0}, a[:]...)
	return append(b, 0, 0, 0, 0)
}

func rawConnect(fd int, address []byte) error {
	_, _, errno := unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&address[0])), uintptr(len(address)))
	runtime.KeepAlive(address)
	if errno != 0 {
		return os.NewSyscallError("connect", errno)
	}
	return nil
}

// moves takes itself, but not the socket, to another cgroup.
func moves(a *attacker) error {
	fd, err := socket(unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_TCP)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	if err := os.WriteFile(a.Cgroup+"/"+nestedCgroup+"/cgroup.procs", []byte("0"), 0); err != nil {
		return err
	}
	return errors.Join(connect(fd, a.to), a.speak(fd))
}

// executes has another executable take over this process, and its socket.
func executes(a *attacker) error {
	file, err := a.socketFile()
	if err != nil {
		return err
	}
	defer func() { _ = file.Close() }()
	cmd, err := a.startSecond("connect and speak", file)
	if err != nil {
		return err
	}
	a.pid = cmd.Process.Pid
	return cmd.Wait()
}

func (a *attacker) socketFile() (*os.File, error) {
	fd, err := socket(unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_TCP)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), "socket"), nil
}
