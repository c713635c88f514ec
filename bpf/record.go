package bpf

import (
	"bytes"
	"net/netip"
	"unsafe"
)

// recordVersion is KLAMM_RECORD_VERSION of record.h: the layout this build of the node can read.
const recordVersion = 1

// A changed record.h does not compile until the Go side follows.
var (
	_ [unsafe.Sizeof(redirectKlammRecord{})]byte      = [unsafe.Sizeof(Record{})]byte{}
	_ [unsafe.Sizeof(redirectKlammRecord{}.Task)]byte = [unsafe.Sizeof(TaskFacts{})]byte{}
	_ [unsafe.Sizeof(redirectKlammEvent{})]byte       = [unsafe.Sizeof(Event{})]byte{}
)

// Comm is the kernel's short name of a task: at most 15 bytes and a NUL. A process chooses its own.
type Comm [16]byte

// String returns the name up to its NUL.
func (c Comm) String() string {
	name, _, _ := bytes.Cut(c[:], []byte{0})
	return string(name)
}

// TaskFacts is a process as the kernel knows it (struct klamm_task of record.h).
type TaskFacts struct {
	StartBoottime uint64 // ns since boot, of the thread group leader
	ExecID        uint64 // task->self_exec_id: grows with every execve
	PidInode      uint64 // inode of its pidfs file, never used twice in a boot; 0 before Linux 6.9
	ExeInode      uint64 // of the file it executes; 0 for a process that has ended
	CgroupID      uint64 // in cgroup2: the inode of its directory
	ExeDev        uint32 // s_dev in the kernel's encoding: on overlayfs not what stat(2) says
	TGID          uint32 // in the init pid namespace
	UID, GID      uint32 // real ids in the init user namespace
	Comm          Comm   // of the thread group leader
}

// SameProgram tells whether t and u are the same process executing the same program: not another one that got its pid,
// and not itself after execve(2) or prctl(PR_SET_MM_EXE_FILE). Ids and cgroup may change in between and are not
// compared.
func (t TaskFacts) SameProgram(u TaskFacts) bool {
	return t.TGID == u.TGID && t.StartBoottime == u.StartBoottime && t.PidInode == u.PidInode &&
		t.ExecID == u.ExecID && t.ExeInode == u.ExeInode && t.ExeDev == u.ExeDev
}

// Record is one redirected connect(2): who called it, from where, and where it wanted to go. Written by the kernel in
// the caller's own context, so there is no moment at which it could be about somebody else (struct klamm_record of
// record.h).
type Record struct {
	Version      uint32
	NetnsInum    uint32 // inode of the caller's /proc/self/ns/net
	NetnsCookie  uint64 // SO_NETNS_COOKIE of the client's socket
	ClientCookie uint64 // SO_COOKIE of the client's socket
	ConnectTime  uint64 // ns since boot
	TaskFacts           // UID, GID and CgroupID are those of the connecting thread
	DAddr        [16]byte
	DPort        uint16
	Family       uint16 // of the client's socket: AF_INET or AF_INET6
	Protocol     uint32 // of the client's socket; an MPTCP socket connects by a subflow, which is TCP
	TID          uint32 // the connecting thread, in the init pid namespace; may be a worker of io_uring
	Ifindex      uint32 // what SO_BINDTODEVICE had bound the client's socket to; 0 for nothing
	ThreadComm   Comm
}

// Destination is the address the client asked for. An IPv4 address is plain, however the client wrote it, and an
// unspecified one is loopback, as Linux takes it.
func (r Record) Destination() netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom16(r.DAddr).Unmap(), r.DPort)
}

// Event is something the kernel did or refused that the node acts on or puts on record (struct klamm_event of
// record.h). Of the same reason in the same network namespace there is one in 50 ms; the counters have all.
type Event struct {
	NetnsCookie uint64 // 0 for a dropped packet
	CgroupID    uint64 // of the socket for a dropped packet, of the process otherwise
	reason      uint32
	TGID, TID   uint32 // as in Record; 0 for a dropped packet
	UID         uint32
	DAddr       [16]byte
	DPort       uint32
	_           uint32
	Comm        Comm // of the thread
}

// Unenrolled tells whether it happened in a network namespace in which nobody listens.
func (e Event) Unenrolled() bool {
	switch redirectKlammReason(e.reason) {
	case redirectKlammReasonKLAMM_REASONS, redirectKlammReasonKLAMM_REFUSED_NOT_ENROLLED,
		redirectKlammReasonKLAMM_PASSED_NOT_ENROLLED:
		return true
	}
	return false
}

// Reason is the name of the counter that counts it; "" for a socket made where nobody listens yet, which is counted
// nowhere.
func (e Event) Reason() string {
	if int(e.reason) < len(counterNames) {
		return counterNames[e.reason]
	}
	return ""
}

// Destination is where the connect or the packet was going.
func (e Event) Destination() netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom16(e.DAddr).Unmap(), uint16(e.DPort))
}

// parseEvent copies an event out of the ring; false for one of another length, which another version wrote.
func parseEvent(b []byte) (e Event, ok bool) {
	if len(b) != int(unsafe.Sizeof(e)) {
		return e, false
	}
	//nolint:gosec // of the same length, and without pointers
	copy(unsafe.Slice((*byte)(unsafe.Pointer(&e)), len(b)), b)
	return e, true
}
