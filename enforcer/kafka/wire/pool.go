package wire

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"
)

// BaseBuffer is the buffer, in bytes, a direction of a connection reads into while it has something to read. Idle
// directions hold none.
const BaseBuffer = 64 << 10

// ErrBudget refuses a frame that the node's memory budget has no room for.
var ErrBudget = errors.New("the memory budget is exhausted")

const budgetWait = 10 * time.Second

// Budget bounds the memory of all frames that are held whole and are larger than BaseBuffer. A frame's share is taken
// at once, before its first byte is read, so that two half-read frames cannot wait for each other. Requests and answers
// need separate budgets, because a broker that waits for its answer to be read does not read the next request; and so
// does what is decoded, because its frame is held meanwhile.
type Budget struct {
	sem *semaphore.Weighted
	max int64
}

// NewBudget makes a budget of so many bytes.
func NewBudget(bytes int64) *Budget {
	return &Budget{sem: semaphore.NewWeighted(bytes), max: bytes}
}

// Acquire takes n bytes, waiting for others to give theirs back: that is the back pressure. It fails with ErrBudget
// when n can never be had, or was not had within 10 s.
func (b *Budget) Acquire(n int64) error {
	if n > b.max {
		return fmt.Errorf("%w: %d bytes are needed, the budget is %d", ErrBudget, n, b.max)
	}
	if b.sem.TryAcquire(n) {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), budgetWait)
	defer cancel()
	if b.sem.Acquire(ctx, n) != nil {
		return fmt.Errorf("%w: no %d bytes were free within %s", ErrBudget, n, budgetWait)
	}
	return nil
}

// Release gives n bytes back.
func (b *Budget) Release(n int64) {
	if n > 0 {
		b.sem.Release(n)
	}
}

// pools[k] holds buffers of BaseBuffer<<k bytes.
var pools [16]sync.Pool

func getBuffer(n int) *[]byte {
	k := class(n)
	if b, ok := pools[k].Get().(*[]byte); ok {
		return b
	}
	b := make([]byte, BaseBuffer<<k)
	return &b
}

func putBuffer(b *[]byte) { pools[class(len(*b))].Put(b) }

// HeldSize is what a frame of n bytes takes of a budget while it is held whole.
func HeldSize(n int) int64 {
	if n <= BaseBuffer {
		return 0
	}
	return BaseBuffer << class(n)
}

func class(n int) int {
	if n <= BaseBuffer {
		return 0
	}
	return bits.Len(uint(n-1) / BaseBuffer)
}
