package bypass

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// tricks: what root of a pod can do to packets on their way out of it, and what it can see.
var tricks = []vector{
	{name: "nftables: DNAT of another port to the broker's", as: podRoot, want: refused, attack: dnat(broker4)},
	{name: "nftables: DNAT of another port to the broker's over IPv6", as: podRoot, want: refused, attack: dnat(broker6)},
	{name: "nftables: DNAT of the rewritten destination to the broker", as: podRoot, want: refused, attack: dnatLoopback},
	{name: "nftables: DNAT in a user namespace", from: inUserNamespace, want: refused, attack: dnat(broker4)},
	{name: "nftables: the port is set at output, untracked", as: podRoot, want: refused,
		attack: stateless(nftables.ChainHookOutput)},
	{name: "nftables: the port is set at postrouting, untracked", as: podRoot, want: refused,
		attack: stateless(nftables.ChainHookPostrouting)},
	{name: "nftables: the port is set at the device's egress", as: podRoot, want: refused, attack: setAtEgress},
	{name: "tc: the port is set by an eBPF classifier", as: podBPF, want: refused, attack: setByClassifier},
	{name: "tc: the port is set by pedit", as: podRoot, want: refused, attack: setByPedit},
	{name: "a namespace behind the pod, for which it does DNAT", as: podRoot, want: refused, attack: behind},
	{name: "reading the node's traffic in the pod", as: podRoot, want: intercepted, attack: reads(broker4)},
	{name: "reading the node's traffic on the bridge", as: podRoot, from: inBridgedPod, want: intercepted,
		attack: reads(bridged4)},
}

// rules are put into a table of the attacker's.
func rules(family nftables.TableFamily, chain nftables.Chain, rules ...[]expr.Any) error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	chain.Table = c.AddTable(&nftables.Table{Family: family, Name: "attack"})
	in := c.AddChain(&chain)
	for _, r := range rules {
		c.AddRule(&nftables.Rule{Table: chain.Table, Chain: in, Exprs: r})
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("nftables: chain %s: %w", chain.Name, unsupported(err))
	}
	return nil
}

func isTCP() []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{protocolTCP}},
	}
}

// Offsets in the TCP header.
const (
	sourcePort      = 0
	destinationPort = 2
	flagsByte       = 13
)

func port(p uint16) []byte { return binary.BigEndian.AppendUint16(nil, p) }

func hasPort(which uint32, p uint16) []expr.Any {
	return append(isTCP(),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: which, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: port(p)})
}

// setPort changes a port and the checksum.
func setPort(which uint32, from, to uint16) []expr.Any {
	return append(hasPort(which, from),
		&expr.Immediate{Register: 1, Data: port(to)},
		&expr.Payload{OperationType: expr.PayloadWrite, SourceRegister: 1, Base: expr.PayloadBaseTransportHeader,
			Offset: which, Len: 2, CsumType: expr.CsumTypeInet, CsumOffset: 16})
}

// silence keeps the kernel from resetting connections that it does not know.
func silence() error {
	return rules(nftables.TableFamilyINet, nftables.Chain{Name: "silence", Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookOutput, Priority: nftables.ChainPriorityFilter}, append(isTCP(),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: flagsByte, Len: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{tcpRST}, Xor: []byte{0}},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: []byte{0}},
		&expr.Verdict{Kind: expr.VerdictDrop}))
}

func translate(to netip.Addr) []expr.Any {
	family := uint32(unix.NFPROTO_IPV6)
	if to.Is4() {
		family = unix.NFPROTO_IPV4
	}
	return []expr.Any{
		&expr.Immediate{Register: 1, Data: to.AsSlice()},
		&expr.Immediate{Register: 2, Data: port(brokerPort)},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: family, RegAddrMin: 1, RegProtoMin: 2},
	}
}

var (
	natOutput = nftables.Chain{Name: "output", Type: nftables.ChainTypeNAT, Hooknum: nftables.ChainHookOutput,
		Priority: nftables.ChainPriorityNATDest}
	natPrerouting = nftables.Chain{Name: "prerouting", Type: nftables.ChainTypeNAT,
		Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityNATDest}
	natPostrouting = nftables.Chain{Name: "postrouting", Type: nftables.ChainTypeNAT,
		Hooknum: nftables.ChainHookPostrouting, Priority: nftables.ChainPriorityNATSource}
)

// redirectPort sends what goes from the pod to one port to another of its own.
func redirectPort(from, to uint16) error {
	return rules(nftables.TableFamilyIPv4, natOutput, append(hasPort(destinationPort, from),
		&expr.Immediate{Register: 1, Data: port(to)}, &expr.Redir{RegisterProtoMin: 1}))
}

