package spiffe

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
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

// Attestor tells who is behind connections, for as long as they last. Safe for concurrent use.
type Attestor struct {
	processes *Processes
	sources   []Source

	mu    sync.Mutex
	known map[recordKey]*record
}

// recordKey names what evidence depends on.
type recordKey struct {
	taskKey
	Workload // what the runtime calls it, which it may tell later
}

// NewAttestor asks the sources, in whose order their evidence counts, about processes that processes verifies.
func NewAttestor(processes *Processes, sources ...Source) *Attestor {
	return &Attestor{processes: processes, sources: sources, known: map[recordKey]*record{}}
}

// record is one program image of one process, shared by all its connections.
type record struct {
	key     recordKey
	subject subject
	tokens  tokens
	current atomic.Pointer[Identity]
	settled chan struct{} // closed when every source has told, or one has failed
	stop    context.CancelFunc
	refs    int // connections; guarded by the attestor's mu

	mu       sync.Mutex
	told     []bool
	evidence []*Evidence // by source
	failed   error
	watchers map[*func()]struct{}
}

// Attested is the identity behind one connection, from moment to moment. It must be released.
type Attested struct {
	attestor *Attestor
	record   *record
}

// Attest verifies the process behind peer and asks the sources who it is. Where none knows it the identity has no ID,
// only the process' facts. An error (ErrGone, ErrChanged, or an unreadable fact) means that it is not known who
// connected: the connection must be refused. It takes no longer than ctx, which should have a deadline.
func (a *Attestor) Attest(ctx context.Context, peer Peer) (*Attested, error) {
	p, key, err := a.processes.verify(ctx, peer)
	if err != nil {
		return nil, err
	}
	r := a.acquire(recordKey{key, Workload{p.Namespace, p.Pod, p.Container}}, subject{p, peer})
	attested := &Attested{a, r}
	if err := attested.settle(ctx, peer); err != nil {
		attested.Release()
		return nil, err
	}
	return attested, nil
}

// settle waits for the sources, and looks at the process once more after what they said.
func (a *Attested) settle(ctx context.Context, peer Peer) error {
	select {
	case <-a.record.settled:
		return a.record.failure()
	default:
	}
	select {
	case <-a.record.settled:
	case <-ctx.Done():
		return fmt.Errorf("attest pid %d (%s): %w", peer.TGID, peer.Comm, context.Cause(ctx))
	}
	if _, err := a.attestor.processes.check(peer); err != nil {
		return err
	}
	return a.record.failure()
}

func (r *record) failure() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.failed
}

// Identity is who it is now; never nil.
func (a *Attested) Identity() *Identity { return a.record.current.Load() }

// Watch calls changed after every change of the identity, until stop is called. It must not block.
func (a *Attested) Watch(changed func()) (stop func()) {
	a.record.mu.Lock()
	defer a.record.mu.Unlock()
	a.record.watchers[&changed] = struct{}{}
	return func() {
		a.record.mu.Lock()
		defer a.record.mu.Unlock()
		delete(a.record.watchers, &changed)
	}
}

// Release tells that the connection has ended.
func (a *Attested) Release() {
	a.attestor.mu.Lock()
	defer a.attestor.mu.Unlock()
	if a.record.refs--; a.record.refs == 0 {
		delete(a.attestor.known, a.record.key)
		a.record.stop()
	}
}

// acquire is the record of a program image, which may be new.
func (a *Attestor) acquire(key recordKey, p subject) *record {
	a.mu.Lock()
	defer a.mu.Unlock()
	r := a.known[key]
	if r == nil {
		ctx, stop := context.WithCancel(context.Background())
		r = &record{key: key, subject: p, tokens: newTokens(), settled: make(chan struct{}), stop: stop, told: make([]bool, len(a.sources)),
			evidence: make([]*Evidence, len(a.sources)), watchers: map[*func()]struct{}{}}
		r.current.Store(&Identity{Process: p.Process})
		a.known[key] = r
		for i, s := range a.sources {
			go r.follow(ctx, i, s, p)
		}
		if len(a.sources) == 0 {
			close(r.settled)
		}
	}
	r.refs++
	return r
}

func (r *record) follow(ctx context.Context, i int, s Source, p subject) {
	if ctx.Err() != nil {
		return
	}
	err := s.watch(ctx, p, func(e *Evidence, _ error) { r.tell(i, e, nil) })
	if err != nil {
		r.tell(i, nil, err)
	}
}

// tell takes up what a source says, and makes the identity anew.
func (r *record) tell(i int, e *Evidence, failed error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	before := !slices.Contains(r.told, false) || r.failed != nil
	r.told[i], r.evidence[i] = true, e
	if r.failed == nil {
		r.failed = failed
	}
	id := &Identity{Process: r.current.Load().Process}
	for _, e := range r.evidence {
		if e != nil {
			id.add(*e)
		}
	}
	r.current.Store(id)
	if !before && (!slices.Contains(r.told, false) || r.failed != nil) {
		close(r.settled)
	}
	for changed := range r.watchers {
		(*changed)()
	}
}

// add takes up evidence that counts less than what is there.
func (id *Identity) add(e Evidence) {
	id.Evidence = append(id.Evidence, e)
	if id.ID.IsZero() && !e.ID.IsZero() {
		id.ID, id.Source, id.Rule = e.ID, e.Source, e.Rule
		id.Process.ExeSHA256 = e.exeSHA256
	}
	if id.Claims == nil {
		id.Claims = e.Claims
	}
}
