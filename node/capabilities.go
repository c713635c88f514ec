package node

import (
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"klamm/bpf"
)

// capabilities are what the node uses, of capabilities(7). Where CAP_SYS_ADMIN is, eBPF needs neither CAP_BPF nor
// CAP_PERFMON.
var capabilities = []struct {
	name string
	bit  uint
	what string // for the node, without it
}{
	{"CAP_SYS_ADMIN", unix.CAP_SYS_ADMIN, "cannot load eBPF programs and enter network namespaces"},
	{"CAP_NET_ADMIN", unix.CAP_NET_ADMIN, "cannot attach eBPF programs, end connections and keep the firewall"},
	{"CAP_SYS_PTRACE", unix.CAP_SYS_PTRACE, "cannot tell what processes of other users are"},
	{"CAP_DAC_READ_SEARCH", unix.CAP_DAC_READ_SEARCH, "cannot read the executables of other users"},
}

// CheckCapabilities tells which of the capabilities that the node uses this process lacks: a bpf.ErrPrivilege.
func CheckCapabilities() error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var sets [2]unix.CapUserData
	if err := unix.Capget(&header, &sets[0]); err != nil {
		return fmt.Errorf("read the capabilities of this process: %w", err)
	}
	var lacking []string
	for _, c := range capabilities {
		if sets[c.bit/32].Effective>>(c.bit%32)&1 == 0 {
			lacking = append(lacking, fmt.Sprintf("without %s the node %s", c.name, c.what))
		}
	}
	if len(lacking) > 0 {
		return fmt.Errorf("%w: %s: run as root, or with all four", bpf.ErrPrivilege,
			strings.Join(lacking, "; "))
	}
	return nil
}
