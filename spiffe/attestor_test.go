package spiffe

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sys/unix"
)

// patience bounds every wait, so that a failure ends in a message.
const patience = 20 * time.Second

// fakeKernel sees what procTasks sees, falsified by change, and the holders it is given.
type fakeKernel struct {
	procTasks
	mu      sync.Mutex
	watched []uint32
	holders []Holder
	blind   error
}

func (k *fakeKernel) Watch(pid uint32) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.watched = append(k.watched, pid)
	return nil
}

func (k *fakeKernel) Unwatch(pid uint32) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.watched = slices.DeleteFunc(k.watched, func(p uint32) bool { return p == pid })
	return nil
}

func (k *fakeKernel) Watched() (map[uint32]TaskFacts, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.blind != nil {
		return nil, k.blind
	}
	now := map[uint32]TaskFacts{}
	for _, pid := range k.watched {
		if f, err := k.Task(pid); err == nil {
			now[pid] = f
		}
	}
	return now, nil
}

func (k *fakeKernel) Holders(sockets []uint64) (found []Holder, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, h := range k.holders {
		if slices.Contains(sockets, h.Socket) {
			found = append(found, h)
		}
	}
	return found, nil
}

func (k *fakeKernel) set(f func()) {
	k.mu.Lock()
	defer k.mu.Unlock()
	f()
}

// scripted is a source whose watches the test holds in its hands.
type scripted struct {
	name    string
	watches chan *scriptedWatch
}

type scriptedWatch struct {
	subject subject
	ctx     context.Context
	tell    func(*Evidence, error)
	end     chan func() error
}

func newScripted() *scripted { return &scripted{SourceSPIRE, make(chan *scriptedWatch, 16)} }

func (s *scripted) Name() string { return s.name }

func (s *scripted) watch(ctx context.Context, p subject, tell func(*Evidence, error)) error {
	w := &scriptedWatch{p, ctx, tell, make(chan func() error, 1)}
	s.watches <- w
	select {
	case f := <-w.end:
		return f()
	case <-ctx.Done():
		return ctx.Err()
	}
}

// next is the next watch.
func (s *scripted) next(t *testing.T) *scriptedWatch {
	t.Helper()
	select {
	case w := <-s.watches:
		return w
	case <-time.After(patience):
		t.Fatal("the source is not asked")
		return nil
	}
}

func evidence(id string) *Evidence {
	return &Evidence{Source: SourceSPIRE, ID: spiffeid.RequireFromString(id)}
}

// fixed says the same of every process but those it is given others for.
type fixed struct {
	id    string
	other map[uint32]string
}

func (f fixed) Name() string { return SourceSPIRE }

func (f fixed) watch(ctx context.Context, p subject, tell func(*Evidence, error)) error {
	id, is := f.other[p.PID]
	if !is {
		id = f.id
	}
	tell(evidence(id), nil)
	<-ctx.Done()
	return nil
}

func attestorOf(t *testing.T, k *fakeKernel, sources ...Source) *Attestor {
	t.Helper()
	var tasks Tasks = new(procTasks)
	if k != nil {
		tasks = &k.procTasks
	}
	a := NewAttestor(NewProcesses(tasks, "", nil), sources...)
	if k != nil {
		a.Follow(k)
	}
	t.Cleanup(func() {
		if err := a.Close(); err != nil {
			t.Error(err)
		}
	})
	return a
}

func attest(t *testing.T, a *Attestor, peer Peer) *Attested {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	h, err := a.Attest(ctx, peer)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.Release)
	return h
}

// await waits until the identity is so.
func await(t *testing.T, h *Attested, what string, so func(*Identity) bool) *Identity {
	t.Helper()
	changed := make(chan struct{}, 1)
	stop := h.Watch(func() {
		select {
		case changed <- struct{}{}:
		default:
		}
	})
	defer stop()
	end := time.After(patience)
	for {
		if id := h.Identity(); so(id) {
			return id
		}
		select {
		case <-changed:
		case <-end:
			t.Fatalf("%s: the identity is still %+v", what, *h.Identity())
		}
	}
}

func lost(reason error) func(*Identity) bool {
	return func(id *Identity) bool { return errors.Is(id.Lost, reason) }
}

