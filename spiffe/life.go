package spiffe

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// expiryPeriod is how often it is looked for evidence whose time is over: it is believed that much longer at most.
	expiryPeriod = 250 * time.Millisecond
	// lookPeriod is how often the watched processes are looked at: the net below pidfds and events, and what notices
	// other ids and another cgroup.
	lookPeriod = time.Second
	// blindFor is how long looks may fail before nobody is who it was.
	blindFor = 5 * time.Second
	// grace is for connections to end with their process, before it is looked for who else has them.
	grace = 50 * time.Millisecond
	// successionTimeout bounds the time for which a connection of a process that has exited keeps its identity.
	successionTimeout = 5 * time.Second
)

// exits waits for the end of processes: one epoll instance for all their pidfds, which Go's own waits for.
type exits struct {
	epoll *os.File
	raw   syscall.RawConn
}

func newExits() (*exits, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("wait for the end of processes: %w", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, errors.Join(fmt.Errorf("wait for the end of processes: %w", err), unix.Close(fd))
	}
	x := &exits{epoll: os.NewFile(uintptr(fd), "epoll of pidfds")}
	if x.raw, err = x.epoll.SyscallConn(); err != nil {
		return nil, errors.Join(fmt.Errorf("wait for the end of processes: %w", err), x.epoll.Close())
	}
	return x, nil
}

func (x *exits) close() error { return x.epoll.Close() }

// add has wait tell a number once the process of a pidfd has exited, if the pidfd is open then.
func (x *exits) add(pidfd int, number uint64) (err error) {
	event := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLONESHOT}
	var data [8]byte
	binary.NativeEndian.PutUint64(data[:], number)
	event.Fd, event.Pad = int32(binary.NativeEndian.Uint32(data[:4])), int32(binary.NativeEndian.Uint32(data[4:]))
	cerr := x.raw.Control(func(fd uintptr) { err = unix.EpollCtl(int(fd), unix.EPOLL_CTL_ADD, pidfd, &event) })
	return errors.Join(err, cerr)
}

// wait returns numbers; an error after close.
func (x *exits) wait() (numbers []uint64, err error) {
	events := make([]unix.EpollEvent, 64)
	n := 0
	rerr := x.raw.Read(func(fd uintptr) bool {
		for n, err = unix.EpollWait(int(fd), events, 0); errors.Is(err, unix.EINTR); {
			n, err = unix.EpollWait(int(fd), events, 0)
		}
		return n != 0
	})
	for _, e := range events[:max(n, 0)] {
		data := binary.NativeEndian.AppendUint32(nil, uint32(e.Fd))
		numbers = append(numbers, binary.NativeEndian.Uint64(binary.NativeEndian.AppendUint32(data, uint32(e.Pad))))
	}
	return numbers, errors.Join(err, rerr)
}

// followProcess opens the process of a new record. That it is the one that connected is proven by the look at it after
// the sources have told. a.mu is held.
func (a *Attestor) followProcess(r *record) (err error) {
	peer := r.subject.peer
	if r.pidfd, err = unix.PidfdOpen(int(peer.TGID), 0); err != nil {
		return peer.lost(err)
	}
	defer func() {
		if err != nil {
			a.unfollow(r)
		}
	}()
	if err = samePidfd(r.pidfd, peer); err != nil {
		return err
	}
	of := a.byPID[peer.TGID]
	if of == nil {
		of = map[*record]struct{}{}
		a.byPID[peer.TGID] = of
	}
	if of[r] = struct{}{}; len(of) == 1 && a.kernel != nil {
		if err = a.kernel.Watch(peer.TGID); err != nil {
			return err
		}
	}
	if err = a.exits.add(r.pidfd, r.number); err != nil {
		return fmt.Errorf("follow process %d (%s): %w", peer.TGID, peer.Comm, err)
	}
	return nil
}

// unfollow undoes followProcess. a.mu is held.
func (a *Attestor) unfollow(r *record) {
	_ = unix.Close(r.pidfd) // which takes it out of the epoll instance
	pid := r.subject.peer.TGID
	of := a.byPID[pid]
	if delete(of, r); len(of) > 0 || of == nil {
		return
	}
	delete(a.byPID, pid)
	if a.kernel != nil {
		if err := a.kernel.Unwatch(pid); err != nil {
			a.counts.blind(err) // it is told of in vain
		}
	}
}

func (a *Attestor) followExits() {
	for {
		numbers, err := a.exits.wait()
		if err != nil {
			select {
			case <-a.ended:
			default: // the periodic looks notice exits, too
				a.counts.blind(fmt.Errorf("wait for the end of processes: %w", err))
			}
			return
		}
		for _, number := range numbers {
			a.mu.Lock()
			if r := a.all[number]; r != nil {
				a.exited(r)
			}
			a.mu.Unlock()
		}
	}
}

