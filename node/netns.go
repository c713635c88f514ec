package node

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"

	"github.com/vishvananda/netlink"
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
func openNetns(path string) (*netns, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open a network namespace: %w", err)
	}
	return newNetns(file)
}

// netnsOf is the network namespace of a socket.
func netnsOf(socket int) (*netns, error) {
	fd, err := unix.IoctlRetInt(socket, unix.SIOCGSKNS)
	if err != nil {
		return nil, fmt.Errorf("open the network namespace of a socket: %w", err)
	}
	return newNetns(os.NewFile(uintptr(fd), "netns"))
}

// newNetns takes the file over.
func newNetns(file *os.File) (_ *netns, err error) {
	n := &netns{file: file}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("network namespace %s: %w", file.Name(), err), file.Close())
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

// makeNetns makes a network namespace with its loopback up. It ends with the last that holds it.
func makeNetns() (*netns, error) {
	var n *netns
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked, as in do
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("make a network namespace: %w", err)
			return
		}
		lo, err := netlink.LinkByName("lo")
		if err == nil {
			err = netlink.LinkSetUp(lo)
		}
		if err == nil {
			n, err = openNetns("/proc/thread-self/ns/net")
		}
		done <- err
	}()
	if err := <-done; err != nil {
		return nil, err
	}
	return n, nil
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

// dup is the same namespace by a descriptor of its own.
func (n *netns) dup() (*netns, error) {
	fd, err := unix.FcntlInt(n.file.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("duplicate the descriptor of a network namespace: %w", err)
	}
	return &netns{os.NewFile(uintptr(fd), n.file.Name()), n.inode, n.cookie}, nil
}

// namespacesOf are the network namespaces of processes or threads, by inode, each with one that is in it. Those that
// end meanwhile are left out.
func namespacesOf(pids []int) map[uint64]int {
	found := map[uint64]int{}
	for _, pid := range pids {
		if inode, err := netnsInode(pid); err == nil {
			found[inode] = pid
		}
	}
	return found
}

// threadsOf are all threads of processes.
func threadsOf(pids []int) (tids []int) {
	for _, pid := range pids {
		entries, _ := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid)) // it may have ended
		for _, e := range entries {
			if tid, err := strconv.Atoi(e.Name()); err == nil {
				tids = append(tids, tid)
			}
		}
	}
	return tids
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
