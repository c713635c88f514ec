package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"klamm/test/host"
	"klamm/test/kafka"
)

// dialer is a process in the cgroup that the node redirects. It connects, and hands over the sockets, so that one
// program has connections through the node and past it.
type dialer struct {
	cmd *exec.Cmd
	mu  sync.Mutex
	*net.UnixConn
}

const dialTimeout = 10 * time.Second

func startDialer(cgroup string) (*dialer, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	theirs := os.NewFile(uintptr(pair[1]), "theirs")
	defer func() { _ = theirs.Close() }()
	ours, err := unixConn(pair[0])
	if err != nil {
		return nil, err
	}
	cmd := exec.Command("/proc/self/exe", "dial")
	cmd.ExtraFiles, cmd.Stderr = []*os.File{theirs}, os.Stderr
	if err := (kafka.Place{Cgroup: cgroup}).Start(cmd); err != nil {
		return nil, errors.Join(err, ours.Close())
	}
	return &dialer{cmd: cmd, UnixConn: ours}, nil
}

func unixConn(fd int) (*net.UnixConn, error) {
	file := os.NewFile(uintptr(fd), "dialer")
	defer func() { _ = file.Close() }()
	c, err := net.FileConn(file)
	if err != nil {
		return nil, err
	}
	return c.(*net.UnixConn), nil // of a socket pair it is nothing else
}

// dial connects to an address from one of this host's.
func (d *dialer) dial(from, to string) (net.Conn, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, err := d.Write([]byte(from + " " + to)); err != nil {
		return nil, err
	}
	text, rights := make([]byte, 1024), make([]byte, unix.CmsgSpace(4))
	n, m, _, _, err := d.ReadMsgUnix(text, rights)
	if err != nil {
		return nil, fmt.Errorf("the dialer: %w", err)
	}
	if m == 0 {
		return nil, fmt.Errorf("connect from %s to %s: %s", from, to, text[:n])
	}
	messages, err := unix.ParseSocketControlMessage(rights[:m])
	if err != nil {
		return nil, err
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		return nil, err
	}
	file := os.NewFile(uintptr(fds[0]), to)
	defer func() { _ = file.Close() }()
	return net.FileConn(file)
}

// stop ends the dialer; the connections stay.
func (d *dialer) stop() error {
	return errors.Join(d.Close(), host.EndBy(d.cmd, syscall.SIGKILL))
}

// beDialer is the dialer's own life.
func beDialer() error {
	conn, err := unixConn(3)
	if err != nil {
		return err
	}
	for line := make([]byte, 1024); ; {
		n, err := conn.Read(line)
		if err != nil || n == 0 {
			return nil // the other end is closed
		}
		from, to, _ := strings.Cut(string(line[:n]), " ")
		if err := handOver(conn, from, to); err != nil {
			if _, err := conn.Write([]byte(err.Error())); err != nil {
				return err
			}
		}
	}
}

func handOver(to *net.UnixConn, from, address string) error {
	c, err := connect(from, address)
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	file, err := c.(*net.TCPConn).File()
	if err != nil {
		return err
	}
	defer func() { _ = file.Close() }()
	_, _, err = to.WriteMsgUnix([]byte("ok"), unix.UnixRights(int(file.Fd())), nil)
	return err
}

// connect connects from this process.
func connect(from, to string) (net.Conn, error) {
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}, Timeout: dialTimeout}
	return d.Dial("tcp", to)
}
