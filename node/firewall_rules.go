package node

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// What packets are dropped for, in Counters.
const (
	dropConnection = "connection" // the first segment of a connection
	dropSegment    = "segment"    // any other
	dropFragment   = "fragment"
	dropVLAN       = "vlan"
	dropOverlay    = "overlay" // for the host's end of a tunnel, as if it came from another host
)

var dropReasons = []string{dropConnection, dropSegment, dropFragment, dropVLAN, dropOverlay}

// family is one of the two tables.
type family struct {
	family nftables.TableFamily
	frames [][]expr.Any // rules for what is no IP packet
	hooks  []hook
}

type hook struct {
	name     string
	hook     *nftables.ChainHook
	priority *nftables.ChainPriority
	// translated hooks are behind the host's NAT.
	translated bool
}

// firewallFamilies: see firewall for where packets pass.
var firewallFamilies = []family{
	{nftables.TableFamilyBridge, tagged, []hook{
		{"prerouting", nftables.ChainHookPrerouting, nftables.ChainPriorityFirst, false},
	}},
	{nftables.TableFamilyINet, nil, []hook{
		{"prerouting", nftables.ChainHookPrerouting, nftables.ChainPriorityRaw, false},
		{"input", nftables.ChainHookInput, nftables.ChainPriorityFirst, true},
		{"forward", nftables.ChainHookForward, nftables.ChainPriorityFirst, true},
	}},
}

// build adds one table to the transaction.
func (f *firewall) build(conn *nftables.Conn, family family) error {
	table := &nftables.Table{Name: f.Table, Family: family.family}
	conn.AddTable(table)
	conn.DelTable(table)
	conn.AddTable(table)
	for _, reason := range dropReasons {
		counter := &expr.Counter{}
		if family.family == nftables.TableFamilyINet { // both tables' counters are one sum
			counter.Packets = f.counted[reason]
		}
		conn.AddObj(&nftables.NamedObj{Table: table, Name: reason, Type: nftables.ObjTypeCounter, Obj: counter})
	}
	for _, s := range f.sets() {
		s.set.Table = table
		if err := conn.AddSet(&s.set, s.elements); err != nil {
			return err
		}
	}
	container := slices.Concat(family.frames, fromContainer)
	if len(f.overlays) > 0 {
		container = append(container, toOverlay)
	}
	chains := map[string][][]expr.Any{"container": container, "destination": toBroker, "refused": f.refused()}
	for _, h := range family.hooks {
		conn.AddChain(&nftables.Chain{Name: h.name, Table: table, Type: nftables.ChainTypeFilter, Hooknum: h.hook,
			Priority: h.priority})
		chains[h.name] = [][]expr.Any{fromVeth}
		if h.translated && f.bridged { // it turns connection tracking on, which such hosts have on already
			chains[h.name] = append(chains[h.name], translated)
		}
	}
	for name := range chains {
		conn.AddChain(&nftables.Chain{Name: name, Table: table})
	}
	for name, rules := range chains {
		for _, r := range rules {
			conn.AddRule(&nftables.Rule{Table: table, Chain: &nftables.Chain{Name: name}, Exprs: r})
		}
	}
	return nil
}

type namedSet struct {
	set      nftables.Set
	elements []nftables.SetElement
}

func (f *firewall) sets() []namedSet {
	service := nftables.TypeInetService
	watched, ports := map[uint16]bool{}, map[uint16]bool{}
	for _, p := range f.Ports {
		watched[p], ports[p] = true, true
	}
	for _, n := range f.Refined {
		watched[n.Port] = true
	}
	portSet := func(name string, ports map[uint16]bool) namedSet {
		s := namedSet{set: nftables.Set{Name: name, KeyType: service, KeyByteOrder: binaryutil.BigEndian}}
		for _, p := range slices.Sorted(maps.Keys(ports)) {
			s.elements = append(s.elements, nftables.SetElement{Key: binaryutil.BigEndian.PutUint16(p)})
		}
		return s
	}
	// Of a size that is known the kernel makes a cheaper set.
	skip := namedSet{set: nftables.Set{Name: "skip", KeyType: nftables.TypeIFIndex,
		KeyByteOrder: binaryutil.NativeEndian, Size: uint32(len(f.skip)) + 1}}
	for _, index := range f.skip {
		skip.elements = append(skip.elements, nftables.SetElement{Key: binaryutil.NativeEndian.PutUint32(index)})
	}
	headers := namedSet{set: nftables.Set{Name: "headers", KeyType: nftables.TypeInetProto}}
	for _, h := range fragmentHeaders {
		headers.elements = append(headers.elements, nftables.SetElement{Key: []byte{h}})
	}
	network := func(name string, address nftables.SetDatatype) namedSet {
		return namedSet{set: nftables.Set{Name: name, Interval: true, Concatenation: true,
			KeyType: nftables.MustConcatSetType(address, service)}}
	}
	v4, v6 := network("networks4", nftables.TypeIPAddr), network("networks6", nftables.TypeIP6Addr)
	for _, n := range outermost(f.Refined) {
		first, last := n.Network.Addr().AsSlice(), n.Network.Addr().AsSlice()
		for bit := n.Network.Bits(); bit < len(last)*8; bit++ {
			last[bit/8] |= 0x80 >> (bit % 8)
		}
		port := []byte{byte(n.Port >> 8), byte(n.Port), 0, 0} // padded to a register
		element := nftables.SetElement{Key: append(first, port...), KeyEnd: append(last, port...)}
		if n.Network.Addr().Is4() {
			v4.elements = append(v4.elements, element)
		} else {
			v6.elements = append(v6.elements, element)
		}
	}
	overlays := map[uint16]bool{}
	for _, p := range f.overlays {
		overlays[p] = true
	}
	return []namedSet{portSet("watched", watched), portSet("ports", ports), portSet("overlays", overlays), skip, headers,
		v4, v6}
}

