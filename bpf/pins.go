package bpf

import (
	"cmp"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Pins are laid out so that a crash at any point leaves either generation in force:
//
//	DIR/GENERATION/maps/NAME, DIR/GENERATION/links/HOOK
//
// A generation is one layout of the maps. A node of the same generation takes the maps over and puts its programs into
// the links (BPF_LINK_UPDATE swaps atomically). A node of another builds its directory aside, puts its programs, with
// new maps, into the same links, and moves its directory into place before it removes the old one.
type pins struct {
	dir        string
	lock       *os.File // of dir, by flock(2)
	generation string
	fresh      bool // the generation is not pinned yet
}

// layoutVersion goes up when the meaning of a map changes and its sizes do not.
const layoutVersion = 1

// openPins locks the directory; without one there are no pins, which is a nil *pins.
func openPins(dir string, lock *os.File, spec *ebpf.CollectionSpec) (*pins, error) {
	if dir == "" {
		return nil, nil
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make a directory for the pins: %w", err)
	}
	p := &pins{dir: dir, lock: lock, generation: generation(spec)}
	if p.lock == nil {
		var err error
		if p.lock, err = lockPins(dir); err != nil {
			return nil, err
		}
	}
	_, err := os.Stat(p.path())
	p.fresh = err != nil
	return p, nil
}

func lockPins(dir string) (*os.File, error) {
	lock, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("open the directory of the pins: %w", err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = lock.Close()
		return nil, fmt.Errorf("lock the pins at %s: %w: stop it first, or replace it with klamm node --replace: %w", dir,
			ErrRunning, err)
	}
	return lock, nil
}

// generation names the layout of the maps that are pinned.
func generation(spec *ebpf.CollectionSpec) string {
	h := sha256.New()
	fmt.Fprintln(h, layoutVersion, recordVersion)
	for _, name := range pinned(spec) {
		m := spec.Maps[name]
		fmt.Fprintln(h, name, m.Type, m.KeySize, m.ValueSize, m.MaxEntries, m.Flags)
	}
	return fmt.Sprintf("v%d-%x", layoutVersion, h.Sum(nil)[:4])
}

// own are the maps that end with the process, beside the programs' variables.
var own = []string{redirectMapKlammExecuted, redirectMapKlammSought, redirectMapKlammWatched}

// pinned are the names of the maps that outlive the process.
func pinned(spec *ebpf.CollectionSpec) []string {
	names := slices.Sorted(maps.Keys(spec.Maps))
	return slices.DeleteFunc(names, func(name string) bool {
		return strings.HasPrefix(name, ".") || slices.Contains(own, name)
	})
}

func (p *pins) path(below ...string) string {
	return filepath.Join(append([]string{p.dir, p.generation}, below...)...)
}

// maps are those of the same generation.
func (p *pins) maps(spec *ebpf.CollectionSpec) (map[string]*ebpf.Map, error) {
	if p == nil || p.fresh {
		return nil, nil
	}
	kept := map[string]*ebpf.Map{}
	for _, name := range pinned(spec) {
		m, err := ebpf.LoadPinnedMap(p.path("maps", name), nil)
		switch {
		case errors.Is(err, fs.ErrNotExist): // somebody removed it
		case err != nil:
			return nil, fmt.Errorf("take over a pinned map: %w", err)
		default:
			kept[name] = m
		}
	}
	return kept, nil
}

// ports are those that the pinned programs of any generation intercept; now is the map of this one.
func (p *pins) ports(now *ebpf.Map) ([]uint16, error) {
	ports, err := readPorts(now)
	if p == nil || !p.fresh || err != nil {
		return ports, err
	}
	for _, g := range p.others() {
		m, err := ebpf.LoadPinnedMap(filepath.Join(p.dir, g, "maps", "klamm_ports"), nil)
		if err != nil {
			continue // not a whole generation
		}
		before, err := readPorts(m)
		if err := cmp.Or(err, m.Close()); err != nil {
			return nil, err
		}
		ports = append(ports, before...)
	}
	return ports, nil
}

// others are the other generations.
func (p *pins) others() (names []string) {
	entries, _ := os.ReadDir(p.dir) // what cannot be read is not there
	for _, e := range entries {
		if e.Name() != p.generation {
			names = append(names, e.Name())
		}
	}
	return names
}

// link is the pinned link of a hook, this generation's or another's, nil where there is none that holds.
func (p *pins) link(h *hook) link.Link {
	if p == nil {
		return nil
	}
	for _, g := range append([]string{p.generation}, p.others()...) {
		l, err := link.LoadPinnedLink(filepath.Join(p.dir, g, "links", h.name), nil)
		if err != nil {
			continue
		}
		if h.holds(l) {
			return l
		}
		_ = l.Close()
	}
	return nil
}

// commit pins what is not pinned yet, and removes other generations.
func (p *pins) commit(programs *Programs) error {
	if p == nil {
		return nil
	}
	aside := *p
	if p.fresh {
		aside.generation = p.generation + "-new" // no dots: the BPF file system keeps them for itself
		_ = os.RemoveAll(aside.path())           // left by a crash
	}
	for _, dir := range []string{"maps", "links"} {
		if err := os.MkdirAll(aside.path(dir), 0o700); err != nil {
			return fmt.Errorf("make a directory for the pins: is %s on a BPF file system? %w", p.dir, err)
		}
	}
	for name, m := range programs.objects.pinned() {
		if err := pin(m, aside.path("maps", name)); err != nil {
			return err
		}
	}
	for _, h := range programs.hooks {
		if err := aside.keep(h); err != nil {
			return err
		}
	}
	if p.fresh {
		if err := os.Rename(aside.path(), p.path()); err != nil {
			return fmt.Errorf("put the pins into place: %w", err)
		}
		p.fresh = false
	}
	for _, g := range p.others() {
		if err := os.RemoveAll(filepath.Join(p.dir, g)); err != nil {
			return fmt.Errorf("remove the pins of another version: %w", err)
		}
	}
	return nil
}

// pinned are the maps that outlive the process, by name.
func (o *redirectObjects) pinned() map[string]*ebpf.Map {
	return map[string]*ebpf.Map{
		"klamm_accepted":  o.KlammAccepted,
		"klamm_client":    o.KlammClient,
		"klamm_config":    o.KlammConfig,
		"klamm_counters":  o.KlammCounters,
		"klamm_down":      o.KlammDown,
		"klamm_enrolled":  o.KlammEnrolled,
		"klamm_events":    o.KlammEvents,
		"klamm_exempt":    o.KlammExempt,
		"klamm_handshake": o.KlammHandshake,
		"klamm_networks":  o.KlammNetworks,
		"klamm_ports":     o.KlammPorts,
		"klamm_stamp":     o.KlammStamp,
		"klamm_told":      o.KlammTold,
	}
}

func pin(m *ebpf.Map, path string) error {
	if _, err := os.Stat(path); err == nil {
		return nil // it is the one that was taken over
	}
	// The system call itself: Map.Pin would move the pin it knows of.
	clone, err := m.Clone()
	if err == nil {
		err = cmp.Or(clone.Pin(path), clone.Close())
	}
	if err != nil {
		return fmt.Errorf("pin a map at %s: %w", path, err)
	}
	return nil
}

func (p *pins) has(h *hook) bool {
	if p == nil {
		return true
	}
	_, err := os.Stat(p.path("links", h.name))
	return err == nil
}

// keep pins a hook's link, in the place of one that is severed.
func (p *pins) keep(h *hook) error {
	if p == nil {
		return nil
	}
	path := p.path("links", h.name)
	if l, err := link.LoadPinnedLink(path, nil); err == nil {
		holds := h.holds(l)
		_ = l.Close()
		if holds {
			return nil
		}
		if err := os.Remove(path); err != nil {
			return fmt.Errorf("remove the pin of a severed link: %w", err)
		}
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("make a directory for the pins: %w", err)
	}
	if err := h.link.Pin(path); err != nil {
		return fmt.Errorf("pin the link of %s at %s: %w", h.name, path, err)
	}
	return nil
}

func (p *pins) close() error {
	if p == nil {
		return nil
	}
	return p.lock.Close()
}

// Lock is the lock on the pins, to be handed over; nil without pins.
func (p *Programs) Lock() *os.File {
	if p.pins == nil {
		return nil
	}
	return p.pins.lock
}

// Uninstall removes the pins, and with them the programs: from then on nothing is redirected or refused. It is no error
// if there are none; ErrRunning while a node uses them.
func Uninstall(dir string) error {
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	lock, err := lockPins(dir)
	if err != nil {
		return err
	}
	defer func() { _ = lock.Close() }()
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove the pins: %w", err)
	}
	return nil
}
