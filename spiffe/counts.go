package spiffe

import (
	"maps"
	"sync"
	"sync/atomic"
)

// State is what an attestor knows and has seen.
type State struct {
	Processes int `json:"processes"` // known, each with what it executes
	Lingering int `json:"lingering"` // of them, without a connection
	// Processes by the source whose evidence gave their SPIFFE ID, "" for none, and by source that has evidence of them.
	Identified map[string]int `json:"identified"`
	Evidence   map[string]int `json:"evidence"`

	Changes   uint64 `json:"changes"`   // times that the evidence of a process changed, expiry included
	Changed   uint64 `json:"changed"`   // processes that executed another program, or changed ids or cgroup
	Gone      uint64 `json:"gone"`      // connections that ended after their process
	Inherited uint64 `json:"inherited"` // connections that became those of another process with their socket
	// Failures by source: processes of which it could not say who they are, and so refused.
	Failures map[string]uint64 `json:"failures"`
	// Why is by source the last reason it gave, or had, for having no evidence of a process.
	Why map[string]string `json:"why"`
	// Blind counts failures to see what became of processes; BlindWhy is the last.
	Blind    uint64 `json:"blind"`
	BlindWhy string `json:"blind_why,omitempty"`
}

type counts struct {
	changes, changed, gone, inherited atomic.Uint64

	mu       sync.Mutex
	failures map[string]uint64
	why      map[string]string
	unseen   uint64
	unwhy    string
}

func (c *counts) told(source string, why error) {
	if why == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.why[source] = why.Error()
}

func (c *counts) failed(source string, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.failures[source]++
	c.why[source] = err.Error()
}

func (c *counts) blind(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.unseen++
	c.unwhy = err.Error()
}

// State is what is known now.
func (a *Attestor) State() State {
	c := &a.counts
	s := State{Identified: map[string]int{}, Evidence: map[string]int{}, Changes: c.changes.Load(),
		Changed: c.changed.Load(), Gone: c.gone.Load(), Inherited: c.inherited.Load()}
	c.mu.Lock()
	s.Failures, s.Why, s.Blind, s.BlindWhy = maps.Clone(c.failures), maps.Clone(c.why), c.unseen, c.unwhy
	c.mu.Unlock()
	for _, source := range a.sources {
		s.Evidence[source.Name()] = 0
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	s.Processes, s.Lingering = len(a.all), a.lingering.Len()
	for _, r := range a.all {
		id := r.current.Load()
		s.Identified[id.Source]++
		for _, e := range id.Evidence {
			s.Evidence[e.Source]++
		}
	}
	return s
}
