package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/rs/zerolog"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// firewall is the third line of defence: nftables tables of our own in the host's network namespace. They drop
// broker-bound TCP that comes out of containers and that no socket hook has seen: from packet sockets, tc, NAT by a
// container's root. What a container may send to a broker is redirected inside its namespace and never arrives here.
//
// Containers' packets are known by the kind of the device they arrive on, veth, which only the host's side can choose.
// That needs no hook per device: a new veth is covered from its first packet on, also while no node runs. The netdev
// family's ingress hook would have to be registered on each device after it came. Where packets pass:
//
//	bridge prerouting  of frames that a bridge gets from a veth, before it looks at VLANs or addresses
//	inet prerouting    of routed packets, behind the reassembly of conntrack and before any NAT
//	inet forward/input the same behind the host's NAT: a service address whose port is not a broker's. Here also what
//	                   comes from a bridge, if its destination was translated
//
// Not seen are: containers with another device than a veth (macvlan, ipvlan, a virtual machine's tap); packets that a
// program at the host's end redirects before netfilter (Cilium's host routing); devices on top of the host's end (vlan,
// macvlan); tunnels that another host opens, or this one without a device of its own; and behind IPVS, a service whose
// port is not a broker's. An exempt container behind a bridge reaches brokers by their own port only.
type firewall struct {
	firewallOptions

	mu sync.Mutex
	hostLinks
	made    string            // what the kernel said of the tables when they were made; "" if that failed
	counted map[string]uint64 // packets, as last read
}

// firewallOptions is what a firewall is made of.
type firewallOptions struct {
	// The tables' name, the same in the families inet and bridge.
	Table string
	// The host's network namespace. It stays open as long as the firewall is used.
	Netns *netns
	// TCP destination ports at any address, and those of some networks only.
	Ports   []uint16
	Refined []networkPort
	// Network namespaces whose packets pass, of a broker on this host say. Each stays open until it is set no more.
	Exempt []*netns
	// Connections that exist pass: only new ones are refused.
	Established bool
	Log         zerolog.Logger
}

// networkPort is a TCP port at the addresses of a network.
type networkPort struct {
	Network netip.Prefix
	Port    uint16
}

// errFirewallChanged is what Check returns when somebody else changed or removed the tables, or a change failed.
var errFirewallChanged = errors.New("the firewall's tables are not as the node makes them")

// openFirewall makes the tables, in one transaction and in place of what is there by their name: at no moment there are
// none, or both. Packets that were counted stay counted. It needs CAP_NET_ADMIN, and CAP_SYS_ADMIN for setns(2). The
// tables stay until RemoveFirewall.
func openFirewall(o firewallOptions) (*firewall, error) {
	f := &firewall{firewallOptions: o, counted: map[string]uint64{}}
	return f, f.change(func() {})
}

// RemoveFirewall removes the tables from the calling thread's network namespace. None there is no error.
func RemoveFirewall(table string) error {
	for _, family := range firewallFamilies {
		conn, err := nftables.New()
		if err != nil {
			return fmt.Errorf("remove the firewall: %w", err)
		}
		// Added first, since what is not there cannot be deleted.
		t := &nftables.Table{Name: table, Family: family.family}
		conn.AddTable(t)
		conn.DelTable(t)
		if err := conn.Flush(); err != nil && !lacksNftables(err) {
			return fmt.Errorf("remove table %q of the firewall: %w", table, err)
		}
	}
	return nil
}

// lacksNftables: the kernel has no nf_tables, or not this family.
func lacksNftables(err error) bool {
	return slices.ContainsFunc([]error{unix.EPROTONOSUPPORT, unix.EAFNOSUPPORT, unix.EOPNOTSUPP},
		func(e error) bool { return errors.Is(err, e) })
}

// SetDestinations replaces ports and networks at once.
func (f *firewall) SetDestinations(ports []uint16, refined []networkPort) error {
	return f.change(func() { f.Ports, f.Refined = ports, refined })
}

// SetExempt replaces the namespaces whose packets pass.
func (f *firewall) SetExempt(exempt []*netns) error {
	return f.change(func() { f.Exempt = exempt })
}

// SetEstablished says whether connections that exist pass. They must until those from before the node are taken over:
// silence from a firewall lets a client wait where a reset lets it connect anew.
func (f *firewall) SetEstablished(pass bool) error {
	return f.change(func() { f.Established = pass })
}

// Restore makes the tables anew.
func (f *firewall) Restore() error { return f.change(func() {}) }

// change makes the tables anew from what set leaves. When that fails the kernel keeps the old ones, and Check says so
// until the next change, or Restore, makes up for it.
func (f *firewall) change(set func()) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	set()
	return f.Netns.do(func() error {
		links, err := f.devices()
		if err == nil {
			f.hostLinks = links
		}
		return errors.Join(err, f.apply())
	})
}

