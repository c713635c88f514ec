package spiffe

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

// Source gives evidence of processes.
type Source interface {
	// Name is one of the Source constants.
	Name() string
	// watch tells what is known of a process, at once and whenever that changes: nil is nothing, and why says why where
	// that is not plain. It ends with ctx, or when nothing can change any more. Its error means that it is not known who
	// the process is: its connection must be refused.
	watch(ctx context.Context, p subject, tell func(e *Evidence, why error)) error
}

// subject is a process a source is asked about.
type subject struct {
	process
	peer Peer
}

// Kernel tells of processes what Tasks does not. Pids are thread group ids in the init pid namespace.
type Kernel interface {
	// Watch has the kernel tell of an execve of the process, by Attestor.Executed, and Watched look at it. Unwatch undoes
	// it.
	Watch(pid uint32) error
	Unwatch(pid uint32) error
	// Watched are all watched processes that are there, as they are now.
	Watched() (map[uint32]TaskFacts, error)
	// Holders are the processes that have descriptors of sockets, each for each socket. Sockets are named by SO_COOKIE.
	Holders(sockets []uint64) ([]Holder, error)
}

// Holder is a process that has a descriptor of a socket.
type Holder struct {
	Socket uint64 // SO_COOKIE
	PID    uint32
	TaskFacts
}

const (
	// linger is how long a process is known after its last connection has ended, so that its next one finds the evidence.
	linger = 5 * time.Minute
	// maxLingering bounds the processes without a connection that are known; the one that waits longest gives way.
	maxLingering = 1024
)

// errClosed is Attest's error after Close.
var errClosed = errors.New("the attestor is closed")

// Attestor tells who is behind connections, for as long as they last. Safe for concurrent use.
type Attestor struct {
	processes *Processes
	sources   []Source
	kernel    Kernel // nil where nobody follows
	exits     *exits
	broken    error // why there are no exits
	ended     chan struct{}
	running   sync.WaitGroup
	counts    counts

	// Of what follows and of the records' places in it. Taken before a record's mu, and that before an Attested's.
	mu        sync.Mutex
	known     map[recordKey]*record // those that new connections share
	all       map[uint64]*record    // by number, until nothing is left of them
	byPID     map[uint32]map[*record]struct{}
	lingering *list.List // records without a connection, the longest first
	last      uint64     // number given
	seen      time.Time  // when what processes are was seen last
	closed    bool
}

// recordKey names what evidence depends on.
type recordKey struct {
	taskKey
	Workload // what the runtime calls it, which it may tell later
}

// NewAttestor asks the sources, in whose order their evidence counts, about processes that processes verifies.
func NewAttestor(processes *Processes, sources ...Source) *Attestor {
	a := &Attestor{processes: processes, sources: sources, ended: make(chan struct{}), known: map[recordKey]*record{},
		all: map[uint64]*record{}, byPID: map[uint32]map[*record]struct{}{}, lingering: list.New(), seen: time.Now(),
		counts: counts{failures: map[string]uint64{}, why: map[string]string{}}}
	if a.exits, a.broken = newExits(); a.broken == nil {
		a.running.Go(a.followExits)
	}
	a.running.Go(a.follow)
	return a
}

// Follow has the kernel tell of what becomes of processes. Without it a process is looked at every second, and who has
// a socket when the process that connected has exited is not known. Call it before Attest.
func (a *Attestor) Follow(k Kernel) { a.kernel = k }

// Close ends what is known. Connections that last are no longer anybody's.
func (a *Attestor) Close() error {
	a.mu.Lock()
	a.closed = true
	a.loseAll(errClosed)
	a.mu.Unlock()
	close(a.ended)
	var err error
	if a.broken == nil {
		err = a.exits.close()
	}
	a.running.Wait()
	return err
}

// Attested is the identity behind one connection, from moment to moment. It must be released.
type Attested struct {
	attestor *Attestor
	socket   uint64 // SO_COOKIE of the client's; 0 where it is not known
	cached   bool
	record   atomic.Pointer[record]
	released bool // guarded by the attestor's mu

	mu       sync.Mutex
	watchers map[*func()]struct{}
}

