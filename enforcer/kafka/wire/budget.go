package wire

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// ErrBudget refuses a frame that the node's memory budget has no room for.
var ErrBudget = errors.New("the memory budget is exhausted")

// Who waits longer than budgetTurn is not overtaken any more by what fits meanwhile, and those that hold more give way.
const (
	budgetWait = 10 * time.Second
	budgetTurn = 2 * time.Second
)

// Budget bounds the memory of all frames that are held whole and are larger than BaseBuffer. A frame's share is taken
// at once, before its first byte is read, so that two half-read frames cannot wait for each other. Requests and answers
// need separate budgets, because a broker that waits for its answer to be read does not read the next request; so does
// what is decoded, because its frame is held meanwhile; and so does what is kept until the broker answers, because that
// may take as long as it likes.
//
// It is fair between owners, however many accounts they have. When it is exhausted, the owner that holds least is
// served first, and after [budgetTurn] the owner that holds most gives way, if it holds more than the one that waits
// would: its accounts that did not get on meanwhile are evicted, oldest first. Whoever is slower than a pipe lets a
// sender be gives way to all.
type Budget struct {
	max int64

	mu      sync.Mutex
	used    int64
	leaving int64             // of used: what evicted accounts still hold
	owners  map[string]*owner // those with accounts
	waiting []*waiter         // in the order of their coming
	crowded atomic.Bool       // somebody waits
}

// owner is whoever the budget is fair to.
type owner struct {
	held     int64
	leaving  int64 // of held
	accounts map[*Account]struct{}
}

// Account is what one connection holds of a budget.
type Account struct {
	budget *Budget
	name   string
	owner  *owner
	evict  func(error)
	done   <-chan struct{}
	lasts  bool

	// under the budget's lock
	held    int64
	since   time.Time // of the latest share it took
	evicted bool
}

type waiter struct {
	account *Account
	n       int64
	since   time.Time
	granted chan struct{}
}

// NewBudget makes a budget of so many bytes.
func NewBudget(bytes int64) *Budget {
	return &Budget{max: bytes, owners: map[string]*owner{}}
}

// Open opens an account of an owner. Evict is called, once, when the account has to give way; it must make the account
// be closed, and not wait for that. Waits of the account end with done. Both may be nil.
func (b *Budget) Open(name string, evict func(error), done <-chan struct{}) *Account {
	b.mu.Lock()
	defer b.mu.Unlock()
	o := b.owners[name]
	if o == nil {
		o = &owner{accounts: map[*Account]struct{}{}}
		b.owners[name] = o
	}
	a := &Account{budget: b, name: name, owner: o, evict: evict, done: done}
	o.accounts[a] = struct{}{}
	return a
}

// Lasting makes it an account of what is not given back as work gets on, like the state of a session: how long it has
// been held tells nothing.
func (a *Account) Lasting() *Account {
	a.lasts = true
	return a
}

// Close gives back all that the account holds.
func (a *Account) Close() {
	b := a.budget
	b.mu.Lock()
	defer b.mu.Unlock()
	a.give(a.held)
	delete(a.owner.accounts, a)
	if len(a.owner.accounts) == 0 && b.owners[a.name] == a.owner {
		delete(b.owners, a.name)
	}
}

// Acquire takes n bytes, waiting for others to give theirs back: that is the back pressure. It fails with ErrBudget
// when n can never be had, or was not had within 10 s.
func (a *Account) Acquire(n int64) error {
	b := a.budget
	if n > b.max {
		return fmt.Errorf("%w: %d bytes are needed, the budget is %d", ErrBudget, n, b.max)
	}
	w := b.enqueue(a, n)
	if w == nil {
		return nil
	}
	giveUp, turn := time.NewTimer(budgetWait), time.NewTicker(budgetTurn)
	defer giveUp.Stop()
	defer turn.Stop()
	for {
		select {
		case <-w.granted:
			return nil
		case <-turn.C:
			b.makeRoom(w)
		case <-a.done:
			return b.leave(w, ErrClosed)
		case <-giveUp.C:
			return b.leave(w, fmt.Errorf("%w: no %d bytes were free within %s", ErrBudget, n, budgetWait))
		}
	}
}

// Release gives n bytes back.
func (a *Account) Release(n int64) {
	if n <= 0 {
		return
	}
	a.budget.mu.Lock()
	defer a.budget.mu.Unlock()
	a.give(n)
}

