package wire

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
)

// The model of a queue is a list: an answer may reach the client only when all before it have.
func TestAQueueIsAList(t *testing.T) {
	for range 200 {
		seed := rand.Uint64()
		t.Run(fmt.Sprintf("seed %#x", seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 0))
			var client bytes.Buffer // of both our own answers and, as the pipe writes them, the broker's
			const most = 8
			q := NewQueue[int](&client, most, NewBudget(0).Open("", nil, nil))
			var want bytes.Buffer // what the client is owed, in order
			var pending []byte    // handed to the pipe
			var inFlight int
			flush := func() {
				client.Write(pending)
				pending = nil
				if err := q.Written(); err != nil {
					t.Fatal(err)
				}
			}
			owed := 0 // entries that wait for the broker
			for i := range 300 {
				switch {
				case r.IntN(2) == 0 && !q.Full():
					e := q.New()
					if e.Ours != nil {
						t.Fatal("a new entry has an answer")
					}
					e.V = i
					answer := fmt.Sprintf("%d;", i)
					if r.IntN(2) == 0 {
						e.Ours = []byte(answer)
					} else {
						owed++
					}
					want.WriteString(answer)
					if err := q.Push(e); err != nil {
						t.Fatal(err)
					}
				case r.IntN(3) == 0:
					flush()
				default: // the broker answers, or ours stands first
					e := q.Next()
					if e == nil {
						break
					}
					if e.Ours != nil {
						pending = append(pending, e.Ours...)
					} else {
						pending = append(pending, fmt.Sprintf("%d;", e.V)...)
						owed--
					}
					q.Done()
				}
				inFlight = max(inFlight, q.n)
				if !bytes.HasPrefix(want.Bytes(), client.Bytes()) {
					t.Fatalf("the client has %q of %q", client.Bytes(), want.Bytes())
				}
				if open := q.Open(); len(open) != owed {
					t.Fatalf("%d entries are open, not %d", len(open), owed)
				}
			}
			for e := q.Next(); e != nil; e = q.Next() {
				if e.Ours != nil {
					pending = append(pending, e.Ours...)
				} else {
					pending = append(pending, fmt.Sprintf("%d;", e.V)...)
				}
				q.Done()
			}
			flush()
			if !bytes.Equal(client.Bytes(), want.Bytes()) {
				t.Errorf("the client has %q, not %q", client.Bytes(), want.Bytes())
			}
			if inFlight > most {
				t.Errorf("%d were in the queue of %d", inFlight, most)
			}
			if err := q.WaitEmpty(); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestACloseEndsTheWaitsOfAQueue(t *testing.T) {
	q := NewQueue[int](new(bytes.Buffer), 1, NewBudget(0).Open("", nil, nil))
	if err := q.Push(q.New()); err != nil {
		t.Fatal(err)
	}
	errs := make([]error, 2)
	var waits sync.WaitGroup
	waits.Go(func() { errs[0] = q.Push(q.New()) })
	waits.Go(func() { errs[1] = q.WaitEmpty() })
	q.Close()
	waits.Wait()
	if slices.ContainsFunc(errs, func(err error) bool { return !errors.Is(err, ErrClosed) }) {
		t.Errorf("the waits ended with %v", errs)
	}
}

func TestAFullQueueGoesOnWhenAnAnswerIsWritten(t *testing.T) {
	var client bytes.Buffer
	q := NewQueue[int](&client, 1, NewBudget(0).Open("", nil, nil))
	if err := q.Push(q.New()); err != nil {
		t.Fatal(err)
	}
	pushed := make(chan error)
	go func() {
		e := q.New()
		e.Ours = []byte("ours")
		pushed <- q.Push(e)
	}()
	q.Next()
	q.Done()
	if err := q.Written(); err != nil {
		t.Fatal(err)
	}
	if err := <-pushed; err != nil || client.String() != "ours" {
		t.Errorf("%v, the client has %q", err, client.String())
	}
}