func (w *scriptedWatch) ended(t *testing.T) {
	t.Helper()
	select {
	case <-w.ctx.Done():
	case <-time.After(patience):
		t.Fatal("the source is still asked")
	}
}

const billing = "spiffe://example.test/ns/shop/sa/billing"

func TestAReconnectFindsTheEvidence(t *testing.T) {
	source := newScripted()
	a := attestorOf(t, nil, source)
	peer := peerOf(t, started(t, copyOf(t, "sleep"), "1000").Process.Pid)
	go func() { source.next(t).tell(evidence(orders), nil) }()
	first := attest(t, a, peer)
	if got := first.Identity().ID.String(); got != orders {
		t.Fatalf("it is %s", got)
	}
	first.Release()
	first.Release() // is nothing
	if s := a.State(); s.Processes != 1 || s.Lingering != 1 || s.Evidence[SourceSPIRE] != 1 {
		t.Errorf("after the first connection: %+v", s)
	}
	second := attest(t, a, peer) // nobody tells anything
	if got := second.Identity().ID.String(); got != orders {
		t.Errorf("it is %s", got)
	}
	if s := a.State(); s.Processes != 1 || s.Lingering != 0 {
		t.Errorf("during the second connection: %+v", s)
	}
}

func TestALingeringProcessIsForgottenInTheEnd(t *testing.T) {
	source := newScripted()
	k := new(fakeKernel)
	a := attestorOf(t, k, source)
	peer := peerOf(t, started(t, copyOf(t, "sleep"), "1000").Process.Pid)
	watch := make(chan *scriptedWatch, 1)
	go func() {
		w := source.next(t)
		w.tell(nil, nil)
		watch <- w
	}()
	attest(t, a, peer).Release()
	w := <-watch
	a.expire(time.Now().Add(linger - time.Second))
	if w.ctx.Err() != nil {
		t.Fatal("it is forgotten too early")
	}
	a.expire(time.Now().Add(linger + time.Second))
	w.ended(t)
	if s := a.State(); s.Processes != 0 || s.Lingering != 0 {
		t.Errorf("afterwards: %+v", s)
	}
	k.set(func() {
		if len(k.watched) > 0 {
			t.Errorf("%v are still watched", k.watched)
		}
	})
}

func TestLingeringProcessesAreBoundedAndTheOldestGoFirst(t *testing.T) {
	k := new(fakeKernel)
	a := attestorOf(t, k, fixed{id: orders})
	cmd := started(t, copyOf(t, "sleep"), "1000")
	peer := peerOf(t, cmd.Process.Pid)
	p, key, err := a.processes.verify(t.Context(), peer)
	if err != nil {
		t.Fatal(err)
	}
	keyOf := func(i int) recordKey { return recordKey{key, Workload{Pod: fmt.Sprint(i)}} }
	for i := range maxLingering + 10 {
		h := &Attested{attestor: a, watchers: map[*func()]struct{}{}}
		if err := a.acquire(h, keyOf(i), subject{p, peer}); err != nil {
			t.Fatal(err)
		}
		h.Release()
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.all) != maxLingering || a.known[keyOf(9)] != nil || a.known[keyOf(10)] == nil {
		t.Errorf("%d linger; the 10th: %v, the 11th: %v", len(a.all), a.known[keyOf(9)] != nil, a.known[keyOf(10)] != nil)
	}
}

func TestEvidenceEndsWithItsTime(t *testing.T) {
	source := newScripted()
	a := attestorOf(t, nil, source)
	peer := peerOf(t, started(t, copyOf(t, "sleep"), "1000").Process.Pid)
	e := evidence(orders)
	e.Expires = time.Now().Add(time.Hour)
	watch := make(chan *scriptedWatch, 1)
	go func() {
		w := source.next(t)
		w.tell(e, nil)
		watch <- w
	}()
	h := attest(t, a, peer)
	w := <-watch

	a.expire(time.Now().Add(59 * time.Minute))
	if h.Identity().ID.IsZero() {
		t.Fatal("it ended before its time")
	}
	a.expire(time.Now().Add(time.Hour)) // the clock was set, or the host slept
	if id := h.Identity(); !id.ID.IsZero() || len(id.Evidence) > 0 || id.Lost != nil {
		t.Errorf("after its time: %+v", id)
	}

	e = evidence(orders)
	e.Expires = time.Now().Add(300 * time.Millisecond)
	w.tell(e, nil)
	await(t, h, "its end", func(id *Identity) bool { return id.ID.IsZero() })
	if late := time.Since(e.Expires); late > time.Second {
		t.Errorf("it ended %v late", late)
	}
	w.tell(e, nil)
	if id := h.Identity(); !id.ID.IsZero() {
		t.Error("evidence that is over when it is told counts")
	}
	if a.State().Changes == 0 {
		t.Error("nothing is counted")
	}
}

