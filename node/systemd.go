package node

import (
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// serviceManager is systemd, or who speaks its protocol, sd_notify(3): it is told how the node is, and keeps the
// listeners while the node restarts (FDSTORE, systemd 219). The zero value is none: what it is told is lost.
type serviceManager struct {
	socket string
}

// findServiceManager takes the manager's socket and the listeners it kept (sd_listen_fds(3)) out of the environment, so
// that no child takes them for its own.
func findServiceManager() (m serviceManager, kept []*os.File) {
	m.socket = os.Getenv("NOTIFY_SOCKET")
	n, err := strconv.Atoi(os.Getenv("LISTEN_FDS"))
	mine := err == nil && os.Getenv("LISTEN_PID") == strconv.Itoa(os.Getpid())
	for _, name := range []string{"NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"} {
		_ = os.Unsetenv(name)
	}
	if !mine {
		return m, nil
	}
	const first = 3 // SD_LISTEN_FDS_START
	for fd := first; fd < first+n; fd++ {
		unix.CloseOnExec(fd)
		kept = append(kept, os.NewFile(uintptr(fd), fmt.Sprintf("inherited descriptor %d", fd)))
	}
	return m, kept
}

// tell sends a state of sd_notify(3), with file descriptors or without.
func (m serviceManager) tell(state string, files ...*os.File) error {
	if m.socket == "" {
		return nil
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("tell the service manager %q: %w", state, err)
	}
	defer func() { _ = unix.Close(fd) }()
	rights, err := rightsOf(files)
	if err != nil {
		return fmt.Errorf("tell the service manager %q: %w", state, err)
	}
	if err := unix.Sendmsg(fd, []byte(state), rights, &unix.SockaddrUnix{Name: m.socket}, unix.MSG_NOSIGNAL); err != nil {
		return fmt.Errorf("tell the service manager %q: %w", state, err)
	}
	return nil
}

// rightsOf is the control message that carries the files' descriptors (unix(7), SCM_RIGHTS). Not by File.Fd: it would
// make accept(2) block on a listener that is still in use.
func rightsOf(files []*os.File) ([]byte, error) {
	var fds []int
	for _, f := range files {
		raw, err := f.SyscallConn()
		if err == nil {
			err = control(raw, func(fd int) error {
				fds = append(fds, fd)
				return nil
			})
		}
		if err != nil {
			return nil, err
		}
	}
	if len(fds) == 0 {
		return nil, nil
	}
	return unix.UnixRights(fds...), nil
}

// keeps tells whether listeners outlive the node.
func (m serviceManager) keeps() bool { return m.socket != "" }

// keep has the manager hold copies of the file descriptors, which it closes, until drop.
func (m serviceManager) keep(name string, files []*os.File) error {
	err := m.tell("FDSTORE=1\nFDNAME="+name, files...)
	for _, f := range files {
		err = errors.Join(err, f.Close())
	}
	return err
}

func (m serviceManager) drop(name string) error { return m.tell("FDSTOREREMOVE=1\nFDNAME=" + name) }
