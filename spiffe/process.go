package spiffe

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// ErrGone says that the process that connected has exited: nobody is left to attest.
var ErrGone = errors.New("process is gone")

// ErrChanged says that what carries the pid now is not what connected: another process, another program (exec),
// other ids or another cgroup.
var ErrChanged = errors.New("process changed since it connected")

// TaskFacts is what the kernel says of a process now. Each field has the meaning and encoding of its namesake in Peer.
type TaskFacts struct {
	StartBoottime, ExecID, PidInode, ExeInode uint64
	ExeDev                                    uint32
	UID, GID                                  uint32
	CgroupID                                  uint64
}

// Tasks reads a process' facts in the kernel, the same way the record of connect(2) was made, so that the two compare.
// It fails with unix.ESRCH when there is no such process. The pid is a thread group id in the init pid namespace.
type Tasks interface {
	Task(pid uint32) (TaskFacts, error)
}

// Processes verifies the process behind a Peer and reads its facts. Safe for concurrent use.
type Processes struct {
	tasks     Tasks
	cgroups   string
	workloads Workloads
	slots     chan struct{}
	known     bounded[taskKey, process]
	hashes    hasher
	files     *fileReaders
}

const (
	// maxProcesses bounds the cache of verified processes; when more than these connect, some are verified anew.
	maxProcesses = 4096
	// maxReaders is how many processes are looked at through /proc at a time. Their executables may lie on a file
	// system that never answers (FUSE, NFS): what hangs there is at most these.
	maxReaders = 64
)

// NewProcesses verifies by means of tasks. cgroups is where the root of cgroup2 is mounted; without it no process is
// seen to be in a container. workloads is nil where no container runtime tells of its containers.
func NewProcesses(tasks Tasks, cgroups string, workloads Workloads) *Processes {
	return &Processes{tasks: tasks, cgroups: cgroups, workloads: workloads, slots: make(chan struct{}, maxReaders),
		known: newBounded[taskKey, process](maxProcesses), hashes: newHasher(), files: newFileReaders()}
}

// taskKey names one program image of one process: the pid alone is reused, and survives exec together with the start
// time. It holds every fact, so that a process that changed its ids or cgroup is a new one.
type taskKey struct {
	pid uint32
	TaskFacts
}

// process is a Process with what only attestation needs.
type process struct {
	Process
	exeOnHost bool // Exe is the very file of that path in the node's own mount namespace
}

// verify proves that the process which made peer's connect is still there and still runs the same program, and tells
// its facts. A process verified before costs one look into the kernel.
func (ps *Processes) verify(ctx context.Context, peer Peer) (process, taskKey, error) {
	key, err := ps.check(peer)
	if err != nil {
		return process{}, taskKey{}, err
	}
	p, ok := ps.known.get(key)
	if !ok {
		p, err = during(ctx, ps, ps.slots, peer, func() (process, error) { return ps.read(key) })
		if err != nil {
			return process{}, taskKey{}, err
		}
		ps.known.put(key, p)
	}
	p.Comm = peer.Comm
	if ps.workloads != nil && p.PodUID != "" {
		if w, ok := ps.workloads.Workload(p.PodUID, p.ContainerID); ok {
			p.Namespace, p.Pod, p.Container = w.Namespace, w.Pod, w.Container
		}
	}
	return p, key, nil
}

// sha256 is the hex digest of the executable peer's process runs.
func (ps *Processes) sha256(ctx context.Context, peer Peer) (string, error) {
	return during(ctx, ps, ps.slots, peer, func() (string, error) { return ps.hashes.sum(ctx, exeLink(peer.TGID)) })
}

// during is f's result, got at the latest when ctx ends, if peer's process held its pid for as long as f read /proc by
// that pid. f runs when one of the slots is free.
func during[T any](ctx context.Context, ps *Processes, slots chan struct{}, peer Peer, f func() (T, error)) (
	T, error) {
	type result struct {
		value T
		err   error
	}
	done := make(chan result, 1)
	select {
	case slots <- struct{}{}:
		go func() {
			defer func() { <-slots }()
			var r result
			r.err = ps.bracket(peer, func() (err error) {
				r.value, err = f()
				return err
			})
			done <- r
		}()
	case <-ctx.Done():
	}
	select {
	case r := <-done:
		return r.value, r.err
	case <-ctx.Done():
		var none T
		return none, fmt.Errorf("verify pid %d (%s): %w", peer.TGID, peer.Comm, context.Cause(ctx))
	}
}