func TestAChangeBeforeWatchIsNotMissed(t *testing.T) {
	source := newScripted()
	a := attestorOf(t, nil, source)
	peer := peerOf(t, started(t, copyOf(t, "sleep"), "1000").Process.Pid)
	watch := make(chan *scriptedWatch, 1)
	go func() {
		w := source.next(t)
		w.tell(nil, nil)
		watch <- w
	}()
	h := attest(t, a, peer)
	w := <-watch
	before := h.Identity()
	w.tell(evidence(orders), nil)
	told := 0
	stop := h.Watch(func() { told++ })
	if told == 0 || h.Identity() == before {
		t.Errorf("told %d times", told)
	}
	w.tell(nil, nil)
	if told != 2 {
		t.Errorf("told %d times after another change", told)
	}
	stop()
	w.tell(evidence(orders), nil)
	if told != 2 {
		t.Error("told after stop")
	}
}

func TestASourceThatFailsRefusesAndIsAskedAnew(t *testing.T) {
	for name, test := range map[string]struct {
		end   func() error
		want  string
		lasts bool // what it told before
	}{
		"an error":            {func() error { return errors.New("no answer") }, "identity source spire: no answer", false},
		"a panic":             {func() error { panic("defect") }, "identity source spire: panic: defect", false},
		"an end without word": {func() error { return nil }, "identity source spire: it ended without a word", true},
	} {
		t.Run(name, func(t *testing.T) {
			source := newScripted()
			a := attestorOf(t, nil, source)
			peer := peerOf(t, started(t, copyOf(t, "sleep"), "1000").Process.Pid)
			go func() { source.next(t).end <- test.end }()
			if _, err := a.Attest(t.Context(), peer); err == nil || err.Error() != test.want {
				t.Fatalf("got %v", err)
			}
			if s := a.State(); s.Failures[SourceSPIRE] != 1 || s.Why[SourceSPIRE] != test.want {
				t.Errorf("the state is %+v", s)
			}
			watch := make(chan *scriptedWatch, 1)
			go func() {
				w := source.next(t)
				w.tell(evidence(orders), nil)
				watch <- w
			}()
			h := attest(t, a, peer)
			if got := h.Identity().ID.String(); got != orders {
				t.Fatalf("it is %s", got)
			}
			(<-watch).end <- test.end
			if test.lasts {
				return
			}
			await(t, h, "the end of the evidence", func(id *Identity) bool { return id.ID.IsZero() })
			go func() { source.next(t).tell(evidence(billing), nil) }()
			if got := attest(t, a, peer).Identity().ID.String(); got != billing {
				t.Errorf("the next connection is of %s", got)
			}
		})
	}
}

func TestTheEndOfAProcessIsNoticedReapedOrNot(t *testing.T) {
	for name, looks := range map[string]bool{"by its pidfd": false, "by a look": true} {
		t.Run(name, func(t *testing.T) {
			k := new(fakeKernel)
			a := attestorOf(t, k, fixed{id: orders})
			cmd := started(t, copyOf(t, "sleep"), "1000")
			h := attest(t, a, peerOf(t, cmd.Process.Pid))
			if looks {
				var err error
				cerr := a.exits.raw.Control(func(fd uintptr) {
					err = unix.EpollCtl(int(fd), unix.EPOLL_CTL_DEL, h.record.Load().pidfd, nil)
				})
				if err := errors.Join(err, cerr); err != nil {
					t.Fatal(err)
				}
			} else {
				k.set(func() { k.blind = errors.New("blind") })
			}
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			if looks {
				_ = cmd.Wait() // a zombie is found only by its pidfd
			}
			id := await(t, h, "the end", lost(ErrGone))
			if id.ID.String() != orders {
				t.Errorf("the audit will not know who it was: %+v", id)
			}
			if s := a.State(); s.Processes != 0 || s.Gone != 1 {
				t.Errorf("the state is %+v", s)
			}
			_ = cmd.Wait()
			if _, err := a.Attest(t.Context(), h.record.Load().subject.peer); !errors.Is(err, ErrGone) {
				t.Errorf("attested again: %v", err)
			}
		})
	}
}

