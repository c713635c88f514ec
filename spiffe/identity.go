// Package spiffe tells who the process behind a connection is.
package spiffe

import (
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// Identity is who is on the other end of a connection at one moment, as far as evidence goes. Immutable. The zero value
// is "unidentified": policy decides what that may do (by default nothing).
type Identity struct {
	// What rules name: of the first evidence, in the configured order of the sources, that has it.
	ID     spiffeid.ID    // zero when no source knows the workload
	Source string         // which source gave ID
	Rule   string         // the attestation rule that matched, for the audit
	Claims map[string]any // OIDC claims; nil without OIDC evidence

	Evidence []Evidence // all there is, in the configured order of the sources
	Process  Process
	// Lost says why nobody is behind the connection any more: the process exited, or executed another program. No
	// right is left then, whatever the evidence was.
	Lost error
}

// The sources of evidence.
const (
	SourceStatic     = "static"     // rules of klamm.yaml
	SourceSPIRE      = "spire"      // X509-SVID of the SPIRE agent, by pid
	SourceKubernetes = "kubernetes" // projected service account token
	SourceTokenFile  = "token-file" // OIDC token in a file of the workload
	SourceSASL       = "sasl"       // SASL/OAUTHBEARER token the broker accepted
	SourceTLS        = "tls"        // client certificate
)

// Evidence is what one source says of a workload.
type Evidence struct {
	Source  string
	ID      spiffeid.ID    // zero where the source knows no SPIFFE ID
	Rule    string         // of SourceStatic
	Issuer  string         // of a token or certificate
	Subject string         // of a token: the claim that is its principal; of a certificate: its subject (RFC 2253)
	Claims  map[string]any // of a token
	Expires time.Time      // zero: it does not end by itself
	Hint    string         // of an SVID

	svid      *x509svid.SVID // of SourceSPIRE
	exeSHA256 string         // of SourceStatic, where its rule asks for it
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
	Socket        uint64 // SO_COOKIE of the client's socket; 0 where it is not known
}
