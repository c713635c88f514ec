package wire

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// holding opens an account of an owner that holds n bytes.
func holding(t *testing.T, b *Budget, name string, n int64, evict func(error)) *Account {
	t.Helper()
	a := b.Open(name, evict, nil)
	if err := a.Acquire(n); err != nil {
		t.Fatal(err)
	}
	return a
}

// acquired is how an Acquire ended, and when.
type acquired struct {
	name string
	err  error
	at   time.Duration
}

func acquire(b *Budget, name string, n int64, into chan<- acquired) {
	start := time.Now()
	go func() {
		err := b.Open(name, nil, nil).Acquire(n)
		into <- acquired{name, err, time.Since(start)}
	}()
	synctest.Wait()
}

func TestWhoHoldsLeastIsServedFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := NewBudget(100)
		greedy := holding(t, b, "greedy", 100, nil)
		got := make(chan acquired, 3)
		acquire(b, "greedy", 60, got)
		acquire(b, "first", 60, got)
		acquire(b, "second", 60, got)
		greedy.Release(60)
		if a := <-got; a.name != "first" || a.err != nil {
			t.Errorf("%+v was served first", a)
		}
		greedy.Release(40)
		time.Sleep(budgetWait)
		for range 2 {
			if a := <-got; !errors.Is(a.err, ErrBudget) || a.at != budgetWait {
				t.Errorf("%+v, though all is taken", a)
			}
		}
	})
}

func TestASmallShareOvertakesALargeOneForAWhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := NewBudget(100)
		holding(t, b, "a", 50, nil)
		got := make(chan acquired, 3)
		acquire(b, "large", 80, got)
		acquire(b, "small", 10, got)
		if a := <-got; a.name != "small" || a.at != 0 {
			t.Errorf("%+v was served", a)
		}
		time.Sleep(budgetTurn)
		acquire(b, "late", 10, got)
		if a := <-got; a.name != "large" || !errors.Is(a.err, ErrBudget) {
			t.Errorf("%+v was served, though another has waited for %v", a, budgetTurn)
		}
		if a := <-got; a.name != "late" || a.err != nil || a.at != budgetWait-budgetTurn {
			t.Errorf("%+v", a)
		}
	})
}

// One who holds many shares that do not move gives way to one who wants a share of his own.
func TestAGreedyOwnerGivesWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := NewBudget(100)
		evicted := make(chan string, 10)
		open := func(owner, name string, n int64) {
			var a *Account
			a = b.Open(owner, func(err error) {
				if !errors.Is(err, ErrBudget) {
					t.Errorf("evicted for %v", err)
				}
				evicted <- name
				go a.Close()
			}, nil)
			if err := a.Acquire(n); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Millisecond)
		}
		open("modest", "modest", 20)
		for i := range 4 {
			open("greedy", fmt.Sprint("greedy ", i), 20)
		}
		got := make(chan acquired, 2)
		acquire(b, "newcomer", 35, got)
		if a := <-got; a.err != nil || a.at > budgetTurn {
			t.Errorf("%+v", a)
		}
		synctest.Wait()
		if a, b := <-evicted, <-evicted; a != "greedy 0" || b != "greedy 1" || len(evicted) > 0 {
			t.Errorf("evicted were %s, %s and %d more", a, b, len(evicted))
		}
		// Now nobody holds more than the next one would.
		acquire(b, "another", 40, got)
		if a := <-got; !errors.Is(a.err, ErrBudget) || a.at != budgetWait || len(evicted) > 0 {
			t.Errorf("%+v; evicted were %d", a, len(evicted))
		}
	})
}