// Check returns errFirewallChanged when the tables are not as they were to be made, by somebody's "nft flush ruleset"
// say.
func (f *firewall) Check() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.made == "" {
		return errFirewallChanged
	}
	return f.Netns.do(func() error {
		// Twice: a listing during somebody's transaction on other tables may have gaps.
		now, err := f.listing()
		if err != nil || now != f.made {
			now, err = f.listing()
		}
		if err == nil && now != f.made {
			err = errFirewallChanged
		}
		return err
	})
}

// Counters are the packets dropped, by reason, also by nodes before this one.
func (f *firewall) Counters() (map[string]uint64, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	err := f.Netns.do(func() error {
		conn, err := nftables.New()
		if err != nil {
			return fmt.Errorf("read the firewall's counters: %w", err)
		}
		return f.count(conn)
	})
	return maps.Clone(f.counted), err
}

// count reads the counters. They never go back: with tables that somebody removed, the last known values remain.
func (f *firewall) count(conn *nftables.Conn) error {
	sums := map[string]uint64{}
	for _, family := range firewallFamilies {
		objects, err := conn.GetNamedObjects(&nftables.Table{Name: f.Table, Family: family.family})
		if err != nil {
			return fmt.Errorf("read the firewall's counters: %w", err)
		}
		for _, o := range objects {
			if named, is := o.(*nftables.NamedObj); is {
				if counter, is := named.Obj.(*expr.Counter); is {
					sums[named.Name] += counter.Packets
				}
			}
		}
	}
	for _, reason := range dropReasons {
		f.counted[reason] = max(f.counted[reason], sums[reason])
	}
	return nil
}

// firewallPause is between attempts to follow the devices.
const firewallPause = time.Second

// Follow keeps the devices left out up to date until ctx ends. All others are covered without it.
func (f *firewall) Follow(ctx context.Context) {
	for ctx.Err() == nil {
		if err := f.follow(ctx); err != nil {
			f.Log.Error().Err(err).Msg("following the network devices of the host")
		}
		select {
		case <-time.After(firewallPause):
		case <-ctx.Done():
		}
	}
}

func (f *firewall) follow(ctx context.Context) error {
	events, done := make(chan netlink.LinkUpdate), make(chan struct{})
	var lost error // why there are no more events: ENOBUFS when they came too fast. It is set before events is closed.
	err := f.Netns.do(func() error {
		return netlink.LinkSubscribeWithOptions(events, done,
			netlink.LinkSubscribeOptions{ErrorCallback: func(err error) { lost = err }})
	})
	if err != nil {
		close(done)
		return fmt.Errorf("subscribe to network devices: %w", err)
	}
	defer func() {
		close(done)
		for range events {
			continue // until the sender has seen it
		}
	}()
	for {
		// Once before the first event, for those that came before the subscription.
		if err := f.refresh(); err != nil {
			return err
		}
		select {
		case _, open := <-events:
			if !open {
				return fmt.Errorf("events of network devices were lost: %w", lost)
			}
		case <-ctx.Done():
			return nil
		}
	}
}

// refresh makes the tables anew if other devices are to be left out.
func (f *firewall) refresh() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.Netns.do(func() error {
		links, err := f.devices()
		if err != nil || links.equal(f.hostLinks) {
			return err
		}
		f.hostLinks = links
		return f.apply()
	})
}

// hostLinks is what the firewall takes from the devices of the host.
type hostLinks struct {
	skip     []uint32 // devices whose packets pass, by index, in order
	overlays []uint16 // UDP ports at which the host takes packets out of tunnels, in order
	bridged  bool     // there is a bridge that is no uplink
}

func (l hostLinks) equal(o hostLinks) bool {
	return slices.Equal(l.skip, o.skip) && slices.Equal(l.overlays, o.overlays) && l.bridged == o.bridged
}

