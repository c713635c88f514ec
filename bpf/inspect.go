package bpf

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// Inspection is what is in force in the kernel.
type Inspection struct {
	Hooks     []HookState       `json:"hooks"`
	Up        bool              `json:"enforcer_up"` // its heartbeat is not over
	FailModes FailModes         `json:"fail_modes"`
	Cut       bool              `json:"cut_established"`
	Ports     []uint16          `json:"ports"` // of brokers at any address
	Enrolled  map[uint64]uint16 `json:"-"`     // listeners' ports by network namespace cookie
	Exempt    map[uint64]uint64 `json:"-"`     // connects by cgroup id
	Counters  map[string]uint64 `json:"-"`     // see Counters
	// Why an execve is noticed by a look every second instead of at once; empty where it is at once.
	Unnoticed string `json:"exec_unnoticed,omitempty"`
}

// HookState tells whether a program is attached where it should be.
type HookState struct {
	Name     string `json:"name"`
	Attached bool   `json:"attached"`
}

// Attached tells whether all hooks are.
func (i Inspection) Attached() bool {
	return len(i.Hooks) > 0 && !slices.ContainsFunc(i.Hooks, func(h HookState) bool { return !h.Attached })
}

// Inspect looks at the programs that this process runs.
func (p *Programs) Inspect() (Inspection, error) {
	i, err := p.inspect()
	if p.life.unattached != nil {
		i.Unnoticed = p.life.unattached.Error()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, h := range p.hooks {
		i.Hooks = append(i.Hooks, HookState{h.name, h.holds(h.link)})
	}
	return i, err
}

func (p *Programs) inspect() (i Inspection, err error) {
	var c redirectKlammConfig
	if err = p.objects.KlammConfig.Lookup(uint32(0), &c); err != nil {
		return i, fmt.Errorf("read what is configured in the kernel: %w", err)
	}
	i.FailModes = FailModes{c.PassDown != 0, c.PassUnenrolled != 0}
	i.Cut = c.CutEstablished != 0
	var errs [5]error
	i.Up, errs[0] = p.Up()
	i.Ports, errs[1] = p.Ports()
	i.Enrolled, errs[2] = p.Enrolled()
	i.Exempt, errs[3] = p.Exempted()
	i.Counters, errs[4] = p.Counters()
	return i, errors.Join(errs[:]...)
}

// Inspect looks at what is pinned in a directory, whether a process uses it or not; fs.ErrNotExist where nothing is.
func Inspect(dir string) (i Inspection, err error) {
	spec, err := loadRedirect()
	if err != nil {
		return i, err
	}
	pins := &pins{dir: dir, generation: generation(spec)}
	if _, err := os.Stat(pins.path()); errors.Is(err, fs.ErrNotExist) {
		if others := pins.others(); len(others) > 0 {
			return i, fmt.Errorf("the pins at %s are of another version of klamm: %v", dir, others)
		}
		return i, fmt.Errorf("nothing is pinned at %s: %w", dir, fs.ErrNotExist)
	}
	kept, err := pins.maps(spec)
	if err != nil {
		return i, err
	}
	p := &Programs{}
	p.objects.redirectMaps = redirectMaps{KlammConfig: kept["klamm_config"], KlammPorts: kept["klamm_ports"],
		KlammEnrolled: kept["klamm_enrolled"], KlammExempt: kept["klamm_exempt"], KlammCounters: kept["klamm_counters"]}
	defer func() {
		for _, m := range kept {
			err = cmp.Or(err, m.Close())
		}
	}()
	for _, m := range []*ebpf.Map{p.objects.KlammConfig, p.objects.KlammPorts, p.objects.KlammEnrolled,
		p.objects.KlammExempt, p.objects.KlammCounters} {
		if m == nil {
			return i, fmt.Errorf("a map is missing at %s: start the node, or klamm uninstall", dir)
		}
	}
	if i, err = p.inspect(); err != nil {
		return i, err
	}
	for _, place := range places {
		i.Hooks = append(i.Hooks, HookState{place.name, attaches(pins.path("links", place.name))})
	}
	return i, nil
}

// attaches tells whether a pinned link still attaches its program anywhere.
func attaches(path string) bool {
	l, err := link.LoadPinnedLink(path, nil)
	if err != nil {
		return false
	}
	defer func() { _ = l.Close() }()
	info, err := l.Info()
	return err == nil && info.Cgroup() != nil && info.Cgroup().CgroupId != 0
}
