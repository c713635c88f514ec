package spiffe

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// record is one program image of one process, shared by all its connections.
type record struct {
	key     recordKey
	number  uint64
	subject subject
	pidfd   int
	tokens  tokens
	current atomic.Pointer[Identity]
	settled chan struct{} // closed when every source has told, or one has failed
	proven  atomic.Bool   // the process was what it is in key after the sources had told
	stop    context.CancelFunc
	changes *atomic.Uint64 // counts them

	// guarded by the attestor's mu
	place    *list.Element // among those that linger
	since    time.Time     // when it began to
	orphaned bool          // its process has exited
	over     bool

	mu       sync.Mutex
	told     []bool
	evidence []*Evidence // by source
	failed   error
	lost     error
	conns    map[*Attested]struct{}
	empty    chan struct{} // not nil where somebody waits for conns to become empty
}

func (r *record) failure() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return errors.Join(r.failed, r.lost)
}

func (r *record) with(h *Attested) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.conns[h] = struct{}{}
}

// without tells whether it was the last.
func (r *record) without(h *Attested) (last bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.conns, h)
	last = len(r.conns) == 0
	if last && r.empty != nil {
		close(r.empty)
		r.empty = nil
	}
	return last
}

// emptied is closed when there is no connection.
func (r *record) emptied() <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	empty := make(chan struct{})
	if len(r.conns) == 0 {
		close(empty)
	} else {
		r.empty = empty
	}
	return empty
}

func (r *record) connections() (all []*Attested) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for h := range r.conns {
		all = append(all, h)
	}
	return all
}

// tell takes up what a source says.
func (r *record) tell(i int, e *Evidence, failed error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	before := r.isSettled()
	r.told[i], r.evidence[i] = true, e
	if r.failed == nil {
		r.failed = failed
	}
	if before {
		r.changes.Add(1)
	}
	r.renew()
	if !before && r.isSettled() {
		close(r.settled)
	}
}

func (r *record) isSettled() bool { return !slices.Contains(r.told, false) || r.failed != nil }

// lose says that nobody is behind the connections any more.
func (r *record) lose(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lost = err
	r.renew()
}

// expire drops the evidence whose time is over: by the wall clock, which jumps and goes on in suspend.
func (r *record) expire(now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	some := false
	for i, e := range r.evidence {
		if e != nil && e.expired(now) {
			r.evidence[i], some = nil, true
		}
	}
	if some {
		r.changes.Add(1)
		r.renew()
	}
}

// expired compares what clocks show. now is without a monotonic reading.
func (e *Evidence) expired(now time.Time) bool {
	return !e.Expires.IsZero() && !now.Before(e.Expires.Round(0))
}

// renew makes the identity anew. r.mu is held.
func (r *record) renew() {
	id := &Identity{Process: r.subject.Process, Lost: r.lost}
	now := time.Now().Round(0)
	for _, e := range r.evidence {
		if e != nil && !e.expired(now) {
			id.add(*e)
		}
	}
	r.current.Store(id)
	for h := range r.conns {
		h.changed()
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

// begin makes a record and asks the sources. a.mu is held.
func (a *Attestor) begin(key recordKey, p subject) (*record, error) {
	a.last++
	r := &record{key: key, number: a.last, subject: p, tokens: newTokens(), settled: make(chan struct{}),
		told: make([]bool, len(a.sources)), evidence: make([]*Evidence, len(a.sources)),
		conns: map[*Attested]struct{}{}, changes: &a.counts.changes}
	r.current.Store(&Identity{Process: p.Process})
	if len(a.sources) == 0 {
		close(r.settled)
	}
	if err := a.followProcess(r); err != nil {
		return nil, err
	}
	ctx, stop := context.WithCancel(context.Background())
	r.stop = stop
	a.known[key], a.all[r.number] = r, r
	for i, s := range a.sources {
		go a.ask(ctx, r, i, s)
	}
	return r, nil
}

// ask follows what a source says of a record's process. Where the source fails its evidence is gone, and the next
// connection asks it anew.
func (a *Attestor) ask(ctx context.Context, r *record, i int, s Source) {
	told := false
	err := guarded(func() error {
		return s.watch(ctx, r.subject, func(e *Evidence, why error) {
			told = true
			a.counts.told(s.Name(), why)
			r.tell(i, e, nil)
		})
	})
	if ctx.Err() != nil {
		return
	}
	if err == nil && !told {
		err = errors.New("it ended without a word")
	}
	if err != nil {
		err = fmt.Errorf("identity source %s: %w", s.Name(), err)
		a.counts.failed(s.Name(), err)
		a.retire(r) // before anybody hears of it and tries again
		r.tell(i, nil, err)
	}
}

// guarded turns a panic into an error: a defect of a source ends what it says, not the node.
func guarded(watch func() error) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("panic: %v", v)
		}
	}()
	return watch()
}