// outermost leaves out networks within others: a set of intervals refuses what overlaps.
func outermost(all []networkPort) (kept []networkPort) {
	sorted := make([]networkPort, len(all))
	for i, n := range all {
		addr, bits := n.Network.Addr(), n.Network.Bits()
		if addr.Is4In6() && bits >= 96 {
			addr, bits = addr.Unmap(), bits-96
		}
		sorted[i] = networkPort{netip.PrefixFrom(addr, bits).Masked(), n.Port}
	}
	slices.SortFunc(sorted, func(a, b networkPort) int { return cmp.Compare(a.Network.Bits(), b.Network.Bits()) })
	for _, n := range sorted {
		within := func(o networkPort) bool { return o.Port == n.Port && o.Network.Overlaps(n.Network) }
		if !slices.ContainsFunc(kept, within) {
			kept = append(kept, n)
		}
	}
	return kept
}

// nftMetaIIFKind is NFT_META_IIFKIND (Linux 5.3): the kind of the device, as in "ip link add type".
const nftMetaIIFKind = 26

// Registers. With two values in a row, one look-up takes both.
const (
	regFirst     = unix.NFT_REG_1
	regAfterIPv4 = unix.NFT_REG32_00 + 1
	regAfterIPv6 = unix.NFT_REG32_00 + 4
)

func meta(key expr.MetaKey) *expr.Meta { return &expr.Meta{Key: key, Register: regFirst} }

func equal(value ...byte) *expr.Cmp {
	return &expr.Cmp{Op: expr.CmpOpEq, Register: regFirst, Data: value}
}

func in(set string) *expr.Lookup { return &expr.Lookup{SourceRegister: regFirst, SetName: set} }

func header(base expr.PayloadBase, offset, length, register uint32) *expr.Payload {
	return &expr.Payload{Base: base, Offset: offset, Len: length, DestRegister: register}
}

func bits(mask ...byte) *expr.Bitwise {
	return &expr.Bitwise{SourceRegister: regFirst, DestRegister: regFirst, Len: uint32(len(mask)), Mask: mask,
		Xor: make([]byte, len(mask))}
}

func jump(chain string) *expr.Verdict { return &expr.Verdict{Kind: expr.VerdictJump, Chain: chain} }

// drop ends a rule.
func drop(reason string, match ...expr.Any) []expr.Any {
	return append(match, &expr.Objref{Type: unix.NFT_OBJECT_COUNTER, Name: reason},
		&expr.Verdict{Kind: expr.VerdictDrop})
}

func etherType(t uint16) []expr.Any {
	return []expr.Any{meta(expr.MetaKeyPROTOCOL), equal(byte(t>>8), byte(t))}
}

// from matches what comes by a device of a kind, but from those that are left out.
func from(kind string) []expr.Any {
	name := make([]byte, unix.IFNAMSIZ)
	copy(name, kind)
	return []expr.Any{meta(nftMetaIIFKind), equal(name...),
		meta(expr.MetaKeyIIF), &expr.Lookup{SourceRegister: regFirst, SetName: "skip", Invert: true}}
}

// ipsDNAT is IPS_DST_NAT of the connection's status.
const ipsDNAT = 1 << 5

var (
	// fromVeth is what the base chains have: only what comes from a container goes on.
	fromVeth = append(from("veth"), jump("container"))
	// translated is what came from behind a bridge, where the container cannot be told any more, to an address that the
	// host translated: to the one that it had the bridge let it pass.
	translated = append(from("bridge"), &expr.Ct{Key: expr.CtKeySTATUS, Register: regFirst},
		bits(binaryutil.NativeEndian.PutUint32(ipsDNAT)...),
		&expr.Cmp{Op: expr.CmpOpNeq, Register: regFirst, Data: []byte{0, 0, 0, 0}}, jump("container"))
)