// bracket runs f between two looks at the process. A pid is not reused before its process is reaped, so a pidfd that is
// the peer's, and not readable (exited) afterwards, covers all that f read; the facts compared again afterwards cover
// exec, which changes neither pidfd nor start time.
func (ps *Processes) bracket(peer Peer, f func() error) error {
	fd, err := unix.PidfdOpen(int(peer.TGID), 0)
	if err != nil {
		return peer.lost(err)
	}
	defer unix.Close(fd)
	if err = samePidfd(fd, peer); err != nil {
		return err
	}
	ferr := f() // told last: where the process is gone or changed, that is why f failed
	over, err := exited(fd)
	if err != nil {
		return fmt.Errorf("poll the pidfd of process %d: %w", peer.TGID, err)
	}
	if over {
		return peer.lost(unix.ESRCH)
	}
	if _, err = ps.check(peer); err != nil {
		return err
	}
	return ferr
}

// check compares the peer with what the kernel says now.
func (ps *Processes) check(peer Peer) (taskKey, error) {
	now, err := ps.tasks.Task(peer.TGID)
	if err != nil {
		return taskKey{}, peer.lost(err)
	}
	if now.ExeInode == 0 && peer.ExeInode != 0 { // it has exited, and its parent has not asked yet
		return taskKey{}, peer.lost(unix.ESRCH)
	}
	return taskKey{peer.TGID, now}, peer.compare(now)
}

// compare is ErrChanged where the process is not what it was.
func (p Peer) compare(now TaskFacts) error {
	if p.PidInode == 0 || now.PidInode == 0 {
		p.PidInode, now.PidInode = 0, 0
	}
	for _, f := range []struct {
		what     string
		was, now uint64
	}{
		{"start time (the pid was reused)", p.StartBoottime, now.StartBoottime},
		{"pidfs inode (the pid was reused)", p.PidInode, now.PidInode},
		{"exec id (it executed another program)", p.ExecID, now.ExecID},
		{"executable's inode", p.ExeInode, now.ExeInode},
		{"executable's device", uint64(p.ExeDev), uint64(now.ExeDev)},
		{"uid", uint64(p.UID), uint64(now.UID)},
		{"gid", uint64(p.GID), uint64(now.GID)},
		{"cgroup id", p.CgroupID, now.CgroupID},
	} {
		if f.was != f.now {
			return fmt.Errorf("%w: pid %d (%s): %s was %d, is %d", ErrChanged, p.TGID, p.Comm, f.what, f.was, f.now)
		}
	}
	return nil
}

// reused tells whether now is of another process that got the pid.
func (p Peer) reused(now TaskFacts) bool {
	return p.StartBoottime != now.StartBoottime ||
		p.PidInode != now.PidInode && p.PidInode != 0 && now.PidInode != 0
}

// lost is the error for a process that cannot be found, ErrGone where that is because it exited.
func (p Peer) lost(err error) error {
	if errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("%w: pid %d (%s)", ErrGone, p.TGID, p.Comm)
	}
	return fmt.Errorf("look up pid %d (%s): %w", p.TGID, p.Comm, err)
}

// samePidfd compares the pidfs inode, unique for a boot (Linux 6.9+). Where pidfds are not on pidfs the start time,
// compared after f, has to do.
func samePidfd(fd int, peer Peer) error {
	var fs unix.Statfs_t
	var st unix.Stat_t
	if err := cmp.Or(unix.Fstatfs(fd, &fs), unix.Fstat(fd, &st)); err != nil {
		return fmt.Errorf("stat the pidfd of process %d: %w", peer.TGID, err)
	}
	if fs.Type == unix.PID_FS_MAGIC && peer.PidInode != 0 && st.Ino != peer.PidInode {
		return fmt.Errorf("%w: pid %d (%s): pidfs inode (the pid was reused) was %d, is %d",
			ErrChanged, peer.TGID, peer.Comm, peer.PidInode, st.Ino)
	}
	return nil
}

