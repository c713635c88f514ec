package node

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"

	"golang.org/x/sys/unix"
)

// netns is an open network namespace. While it is open the namespace lives on, though no process is left in it.
type netns struct {
	file   *os.File
	inode  uint64 // as in /proc/PID/ns/net
	cookie uint64 // SO_NETNS_COOKIE (Linux 5.14): never used twice in a boot
}

// openNetns opens a network namespace by a file of it: /proc/PID/ns/net, /proc/TID/ns/net or a bind mount. What is no
// network namespace is refused by setns(2).
func openNetns(path string) (_ *netns, err error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open a network namespace: %w", err)
	}
	n := &netns{file: file}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("network namespace %s: %w", path, err), file.Close())
		}
	}()
	var s unix.Stat_t
	if err = unix.Fstat(int(file.Fd()), &s); err != nil {
		return nil, err
	}
	n.inode = s.Ino
	err = n.do(func() (err error) {
		n.cookie, err = ownCookie()
		return err
	})
	return n, err
}

// ownCookie is the cookie of the calling thread's network namespace.
func ownCookie() (uint64, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer func() { _ = unix.Close(fd) }()
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if err != nil {
		return 0, fmt.Errorf("read SO_NETNS_COOKIE (Linux 5.14): %w", err)
	}
	return cookie, nil
}

// do calls f on a thread inside the namespace. f must not start goroutines that make sockets: they would run elsewhere.
func (n *netns) do(f func() error) error {
	done := make(chan error, 1)
	go func() {
		// Never unlocked: the thread, which is in the wrong namespace from here on, ends with the goroutine.
		runtime.LockOSThread()
		if err := unix.Setns(int(n.file.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("enter the network namespace: %w", err)
			return
		}
		done <- f()
	}()
	return <-done
}

// Close lets go of the namespace.
func (n *netns) Close() error { return n.file.Close() }

// processNetns are the network namespaces in which processes are, by inode, each with one of its processes. Processes
// that end meanwhile are left out.
func processNetns() (map[uint64]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("look for network namespaces: %w", err)
	}
	found := map[uint64]int{}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if inode, err := netnsInode(pid); err == nil {
			if _, known := found[inode]; !known {
				found[inode] = pid
			}
		}
	}
	return found, nil
}

// netnsInode is the network namespace of a process or thread.
func netnsInode(pid int) (uint64, error) {
	var s unix.Stat_t
	if err := unix.Stat(netnsPath(pid), &s); err != nil {
		return 0, err
	}
	return s.Ino, nil
}

func netnsPath(pid int) string { return fmt.Sprintf("/proc/%d/ns/net", pid) }
