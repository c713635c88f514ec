package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

const brokerDown = "broker down"

// The records of an outage: those before the kill, those while the broker is down, and those after it is back.
const (
	before, during, after = 20, 30, 20

	pace          = 150 * time.Millisecond // between two records
	outageLimit   = 2 * time.Minute
	grace         = 10 * time.Second // by which a redirected client may be later than a direct one to tell of an error
	killed        = 2                // the broker, counted from 0
	outageStartUp = 5 * time.Second  // for all clients to come up, so that the kill meets them at work
)

// outage runs every client twice at the same time, redirected and direct, while a broker is killed and started again:
// both runs must be held to the same. Each is also pointed at a broker that is down
// throughout, and must tell of it in the same words and in no more time.
func outage(ctx context.Context, r *rig, sheets []*sheet) error {
	feed := newFeed(ctx)
	var all sync.WaitGroup
	for _, s := range sheets {
		if !s.obtained {
			continue
		}
		all.Go(func() { s.note(brokerDown, meetsOutage(ctx, r, s.client, feed)) })
	}
	err := feed.through(r)
	all.Wait()
	return err
}

func meetsOutage(ctx context.Context, r *rig, c *client, feed *feed) error {
	var survives, unreachable error
	var both sync.WaitGroup
	both.Go(func() { survives = survivesKill(ctx, r, c, feed) })
	both.Go(func() { unreachable = tellsOfDeadBroker(ctx, r, c) })
	both.Wait()
	return errors.Join(survives, unreachable)
}

// paths are the two ways a client is run for comparison.
func (r *rig) paths() map[string]*cgroup {
	return map[string]*cgroup{"redirected": r.redirected, "direct": r.direct}
}

// compare runs a call on both paths at the same time.
func (r *rig) compare(ctx context.Context, of func(path string) call) map[string]outcome {
	var mu sync.Mutex
	outcomes := map[string]outcome{}
	var all sync.WaitGroup
	for path, place := range r.paths() {
		all.Go(func() {
			call := of(path)
			call.name, call.place = call.name+"-"+path, place
			o := r.run(ctx, call)
			mu.Lock()
			defer mu.Unlock()
			outcomes[path] = o
		})
	}
	all.Wait()
	return outcomes
}

// survivesKill: a producer at work loses nothing that it would not lose without the node.
func survivesKill(ctx context.Context, r *rig, c *client, feed *feed) error {
	if c.produce == "" {
		return nil
	}
	outcomes := r.compare(ctx, func(path string) call {
		call := c.call("outage", c.produce)
		call.topic, call.limit = c.topic()+"-"+path, outageLimit
		call.group = call.topic // names a transactional id
		call.lines = linesOf(c.name, before+during+after)
		if c.slow != "" {
			call.command = c.slow
		} else {
			call.input = feed.reader(c.name)
		}
		return call
	})
	var failures []error
	for path, o := range outcomes {
		values, err := r.read(ctx, c.topic()+"-"+path)
		if err != nil {
			return err
		}
		if err := c.delivered(values, o); err != nil {
			failures = append(failures, fmt.Errorf("%s: %w", path, err))
		}
	}
	return errors.Join(failures...)
}

// delivered: all records are there, repetitions apart, which a producer without idempotence makes when it retries. A
// client that gives up sooner than a broker comes back has lost none of those after that, and has told of it.
func (c *client) delivered(values []string, o outcome) error {
	if c.slow != "" { // draws from its lines at random
		if len(values) < before+during+after {
			return o.failure("it lost %d records", before+during+after-len(values))
		}
		return nil
	}
	var lost []string
	for i, line := range linesOf(c.name, before+during+after) {
		if !slices.Contains(values, line) {
			lost = append(lost, line)
			if i >= before+during {
				return o.failure("it lost %q, produced when the broker was back", line)
			}
		}
	}
	if len(lost) > 0 && (c.givesUp == nil || !c.givesUp.MatchString(o.all)) {
		return o.failure("it lost %q", lost)
	}
	return nil
}

// tellsOfDeadBroker: a client that knows only a broker that is down says so as it would without the node.
func tellsOfDeadBroker(ctx context.Context, r *rig, c *client) error {
	outcomes := r.compare(ctx, func(string) call {
		call := c.call("unreachable", cmp.Or(c.list, c.produce))
		call.brokers, call.limit, call.until = r.deadBroker(), outageLimit, c.unreachable
		return call
	})
	direct, redirected := outcomes["direct"], outcomes["redirected"]
	switch {
	case !c.unreachable.MatchString(direct.all):
		return direct.failure("to a broker that is down, direct: it did not say %q", c.unreachable)
	case !c.unreachable.MatchString(redirected.all):
		return redirected.failure("to a broker that is down, redirected: it did not say %q", c.unreachable)
	case redirected.took > 2*direct.took+grace:
		return fmt.Errorf("to a broker that is down, it told of it after %v, direct after %v", redirected.took,
			direct.took)
	}
	return nil
}

// feed gives all clients their records in step with the outage.
type feed struct {
	ctx   context.Context //nolint:containedctx // it is the life of the readers, which io.Reader cannot pass
	mu    sync.Mutex
	grown *sync.Cond
	n     int // records given so far
}

func newFeed(ctx context.Context) *feed {
	f := &feed{ctx: ctx}
	f.grown = sync.NewCond(&f.mu)
	return f
}

// through feeds the records and meanwhile kills a broker and starts it again.
func (f *feed) through(r *rig) error {
	defer f.grow(before + during + after) // whatever fails, no client waits for ever
	phases := []struct {
		wait time.Duration
		n    int
		then func() error
	}{
		{outageStartUp, 0, nil},
		{0, before, func() error { return r.cluster.StopBroker(killed, syscall.SIGKILL) }},
		{0, during, func() error { return r.cluster.StartBroker(f.ctx, killed) }},
		{0, after, nil},
	}
	for _, phase := range phases {
		if err := f.sleep(phase.wait); err != nil {
			return err
		}
		for range phase.n {
			f.grow(1)
			if err := f.sleep(pace); err != nil {
				return err
			}
		}
		if phase.then != nil {
			if err := phase.then(); err != nil {
				return err
			}
		}
	}
	return nil
}

func (f *feed) sleep(d time.Duration) error {
	select {
	case <-f.ctx.Done():
		return f.ctx.Err()
	case <-time.After(d):
		return nil
	}
}

func (f *feed) grow(n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.n = min(f.n+n, before+during+after)
	f.grown.Broadcast()
}

// reader returns the standard input of one client: one line for each record of the feed, and then the end.
func (f *feed) reader(name string) io.Reader {
	lines := linesOf(name, before+during+after)
	given := 0
	return readerFunc(func(p []byte) (int, error) {
		if given == len(lines) {
			return 0, io.EOF
		}
		f.mu.Lock()
		for f.n <= given {
			f.grown.Wait()
		}
		f.mu.Unlock()
		n, err := io.ReadFull(strings.NewReader(lines[given]+"\n"), p[:len(lines[given])+1])
		given++
		return n, err
	})
}

// readerFunc is a function that reads. Lines are shorter than any buffer it is given.
type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }
