package node

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"time"

	"klamm/bpf"
	"klamm/enforcer"
	"klamm/enforcer/audit"
)

// firewallTable is the name of the node's tables.
const firewallTable = "klamm"

// wallPeriod is how long at most the firewall stays as somebody else left it: "nft flush ruleset" is a habit of hosts.
const wallPeriod = time.Second

// wall is the firewall and what it is kept in step with. The zero value is none.
type wall struct {
	*firewall
	host   *netns
	exempt []*netns // left out, in the order of their inodes
}

// raise opens the firewall, if the configuration wants it.
func (n *Node) raise() (err error) {
	if !n.config.Intercept.Firewall {
		return nil
	}
	host, err := openNetns("/proc/self/ns/net")
	if err != nil {
		return err
	}
	n.closers = append(n.closers, host)
	n.wall.host = host
	n.mu.Lock()
	defer n.mu.Unlock()
	ports, networks := n.bound()
	n.wall.firewall, err = openFirewall(firewallOptions{Table: firewallTable, Netns: host, Ports: ports,
		Refined: refined(networks), Established: true, Log: n.log})
	if err != nil {
		return fmt.Errorf("intercept.firewall: %w: set it to false to do without", err)
	}
	return nil
}

// CheckFirewall makes the firewall in a network namespace of its own, to see whether the kernel can.
func CheckFirewall() (err error) {
	ns, err := makeNetns()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, ns.Close()) }()
	_, err = openFirewall(firewallOptions{Table: firewallTable, Netns: ns, Ports: []uint16{9092}})
	return err
}

func refined(networks []bpf.Network) (all []networkPort) {
	for _, n := range networks {
		all = append(all, networkPort{n.Prefix, n.Port})
	}
	return all
}

// guard keeps the firewall as it should be until ctx ends.
func (n *Node) guard(ctx context.Context) {
	if n.wall.firewall == nil {
		return
	}
	n.conns.Go(func() { n.wall.Follow(ctx) })
	tick := time.NewTicker(wallPeriod)
	defer tick.Stop()
	defer func() { closeNetns(n.wall.exempt) }()
	for {
		if err := n.leaveOut(); err != nil {
			n.log.Error().Err(err).Msg("the firewall stops what exempt containers send to brokers")
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		if n.handing.Load() {
			continue
		}
		err := n.wall.Check()
		if err == nil {
			continue
		}
		n.log.Error().Err(errors.Join(err, n.wall.Restore())).Msg("the firewall was changed; it is put back")
		n.refuse(enforcer.Client{}, audit.Tampered, err)
	}
}

// leaveOut keeps the firewall away from the network namespaces of exempt processes.
func (n *Node) leaveOut() error {
	inodes := map[uint64]int{}
	for _, path := range n.exempted.paths() {
		maps.Copy(inodes, namespacesOf(processesIn(path)))
	}
	delete(inodes, n.wall.host.inode)
	wanted := slices.Sorted(maps.Keys(inodes))
	if slices.EqualFunc(wanted, n.wall.exempt, func(inode uint64, ns *netns) bool { return inode == ns.inode }) {
		return nil
	}
	var open []*netns
	for _, inode := range wanted {
		if ns, err := openNetns(netnsPath(inodes[inode])); err == nil { // it may have ended
			open = append(open, ns)
		}
	}
	if err := n.wall.SetExempt(open); err != nil {
		closeNetns(open)
		return err
	}
	closeNetns(n.wall.exempt)
	n.wall.exempt = open
	return nil
}

func closeNetns(all []*netns) {
	for _, ns := range all {
		_ = ns.Close()
	}
}

// paths are the directories of the exempt cgroups that are there.
func (e *exemptions) paths() (paths []string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for i, w := range e.wanted {
		if e.ids[i] == 0 {
			continue
		}
		if w.Unit != "" {
			paths = append(paths, findUnit(e.root, w.Unit))
		} else {
			paths = append(paths, filepath.Join(e.root, w.Cgroup))
		}
	}
	return paths
}
