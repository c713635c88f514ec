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
	done bool // judged and handed to the pipe that writes to the client
}

// ErrClosed ends the waits of a closed queue.
var ErrClosed = errors.New("the connection is closing")

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
	free   []*Entry[T]
	client io.Writer
	closed bool
}

// NewQueue makes a queue of at most limit entries that writes our own answers to client.
func NewQueue[T any](client io.Writer, limit int) *Queue[T] {
	q := &Queue[T]{client: client, max: limit, ring: make([]*Entry[T], 4)}
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
	return q.n >= q.max
}

// Push appends an entry, waiting while the queue is full, and writes our own answers at the head.
func (q *Queue[T]) Push(e *Entry[T]) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	for q.n >= q.max && !q.closed {
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
	q.free = append(q.free, e)
	q.mu.Unlock()
}

// Close ends all waits; a push fails from now on.
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
	e.Ours, e.done = nil, false
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
