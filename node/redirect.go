package node

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"klamm/bpf"
)

const (
	// listenAttempts bounds the search for a port that is free on both loopback addresses.
	listenAttempts = 64
	// acceptPauseMin and acceptPauseMax bound the pause after a failed accept(2), which doubles: for want of file
	// descriptors, trying at once would only burn the CPU.
	acceptPauseMin = 5 * time.Millisecond
	acceptPauseMax = time.Second
)

// RedirectOptions are the options of OpenRedirect.
type RedirectOptions struct {
	// CgroupPath is the directory in cgroup2 whose processes are redirected, with all below. Default: the root, which
	// alone leaves no way around.
	CgroupPath string
	// Ports are the brokers' ports; see SetPorts.
	Ports []uint16
}

// Redirect is the kernel's redirect and the listeners behind it. All methods may be called concurrently, but none after
// Close except Accept.
type Redirect struct {
	programs *bpf.Programs
	listener listener // of the host's network namespace
	accepted chan redirected
	closed   chan struct{}
	running  sync.WaitGroup
	stop     func() error
	close    func() error

	// The node's own Kafka clients may still dial, and metrics be read, while it closes.
	using sync.RWMutex
	gone  bool // the programs are closed

	acceptRefused, acceptFailed atomic.Uint64
}

// redirected is an accepted connection with its record.
type redirected struct {
	conn   *net.TCPConn
	record bpf.Record
}

// OpenRedirect attaches the programs and listens in the network namespace of the caller. Where it fails, the error says
// what the user can do; see bpf.Load for its kinds.
func OpenRedirect(o RedirectOptions) (_ *Redirect, err error) {
	root, err := Cgroup2Mount()
	if err != nil {
		return nil, err
	}
	if o.CgroupPath == "" {
		o.CgroupPath = root
	}
	programs, err := bpf.Load(bpf.Options{CgroupPath: o.CgroupPath, ListenerCgroup: ownCgroup(root)})
	if err != nil {
		return nil, err
	}
	r := &Redirect{programs: programs, accepted: make(chan redirected), closed: make(chan struct{})}
	r.stop = sync.OnceValue(func() error {
		close(r.closed)
		return r.listener.Close()
	})
	r.close = sync.OnceValue(r.shut)
	defer func() {
		if err != nil {
			err = errors.Join(err, r.Close())
		}
	}()
	if r.listener, err = r.listen(); err != nil {
		return nil, err
	}
	if err := programs.Enrol(r.listener.cookie, r.listener.port); err != nil {
		return nil, err
	}
	for _, l := range r.listener.tcp {
		r.running.Go(func() { r.serve(l) })
	}
	if err := r.SetPorts(o.Ports); err != nil {
		return nil, err
	}
	return r, nil
}

// listener is what one network namespace has: the same port at 127.0.0.1 and, where there is IPv6, at ::1.
type listener struct {
	cookie uint64 // SO_NETNS_COOKIE
	port   uint16
	tcp    []*net.TCPListener
}

func (l listener) Close() error {
	var errs []error
	for _, tcp := range l.tcp {
		errs = append(errs, tcp.Close())
	}
	return errors.Join(errs...)
}

// listen opens the listeners of the calling thread's network namespace.
func (r *Redirect) listen() (listener, error) {
	var err error
	for range listenAttempts {
		var l listener
		if l, err = r.listenOnce(); err == nil || !errors.Is(err, unix.EADDRINUSE) {
			return l, err
		}
	}
	return listener{}, fmt.Errorf("find a port that is free on both loopback addresses, %d times: %w", listenAttempts, err)
}

func (r *Redirect) listenOnce() (_ listener, err error) {
	v4, cookie, err := r.listenAt(netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), 0))
	if err != nil {
		return listener{}, err
	}
	port := netip.MustParseAddrPort(v4.Addr().String()).Port()
	l := listener{cookie: cookie, port: port, tcp: []*net.TCPListener{v4}}
	v6, _, err := r.listenAt(netip.AddrPortFrom(netip.IPv6Loopback(), port))
	switch {
	// No IPv6 here: then no client can connect by it either.
	case errors.Is(err, unix.EAFNOSUPPORT), errors.Is(err, unix.EADDRNOTAVAIL):
		return l, nil
	case err != nil:
		return listener{}, errors.Join(err, l.Close())
	}
	l.tcp = append(l.tcp, v6)
	return l, nil
}