// Also among the connections of one owner, and where they hold the same.
func TestASlowOneGivesWayToItsEqual(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const all = 8 << 20 // 32 s at stallRate
		b := NewBudget(all)
		evicted := make(chan struct{})
		slow := holding(t, b, "same", all, func(error) { close(evicted) })
		go func() {
			<-evicted
			slow.Close()
		}()
		got := make(chan acquired, 1)
		time.Sleep(stallTimeout + 10*time.Second)
		acquire(b, "same", all, got)
		if a := <-got; !errors.Is(a.err, ErrBudget) {
			t.Errorf("%+v, though the other may still get on", a)
		}
		time.Sleep(15 * time.Second)
		acquire(b, "same", all, got)
		if a := <-got; a.err != nil || a.at > budgetTurn {
			t.Errorf("%+v", a)
		}
	})
}

// What lasts is not slow. Its owner gives way where it holds most, and to others alone.
func TestWhatLastsIsNotOverdue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := NewBudget(100)
		lasts := b.Open("modest", func(error) { t.Error("evicted") }, nil).Lasting()
		if err := lasts.Acquire(30); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Hour)
		evicted := make(chan struct{})
		greedy := holding(t, b, "greedy", 70, func(error) { close(evicted) })
		go func() {
			<-evicted
			greedy.Close()
		}()
		got := make(chan acquired, 1)
		acquire(b, "other", 10, got)
		if a := <-got; a.err != nil {
			t.Errorf("%+v", a)
		}
		if err := lasts.Acquire(80); !errors.Is(err, ErrBudget) {
			t.Errorf("more than there is: %v", err)
		}
		lasts.Close()
	})
}

func TestWhoGetsOnIsNotEvicted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := NewBudget(100)
		busy := holding(t, b, "busy", 100, func(error) { t.Error("evicted") })
		got := make(chan acquired, 1)
		time.Sleep(budgetTurn - time.Millisecond)
		busy.Release(100)
		if err := busy.Acquire(100); err != nil {
			t.Fatal(err)
		}
		acquire(b, "other", 10, got)
		time.Sleep(budgetTurn - time.Millisecond)
		busy.Release(100)
		if a := <-got; a.err != nil {
			t.Errorf("%+v", a)
		}
	})
}

func TestAWaitEndsWithItsConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := NewBudget(100)
		holding(t, b, "a", 100, nil)
		done := make(chan struct{})
		got := make(chan error, 1)
		go func() { got <- b.Open("b", nil, done).Acquire(1) }()
		synctest.Wait()
		close(done)
		if err := <-got; !errors.Is(err, ErrClosed) {
			t.Errorf("got %v", err)
		}
		if b.crowded.Load() {
			t.Error("somebody still waits")
		}
	})
}

// Whatever accounts do at once: no more is held than there is, and in the end nothing.
func TestABudgetIsNeverOverdrawnNorLost(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %#x", seed)
	synctest.Test(t, func(t *testing.T) {
		const most, accounts = 1000, 60
		b := NewBudget(most)
		var held atomic.Int64
		var all sync.WaitGroup
		for i := range uint64(accounts) {
			all.Go(func() {
				r := rand.New(rand.NewPCG(seed, i))
				dead := make(chan struct{})
				die := sync.OnceFunc(func() { close(dead) })
				a := b.Open(fmt.Sprint(i%7), func(error) { die() }, dead)
				defer a.Close()
				for range 200 {
					n := 1 + r.Int64N(most/2)
					if err := a.Acquire(n); err != nil {
						if errors.Is(err, ErrClosed) {
							return
						}
						continue
					}
					if sum := held.Add(n); sum > most {
						t.Errorf("%d of %d are held", sum, most)
					}
					select {
					case <-time.After(time.Duration(r.Int64N(int64(5 * time.Second)))):
					case <-dead:
						held.Add(-n)
						return
					}
					held.Add(-n)
					a.Release(n)
				}
			})
		}
		all.Wait()
		if b.Held() != 0 || b.leaving != 0 || len(b.owners) != 0 || len(b.waiting) != 0 {
			t.Errorf("left over: %d bytes, %d of them leaving, %d owners, %d waiting",
				b.Held(), b.leaving, len(b.owners), len(b.waiting))
		}
	})
}
