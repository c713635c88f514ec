package enforcer

import (
	"context"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"
)

// relays are the opaque connections that are open; the zero value has none.
type relays struct {
	mu       sync.Mutex
	open     map[*relay]struct{}
	draining bool
	ended    chan struct{} // tells drain that none is open; nil before
}

func (o *relays) add(r *relay) {
	o.mu.Lock()
	if o.open == nil {
		o.open = map[*relay]struct{}{}
	}
	o.open[r] = struct{}{}
	draining := o.draining
	o.mu.Unlock()
	if draining {
		r.drain()
	}
}

func (o *relays) remove(r *relay) {
	o.mu.Lock()
	defer o.mu.Unlock()
	delete(o.open, r)
	if len(o.open) > 0 {
		return
	}
	select {
	case o.ended <- struct{}{}:
	default: // nobody waits for it, or was told already
	}
}

// all returns the open ones, in the random order of a map.
func (o *relays) all() []*relay {
	o.mu.Lock()
	defer o.mu.Unlock()
	return slices.Collect(maps.Keys(o.open))
}

// look makes each look at the policy again.
func (o *relays) look() {
	for _, r := range o.all() {
		r.look()
	}
}

// drain ends all as kafka.Shared.Drain does, each at a moment when nothing passes.
func (o *relays) drain(ctx context.Context, spread time.Duration) (cut int) {
	ended := make(chan struct{}, 1)
	o.mu.Lock()
	o.draining, o.ended = true, ended
	o.mu.Unlock()
	start, open := time.Now(), o.all()
	for i, r := range open {
		jitter := rand.N(spread + 1) //nolint:gosec // it is no secret
		select {
		case <-ctx.Done():
		case <-time.After(time.Until(start.Add((time.Duration(i)*spread + jitter) / time.Duration(len(open))))):
		}
		r.drain()
	}
	for open = o.all(); len(open) > 0; open = o.all() {
		select {
		case <-ctx.Done():
			for _, r := range open {
				r.end(errCut)
			}
			return len(open)
		case <-ended:
		}
	}
	return 0
}
