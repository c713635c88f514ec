// Package bpf is the kernel side of the redirect: it sends broker-bound TCP connects to a listener of the node, and
// tells for each accepted connection which process connected, and where to.
package bpf

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/ringbuf"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"
)

var (
	// ErrNoRecord is returned for a socket that did not come by a redirected connect. Refuse it.
	ErrNoRecord = errors.New("the socket has no record of a redirected connect")
	// ErrRecordVersion is returned for a record that another version of the programs wrote. Refuse the socket.
	ErrRecordVersion = errors.New("the record was written by another version of the programs")
	// ErrNoTask is returned for a process that has ended.
	ErrNoTask = errors.New("no such process")
	// ErrPrivilege is returned by Load for a process that may not load or attach the programs.
	ErrPrivilege = errors.New("not permitted")
	// ErrKernel is returned by Load where the kernel lacks something the programs need.
	ErrKernel = errors.New("the kernel is not fit")
	// ErrRunning is returned by Load where another process uses the pins.
	ErrRunning = errors.New("another node is running")
	// ErrForeignProgram is returned by Load where somebody else's program occupies a hook of the cgroup exclusively.
	ErrForeignProgram = errors.New("another program holds the hook exclusively")
)

// Options for Load.
type Options struct {
	// CgroupPath is a directory of cgroup2. All sockets made by processes in it or below are subject to the redirect;
	// only its root leaves no way around.
	CgroupPath string
	// ListenerCgroup is the directory of cgroup2 in which the listeners are opened: that of the calling process. An
	// accepted socket belongs to the cgroup of its listener. Default: CgroupPath or anywhere below.
	ListenerCgroup string
	// Pins is a directory on a BPF file system that keeps programs and maps in force when the process ends, and from
	// which the next one takes them over. It is made if it is missing. Default: they end with the process.
	Pins string
	// Lock is the lock on Pins that another process handed over. Default: it is taken.
	Lock *os.File
	// Ports are brokers' ports from the first moment on; see SetDestinations.
	Ports []uint16
}

// Programs are the loaded and attached programs. All methods may be called concurrently.
type Programs struct {
	objects redirectObjects
	pins    *pins // nil without
	tasks   taskReader
	events  *ringbuf.Reader
	life    *life
	cgroups []*os.File

	mu     sync.Mutex // guards what follows
	hooks  []*hook
	config redirectKlammConfig
}

// places are where the programs belong, in the order in which they are attached: connect comes after all that its
// sockets need on their way, and after egress, which must know the stamps of whom it lets go.
var places = []struct {
	name      string // of the pin
	attach    ebpf.AttachType
	listeners bool // the cgroup must cover the listeners, too
	program   func(*redirectPrograms) *ebpf.Program
}{
	{"sockops", ebpf.AttachCGroupSockOps, true, func(p *redirectPrograms) *ebpf.Program { return p.KlammSockops }},
	{"post_bind4", ebpf.AttachCGroupInet4PostBind, false,
		func(p *redirectPrograms) *ebpf.Program { return p.KlammPostBind4 }},
	{"post_bind6", ebpf.AttachCGroupInet6PostBind, false,
		func(p *redirectPrograms) *ebpf.Program { return p.KlammPostBind6 }},
	{"getpeername4", ebpf.AttachCgroupInet4GetPeername, false,
		func(p *redirectPrograms) *ebpf.Program { return p.KlammGetpeername4 }},
	{"getpeername6", ebpf.AttachCgroupInet6GetPeername, false,
		func(p *redirectPrograms) *ebpf.Program { return p.KlammGetpeername6 }},
	{"egress", ebpf.AttachCGroupInetEgress, false, func(p *redirectPrograms) *ebpf.Program { return p.KlammEgress }},
	{"connect4", ebpf.AttachCGroupInet4Connect, false, func(p *redirectPrograms) *ebpf.Program { return p.KlammConnect4 }},
	{"connect6", ebpf.AttachCGroupInet6Connect, false, func(p *redirectPrograms) *ebpf.Program { return p.KlammConnect6 }},
	{"sock_create", ebpf.AttachCGroupInetSockCreate, false,
		func(p *redirectPrograms) *ebpf.Program { return p.KlammSockCreate }},
}

