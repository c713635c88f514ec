package node

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// listShare is how much of the time at most goes by with asking for the list of topics: brokers give it with all
// partitions, which in a large cluster takes them a while.
const listShare = 20

// topicNames is the list of all topics of one cluster. It is asked for when somebody needs it, and then again as long
// as somebody does.
type topicNames struct {
	list atomic.Pointer[topicList]
	ask  func(context.Context) ([]string, error)
	pace pace
	log  zerolog.Logger

	mu     sync.Mutex
	flight *listing // nil when none runs
	began  time.Time
	failed string // what went wrong the last time
}

// topicList does not change.
type topicList struct {
	names   []string // sorted
	edition uint64
	until   time.Time // when it is no longer fresh
}

// listing is one request for the list.
type listing struct {
	began time.Time     // valid once done is closed, as is
	err   error         // why there is no new list
	done  chan struct{} // closed at its end
}

// current is the list and its edition, see [authz.Groups]. A list that is no longer fresh is renewed meanwhile.
func (t *topicNames) current(start func(func(context.Context))) (names []string, edition uint64) {
	l := t.list.Load()
	if l == nil || time.Now().After(l.until) {
		t.begin(start)
	}
	if l == nil {
		return nil, 0
	}
	return l.names, l.edition
}

// renew returns when there is a list that was asked for after the call.
func (t *topicNames) renew(ctx context.Context, start func(func(context.Context))) error {
	called := time.Now()
	for {
		l := t.begin(start)
		select {
		case <-l.done:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		if l.err != nil || !l.began.Before(called) {
			return l.err
		}
	}
}

// begin starts a request for the list, or joins the one that runs. Between two there is a pause.
func (t *topicNames) begin(start func(func(context.Context))) *listing {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.flight == nil {
		l := &listing{done: make(chan struct{})}
		t.flight = l
		pause := time.Until(t.began.Add(t.pace.demand))
		start(func(ctx context.Context) { t.run(ctx, l, pause) })
	}
	return t.flight
}

func (t *topicNames) run(ctx context.Context, l *listing, pause time.Duration) {
	defer close(l.done)
	select {
	case <-time.After(pause):
	case <-ctx.Done():
	}
	l.began = time.Now()
	names, err := t.ask(ctx)
	l.err = err
	t.mu.Lock()
	defer t.mu.Unlock()
	t.flight, t.began = nil, l.began
	if err != nil {
		if ctx.Err() == nil && t.failed != err.Error() {
			t.failed = err.Error()
			t.log.Warn().Err(err).Msg("cannot list the topics; subscriptions by regular expression keep those they have")
		}
		return
	}
	t.failed = ""
	t.take(names, l.began)
}

// take makes names the list. t.mu is held.
func (t *topicNames) take(names []string, began time.Time) {
	slices.Sort(names)
	now := time.Now()
	next := &topicList{names: names, edition: 1, until: now.Add(max(t.pace.names, listShare*now.Sub(began)))}
	if old := t.list.Load(); old != nil {
		next.edition = old.edition
		if !slices.Equal(old.names, names) {
			next.edition++
		}
	}
	t.list.Store(next)
}

// askTopicNames asks a cluster which topics it has.
func askTopicNames(ctx context.Context, client *kgo.Client, learn func(*kmsg.MetadataResponse)) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
	defer cancel()
	m, err := kmsg.NewPtrMetadataRequest().RequestWith(ctx, client) // null topics are all
	if err != nil {
		return nil, fmt.Errorf("list the topics: %w", err)
	}
	learn(m)
	names := make([]string, 0, len(m.Topics))
	for i := range m.Topics {
		if m.Topics[i].Topic != nil {
			names = append(names, *m.Topics[i].Topic)
		}
	}
	return names, nil
}