func TestAChangeOfTheProcessIsNoticed(t *testing.T) {
	exe := copyOf(t, "sleep")
	for name, test := range map[string]struct {
		change   func(*TaskFacts)
		executed bool
		want     error
	}{
		"an execve that is told":               {func(f *TaskFacts) { f.ExecID++ }, true, ErrChanged},
		"an execve that is seen":               {func(f *TaskFacts) { f.ExecID++ }, false, ErrChanged},
		"setuid":                               {func(f *TaskFacts) { f.UID = 0 }, false, ErrChanged},
		"setgid":                               {func(f *TaskFacts) { f.GID = 0 }, false, ErrChanged},
		"another cgroup":                       {func(f *TaskFacts) { f.CgroupID++ }, false, ErrChanged},
		"another executable without an execve": {func(f *TaskFacts) { f.ExeInode++ }, false, ErrChanged},
		"another process with the pid, by its inode": {func(f *TaskFacts) { f.PidInode++ }, false, ErrGone},
		"another process with the pid, by its start": {func(f *TaskFacts) { f.StartBoottime++ }, false, ErrGone},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			k := new(fakeKernel)
			a := attestorOf(t, k, fixed{id: orders})
			pid := started(t, exe, "1000").Process.Pid
			h := attest(t, a, peerOf(t, pid))
			k.set(func() { k.change = func(_ int32, f *TaskFacts) { test.change(f) } })
			if test.executed {
				a.Executed(uint32(pid))
				if id := h.Identity(); !errors.Is(id.Lost, test.want) {
					t.Fatalf("after it was told: %v", id.Lost)
				}
				return
			}
			await(t, h, name, lost(test.want))
		})
	}
}

func TestAThreadGroupOutlivesItsFirstThread(t *testing.T) {
	k := new(fakeKernel)
	a := attestorOf(t, k, fixed{id: orders})
	h := attest(t, a, peerOf(t, started(t, copyOf(t, "sleep"), "1000").Process.Pid))
	k.set(func() { k.change = func(_ int32, f *TaskFacts) { f.ExeInode, f.ExeDev = 0, 0 } })
	a.look(time.Now())
	if id := h.Identity(); id.Lost != nil {
		t.Errorf("lost: %v", id.Lost)
	}
}

func TestWhoCannotBeSeenIsNotBelievedForLong(t *testing.T) {
	k := new(fakeKernel)
	a := attestorOf(t, k, fixed{id: orders})
	h := attest(t, a, peerOf(t, started(t, copyOf(t, "sleep"), "1000").Process.Pid))
	k.set(func() { k.blind = errors.New("no memory") })
	a.look(time.Now())
	if id := h.Identity(); id.Lost != nil {
		t.Fatalf("lost at once: %v", id.Lost)
	}
	a.look(time.Now().Add(blindFor + 2*time.Second))
	if id := h.Identity(); !errors.Is(id.Lost, ErrChanged) {
		t.Errorf("lost: %v", id.Lost)
	}
	if s := a.State(); s.Blind < 2 || s.BlindWhy != "no memory" {
		t.Errorf("the state is %+v", s)
	}
}