// Crowded tells whether somebody waits: who could go on without what he holds should give it back.
func (a *Account) Crowded() bool { return a.budget.crowded.Load() }

// Held is what is taken of the budget.
func (b *Budget) Held() int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.used
}

func (a *Account) give(n int64) {
	a.hold(-n)
	a.budget.grant()
}

// hold changes what the account holds.
func (a *Account) hold(n int64) {
	a.held += n
	a.owner.held += n
	a.budget.used += n
	if a.evicted {
		a.owner.leaving += n
		a.budget.leaving += n
	}
}

// enqueue takes n bytes at once, and returns nil, or makes the account wait.
func (b *Budget) enqueue(a *Account, n int64) *waiter {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.waiting) == 0 && b.used+n <= b.max {
		b.take(a, n)
		return nil
	}
	w := &waiter{account: a, n: n, since: time.Now(), granted: make(chan struct{})}
	b.waiting = append(b.waiting, w)
	b.grant()
	return w
}

func (b *Budget) take(a *Account, n int64) {
	a.hold(n)
	a.since = time.Now()
}

// grant serves who waits, as long as something fits.
func (b *Budget) grant() {
	for w := b.next(); w != nil; w = b.next() {
		b.take(w.account, w.n)
		b.forget(w)
		close(w.granted)
	}
	b.crowded.Store(len(b.waiting) > 0)
}

// next is whom to serve now, or nil: whoever is first, but as long as that does not fit and has not waited long, the
// first of those that fit.
func (b *Budget) next() *waiter {
	first := b.first(b.max)
	if first == nil || b.used+first.n <= b.max {
		return first
	}
	if time.Since(first.since) >= budgetTurn {
		return nil
	}
	return b.first(b.max - b.used)
}

// first is the waiter, for at most so many bytes, whose owner holds least; of those, the one that came first.
func (b *Budget) first(limit int64) (first *waiter) {
	for _, w := range b.waiting {
		if w.n <= limit && (first == nil || w.account.owner.held < first.account.owner.held) {
			first = w
		}
	}
	return first
}

func (b *Budget) forget(w *waiter) {
	b.waiting = slices.DeleteFunc(b.waiting, func(x *waiter) bool { return x == w })
}

// leave ends a wait in vain, unless it was served at this very moment.
func (b *Budget) leave(w *waiter, err error) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	select {
	case <-w.granted:
		return nil
	default:
	}
	b.forget(w)
	b.grant()
	return err
}

// makeRoom evicts for a waiter, once it is the first.
func (b *Budget) makeRoom(w *waiter) {
	var evicted []*Account
	b.mu.Lock()
	for b.first(b.max) == w && b.used-b.leaving+w.n > b.max {
		a := b.victim(w)
		if a == nil {
			break
		}
		a.evicted = true
		a.owner.leaving += a.held
		b.leaving += a.held
		evicted = append(evicted, a)
	}
	b.mu.Unlock()
	for _, a := range evicted {
		a.evict(fmt.Errorf("%w: others wait for what this connection holds without getting on", ErrBudget))
	}
}

// victim is the account that took its share longest ago, of the owner that holds most; before that, of any owner, one
// that has held its share longer than it takes who gets on at all.
func (b *Budget) victim(w *waiter) (victim *Account) {
	if a := b.overdue(w); a != nil {
		return a
	}
	var most *owner
	for _, o := range b.owners {
		if most == nil || o.held-o.leaving > most.held-most.leaving {
			most = o
		}
	}
	if most == nil || most.held-most.leaving <= w.account.owner.held+w.n {
		return nil
	}
	for a := range most.accounts {
		if a != w.account && a.stuck(budgetTurn) && (victim == nil || a.since.Before(victim.since)) {
			victim = a
		}
	}
	return victim
}

func (b *Budget) overdue(w *waiter) *Account {
	for _, o := range b.owners {
		for a := range o.accounts {
			if a != w.account && !a.lasts && a.stuck(stallTimeout+time.Duration(a.held)*time.Second/stallRate) {
				return a
			}
		}
	}
	return nil
}

// stuck tells whether the account has held its latest share for so long, and can be evicted.
func (a *Account) stuck(limit time.Duration) bool {
	return a.held > 0 && !a.evicted && a.evict != nil && time.Since(a.since) >= limit
}
