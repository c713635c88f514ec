package bypass

import (
	"errors"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
)

// meter tells the node's connections to brokers from all others on the wire, without asking the node: the kernel notes
// the local port of every socket of the node's cgroup that sends to the brokers' port.
type meter struct{ ports *ebpf.Map }

// Offsets in struct __sk_buff of <linux/bpf.h>.
const (
	skbRemotePort = 132 // network byte order, in the upper half on little endian
	skbLocalPort  = 136 // host byte order
)

// newMeter measures a cgroup until the test ends.
func newMeter(t testing.TB, cgroup string) *meter {
	t.Helper()
	ports, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Hash, KeySize: 4, ValueSize: 4, MaxEntries: 65536})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ports.Close() })
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.CGroupSKB, AttachType: ebpf.AttachCGroupInetEgress, License: "Apache-2.0",
		Instructions: asm.Instructions{
			asm.LoadMem(asm.R7, asm.R1, skbRemotePort, asm.Word),
			asm.LoadMem(asm.R8, asm.R1, skbLocalPort, asm.Word),
			asm.HostTo(asm.BE, asm.R7, asm.Word),
			asm.JNE.Imm(asm.R7, brokerPort, "pass"),
			asm.StoreMem(asm.RFP, -4, asm.R8, asm.Word),
			asm.StoreMem(asm.RFP, -8, asm.R7, asm.Word),
			asm.LoadMapPtr(asm.R1, ports.FD()),
			asm.Mov.Reg(asm.R2, asm.RFP),
			asm.Add.Imm(asm.R2, -4),
			asm.Mov.Reg(asm.R3, asm.RFP),
			asm.Add.Imm(asm.R3, -8),
			asm.Mov.Imm(asm.R4, 0),
			asm.FnMapUpdateElem.Call(),
			asm.Mov.Imm(asm.R0, 1).WithSymbol("pass"),
			asm.Return(),
		},
	})
	if err != nil {
		t.Fatalf("load the meter: %v", err)
	}
	defer program.Close() // the link keeps it
	attached, err := link.AttachCgroup(link.CgroupOptions{
		Path: cgroup, Attach: ebpf.AttachCGroupInetEgress, Program: program,
	})
	if err != nil {
		t.Fatalf("attach the meter: %v", err)
	}
	t.Cleanup(func() { _ = attached.Close() })
	return &meter{ports}
}

// has tells whether a socket of the cgroup sent from this port.
func (m *meter) has(t testing.TB, port uint16) bool {
	t.Helper()
	var v uint32
	err := m.ports.Lookup(uint32(port), &v)
	if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		t.Fatal(err)
	}
	return err == nil
}