// hook is a program at its place.
type hook struct {
	name    string // of its pin
	cgroup  *os.File
	id      uint64 // of cgroup
	attach  ebpf.AttachType
	program *ebpf.Program
	link    link.Link
}

// Load loads the programs and attaches them to a cgroup, or puts them in the place of those that are pinned there. It
// needs what Linux 5.15 has, BTF, and root or CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON. Errors are ErrPrivilege,
// ErrKernel, ErrForeignProgram, ErrRunning, or those of the file system for CgroupPath and Pins.
func Load(o Options) (_ *Programs, err error) {
	p := &Programs{}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.Close())
		}
	}()
	clients, both, err := o.openCgroups()
	if err != nil {
		return nil, explainCgroup(err)
	}
	p.cgroups = []*os.File{clients, both}
	spec, err := loadRedirect()
	if err != nil {
		return nil, explainLoad(err)
	}
	if p.pins, err = openPins(o.Pins, o.Lock, spec); err != nil {
		return nil, err
	}
	kept, err := p.pins.maps(spec)
	if err != nil {
		return nil, err
	}
	// Only kernels before 5.11 need it, where it may fail without harm for us.
	_ = rlimit.RemoveMemlock()
	err = spec.LoadAndAssign(&p.objects, &ebpf.CollectionOptions{MapReplacements: kept})
	for _, m := range kept {
		_ = m.Close() // the collection has descriptors of its own
	}
	if err != nil {
		return nil, explainLoad(err)
	}
	if err := p.prepare(o.Ports); err != nil {
		return nil, err
	}
	if err := p.attach(clients, both); err != nil {
		return nil, err
	}
	return p, p.pins.commit(p)
}

// prepare sets what must be in the maps before a program runs.
func (p *Programs) prepare(ports []uint16) (err error) {
	p.tasks = taskReader{program: p.objects.KlammTask, wanted: p.objects.KlammWantedPid}
	if p.events, err = ringbuf.NewReader(p.objects.KlammEvents); err != nil {
		return fmt.Errorf("read the events of the eBPF programs: %w", err)
	}
	if p.life, err = newLife(&p.objects); err != nil {
		return err
	}
	if err := p.objects.KlammConfig.Lookup(uint32(0), &p.config); err != nil {
		return fmt.Errorf("read what is configured in the kernel: %w", err)
	}
	before, err := p.pins.ports(p.objects.KlammPorts)
	if err != nil {
		return err
	}
	return p.addPorts(append(before, ports...))
}

// openCgroups opens the directory of the clients, and the deepest one that has the listeners below it too.
func (o Options) openCgroups() (clients, both *os.File, err error) {
	path, err := filepath.EvalSymlinks(o.CgroupPath)
	if err != nil {
		return nil, nil, err
	}
	above := path
	if o.ListenerCgroup != "" {
		listeners, err := filepath.EvalSymlinks(o.ListenerCgroup)
		if err != nil {
			return nil, nil, err
		}
		for !isBelow(listeners, above) {
			above = filepath.Dir(above)
		}
	}
	if clients, err = os.Open(path); err != nil {
		return nil, nil, err
	}
	if both, err = os.Open(above); err != nil {
		return nil, nil, errors.Join(err, clients.Close())
	}
	return clients, both, nil
}

func isBelow(path, above string) bool {
	relative, err := filepath.Rel(above, path)
	return err == nil && filepath.IsLocal(relative)
}

// attach puts each program to its place, into the link that is pinned there or a new one.
func (p *Programs) attach(clients, both *os.File) error {
	for _, place := range places {
		h := &hook{name: place.name, cgroup: clients, attach: place.attach,
			program: place.program(&p.objects.redirectPrograms)}
		if place.listeners {
			h.cgroup = both
		}
		p.hooks = append(p.hooks, h)
	}
	for _, h := range p.hooks {
		var s unix.Stat_t
		if err := unix.Fstat(int(h.cgroup.Fd()), &s); err != nil {
			return explainCgroup(err)
		}
		h.id = s.Ino
		if h.link = p.pins.link(h); h.link != nil {
			if err := h.link.Update(h.program); err != nil {
				return fmt.Errorf("put a new program at %s of %s: %w", h.name, h.cgroup.Name(), err)
			}
			continue
		}
		if err := h.reattach(); err != nil {
			return err
		}
	}
	return nil
}

