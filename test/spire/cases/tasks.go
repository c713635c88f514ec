package cases

import (
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"klamm/spiffe"
)

// tasks tells facts of processes from /proc, in place of the BPF program. It has no exec id to read: the executable's
// inode stands in for it.
type tasks struct{}

// Task is of the process that has the pid now.
func (tasks) Task(pid uint32) (f spiffe.TaskFacts, err error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return f, unix.ESRCH
	}
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+2:]))
	if fields[0] == "Z" {
		return f, unix.ESRCH
	}
	var exe, proc, pidfs unix.Stat_t
	if unix.Stat(fmt.Sprintf("/proc/%d/exe", pid), &exe) != nil || unix.Stat(fmt.Sprintf("/proc/%d", pid), &proc) != nil {
		return f, unix.ESRCH
	}
	fd, err := unix.PidfdOpen(int(pid), 0)
	if err != nil {
		return f, err
	}
	defer func() { _ = unix.Close(fd) }()
	if err := unix.Fstat(fd, &pidfs); err != nil {
		return f, err
	}
	var ticks uint64
	if _, err := fmt.Sscan(fields[19], &ticks); err != nil {
		return f, err
	}
	return spiffe.TaskFacts{StartBoottime: ticks * 1e7, ExecID: exe.Ino, PidInode: pidfs.Ino, ExeInode: exe.Ino,
		ExeDev: uint32(exe.Dev), UID: proc.Uid, GID: proc.Gid, CgroupID: 1}, nil
}

// peerOf is what connect(2) would record of a process now.
func peerOf(pid int) (spiffe.Peer, error) {
	f, err := tasks{}.Task(uint32(pid))
	return spiffe.Peer{TGID: uint32(pid), UID: f.UID, GID: f.GID, StartBoottime: f.StartBoottime, ExecID: f.ExecID,
		PidInode: f.PidInode, ExeInode: f.ExeInode, ExeDev: f.ExeDev, CgroupID: f.CgroupID, Comm: "test"}, err
}
