package node

import (
	"context"
	"io/fs"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/rs/zerolog"
)

// exemptRefresh is how long a unit that was restarted, and so has a new cgroup, is redirected like any other process.
const exemptRefresh = time.Second

// exemptions keeps the exempt cgroups in the kernel as they come and go.
type exemptions struct {
	redirect *Redirect
	root     string // where cgroup2 is mounted
	log      zerolog.Logger
	wanted   []Exemption

	mu  sync.Mutex
	ids []uint64 // of wanted, as the kernel knows them; 0 for none
}

// follow refreshes until ctx ends. A failure is told and tried again; until then the processes are redirected.
func (e *exemptions) follow(ctx context.Context) {
	tick := time.NewTicker(exemptRefresh)
	defer tick.Stop()
	for {
		if err := e.refresh(); err != nil {
			e.log.Error().Err(err).Msg("exempting a cgroup from the redirect")
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

func (e *exemptions) refresh() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	for i, w := range e.wanted {
		id := w.cgroup(e.root)
		if id == e.ids[i] {
			continue
		}
		if old := e.ids[i]; old != 0 {
			if err := e.redirect.programs.Unexempt(old); err != nil {
				return err
			}
			e.ids[i] = 0
		}
		if id == 0 {
			continue
		}
		if err := e.redirect.programs.Exempt(id); err != nil {
			return err
		}
		e.ids[i] = id
	}
	return nil
}

// cgroup is the id of the exempt cgroup, 0 while there is none.
func (e *Exemption) cgroup(root string) uint64 {
	path := filepath.Join(root, e.Cgroup)
	if e.Unit != "" {
		path = findUnit(root, e.Unit)
	}
	id, err := cgroupID(path)
	if err != nil {
		return 0
	}
	return id
}

// findUnit is the cgroup of a unit of the system manager: a directory of its name, below slices only. A user's own
// manager is a service, and what it calls its units does not count.
func findUnit(root, unit string) (found string) {
	// What cannot be read has ended, as a cgroup may at any time.
	_ = filepath.WalkDir(root, func(path string, d fs.DirEntry, unreadable error) error {
		switch {
		case unreadable != nil, path == root, !d.IsDir():
			return nil //nolint:nilerr // as said above
		case d.Name() == unit:
			found = path
			return fs.SkipAll
		case !strings.HasSuffix(d.Name(), ".slice"):
			return fs.SkipDir
		}
		return nil
	})
	return found
}