// toOther connects to the broker at a port that is none of a broker's.
func (a *attacker) toOther(address netip.Addr) error {
	return a.plain(netip.AddrPortFrom(address, otherPort))
}

func dnat(to netip.Addr) func(*attacker) error {
	return func(a *attacker) error {
		family := nftables.TableFamilyIPv6
		if to.Is4() {
			family = nftables.TableFamilyIPv4
		}
		if err := rules(family, natOutput, append(hasPort(destinationPort, otherPort), translate(to)...)); err != nil {
			return err
		}
		return a.toOther(to)
	}
}

// dnatLoopback sends what goes to 127.0.0.1 to the broker: what was rewritten or, without a node, what was asked for.
func dnatLoopback(a *attacker) error {
	to := at(broker4)
	if p, err := listenerPort(); err != nil {
		return err
	} else if p == 0 {
		to = netip.AddrPortFrom(loopback4, otherPort)
	}
	toLoopback := append(isTCP(),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 16, Len: 4},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: loopback4.AsSlice()})
	err := errors.Join(
		rules(nftables.TableFamilyIPv4, natOutput, append(toLoopback, translate(broker4)...)),
		rules(nftables.TableFamilyIPv4, natPostrouting, []expr.Any{&expr.Masq{}}),
		sysctl("net/ipv4/conf/all/route_localnet", "1"), sysctl("net/ipv4/conf/eth0/route_localnet", "1"))
	if err != nil {
		return err
	}
	return a.plain(to)
}

// stateless sets the port on the way out and back on the way in.
func stateless(hook *nftables.ChainHook) func(*attacker) error {
	return func(a *attacker) error {
		err := errors.Join(
			rules(nftables.TableFamilyINet, nftables.Chain{Name: "raw", Type: nftables.ChainTypeFilter,
				Hooknum: nftables.ChainHookOutput, Priority: nftables.ChainPriorityRaw}, []expr.Any{&expr.Notrack{}}),
			rules(nftables.TableFamilyINet, nftables.Chain{Name: "out", Type: nftables.ChainTypeFilter,
				Hooknum: hook, Priority: nftables.ChainPriorityMangle}, setPort(destinationPort, otherPort, brokerPort)),
			back())
		if err != nil {
			return err
		}
		return a.toOther(broker4)
	}
}

// back sets the port in what comes in.
func back() error {
	return rules(nftables.TableFamilyINet, nftables.Chain{Name: "in", Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityRaw},
		[]expr.Any{&expr.Notrack{}}, setPort(sourcePort, brokerPort, otherPort))
}

// setAtEgress changes packets behind everything that knows whose they are (Linux 5.16).
func setAtEgress(a *attacker) error {
	err := rules(nftables.TableFamilyNetdev, nftables.Chain{Name: "egress", Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookEgress, Priority: nftables.ChainPriorityFilter, Device: a.Device},
		setPort(destinationPort, otherPort, brokerPort))
	if err := errors.Join(err, back()); err != nil {
		return err
	}
	return a.toOther(broker4)
}

// clsact is where filters on the way out of the pod's device are.
func clsact(a *attacker) (netlink.FilterAttrs, error) {
	err := netlink.QdiscAdd(&netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: indexOf(a.Device),
		Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}})
	return netlink.FilterAttrs{LinkIndex: indexOf(a.Device), Parent: netlink.HANDLE_MIN_EGRESS, Handle: 1, Priority: 1,
		Protocol: unix.ETH_P_ALL}, unsupported(err)
}

func setByClassifier(a *attacker) error {
	const ethernet, ipv4 = 14, 20
	const at, sum = ethernet + ipv4 + destinationPort, ethernet + ipv4 + 16
	big := func(p uint16) int32 { return int32(network16(p)) }
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "Apache-2.0",
		Instructions: asm.Instructions{
			asm.Mov.Reg(asm.R6, asm.R1),
			asm.Mov.Imm(asm.R2, at),
			asm.Mov.Reg(asm.R3, asm.RFP),
			asm.Add.Imm(asm.R3, -8),
			asm.Mov.Imm(asm.R4, 2),
			asm.FnSkbLoadBytes.Call(),
			asm.JNE.Imm(asm.R0, 0, "pass"),
			asm.LoadMem(asm.R7, asm.RFP, -8, asm.Half),
			asm.JNE.Imm(asm.R7, big(otherPort), "pass"),
			asm.Mov.Reg(asm.R1, asm.R6),
			asm.Mov.Imm(asm.R2, sum),
			asm.Mov.Imm(asm.R3, big(otherPort)),
			asm.Mov.Imm(asm.R4, big(brokerPort)),
			asm.Mov.Imm(asm.R5, 2),
			asm.FnL4CsumReplace.Call(),
			asm.StoreImm(asm.RFP, -8, int64(big(brokerPort)), asm.Half),
			asm.Mov.Reg(asm.R1, asm.R6),
			asm.Mov.Imm(asm.R2, at),
			asm.Mov.Reg(asm.R3, asm.RFP),
			asm.Add.Imm(asm.R3, -8),
			asm.Mov.Imm(asm.R4, 2),
			asm.Mov.Imm(asm.R5, 0),
			asm.FnSkbStoreBytes.Call(),
			asm.Mov.Imm(asm.R0, 0).WithSymbol("pass"), // TC_ACT_OK
			asm.Return(),
		}})
	if err != nil {
		return fmt.Errorf("load the classifier: %w", err)
	}
	defer func() { _ = program.Close() }()
	attrs, err := clsact(a)
	if err != nil {
		return err
	}
	filter := &netlink.BpfFilter{FilterAttrs: attrs, Fd: program.FD(), Name: "attack", DirectAction: true}
	if err := errors.Join(netlink.FilterAdd(filter), back()); err != nil {
		return unsupported(err)
	}
	return a.toOther(broker4)
}