// listenAt stamps the socket, because nobody else may bind an enrolled port. It must be plain TCP: an MPTCP listener
// would keep the record on a subflow, where it cannot be found by the accepted socket.
func (r *Redirect) listenAt(at netip.AddrPort) (*net.TCPListener, uint64, error) {
	var cookie uint64
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		return control(c, func(fd int) (err error) {
			if cookie, err = unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE); err != nil {
				return fmt.Errorf("read SO_NETNS_COOKIE (Linux 5.14): %w", err)
			}
			return r.programs.Stamp(fd)
		})
	}}
	config.SetMultipathTCP(false)
	l, err := config.Listen(context.Background(), "tcp", at.String())
	if err != nil {
		return nil, 0, fmt.Errorf("listen for redirected connections: %w", err)
	}
	return l.(*net.TCPListener), cookie, nil
}

// control calls f with the file descriptor.
func control(c syscall.RawConn, f func(fd int) error) (err error) {
	return errors.Join(c.Control(func(fd uintptr) { err = f(int(fd)) }), err)
}

// serve accepts until the listener is closed.
func (r *Redirect) serve(l *net.TCPListener) {
	pause := acceptPauseMin
	for {
		conn, err := l.AcceptTCP()
		switch {
		case errors.Is(err, net.ErrClosed):
			return
		case err != nil:
			r.acceptFailed.Add(1)
			select {
			case <-time.After(pause):
			case <-r.closed:
				return
			}
			pause = min(2*pause, acceptPauseMax)
			continue
		}
		pause = acceptPauseMin
		record, err := r.record(conn)
		if err != nil {
			r.acceptRefused.Add(1)
			reset(conn)
			continue
		}
		select {
		case r.accepted <- redirected{conn, record}:
		case <-r.closed:
			reset(conn)
		}
	}
}

func (r *Redirect) record(conn *net.TCPConn) (record bpf.Record, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return bpf.Record{}, err
	}
	err = control(raw, func(fd int) (err error) {
		record, err = r.programs.Record(fd)
		return err
	})
	return record, err
}

// Accept waits for the next redirected connection. A connection that has no record was not redirected: it is reset and
// counted, never returned. The error is net.ErrClosed after Close, and none other.
func (r *Redirect) Accept() (net.Conn, bpf.Record, error) {
	select {
	case a := <-r.accepted:
		return a.conn, a.record, nil
	case <-r.closed:
		return nil, bpf.Record{}, fmt.Errorf("accept a redirected connection: %w", net.ErrClosed)
	}
}

// Dial connects to a broker itself, from the network namespace of the calling thread, over plain TCP.
func (r *Redirect) Dial(ctx context.Context, to netip.AddrPort) (*net.TCPConn, error) {
	return r.Dialer().DialTCP(ctx, "tcp", netip.AddrPort{}, to)
}

// Dialer returns a dialer for the node itself: its sockets are stamped before they connect, so they are not redirected.
// They are plain TCP, since the stamp of an MPTCP socket is not on the subflow that connects.
func (r *Redirect) Dialer() *net.Dialer {
	d := &net.Dialer{Control: func(_, _ string, c syscall.RawConn) error { return control(c, r.stamp) }}
	d.SetMultipathTCP(false)
	return d
}

// downFor is how long a destination that could not be reached is refused without trying again.
const downFor = time.Second

// Down makes clients see for a second what the node saw: a broker that refuses connections.
func (r *Redirect) Down(record bpf.Record) error {
	cookie, to := record.NetnsCookie, record.Destination()
	r.running.Go(func() {
		select {
		case <-time.After(2 * downFor):
			_ = r.programs.Forget(cookie, to) // an entry that stays has no effect
		case <-r.closed:
		}
	})
	return r.programs.Down(cookie, to, downFor)
}

func (r *Redirect) stamp(fd int) error {
	r.using.RLock()
	defer r.using.RUnlock()
	if r.gone {
		return net.ErrClosed
	}
	return r.programs.Stamp(fd)
}

// SetPorts replaces the set of broker ports: connects to them, on any address, are redirected from then on.
func (r *Redirect) SetPorts(ports []uint16) error { return r.programs.SetPorts(ports) }

// Task returns what a process is now; see bpf.Programs.Task.
func (r *Redirect) Task(pid uint32) (bpf.TaskFacts, error) { return r.programs.Task(pid) }

