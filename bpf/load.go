// Package bpf is the kernel side of the redirect: it sends broker-bound TCP connects to a listener of the node, and
// tells for each accepted connection which process connected, and where to.
package bpf

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/link"
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
}

// Programs are the loaded and attached programs. All methods may be called concurrently.
type Programs struct {
	objects redirectObjects
	links   []link.Link
	tasks   taskReader
}

// Load loads the programs and attaches them to a cgroup. Nothing is redirected until SetPorts. It needs what Linux
// 5.15 has, BTF, and root or CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON. Errors are ErrPrivilege, ErrKernel,
// ErrForeignProgram, or those of the file system for CgroupPath.
func Load(o Options) (*Programs, error) {
	clients, both, err := o.cgroups()
	if err != nil {
		return nil, explainCgroup(err)
	}
	defer func() { _, _ = clients.Close(), both.Close() }()

	// Only kernels before 5.11 need it, where it may fail without harm for us.
	_ = rlimit.RemoveMemlock()
	p := &Programs{}
	if err := loadRedirectObjects(&p.objects, nil); err != nil {
		return nil, explainLoad(err)
	}
	if err := p.attach(clients, both); err != nil {
		return nil, errors.Join(err, p.Close())
	}
	p.tasks = taskReader{program: p.objects.KlammTask, wanted: p.objects.KlammWantedPid}
	return p, nil
}

// cgroups opens the directory of the clients, and the deepest one that has the listeners below it too.
func (o Options) cgroups() (clients, both *os.File, err error) {
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

// attach puts connect last, so that no socket is redirected before the way behind it is complete.
func (p *Programs) attach(clients, both *os.File) error {
	for _, hook := range []struct {
		cgroup  *os.File
		attach  ebpf.AttachType
		program *ebpf.Program
	}{
		{both, ebpf.AttachCGroupSockOps, p.objects.KlammSockops},
		{clients, ebpf.AttachCGroupInet4PostBind, p.objects.KlammPostBind4},
		{clients, ebpf.AttachCGroupInet6PostBind, p.objects.KlammPostBind6},
		{clients, ebpf.AttachCgroupInet4GetPeername, p.objects.KlammGetpeername4},
		{clients, ebpf.AttachCgroupInet6GetPeername, p.objects.KlammGetpeername6},
		{clients, ebpf.AttachCGroupInet4Connect, p.objects.KlammConnect4},
		{clients, ebpf.AttachCGroupInet6Connect, p.objects.KlammConnect6},
	} {
		// A link and never the older BPF_PROG_ATTACH: programs by link always let others attach too.
		l, err := link.AttachRawLink(link.RawLinkOptions{
			Target: int(hook.cgroup.Fd()), Attach: hook.attach, Program: hook.program,
		})
		if err != nil {
			return explainAttach(hook.cgroup, hook.attach, err)
		}
		p.links = append(p.links, l)
	}
	return nil
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

// Close detaches and unloads the programs: from then on nothing is redirected or refused.
func (p *Programs) Close() error {
	var errs []error
	// Connect first: what is already redirected then still finds its way.
	for i := len(p.links) - 1; i >= 0; i-- {
		errs = append(errs, p.links[i].Close())
	}
	p.links = nil
	return errors.Join(append(errs, p.objects.Close())...)
}

// SetPorts replaces the set of broker ports: a connect to one of them, on any address, is broker-bound.
func (p *Programs) SetPorts(ports []uint16) error {
	var set redirectKlammPorts
	for _, port := range ports {
		set.Bits[port/64] |= 1 << (port % 64)
	}
	if err := p.objects.KlammPorts.Put(uint32(0), &set); err != nil {
		return fmt.Errorf("set the broker ports %v: %w", ports, err)
	}
	return nil
}

// Enrol names the listener of a network namespace, by the port on which it listens at 127.0.0.1 and ::1. cookie is
// SO_NETNS_COOKIE of any socket made in it. Broker-bound connects are refused in a namespace that is not enrolled.
func (p *Programs) Enrol(cookie uint64, port uint16) error {
	if err := p.objects.KlammEnrolled.Put(cookie, port); err != nil {
		return fmt.Errorf("enrol network namespace %d with port %d: %w", cookie, port, err)
	}
	return nil
}

// Unenrol undoes Enrol; it is no error if cookie is not enrolled.
func (p *Programs) Unenrol(cookie uint64) error {
	if err := p.objects.KlammEnrolled.Delete(cookie); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("take network namespace %d out of the redirect: %w", cookie, err)
	}
	return nil
}

// Exempt lets the processes in a cgroup and below it connect to brokers directly: meant for brokers on this host.
// cgroupID is the inode of the directory in cgroup2. A process is exempt by the cgroup in which it is when it connects.
// Cgroups deeper than 31 levels cannot be exempted.
func (p *Programs) Exempt(cgroupID uint64) error {
	if err := p.objects.KlammExempt.Put(cgroupID, uint8(1)); err != nil {
		return fmt.Errorf("exempt cgroup %d: %w", cgroupID, err)
	}
	return nil
}

// Unexempt undoes Exempt; it is no error if cgroupID is not exempt.
func (p *Programs) Unexempt(cgroupID uint64) error {
	if err := p.objects.KlammExempt.Delete(cgroupID); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("redirect cgroup %d again: %w", cgroupID, err)
	}
	return nil
}

