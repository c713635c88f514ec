package node

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"

	"klamm/bpf"
	"klamm/enforcer"
	"klamm/enforcer/audit"
	"klamm/spiffe"
)

// takeOver deals with the connections that are older than the redirect until ctx ends: at once, and again whenever more
// has become broker-bound. From the first time on the second line stops what is left of them.
func (n *Node) takeOver(ctx context.Context) {
	cut := n.config.Intercept.Established.Mode == TakeOver
	if !cut {
		n.cutEstablished(false)
	}
	for {
		n.takeOverOnce(ctx)
		if cut && ctx.Err() == nil {
			n.cutEstablished(true)
		}
		select {
		case <-n.more:
		case <-ctx.Done():
			return
		}
	}
}

func (n *Node) cutEstablished(cut bool) {
	err := n.redirect.programs.CutEstablished(cut)
	if n.wall.firewall != nil {
		err = errors.Join(err, n.wall.SetEstablished(!cut))
	}
	if err != nil {
		n.log.Error().Err(err).Bool("cut", cut).Msg("the second line treats older connections as before")
	}
}

// moreIsBound wakes takeOver.
func (n *Node) moreIsBound() {
	select {
	case n.more <- struct{}{}:
	default: // it is about to look
	}
}

func (n *Node) takeOverOnce(ctx context.Context) {
	root, err := Cgroup2Mount()
	if err != nil {
		n.log.Error().Err(err).Msg("connections older than the node may go on past it")
		return
	}
	namespaces := n.redirect.enrolled.all()
	defer func() {
		for _, ns := range namespaces {
			_ = ns.Close()
		}
	}()
	c := n.config.Intercept.Established
	t := takeOver{mode: c.Mode, rate: c.Rate, broker: n.isBroker, stamps: n.redirect.programs.Stamps().FD(),
		exempt: func(e established) bool { return !n.redirects(root, e.cgroup) }, report: n.tookOver, wait: sleep}
	done, err := t.run(ctx, namespaces)
	if err != nil && ctx.Err() == nil {
		n.log.Error().Err(err).Msg("connections older than the node may go on past it")
	}
	line := n.log.Info()
	for _, action := range slices.Sorted(maps.Keys(done)) {
		line = line.Int(string(action), done[action])
	}
	line.Msg("connections older than the node")
}

// isBroker tells whether a connect to the destination is redirected.
func (n *Node) isBroker(to netip.AddrPort) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if slices.Contains(n.ports, to.Port()) || slices.Contains(n.kept, to.Port()) {
		return true
	}
	for _, networks := range n.networks {
		if slices.ContainsFunc(networks, func(network bpf.Network) bool {
			return network.Port == to.Port() && network.Prefix.Contains(to.Addr())
		}) {
			return true
		}
	}
	return false
}

// redirects tells whether connects of sockets of a cgroup are redirected. What cannot be told is.
func (n *Node) redirects(root string, cgroup uint64) bool {
	path, err := cgroupPath(root, cgroup)
	if err != nil {
		return true
	}
	exempt, err := n.redirect.programs.Exempted()
	if err != nil {
		return true
	}
	below := n.config.Node.Cgroup == ""
	for ; ; path = filepath.Dir(path) {
		below = below || path == filepath.Clean(n.config.Node.Cgroup)
		if id, err := cgroupID(path); err == nil {
			if _, is := exempt[id]; is {
				return false
			}
		}
		if path == root || path == "/" {
			return below
		}
	}
}

func (n *Node) tookOver(e established) {
	level := zerolog.InfoLevel
	if e.action == takenFailed || e.action == takenPassive {
		level = zerolog.WarnLevel
	}
	line := n.log.WithLevel(level).Err(e.err).Str("action", string(e.action)).Uint64("netns", e.netns).
		Stringer("local", e.local).Stringer("remote", e.remote).Stringer("state", e.state).Uint32("uid", e.uid)
	for _, o := range e.owners {
		line = line.Int("pid", o.pid).Str("comm", o.comm).Str("exe", o.exe)
	}
	line.Msg("a connection older than the node")
	client := enforcer.Client{Destination: e.broker}
	client.Identity.Process = spiffe.Process{UID: e.uid}
	if len(e.owners) > 0 {
		client.Identity.Process = spiffe.Process{PID: uint32(e.owners[0].pid), UID: e.uid, Exe: e.owners[0].exe,
			Comm: e.owners[0].comm}
	}
	switch e.action {
	case takenDestroyed:
		n.refuse(client, audit.Older, errors.New("connected before the node ran"))
	case takenLeft, takenPassive, takenFailed:
		n.passed(client, "older_connection")
	}
}

// fileidKernfs is the kernel's FILEID_KERNFS: the handle of a cgroup is its id.
const fileidKernfs = 0xfe

// cgroupPath is the directory of a cgroup. It needs CAP_DAC_READ_SEARCH.
func cgroupPath(root string, id uint64) (_ string, err error) {
	mount, err := os.Open(root)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, mount.Close()) }()
	handle := unix.NewFileHandle(fileidKernfs, binary.NativeEndian.AppendUint64(nil, id))
	fd, err := unix.OpenByHandleAt(int(mount.Fd()), handle, unix.O_PATH|unix.O_CLOEXEC)
	if err != nil {
		return "", fmt.Errorf("open cgroup %d: %w", id, err)
	}
	defer func() { err = errors.Join(err, unix.Close(fd)) }()
	return os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
}
