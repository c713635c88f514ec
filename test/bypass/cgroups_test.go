package bypass

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// nestedCgroup is below that of the other attackers.
const nestedCgroup = podsCgroup + "/nested"

// cgroups: programs of the attacker's own in a cgroup of its own.
var cgroups = []vector{
	{name: "a nested cgroup", cgroup: nestedCgroup, want: intercepted, attack: to(broker4)},
	{name: "a nested cgroup whose program rewrites another destination to the broker", cgroup: nestedCgroup, as: podBPF,
		want: intercepted, attack: rewrites(0)},
	{name: "a nested cgroup whose program, attached with BPF_F_PREORDER, rewrites", cgroup: nestedCgroup, as: podBPF,
		want: intercepted, attack: rewrites(preorder)},
	{name: "a nested cgroup with a program attached the old way, without flags", cgroup: nestedCgroup, as: podBPF,
		want: intercepted, attack: attachesExclusively},
	{name: "a nested cgroup with a program at egress that lets all pass", cgroup: nestedCgroup, as: podBPF,
		want: refused, attack: letsPass},
	{name: "detaching the node's programs without CAP_SYS_ADMIN", as: podBPF, want: intercepted, attack: detaches},
}

const preorder = 1 << 6 // BPF_F_PREORDER, Linux 6.15

// Offsets in struct bpf_sock_addr of <linux/bpf.h>.
const (
	addrIP4  = 4
	addrPort = 24
)

// rewriter sends what goes to otherPort to the broker.
func rewriter() (*ebpf.Program, error) {
	ip := broker4.As4()
	return ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Connect,
		License: "Apache-2.0", Instructions: asm.Instructions{
			asm.LoadMem(asm.R2, asm.R1, addrPort, asm.Word),
			asm.JNE.Imm(asm.R2, int32(network16(otherPort)), "pass"),
			asm.Mov.Imm(asm.R2, int32(uint32(ip[0])|uint32(ip[1])<<8|uint32(ip[2])<<16|uint32(ip[3])<<24)),
			asm.StoreMem(asm.R1, addrIP4, asm.R2, asm.Word),
			asm.Mov.Imm(asm.R2, int32(network16(brokerPort))),
			asm.StoreMem(asm.R1, addrPort, asm.R2, asm.Word),
			asm.Mov.Imm(asm.R0, 1).WithSymbol("pass"),
			asm.Return(),
		}})
}

// passes lets everything pass.
func passes(kind ebpf.ProgramType, attach ebpf.AttachType) (*ebpf.Program, error) {
	return ebpf.NewProgram(&ebpf.ProgramSpec{Type: kind, AttachType: attach, License: "Apache-2.0",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()}})
}

func (a *attacker) nested() (fd int, err error) {
	return unix.Open(a.Cgroup+"/"+nestedCgroup, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
}

func rewrites(flags uint32) func(*attacker) error {
	return func(a *attacker) error {
		program, err := rewriter()
		if err != nil {
			return err
		}
		defer func() { _ = program.Close() }()
		cgroup, err := a.nested()
		if err != nil {
			return err
		}
		defer func() { _ = unix.Close(cgroup) }()
		l, err := link.AttachRawLink(link.RawLinkOptions{Target: cgroup, Program: program,
			Attach: ebpf.AttachCGroupInet4Connect, Flags: flags})
		if flags != 0 && errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("%w: BPF_F_PREORDER: %w", errUnsupported, err)
		}
		if err != nil {
			return err
		}
		defer func() { _ = l.Close() }()
		return a.plain(netip.AddrPortFrom(alias4, otherPort))
	}
}

func attachesExclusively(a *attacker) error {
	program, err := passes(ebpf.CGroupSockAddr, ebpf.AttachCGroupInet4Connect)
	if err != nil {
		return err
	}
	defer func() { _ = program.Close() }()
	cgroup, err := a.nested()
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(cgroup) }()
	err = link.RawAttachProgram(link.RawAttachProgramOptions{Target: cgroup, Program: program,
		Attach: ebpf.AttachCGroupInet4Connect})
	if err == nil {
		defer func() {
			_ = link.RawDetachProgram(link.RawDetachProgramOptions{Target: cgroup, Program: program,
				Attach: ebpf.AttachCGroupInet4Connect})
		}()
	}
	return a.plain(a.to) // refused where programs above allow others only beside them, which is as well
}

// letsPass has its own say at egress, where one that drops is enough.
func letsPass(a *attacker) error {
	program, err := passes(ebpf.CGroupSKB, ebpf.AttachCGroupInetEgress)
	if err != nil {
		return err
	}
	defer func() { _ = program.Close() }()
	l, err := link.AttachCgroup(link.CgroupOptions{Path: a.Cgroup + "/" + nestedCgroup,
		Attach: ebpf.AttachCGroupInetEgress, Program: program})
	if err != nil {
		return err
	}
	defer func() { _ = l.Close() }()
	return by(rawTCP)(a)
}

// detaches tries to take away what is attached to the world's cgroup: by link, and by program as was done before there
// were links.
func detaches(a *attacker) error {
	cgroup, err := unix.Open(a.Cgroup, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(cgroup) }()
	var s unix.Stat_t
	if err := unix.Fstat(cgroup, &s); err != nil {
		return err
	}
	detachLinks(s.Ino)
	own, err := passes(ebpf.CGroupSockAddr, ebpf.AttachCGroupInet4Connect)
	if err != nil {
		return err
	}
	defer func() { _ = own.Close() }()
	_ = link.RawDetachProgram(link.RawDetachProgramOptions{Target: cgroup, Program: own,
		Attach: ebpf.AttachCGroupInet4Connect})
	return a.plain(a.to)
}

// detachLinks detaches every link that it may have, of those at a cgroup.
func detachLinks(cgroup uint64) {
	all := new(link.Iterator)
	defer all.Close()
	for all.Next() {
		info, err := all.Link.Info()
		if err == nil && info.Cgroup() != nil && info.Cgroup().CgroupId == cgroup {
			_ = all.Link.Detach()
		}
	}
}