// fragmentHeaders are what the first fragment of an IPv6 packet may begin with when it is TCP: that, or an extension
// header behind which it hides, possibly beyond the fragment's end.
var fragmentHeaders = []byte{unix.IPPROTO_TCP, unix.IPPROTO_HOPOPTS, unix.IPPROTO_ROUTING, unix.IPPROTO_FRAGMENT,
	unix.IPPROTO_AH, unix.IPPROTO_DSTOPTS, unix.IPPROTO_MH, 139 /* HIP */, 140 /* Shim6 */}

// tagged drops what has two VLAN tags. One was moved out of the frame when it came in, and what it carries is seen as
// without. With a second the kernel shows none of it, and takes off two tags of VLAN 0 when the frame is for itself.
var tagged = [][]expr.Any{
	drop(dropVLAN, etherType(unix.ETH_P_8021Q)...),
	drop(dropVLAN, etherType(unix.ETH_P_8021AD)...),
}

// fromContainer finds TCP to the ports of brokers. An IPv6 host makes no fragments of TCP: those go, whatever the port.
var fromContainer = [][]expr.Any{
	drop(dropFragment, append(etherType(unix.ETH_P_IPV6),
		&expr.Exthdr{Op: expr.ExthdrOpIpv6, Type: unix.IPPROTO_FRAGMENT, Offset: 0, Len: 1, DestRegister: regFirst},
		in("headers"),
		&expr.Exthdr{Op: expr.ExthdrOpIpv6, Type: unix.IPPROTO_FRAGMENT, Offset: 2, Len: 2, DestRegister: regFirst},
		bits(0xff, 0xf9), &expr.Cmp{Op: expr.CmpOpNeq, Register: regFirst, Data: []byte{0, 0}})...),
	{
		meta(expr.MetaKeyL4PROTO), equal(unix.IPPROTO_TCP),
		header(expr.PayloadBaseTransportHeader, 2, 2, regFirst), in("watched"),
		jump("destination"),
	},
}

// toOverlay drops what would enter a tunnel of the host's as if another host had sent it.
var toOverlay = drop(dropOverlay, meta(expr.MetaKeyL4PROTO), equal(unix.IPPROTO_UDP),
	header(expr.PayloadBaseTransportHeader, 2, 2, regFirst), in("overlays"))

// toBroker finds out of TCP to the ports of brokers what is for a broker's address. Sets of networks are dear to ask:
// other traffic does not come here.
var toBroker = [][]expr.Any{
	{header(expr.PayloadBaseTransportHeader, 2, 2, regFirst), in("ports"), jump("refused")},
	append(etherType(unix.ETH_P_IP),
		header(expr.PayloadBaseNetworkHeader, 16, 4, regFirst),
		header(expr.PayloadBaseTransportHeader, 2, 2, regAfterIPv4), in("networks4"),
		jump("refused")),
	append(etherType(unix.ETH_P_IPV6),
		header(expr.PayloadBaseNetworkHeader, 24, 16, regFirst),
		header(expr.PayloadBaseTransportHeader, 2, 2, regAfterIPv6), in("networks6"),
		jump("refused")),
}

// firstEphemeralPort is where Linux begins to take ports for clients (net.ipv4.ip_local_port_range).
const firstEphemeralPort = 32768

// refused drops what is broker-bound.
//
// IPv4's first fragment has the ports, as its payload is a multiple of 8 bytes, but not always the flags. Without it
// the others are never put together, so they pass.
//
// A segment that opens no connection, to a port that clients are given too, may be a server's answer: it passes. A
// broker does not know the connection it would belong to.
func (f *firewall) refused() [][]expr.Any {
	const flags, syn, ack = 13, 0x02, 0x10
	rules := [][]expr.Any{
		drop(dropFragment, append(etherType(unix.ETH_P_IP), header(expr.PayloadBaseNetworkHeader, 6, 2, regFirst),
			bits(0x3f, 0xff), equal(0x20, 0))...),
		drop(dropConnection, header(expr.PayloadBaseTransportHeader, flags, 1, regFirst), bits(syn|ack), equal(syn)),
	}
	if f.Established {
		return rules
	}
	return append(rules, drop(dropSegment, header(expr.PayloadBaseTransportHeader, 2, 2, regFirst),
		&expr.Cmp{Op: expr.CmpOpLt, Register: regFirst, Data: binaryutil.BigEndian.PutUint16(firstEphemeralPort)}))
}