func setByPedit(a *attacker) error {
	attrs, err := clsact(a)
	if err != nil {
		return err
	}
	attrs.Protocol = unix.ETH_P_IP
	pedit := netlink.NewPeditAction()
	pedit.Proto, pedit.DstPort = protocolTCP, brokerPort
	sum := netlink.NewCsumAction()
	sum.UpdateFlags = netlink.TCA_CSUM_UPDATE_FLAG_TCP
	err = netlink.FilterAdd(&netlink.U32{FilterAttrs: attrs, Actions: []netlink.Action{pedit, sum},
		Sel: &netlink.TcU32Sel{Nkeys: 1, Flags: netlink.TC_U32_TERMINAL, Keys: []netlink.TcU32Key{{
			Off: 20, Mask: 0xffff, Val: otherPort}}}})
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("%w: pedit: %w", errUnsupported, err)
	}
	if err := errors.Join(err, back()); err != nil {
		return err
	}
	return a.toOther(broker4)
}

// behind has a child in a network namespace of its own (a user may make one, in a user namespace), and forwards for it:
// what is forwarded belongs to no socket of the pod.
func behind(*attacker) error {
	cmd := startableSecond("connect to the other port and speak")
	cmd.SysProcAttr = userNamespace(syscall.CLONE_NEWNET)
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("make a user namespace: %w", err)
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "inner"
	err := errors.Join(
		netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsPid(cmd.Process.Pid)}),
		address("inner", []netip.Prefix{netip.PrefixFrom(innerGateway, 24)}), up("inner"),
		sysctl("net/ipv4/ip_forward", "1"),
		rules(nftables.TableFamilyIPv4, natPrerouting, append(hasPort(destinationPort, otherPort), translate(broker4)...)),
		rules(nftables.TableFamilyIPv4, natPostrouting, []expr.Any{&expr.Masq{}}))
	if err != nil {
		return errors.Join(unsupported(err), cmd.Process.Kill(), cmd.Wait())
	}
	return cmd.Wait()
}

var innerGateway, innerAddress = netip.MustParseAddr("10.95.0.1"), netip.MustParseAddr("10.95.0.2")

// fromBehind waits for the device that its parent gives it.
func fromBehind(a *attacker) error {
	for end := time.Now().Add(answerTime); indexOf("eth0") == 0 && time.Now().Before(end); {
		pause()
	}
	err := errors.Join(up("lo"), address("eth0", []netip.Prefix{netip.PrefixFrom(innerAddress, 24)}), up("eth0"),
		defaultRoutes(innerGateway))
	if err != nil {
		return err
	}
	for end := time.Now().Add(answerTime); ; pause() {
		if err = a.toOther(broker4); err == nil || time.Now().After(end) {
			return err
		}
	}
}

// reads listens to all devices of the pod while it connects, and keeps what goes to the brokers' port.
func reads(broker netip.Addr) func(*attacker) error {
	return func(a *attacker) error {
		a.to = at(broker)
		ear, err := listenPackets()
		if err != nil {
			return err
		}
		defer func() { _ = unix.Close(ear) }()
		if device, err := net.InterfaceByName(a.Device); err == nil {
			request := &unix.PacketMreq{Ifindex: int32(device.Index), Type: unix.PACKET_MR_PROMISC}
			if err := unix.SetsockoptPacketMreq(ear, unix.SOL_PACKET, unix.PACKET_ADD_MEMBERSHIP, request); err != nil {
				return err
			}
		}
		if err := a.plain(a.to); err != nil {
			return err
		}
		for {
			p, err := readPacket(ear)
			if p == nil || err != nil {
				return err
			}
			if heard, is := parse(p); is {
				a.got = append(a.got, heard.payload...)
			}
		}
	}
}