// Attest verifies the process behind peer and asks the sources who it is. Where none knows it the identity has no ID,
// only the process' facts. An error (ErrGone, ErrChanged, or an unreadable fact) means that it is not known who
// connected: the connection must be refused. It takes no longer than ctx, which should have a deadline.
func (a *Attestor) Attest(ctx context.Context, peer Peer) (*Attested, error) {
	if a.broken != nil {
		return nil, a.broken
	}
	p, key, err := a.processes.verify(ctx, peer)
	if err != nil {
		return nil, err
	}
	h := &Attested{attestor: a, socket: peer.Socket, watchers: map[*func()]struct{}{}}
	if err := a.acquire(h, recordKey{key, Workload{p.Namespace, p.Pod, p.Container}}, subject{p, peer}); err != nil {
		return nil, err
	}
	if err := h.settle(ctx, peer); err != nil {
		h.Release()
		return nil, err
	}
	return h, nil
}

// settle waits for the sources, and looks at the process once more after what they said.
func (h *Attested) settle(ctx context.Context, peer Peer) error {
	r := h.record.Load()
	if h.cached = r.proven.Load(); h.cached {
		return r.failure()
	}
	select {
	case <-r.settled:
	case <-ctx.Done():
		return fmt.Errorf("attest pid %d (%s): %w", peer.TGID, peer.Comm, context.Cause(ctx))
	}
	if _, err := h.attestor.processes.check(peer); err != nil {
		h.attestor.retire(r) // what was said may be of what the process is now
		return err
	}
	r.proven.Store(true)
	return r.failure()
}

// Identity is who it is now; never nil.
func (h *Attested) Identity() *Identity { return h.record.Load().current.Load() }

// Cached tells whether the process was known, so that no source had to be asked.
func (h *Attested) Cached() bool { return h.cached }

// Watch calls changed once at once, for a change since the caller asked for the Identity, and after every change, until
// stop is called. It must neither block nor call Watch, stop or Release.
func (h *Attested) Watch(changed func()) (stop func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.watchers[&changed] = struct{}{}
	changed()
	return func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		delete(h.watchers, &changed)
	}
}

func (h *Attested) changed() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for changed := range h.watchers {
		(*changed)()
	}
}

// Release tells that the connection has ended. What it did before is nothing to a second call.
func (h *Attested) Release() {
	a := h.attestor
	a.mu.Lock()
	defer a.mu.Unlock()
	if h.released {
		return
	}
	h.released = true
	a.leave(h)
}

// leave takes a connection from its record, which lingers after the last one. a.mu is held.
func (a *Attestor) leave(h *Attested) {
	r := h.record.Load()
	if !r.without(h) || r.over {
		return
	}
	if a.known[r.key] != r {
		a.forget(r)
		return
	}
	r.since = time.Now()
	r.place = a.lingering.PushBack(r)
	if a.lingering.Len() > maxLingering {
		a.forget(a.lingering.Front().Value.(*record))
	}
}

// acquire puts a connection into the record of its program image, which may be new.
func (a *Attestor) acquire(h *Attested, key recordKey, p subject) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return errClosed
	}
	r := a.known[key]
	if r == nil {
		var err error
		if r, err = a.begin(key, p); err != nil {
			return err
		}
	}
	if r.place != nil {
		a.lingering.Remove(r.place)
		r.place = nil
	}
	h.record.Store(r)
	r.with(h)
	return nil
}

// retire keeps new connections from sharing a record.
func (a *Attestor) retire(r *record) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.unknow(r)
}

// unknow is retire with a.mu held.
func (a *Attestor) unknow(r *record) {
	if a.known[r.key] == r {
		delete(a.known, r.key)
	}
	if r.place != nil {
		a.forget(r)
	}
}

// forget ends a record that has no connection. a.mu is held.
func (a *Attestor) forget(r *record) { a.lose(r, ErrGone) }

// lose ends a record: whoever is still connected has lost what it was, and err says why. a.mu is held.
func (a *Attestor) lose(r *record, err error) {
	if r.over {
		return
	}
	r.over = true
	r.stop()
	if r.place != nil {
		a.lingering.Remove(r.place)
		r.place = nil
	}
	if a.known[r.key] == r {
		delete(a.known, r.key)
	}
	delete(a.all, r.number)
	a.unfollow(r)
	r.lose(err)
}