// Counters returns the kernel's counters (see bpf.Programs.Counters) and two of the listeners:
//
//	accept_refused  accepted connections that were reset, because they had no record or its version was not ours
//	accept_failed   failures of accept(2), such as for want of file descriptors; the clients wait meanwhile
func (r *Redirect) Counters() (map[string]uint64, error) {
	r.using.RLock()
	defer r.using.RUnlock()
	if r.gone {
		return nil, net.ErrClosed
	}
	counters, err := r.programs.Counters()
	if err != nil {
		return nil, err
	}
	maps.Copy(counters, map[string]uint64{
		"accept_refused": r.acceptRefused.Load(),
		"accept_failed":  r.acceptFailed.Load(),
	})
	return counters, nil
}

// Stop stops listening, and Accept with it: from then on clients are refused.
func (r *Redirect) Stop() error { return r.stop() }

// Close stops listening and detaches the programs: from then on clients connect directly. Connections that Accept has
// returned stay open.
func (r *Redirect) Close() error { return r.close() }

// shut stops the listeners first, since they use the programs. A client that connects in between is refused.
func (r *Redirect) shut() error {
	err := r.stop()
	r.running.Wait()
	r.using.Lock()
	defer r.using.Unlock()
	r.gone = true
	return errors.Join(err, r.programs.Close())
}

// Cgroup2Mount returns where the root of cgroup2 is mounted: /sys/fs/cgroup, or /sys/fs/cgroup/unified on hosts that
// use cgroup v1 beside it. A container with a cgroup namespace of its own sees only a part of cgroup2: an error.
func Cgroup2Mount() (string, error) {
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup2"))
	if err != nil {
		return "", fmt.Errorf("look for cgroup2: %w", err)
	}
	for _, m := range mounts {
		if id, err := cgroupID(m.Mountpoint); err == nil && id == rootCgroupID {
			return m.Mountpoint, nil
		}
	}
	if len(mounts) > 0 {
		return "", fmt.Errorf("%s is only a part of the host's cgroup2: run the node in the host's cgroup namespace, or"+
			" mount the host's /sys/fs/cgroup into its container", mounts[0].Mountpoint)
	}
	return "", errors.New("cgroup2 is not mounted: mount -t cgroup2 none /sys/fs/cgroup/unified")
}

// rootCgroupID is the id of the root of cgroup2 on every kernel.
const rootCgroupID = 1

// cgroupID returns the id of a cgroup2 directory: its inode.
func cgroupID(path string) (uint64, error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(path, &fs); err != nil {
		return 0, &os.PathError{Op: "statfs", Path: path, Err: err}
	}
	if fs.Type != unix.CGROUP2_SUPER_MAGIC {
		return 0, fmt.Errorf("%s is not in cgroup2", path)
	}
	var s unix.Stat_t
	if err := unix.Stat(path, &s); err != nil {
		return 0, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	return s.Ino, nil
}

// ownCgroup returns the directory of this process in cgroup2; the root where it cannot tell.
func ownCgroup(root string) string {
	all, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return root
	}
	for line := range strings.Lines(string(all)) {
		if path, is := strings.CutPrefix(line, "0::"); is {
			own := filepath.Join(root, strings.TrimSuffix(path, "\n"))
			if _, err := cgroupID(own); err == nil {
				return own
			}
		}
	}
	return root
}

// BPFFS is where hosts have their BPF file system.
const BPFFS = "/sys/fs/bpf"

// HasBPFFS tells whether a BPF file system is mounted at path.
func HasBPFFS(path string) bool {
	var fs unix.Statfs_t
	return unix.Statfs(path, &fs) == nil && fs.Type == unix.BPF_FS_MAGIC
}

// MountBPFFS mounts a BPF file system at path, readable by root only, unless there is one already. It needs
// CAP_SYS_ADMIN.
func MountBPFFS(path string) error {
	if HasBPFFS(path) {
		return nil
	}
	if err := os.MkdirAll(path, 0o700); err != nil {
		return fmt.Errorf("make a place for the BPF file system: %w", err)
	}
	if err := unix.Mount("bpffs", path, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
		return fmt.Errorf("mount the BPF file system at %s: %w: run as root, or: mount -t bpf bpffs %s", path, err, path)
	}
	return nil
}
