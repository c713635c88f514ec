package issuer

import (
	"context"
	"crypto/tls"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/rs/zerolog"
)

const (
	issueTimeout = 20 * time.Second // for one certificate
	retryMin     = time.Second      // after a failure, doubled each time
	retryMax     = 2 * time.Minute
	renewAt      = 2. / 3 // of a certificate's life
	renewSpread  = 0.1    // of its life, at random, so that not all nodes ask at once
)

// Cache keeps the leaves of an issuer that makes new ones, and renews in the background those that are in use. A leaf
// is used until it expires where no newer one can be had. Safe for concurrent use.
type Cache struct {
	from Issuer
	log  zerolog.Logger

	ctx   context.Context // ends with Close
	stop  context.CancelFunc
	tasks sync.WaitGroup

	mu     sync.Mutex
	leaves map[string]*leaf // by names
}

// leaf is what is known of one set of names. Guarded by the cache's mu.
type leaf struct {
	names  []string
	cert   *tls.Certificate // nil: none yet
	used   bool             // since cert was made
	flight chan struct{}    // closed when it has been asked for; nil: it is not being asked for
	failed error            // of the last time; nil: it worked
	pause  time.Duration    // after failed
	again  time.Time        // no sooner is it asked for
	turn   int              // counts renewals that were put off; the last one counts
}

// NewCache keeps the leaves of an issuer until Close.
func NewCache(from Issuer, log zerolog.Logger) *Cache {
	c := &Cache{from: from, log: log, leaves: map[string]*leaf{}}
	c.ctx, c.stop = context.WithCancel(context.Background())
	return c
}

// Close ends all renewals.
func (c *Cache) Close() error {
	c.mu.Lock() // no task begins from here on
	c.stop()
	c.mu.Unlock()
	c.tasks.Wait()
	return nil
}

// Leaf is the certificate that is kept, or a new one. Where many ask for the same it is made once.
func (c *Cache) Leaf(ctx context.Context, names []string) (*tls.Certificate, error) {
	l, flight := c.find(names)
	if flight != nil {
		select {
		case <-flight:
		case <-ctx.Done():
			return nil, failed("waiting for the issuer", names, context.Cause(ctx))
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if l.fresh(time.Now()) {
		return l.cert, nil
	}
	if l.failed == nil {
		return nil, failed("the node ends", names, context.Canceled)
	}
	return nil, l.failed
}

// fresh tells whether there is a certificate to show.
func (l *leaf) fresh(now time.Time) bool { return l.cert != nil && now.Before(l.cert.Leaf.NotAfter) }

// find is the leaf, and what to wait for where there is none to show yet.
func (c *Cache) find(names []string) (*leaf, <-chan struct{}) {
	names = slices.Sorted(slices.Values(names))
	key := strings.Join(names, " ")
	c.mu.Lock()
	defer c.mu.Unlock()
	l := c.leaves[key]
	if l == nil {
		l = &leaf{names: names}
		c.leaves[key] = l
	}
	l.used = true
	now := time.Now()
	if l.fresh(now) {
		return l, nil
	}
	if l.flight == nil && !now.Before(l.again) && c.ctx.Err() == nil {
		c.ask(l)
	}
	return l, l.flight
}

// ask begins to make a certificate. c.mu is held.
func (c *Cache) ask(l *leaf) {
	flight := make(chan struct{})
	l.flight = flight
	c.tasks.Go(func() {
		defer close(flight)
		ctx, cancel := context.WithTimeout(c.ctx, issueTimeout)
		defer cancel()
		cert, err := c.from.Leaf(ctx, l.names)
		if err == nil {
			err = check(cert, l.names, time.Now())
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		l.flight = nil
		c.asked(l, cert, err)
	})
}

// asked takes up the outcome, and sets the time for the next. c.mu is held.
func (c *Cache) asked(l *leaf, cert *tls.Certificate, err error) {
	if c.ctx.Err() != nil {
		return
	}
	now := time.Now()
	if err != nil {
		l.failed = err
		l.pause = min(max(retryMin, 2*l.pause), retryMax)
		l.again = now.Add(l.pause)
		c.log.Warn().Err(err).Dur("again", l.pause).Bool("fallback", l.fresh(now)).Msg("no certificate for brokers")
		if l.cert != nil {
			c.renew(l, l.pause)
		}
		return
	}
	l.cert, l.failed, l.pause, l.again, l.used = cert, nil, 0, time.Time{}, false
	life := float64(cert.Leaf.NotAfter.Sub(now))
	part := renewAt + renewSpread*(rand.Float64()-0.5) //nolint:gosec // jitter needs no secrecy
	c.renew(l, time.Duration(life*part))
}

// renew asks again after a while, where the leaf is still in use. c.mu is held.
func (c *Cache) renew(l *leaf, after time.Duration) {
	l.turn++
	turn := l.turn
	c.tasks.Go(func() {
		select {
		case <-time.After(after):
		case <-c.ctx.Done():
			return
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		switch {
		case c.ctx.Err() != nil || l.flight != nil || l.turn != turn:
		case !l.used:
			delete(c.leaves, strings.Join(l.names, " "))
		default:
			c.ask(l)
		}
	})
}