func TestAConnectionPassesToThoseWhoShareItWithItsProcess(t *testing.T) {
	exe := copyOf(t, "sleep")
	other := peerOf(t, os.Getpid())
	for name, test := range map[string]struct {
		change func(*Holder) // of the second of two
		none   bool
		id     string // of the heir
		want   bool
	}{
		"all are the same program":      {want: true},
		"the heir is somebody else":     {id: billing},
		"nobody has it":                 {none: true},
		"one has executed":              {change: func(h *Holder) { h.ExecID++ }},
		"one has another executable":    {change: func(h *Holder) { h.ExeInode = other.ExeInode }},
		"one is on another file system": {change: func(h *Holder) { h.ExeDev++ }},
		"one has another uid":           {change: func(h *Holder) { h.UID = 0 }},
		"one has another gid":           {change: func(h *Holder) { h.GID = 0 }},
		"one is in another cgroup":      {change: func(h *Holder) { h.CgroupID++ }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			first, second, third := started(t, exe, "1000"), started(t, exe, "1000"), started(t, exe, "1000")
			source := fixed{id: orders, other: map[uint32]string{}}
			if test.id != "" {
				source.other[uint32(second.Process.Pid)] = test.id
			}
			k := new(fakeKernel)
			a := attestorOf(t, k, source)
			peer := peerOf(t, first.Process.Pid)
			peer.Socket = 4711
			h := attest(t, a, peer)
			for i, cmd := range []int{second.Process.Pid, third.Process.Pid} {
				p := peerOf(t, cmd)
				holder := Holder{peer.Socket, p.TGID, TaskFacts{StartBoottime: p.StartBoottime + uint64(i), ExecID: p.ExecID,
					PidInode: p.PidInode, ExeInode: p.ExeInode, ExeDev: p.ExeDev, UID: p.UID, GID: p.GID, CgroupID: p.CgroupID}}
				if i == 0 {
					holder.StartBoottime = p.StartBoottime
				} else if test.change != nil {
					test.change(&holder)
				}
				if !test.none {
					k.set(func() { k.holders = append(k.holders, holder) })
				}
			}
			if err := first.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			if !test.want {
				await(t, h, "its end", lost(ErrGone))
				if n := a.State().Inherited; n != 0 {
					t.Errorf("%d are inherited", n)
				}
				return
			}
			heir := uint32(second.Process.Pid)
			await(t, h, "its heir", func(id *Identity) bool {
				return id.Process.PID == heir && id.ID.String() == orders && id.Lost == nil
			})
			if s := a.State(); s.Inherited != 1 || s.Gone != 0 {
				t.Errorf("the state is %+v", s)
			}
			k.set(func() { k.holders = nil })
			if err := second.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			await(t, h, "the heir's end", lost(ErrGone))
		})
	}
}

func TestAConnectionThatEndsWithItsProcessIsNotSoughtElsewhere(t *testing.T) {
	k := new(fakeKernel)
	a := attestorOf(t, k, fixed{id: orders})
	cmd := started(t, copyOf(t, "sleep"), "1000")
	h := attest(t, a, peerOf(t, cmd.Process.Pid))
	h.Release()
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(patience); a.State().Processes > 0; {
		if time.Now().After(end) {
			t.Fatal("it is still known")
		}
		unixYield()
	}
	if s := a.State(); s.Gone != 0 || s.Inherited != 0 {
		t.Errorf("the state is %+v", s)
	}
}

func unixYield() { _, _ = unix.Poll(nil, 1) }

func TestAfterCloseNobodyIsWhoItWas(t *testing.T) {
	a := NewAttestor(NewProcesses(new(procTasks), "", nil), fixed{id: orders})
	peer := peerOf(t, started(t, copyOf(t, "sleep"), "1000").Process.Pid)
	h := attest(t, a, peer)
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	if id := h.Identity(); !errors.Is(id.Lost, errClosed) {
		t.Errorf("lost: %v", id.Lost)
	}
	if _, err := a.Attest(t.Context(), peer); !errors.Is(err, errClosed) {
		t.Errorf("attested: %v", err)
	}
}

func TestManyConnectionsComeAndGoWhileTheirProcessesDo(t *testing.T) {
	exe := copyOf(t, "sleep")
	k := new(fakeKernel)
	a := attestorOf(t, k, fixed{id: orders})
	var group sync.WaitGroup
	for range 8 {
		cmd := started(t, exe, "1000")
		peer := peerOf(t, cmd.Process.Pid)
		for range 4 {
			group.Go(func() {
				for {
					h, err := a.Attest(t.Context(), peer)
					if err != nil {
						if !errors.Is(err, ErrGone) && !errors.Is(err, ErrChanged) {
							t.Error(err)
						}
						return
					}
					stop := h.Watch(func() {})
					if id := h.Identity(); id.ID.String() != orders && id.Lost == nil {
						t.Errorf("it is %+v", id)
					}
					stop()
					h.Release()
				}
			})
		}
		group.Go(func() {
			unixYield()
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		})
	}
	group.Wait()
}
