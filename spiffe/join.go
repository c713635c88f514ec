package spiffe

import (
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Moments is an identity from moment to moment, like that of Attested.
type Moments interface {
	Identity() *Identity
	Watch(changed func()) (stop func())
}

// Joined is the identity behind a connection together with what the connection itself showed of it. Safe for concurrent
// use. It must be released.
type Joined struct {
	process  Moments
	evidence Evidence
	sum      atomic.Pointer[sum]
	expiry   *time.Timer // nil: it does not end by itself

	mu       sync.Mutex
	expired  bool
	watchers map[*func()]struct{}
}

// sum is an identity with the evidence, of one moment.
type sum struct {
	of, is *Identity
}

// Join adds evidence that was found on the connection, such as a client certificate. It counts less than what the
// process' own sources say, and ends when it expires.
func Join(process Moments, e Evidence) *Joined {
	j := &Joined{process: process, evidence: e, watchers: map[*func()]struct{}{}}
	if !e.Expires.IsZero() {
		j.expiry = time.AfterFunc(time.Until(e.Expires), j.expire)
	}
	return j
}

// Identity is who it is now; never nil, and the same pointer as long as nothing changes.
func (j *Joined) Identity() *Identity {
	of := j.process.Identity()
	if s := j.sum.Load(); s != nil && s.of == of {
		return s.is
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if s := j.sum.Load(); s != nil && s.of == of {
		return s.is
	}
	return j.add(of)
}

// add makes the identity anew. j.mu is held.
func (j *Joined) add(of *Identity) *Identity {
	is := of
	if !j.expired {
		both := *of
		both.Evidence = slices.Clone(of.Evidence)
		both.add(j.evidence)
		is = &both
	}
	j.sum.Store(&sum{of, is})
	return is
}

func (j *Joined) expire() {
	for _, changed := range j.end() {
		(*changed)()
	}
}

// end drops the evidence, and tells who is to hear of it.
func (j *Joined) end() []*func() {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.expired = true
	j.add(j.process.Identity())
	return slices.Collect(maps.Keys(j.watchers))
}

// Watch calls changed after every change of the identity, until stop is called. It must not block.
func (j *Joined) Watch(changed func()) (stop func()) {
	process := j.process.Watch(changed)
	j.mu.Lock()
	defer j.mu.Unlock()
	j.watchers[&changed] = struct{}{}
	return func() {
		process()
		j.mu.Lock()
		defer j.mu.Unlock()
		delete(j.watchers, &changed)
	}
}

// Release tells that the connection has ended. The process' identity is not released by it.
func (j *Joined) Release() {
	if j.expiry != nil {
		j.expiry.Stop()
	}
}