// reattach makes a new link; never the older BPF_PROG_ATTACH: programs by link always let others attach too.
func (h *hook) reattach() error {
	l, err := link.AttachCgroup(link.CgroupOptions{Path: h.cgroup.Name(), Attach: h.attach, Program: h.program})
	if err != nil {
		return explainAttach(h.cgroup, h.attach, err)
	}
	h.link = l
	return nil
}

// holds tells whether the link still attaches to the hook's cgroup: whoever is root on the host may sever it.
func (h *hook) holds(l link.Link) bool {
	info, err := l.Info()
	return err == nil && info.Cgroup() != nil && info.Cgroup().CgroupId == h.id
}

// Repair attaches again what was severed, and pins again what was unpinned. It returns the names of the hooks at which
// something was wrong: somebody with root's rights wants them away.
func (p *Programs) Repair() (wrong []string, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var errs []error
	for _, h := range p.hooks {
		severed := !h.holds(h.link)
		if !severed && p.pins.has(h) {
			continue
		}
		wrong = append(wrong, h.name)
		if severed {
			old := h.link
			if err := h.reattach(); err != nil {
				errs = append(errs, err)
				continue
			}
			_ = old.Close() // it attaches nothing any more
		}
		errs = append(errs, p.pins.keep(h))
	}
	return wrong, errors.Join(errs...)
}

func explainCgroup(err error) error {
	if errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("attach to the cgroup: %w: run as root: %w", ErrPrivilege, err)
	}
	return fmt.Errorf("attach to the cgroup: %w", err)
}

// explainLoad turns the kernel's answer into what the user can do about it.
func explainLoad(err error) error {
	switch {
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("load the eBPF programs: %w: run as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON"+
			" (and not under lockdown=confidentiality): %w", ErrPrivilege, err)
	case !haveBTF():
		return fmt.Errorf("load the eBPF programs: %w: it has no BTF (/sys/kernel/btf/vmlinux): use one built with"+
			" CONFIG_DEBUG_INFO_BTF=y: %w", ErrKernel, err)
	case errors.Is(features.HaveProgramHelper(ebpf.SockOps, asm.FnGetNetnsCookie), ebpf.ErrNotSupported):
		return fmt.Errorf("load the eBPF programs: %w: it is older than 5.15: %w", ErrKernel, err)
	}
	return fmt.Errorf("load the eBPF programs: %w: %w", ErrKernel, err)
}

func haveBTF() bool {
	_, err := btf.LoadKernelSpec()
	return err == nil
}

// explainAttach: the kernel says EPERM both for want of privilege and where a program was attached without
// BPF_F_ALLOW_MULTI, to this cgroup or one above.
func explainAttach(cgroup *os.File, hook ebpf.AttachType, err error) error {
	what := fmt.Sprintf("attach %v to %s", hook, cgroup.Name())
	if !errors.Is(err, unix.EPERM) {
		return fmt.Errorf("%s: %w (is it a directory of cgroup2?)", what, err)
	}
	if others := attached(cgroup, hook); len(others) > 0 {
		return fmt.Errorf("%s: %w: %s: detach it, or have its owner attach it with BPF_F_ALLOW_MULTI: %w",
			what, ErrForeignProgram, strings.Join(others, ", "), err)
	}
	return fmt.Errorf("%s: %w: run as root, or with CAP_NET_ADMIN: %w", what, ErrPrivilege, err)
}

// attached names the programs that run at a hook of a cgroup, those of the cgroups above included.
func attached(cgroup *os.File, hook ebpf.AttachType) []string {
	const effective = 1 // BPF_F_QUERY_EFFECTIVE
	found, err := link.QueryPrograms(link.QueryOptions{Target: int(cgroup.Fd()), Attach: hook, QueryFlags: effective})
	if err != nil {
		return nil
	}
	var names []string
	for _, other := range found.Programs {
		names = append(names, fmt.Sprintf("program %d%s", other.ID, programName(other.ID)))
	}
	return names
}

func programName(id ebpf.ProgramID) string {
	program, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return ""
	}
	defer func() { _ = program.Close() }()
	info, err := program.Info()
	if err != nil {
		return ""
	}
	return " (" + info.Name + ")"
}