// exited tells whether the process of a pidfd has exited, reaped or not: the pidfd is readable then.
func exited(fd int) (bool, error) {
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		if !errors.Is(err, unix.EINTR) {
			return n > 0, err
		}
	}
}

func (ps *Processes) read(key taskKey) (process, error) {
	exe, err := os.Readlink(exeLink(key.pid))
	if err != nil {
		return process{}, fmt.Errorf("read the executable's path of process %d: %w", key.pid, err)
	}
	cgroups, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", key.pid))
	if err != nil {
		return process{}, fmt.Errorf("read the cgroup of process %d: %w", key.pid, err)
	}
	cgroup, err := cgroup2Path(string(cgroups))
	if err != nil {
		return process{}, fmt.Errorf("cgroup of process %d: %w", key.pid, err)
	}
	started, err := bootTime(key.StartBoottime)
	if err != nil {
		return process{}, err
	}
	p := process{
		Process: Process{PID: key.pid, UID: key.UID, GID: key.GID, Exe: exe, Cgroup: cgroup, Unit: unitOf(cgroup),
			Started: started},
		exeOnHost: sameFile(key.pid, exe),
	}
	if c, ok := containerOf(cgroup); ok && ps.cgroups != "" && c.madeByRoot(ps.cgroups) {
		p.ContainerID, p.PodUID = c.id, c.podUID
	}
	return p, nil
}

func exeLink(pid uint32) string { return fmt.Sprintf("/proc/%d/exe", pid) }

// sameFile tells whether the process' executable is the file that has the path exe in the node's own mount namespace.
// The path alone proves nothing: a container, and whoever may create a user namespace, has own files at any path.
func sameFile(pid uint32, exe string) bool {
	var host, own unix.Stat_t
	if unix.Stat(exe, &host) != nil || unix.Stat(exeLink(pid), &own) != nil {
		return false
	}
	return host.Dev == own.Dev && host.Ino == own.Ino
}

// cgroup2Path is the path of the unified hierarchy in the text of /proc/PID/cgroup (cgroups(7)): the line "0::PATH". On
// hybrid hosts other lines name the v1 hierarchies.
func cgroup2Path(text string) (string, error) {
	for line := range strings.Lines(text) {
		p, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "0::")
		if !ok {
			continue
		}
		if p == "/.." || strings.HasPrefix(p, "/../") {
			return "", fmt.Errorf("%q is outside the node's cgroup namespace: run the node in the host's", p)
		}
		return p, nil
	}
	return "", errors.New("no cgroup2 hierarchy: mount cgroup2 on this host")
}

// unitOf is the systemd unit that owns a cgroup: the first component below the slices. What follows belongs to whom the
// unit delegated it, who may name it like any other unit.
func unitOf(cgroup string) string {
	for name := range strings.SplitSeq(strings.TrimPrefix(cgroup, "/"), "/") {
		switch path.Ext(name) {
		case ".slice":
		case ".service", ".scope", ".socket", ".mount", ".swap":
			return strings.TrimPrefix(name, "_") // systemd's escape of names the kernel reserves
		default:
			return ""
		}
	}
	return ""
}

// bootTime is the wall clock time of a point in CLOCK_BOOTTIME, in ns.
func bootTime(ns uint64) (time.Time, error) {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		return time.Time{}, fmt.Errorf("read CLOCK_BOOTTIME: %w", err)
	}
	return time.Now().Add(time.Duration(int64(ns) - now.Nano())).Round(time.Millisecond), nil
}

// bounded is a cache in which any entry may be missing: when full, an arbitrary one gives way.
type bounded[K comparable, V any] struct {
	mu  *sync.Mutex
	m   map[K]V
	max int
}

func newBounded[K comparable, V any](limit int) bounded[K, V] {
	return bounded[K, V]{new(sync.Mutex), map[K]V{}, limit}
}

func (b *bounded[K, V]) get(k K) (V, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	v, ok := b.m[k]
	return v, ok
}

func (b *bounded[K, V]) put(k K, v V) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for old := range b.m {
		if len(b.m) < b.max {
			break
		}
		delete(b.m, old)
	}
	b.m[k] = v
}
