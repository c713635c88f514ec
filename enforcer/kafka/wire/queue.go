package wire

import (
	"errors"
	"io"
	"sync"
)

// Entry is one request that is owed an answer.
type Entry[T any] struct {
	Ours []byte // our own answer, a whole frame; nil while the broker owes one
	V    T
	done bool  // judged and handed to the pipe that writes to the client
	kept int64 // bytes of memory until it is removed; see Keep
}

// ErrClosed ends the waits of a closed queue.
var ErrClosed = errors.New("the connection is closing")

// Entries that keep at most BaseBuffer bytes may keep so many together, unseen by the budget. So many entries are used
// again, of those that kept no more than maxReused: they go on keeping it.
const (
	maxKept   = 4 * BaseBuffer
	maxFree   = 32
	maxReused = 4 << 10
)

// Queue holds the answers a connection owes its client, in the order of the requests: Kafka's clients match answers by
// order. The request side pushes; the answer side takes Next, hands the bytes to its pipe, marks Done, and calls
// Written once they are out. Our own answers go out as soon as nothing stands before them, from whichever side sees
// that first.
type Queue[T any] struct {
	mu     sync.Mutex
	change sync.Cond
	ring   []*Entry[T]
	head   int
	n      int
	done   int // how many at the head are done
	max    int
	kept   int64 // by entries that are below the budget
	free   []*Entry[T]
	client io.Writer

	account *Account
	closed  bool
}

// NewQueue makes a queue of at most limit entries that writes our own answers to client. What entries keep is taken
// from account.
func NewQueue[T any](client io.Writer, limit int, account *Account) *Queue[T] {
	q := &Queue[T]{client: client, max: limit, ring: make([]*Entry[T], 4), account: account}
	q.change.L = &q.mu
	return q
}

// New returns an entry to fill and push. Its V is what an earlier user left: reset what must not carry over.
func (q *Queue[T]) New() *Entry[T] {
	q.mu.Lock()
	defer q.mu.Unlock()
	if k := len(q.free); k > 0 {
		e := q.free[k-1]
		q.free = q.free[:k-1]
		return e
	}
	return new(Entry[T])
}

// Full tells whether Push would wait: flush the requests first, or the broker never answers.
func (q *Queue[T]) Full() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.full()
}

func (q *Queue[T]) full() bool { return q.n >= q.max || q.n > 0 && q.kept >= maxKept }

// Keep says how many bytes of memory an entry that is not pushed yet keeps until its answer is written. It may wait for
// them as [Account.Acquire] does: flush the requests first, or what keeps them never ends.
func (q *Queue[T]) Keep(e *Entry[T], n int64) error {
	if n > BaseBuffer {
		if err := q.account.Acquire(n); err != nil {
			return err
		}
	}
	e.kept = n
	return nil
}

// Push appends an entry, waiting while the queue is full, and writes our own answers at the head.
func (q *Queue[T]) Push(e *Entry[T]) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	for q.full() && !q.closed {
		q.change.Wait()
	}
	if q.closed {
		return ErrClosed
	}
	if q.n == len(q.ring) {
		ring := make([]*Entry[T], 2*len(q.ring))
		for i := range q.n {
			ring[i] = q.at(i)
		}
		q.ring, q.head = ring, 0
	}
	q.ring[(q.head+q.n)&(len(q.ring)-1)] = e
	q.n++
	if e.kept <= BaseBuffer {
		q.kept += e.kept
	}
	return q.writeOurs()
}

// Next is the first entry whose answer has not been handed to the pipe, or nil.
func (q *Queue[T]) Next() *Entry[T] {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.done == q.n {
		return nil
	}
	return q.at(q.done)
}

// Done marks the entry Next returned.
func (q *Queue[T]) Done() {
	q.mu.Lock()
	q.at(q.done).done = true
	q.done++
	q.mu.Unlock()
}

// Written removes the done entries and writes our own answers that then stand at the head.
func (q *Queue[T]) Written() error {
	q.mu.Lock()
	defer q.mu.Unlock()
	for q.done > 0 {
		q.pop()
		q.done--
	}
	q.change.Broadcast()
	return q.writeOurs()
}

// Owes tells whether any answer is owed.
func (q *Queue[T]) Owes() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.n > 0
}

// WaitEmpty waits until every answer owed is written.
func (q *Queue[T]) WaitEmpty() error {
	q.mu.Lock()
	defer q.mu.Unlock()
	for q.n > 0 && !q.closed {
		q.change.Wait()
	}
	if q.closed {
		return ErrClosed
	}
	return nil
}

// Free takes back an entry that is owed no answer (acks=0).
func (q *Queue[T]) Free(e *Entry[T]) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.recycle(e)
}

// Close ends all waits; a push fails from now on. What entries keep they keep until the account is closed.
func (q *Queue[T]) Close() {
	q.mu.Lock()
	q.closed = true
	q.change.Broadcast()
	q.mu.Unlock()
}

// Open returns the entries whose answer never came, once neither side uses the queue any more.
func (q *Queue[T]) Open() []*Entry[T] {
	q.mu.Lock()
	defer q.mu.Unlock()
	var open []*Entry[T]
	for i := range q.n {
		if e := q.at(i); !e.done && e.Ours == nil {
			open = append(open, e)
		}
	}
	return open
}

func (q *Queue[T]) at(i int) *Entry[T] { return q.ring[(q.head+i)&(len(q.ring)-1)] }

func (q *Queue[T]) pop() {
	e := q.ring[q.head]
	q.ring[q.head] = nil
	q.head = (q.head + 1) & (len(q.ring) - 1)
	q.n--
	if e.kept <= BaseBuffer {
		q.kept -= e.kept
	}
	q.recycle(e)
}

func (q *Queue[T]) recycle(e *Entry[T]) {
	if e.kept > BaseBuffer {
		q.account.Release(e.kept)
	}
	if e.kept > maxReused || len(q.free) >= maxFree {
		return
	}
	e.Ours, e.done, e.kept = nil, false, 0
	q.free = append(q.free, e)
}

// writeOurs writes under the lock: whoever else wants to write to the client has to wait for these bytes anyway.
func (q *Queue[T]) writeOurs() error {
	for q.n > 0 && q.done == 0 && q.at(0).Ours != nil {
		if _, err := q.client.Write(q.at(0).Ours); err != nil {
			return err
		}
		q.pop()
		q.change.Broadcast()
	}
	return nil
}
