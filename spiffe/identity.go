// Package spiffe tells who the process behind a connection is.
package spiffe

import (
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Identity is who is on the other end of a connection, as far as evidence goes. The zero value is "unidentified":
// policy decides what that may do (by default nothing).
type Identity struct {
	ID      spiffeid.ID    // zero when no source knows the workload
	Source  string         // which source gave ID: "static"
	Rule    string         // the attestation rule that matched, for the audit
	Claims  map[string]any // OIDC claims; nil without OIDC evidence
	Process Process
}

// Process is the verified process that called connect(2).
type Process struct {
	PID       uint32 // thread group id in the init pid namespace
	UID, GID  uint32 // real ids in the init user namespace, at connect
	Exe       string // path as the process' own mount namespace names it
	ExeSHA256 string // hex; empty when no rule asked for it
	Comm      string // comm of the thread group leader, at connect
	Cgroup    string // cgroup2 path, "/" is the root
	Unit      string // systemd unit taken from the cgroup path; empty when there is none
	Started   time.Time

	ContainerID string // of the container runtime, taken from the cgroup path; empty outside of containers
	PodUID      string // of kubelet, taken from the cgroup path; empty outside of pods
	// What the container runtime calls them; empty where it does not know PodUID, or none was asked.
	Namespace, Pod, Container string
}

// Peer is what the kernel recorded about the process in connect(2), in its own context and so without a race.
type Peer struct {
	TGID          uint32
	UID, GID      uint32
	StartBoottime uint64 // ns since boot, task->group_leader->start_boottime
	ExecID        uint64 // task->self_exec_id: changes with every execve
	PidInode      uint64 // pidfs inode, unique per boot (Linux 6.9+); 0 when the kernel has none
	ExeInode      uint64
	ExeDev        uint32 // kernel encoding of s_dev; never comparable with stat(2) on overlayfs
	CgroupID      uint64
	Comm          string
}