// Down refuses connects to a destination in a network namespace for so long, as its host would where nobody listens:
// the node could not reach it.
func (p *Programs) Down(cookie uint64, to netip.AddrPort, d time.Duration) error {
	key := destination(cookie, to)
	until, err := sinceBoot()
	if err == nil {
		err = p.objects.KlammDown.Put(&key, until+uint64(d))
	}
	if err != nil {
		return fmt.Errorf("refuse connects to %s: %w", to, err)
	}
	return nil
}

// Forget removes what Down said, once its time is over.
func (p *Programs) Forget(cookie uint64, to netip.AddrPort) error {
	key := destination(cookie, to)
	var until uint64
	err := p.objects.KlammDown.Lookup(&key, &until)
	if err == nil {
		var now uint64
		if now, err = sinceBoot(); err == nil && now >= until {
			err = p.objects.KlammDown.Delete(&key)
		}
	}
	if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("forget that %s is down: %w", to, err)
	}
	return nil
}

func destination(cookie uint64, to netip.AddrPort) redirectKlammDestination {
	address := to.Addr().As16()
	key := redirectKlammDestination{NetnsCookie: cookie, Port: uint32(to.Port())}
	for i := range key.To.Word {
		key.To.Word[i] = binary.NativeEndian.Uint32(address[4*i:])
	}
	return key
}

// sinceBoot is bpf_ktime_get_boot_ns.
func sinceBoot() (uint64, error) {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &t); err != nil {
		return 0, fmt.Errorf("read the time since boot: %w", err)
	}
	return uint64(t.Nano()), nil
}

// Stamp marks a socket as the node's own: it may connect to brokers and bind the listener's port. Stamp before
// connect(2) or bind(2). Sockets accepted by a stamped listener are not stamped.
func (p *Programs) Stamp(fd int) error {
	if err := p.objects.KlammStamp.Put(int32(fd), uint8(1)); err != nil {
		return fmt.Errorf("stamp the socket: %w", err)
	}
	return nil
}

// Record returns who connected the accepted socket fd, and where to. ErrNoRecord and ErrRecordVersion are reasons to
// refuse it, as is any other error.
func (p *Programs) Record(fd int) (Record, error) {
	var r Record
	switch err := p.objects.KlammAccepted.Lookup(int32(fd), &r); {
	case errors.Is(err, ebpf.ErrKeyNotExist):
		return Record{}, ErrNoRecord
	case err != nil:
		return Record{}, fmt.Errorf("read the record of a socket: %w", err)
	case r.Version != recordVersion:
		return Record{}, fmt.Errorf("%w: it is %d, not %d", ErrRecordVersion, r.Version, recordVersion)
	}
	return r, nil
}

// Task returns what the process pid (a thread group id in the init pid namespace) is now; ErrNoTask if there is none.
func (p *Programs) Task(pid uint32) (TaskFacts, error) {
	return p.tasks.read(pid)
}