// Executed says that a process has executed another program.
func (a *Attestor) Executed(pid uint32) {
	a.mu.Lock()
	records := slices.Collect(maps.Keys(a.byPID[pid])) // those that are older than what is read of it now
	a.mu.Unlock()
	now, err := a.processes.tasks.Task(pid)
	if err != nil {
		return // it has exited, which its pidfd tells; or the next look does
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, r := range records {
		a.compare(r, now)
	}
}

// compare acts on what a record's process is now. a.mu is held.
func (a *Attestor) compare(r *record, now TaskFacts) {
	peer := r.subject.peer
	if r.over || r.orphaned {
		return
	}
	if now.ExeInode == 0 { // it exits, or its first thread has: without an execve, of which the exec id would tell
		now.ExeInode, now.ExeDev = peer.ExeInode, peer.ExeDev
	}
	err := peer.compare(now)
	switch {
	case err == nil:
	case peer.reused(now):
		a.exited(r)
	default:
		a.counts.changed.Add(1)
		a.lose(r, err)
	}
}

// follow drops what is over, and looks at processes, until the attestor is closed.
func (a *Attestor) follow() {
	expiry, look := time.NewTicker(expiryPeriod), time.NewTicker(lookPeriod)
	defer expiry.Stop()
	defer look.Stop()
	for {
		select {
		case <-expiry.C:
			a.expire(time.Now())
		case <-look.C:
			a.look(time.Now())
		case <-a.ended:
			return
		}
	}
}

// expire drops evidence and records whose time is over.
func (a *Attestor) expire(now time.Time) {
	a.mu.Lock()
	for e := a.lingering.Front(); e != nil; e = a.lingering.Front() {
		r := e.Value.(*record)
		if now.Sub(r.since) < linger {
			break
		}
		a.forget(r)
	}
	records := a.records()
	a.mu.Unlock()
	for _, r := range records {
		r.expire(now.Round(0))
	}
}

// records are those that are not over. a.mu is held.
func (a *Attestor) records() (all []*record) {
	for _, r := range a.all {
		all = append(all, r)
	}
	return all
}

// look compares all processes with what they were. Where that cannot be seen for blindFor they are not believed to be
// that any longer.
func (a *Attestor) look(at time.Time) {
	a.mu.Lock()
	records := a.records() // those that are older than what is seen
	a.mu.Unlock()
	var now map[uint32]TaskFacts
	var err error
	if len(records) > 0 {
		now, err = a.see(records)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if err != nil {
		a.counts.blind(err)
		if at.Sub(a.seen) > blindFor {
			a.loseAll(fmt.Errorf("%w: what it is now cannot be seen: %w", ErrChanged, err))
		}
		return
	}
	a.seen = at
	for _, r := range records {
		if facts, there := now[r.subject.peer.TGID]; there {
			a.compare(r, facts)
		} else if !r.over {
			a.exited(r)
		}
	}
}

// see reads what the processes of records are now; those that are not there are left out.
func (a *Attestor) see(records []*record) (map[uint32]TaskFacts, error) {
	if a.kernel != nil {
		return a.kernel.Watched()
	}
	now := map[uint32]TaskFacts{}
	for _, r := range records {
		pid := r.subject.peer.TGID
		facts, err := a.processes.tasks.Task(pid)
		if errors.Is(err, unix.ESRCH) {
			continue
		}
		if err != nil {
			return nil, err
		}
		now[pid] = facts
	}
	return now, nil
}

// loseAll ends all records. a.mu is held.
func (a *Attestor) loseAll(err error) {
	for _, r := range a.records() {
		a.lose(r, err)
	}
}

// exited acts on the end of a record's process. a.mu is held.
func (a *Attestor) exited(r *record) {
	if r.over || r.orphaned {
		return
	}
	r.orphaned = true
	a.unknow(r)
	if !r.over {
		a.running.Go(func() { a.succeed(r) })
	}
}

// succeed finds heirs for the connections of a process that has exited, as a server has that forks after it has
// connected. What has none is lost.
func (a *Attestor) succeed(r *record) {
	ctx, cancel := context.WithTimeout(context.Background(), successionTimeout)
	defer cancel()
	select {
	case <-r.emptied():
	case <-time.After(grace):
	case <-a.ended:
	}
	conns := r.connections()
	if holders := a.holders(conns); len(holders) > 0 {
		for _, h := range conns {
			if heir, ok := r.subject.peer.heir(holders[h.socket]); ok {
				a.move(ctx, h, heir)
			}
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.counts.gone.Add(uint64(len(r.connections())))
	a.lose(r, r.subject.peer.lost(unix.ESRCH))
}

// holders are the processes that have the sockets of connections.
func (a *Attestor) holders(conns []*Attested) map[uint64][]Holder {
	var sockets []uint64
	for _, h := range conns {
		if h.socket != 0 {
			sockets = append(sockets, h.socket)
		}
	}
	if len(sockets) == 0 || a.kernel == nil {
		return nil
	}
	slices.Sort(sockets)
	all, err := a.kernel.Holders(slices.Compact(sockets))
	if err != nil {
		a.counts.blind(err)
		return nil
	}
	of := map[uint64][]Holder{}
	for _, h := range all {
		of[h.Socket] = append(of[h.Socket], h)
	}
	return of
}

// heir is the process to which the socket of one that has exited belongs: of those that have it the oldest, where all
// are the same program with the same ids in the same cgroup.
func (p Peer) heir(holders []Holder) (heir Peer, ok bool) {
	for _, h := range holders {
		if h.ExecID != p.ExecID || h.ExeInode != p.ExeInode || h.ExeDev != p.ExeDev || h.UID != p.UID || h.GID != p.GID ||
			h.CgroupID != p.CgroupID {
			return Peer{}, false
		}
		if !ok || h.StartBoottime < heir.StartBoottime {
			heir, ok = p, true
			heir.TGID, heir.StartBoottime, heir.PidInode = h.PID, h.StartBoottime, h.PidInode
		}
	}
	return heir, ok
}

// move gives a connection to an heir that is attested as what the connection's process was.
func (a *Attestor) move(ctx context.Context, h *Attested, heir Peer) {
	next, err := a.Attest(ctx, heir)
	if err != nil {
		return
	}
	defer next.Release()
	a.mu.Lock()
	defer a.mu.Unlock()
	r := next.record.Load()
	if h.released || r.over || next.Identity().ID != h.Identity().ID {
		return
	}
	h.record.Load().without(h)
	h.record.Store(r)
	r.with(h)
	a.counts.inherited.Add(1)
	h.changed()
}