// devices looks at the host's devices. Those whose packets pass are uplinks and veths, which nothing that a container
// can do to its own end makes them:
//   - the other end is in an exempt namespace,
//   - the other end is in the host's namespace too, and both are up: a pair between two bridges. One that is down may
//     be about to be moved into a container, and is taken down by the move;
//   - the host's default route leads there, for a host that is a container itself. Routes that a router advertisement
//     made do not count, because a container can send one.
func (f *firewall) devices() (found hostLinks, err error) {
	links, err := uninterrupted(netlink.LinkList)
	if err != nil {
		return found, fmt.Errorf("list network devices: %w", err)
	}
	// After the links were listed: that gave each peer's namespace an id. No other namespace gets it, these are open.
	exempt := map[int]bool{}
	for _, n := range f.Exempt {
		id, err := netlink.GetNetNsIdByFd(int(n.file.Fd()))
		if err != nil {
			return found, fmt.Errorf("find the id of exempt network namespace %d: %w", n.inode, err)
		}
		exempt[id] = true
	}
	uplinks, err := uplinks()
	if err != nil {
		return found, err
	}
	veths := map[int]*netlink.LinkAttrs{}
	for _, l := range links {
		switch l := l.(type) {
		case *netlink.Veth:
			veths[l.Index] = l.Attrs()
		case *netlink.Bridge:
			found.bridged = found.bridged || !uplinks[l.Index]
		case *netlink.Vxlan:
			found.overlays = append(found.overlays, uint16(l.Port))
		case *netlink.Geneve:
			found.overlays = append(found.overlays, l.Dport)
		}
	}
	for index := range uplinks { // also a bridge that the host's own uplink is in
		found.skip = append(found.skip, uint32(index))
	}
	for index, veth := range veths {
		inside := false
		if peer := veths[veth.ParentIndex]; peer != nil && veth.NetNsID < 0 && peer.NetNsID < 0 {
			inside = peer.ParentIndex == index && veth.RawFlags&peer.RawFlags&unix.IFF_UP != 0
		}
		if inside || uplinks[index] || veth.NetNsID >= 0 && exempt[veth.NetNsID] {
			found.skip = append(found.skip, uint32(index))
		}
	}
	slices.Sort(found.skip)
	found.skip = slices.Compact(found.skip)
	slices.Sort(found.overlays)
	found.overlays = slices.Compact(found.overlays)
	return found, nil
}

// uplinks are the devices of the default routes, by index.
func uplinks() (map[int]bool, error) {
	found := map[int]bool{}
	for _, ip := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := uninterrupted(func() ([]netlink.Route, error) {
			return netlink.RouteListFiltered(ip, &netlink.Route{Table: unix.RT_TABLE_MAIN},
				netlink.RT_FILTER_TABLE|netlink.RT_FILTER_DST) // to nowhere in particular
		})
		if err != nil {
			return nil, fmt.Errorf("list default routes: %w", err)
		}
		for _, r := range routes {
			if r.Protocol == unix.RTPROT_RA {
				continue
			}
			found[r.LinkIndex] = true
			for _, hop := range r.MultiPath {
				found[hop.LinkIndex] = true
			}
		}
	}
	return found, nil
}

// listing is all that the kernel has by the tables' name but the counters, as text; "" for none.
func (f *firewall) listing() (string, error) {
	conn, err := nftables.New(nftables.AsLasting())
	if err != nil {
		return "", fmt.Errorf("list the firewall: %w", err)
	}
	defer func() { _ = conn.CloseLasting() }()
	var text strings.Builder
	for _, family := range firewallFamilies {
		tables, err := conn.ListTablesOfFamily(family.family)
		for _, table := range tables {
			if table.Name == f.Table {
				err = errors.Join(err, list(json.NewEncoder(&text), conn, table))
			}
		}
		if err != nil {
			return "", fmt.Errorf("list the firewall: %w", err)
		}
	}
	return text.String(), nil
}

func list(out *json.Encoder, conn *nftables.Conn, table *nftables.Table) error {
	if err := out.Encode(table); err != nil { // its flags: a dormant table does nothing
		return err
	}
	chains, err := conn.ListChainsOfTableFamily(table.Family)
	if err != nil {
		return err
	}
	for _, chain := range chains {
		if chain.Table.Name != table.Name {
			continue
		}
		rules, err := conn.GetRules(table, chain)
		if err != nil {
			return err
		}
		if err := out.Encode(chain); err != nil {
			return err
		}
		for _, rule := range rules {
			if err := out.Encode(rule.Exprs); err != nil {
				return err
			}
		}
	}
	sets, err := conn.GetSets(table)
	if err != nil {
		return err
	}
	for _, set := range sets {
		elements, err := conn.GetSetElements(set)
		if err != nil {
			return err
		}
		slices.SortFunc(elements, func(a, b nftables.SetElement) int { return slices.Compare(a.Key, b.Key) })
		if err := errors.Join(out.Encode(set.Name), out.Encode(elements)); err != nil {
			return err
		}
	}
	return nil
}

// apply replaces the tables in one transaction. Packets dropped between reading the counters and the transaction are
// dropped, but not counted.
func (f *firewall) apply() error {
	f.made = ""
	conn, err := nftables.New()
	if err != nil {
		return fmt.Errorf("make the firewall: %w", err)
	}
	err = f.count(conn)
	for _, family := range firewallFamilies {
		err = errors.Join(err, f.build(conn, family))
	}
	if err == nil {
		err = conn.Flush()
	}
	if err != nil {
		return fmt.Errorf("make table %q of the firewall: %w: it needs a kernel with nf_tables for inet and bridge"+
			" (modprobe nf_tables; CONFIG_NF_TABLES_INET, CONFIG_NF_TABLES_BRIDGE), or intercept.firewall: false",
			f.Table, err)
	}
	f.made, err = f.listing()
	return err
}
