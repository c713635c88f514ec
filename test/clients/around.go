package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/vishvananda/netlink"

	"klamm/test/kafka"
)

// Proof that nothing goes around the node, from two sides that know nothing of it: the kernel counts what the clients'
// own sockets send to the brokers' port, and every connection that the brokers have is looked up at its owner.

// meter counts the bytes that sockets of a cgroup send to the brokers' port, at whatever address. The destination is
// the socket's after any rewrite at connect, which is where its packets really go.
type meter struct {
	bytes *ebpf.Map
	link  link.Link
}

// Offsets in struct __sk_buff of <linux/bpf.h>.
const (
	skbLen        = 0
	skbRemotePort = 132 // network byte order, in the upper half on little endian
)

func newMeter(c *cgroup) (*meter, error) {
	counter, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1})
	if err != nil {
		return nil, fmt.Errorf("make the meter of %s: %w", c.path, err)
	}
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.CGroupSKB, AttachType: ebpf.AttachCGroupInetEgress, License: "Apache-2.0",
		Instructions: asm.Instructions{
			asm.LoadMem(asm.R7, asm.R1, skbLen, asm.Word),
			asm.LoadMem(asm.R8, asm.R1, skbRemotePort, asm.Word),
			asm.HostTo(asm.BE, asm.R8, asm.Word),
			asm.JNE.Imm(asm.R8, kafka.PlaintextPort, "pass"),
			asm.StoreImm(asm.RFP, -4, 0, asm.Word),
			asm.LoadMapPtr(asm.R1, counter.FD()),
			asm.Mov.Reg(asm.R2, asm.RFP),
			asm.Add.Imm(asm.R2, -4),
			asm.FnMapLookupElem.Call(),
			asm.JEq.Imm(asm.R0, 0, "pass"),
			asm.AddAtomic.Mem(asm.R0, asm.R7, asm.DWord, 0),
			asm.Mov.Imm(asm.R0, 1).WithSymbol("pass"),
			asm.Return(),
		},
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("load the meter of %s: %w", c.path, err), counter.Close())
	}
	defer func() { _ = program.Close() }() // the link keeps it
	attached, err := link.AttachCgroup(link.CgroupOptions{
		Path: c.path, Attach: ebpf.AttachCGroupInetEgress, Program: program,
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("attach the meter of %s: %w", c.path, err), counter.Close())
	}
	return &meter{counter, attached}, nil
}

func (m *meter) read() (uint64, error) {
	var n uint64
	err := m.bytes.Lookup(uint32(0), &n)
	return n, err
}

func (m *meter) close() error { return errors.Join(m.link.Close(), m.bytes.Close()) }

// watch looks at all TCP connections to the brokers' port, again and again, and finds whose they are.
type watch struct {
	stop    context.CancelFunc
	ended   sync.WaitGroup
	byNode  int             // connections of the node, over all looks
	foreign map[string]bool // connections of nobody who may have one
	err     error
}

const watchPeriod = 100 * time.Millisecond

func (r *rig) watchSockets(ctx context.Context) *watch {
	ctx, stop := context.WithCancel(ctx)
	w := &watch{stop: stop, foreign: map[string]bool{}}
	w.ended.Go(func() {
		suspects := map[uint32]string{}
		for ctx.Err() == nil && w.err == nil {
			suspects, w.err = r.look(w, suspects)
			select {
			case <-ctx.Done():
			case <-time.After(watchPeriod):
			}
		}
	})
	return w
}

// look takes one look. A socket whose owner is not found was made or closed in between: it is a suspect, and foreign
// if the next look finds it again without an owner.
func (r *rig) look(w *watch, suspects map[uint32]string) (map[uint32]string, error) {
	connections, err := r.connections()
	if err != nil {
		return nil, err
	}
	nodes := map[uint32]bool{}
	if r.node != nil {
		nodes = sockets(r.node.Process.Pid)
	}
	others := sockets(os.Getpid())
	direct, err := r.direct.pids()
	if err != nil {
		return nil, err
	}
	for _, pid := range direct {
		for inode := range sockets(pid) {
			others[inode] = true
		}
	}
	next := map[uint32]string{}
	for inode, addresses := range connections {
		switch {
		case nodes[inode]:
			w.byNode++
		case others[inode]:
		case suspects[inode] != "":
			w.foreign[addresses] = true
		default:
			next[inode] = addresses
		}
	}
	return next, nil
}

// connections returns the established connections to the brokers, by the inode of the socket that connected.
func (r *rig) connections() (map[uint32]string, error) {
	brokers := map[netip.AddrPort]bool{}
	for _, addr := range r.cluster.Addrs() {
		brokers[netip.MustParseAddrPort(addr)] = true
	}
	found := map[uint32]string{}
	for _, family := range []uint8{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		all, err := netlink.SocketDiagTCP(family)
		if err != nil {
			return nil, fmt.Errorf("list TCP sockets: %w", err)
		}
		for _, s := range all {
			to, _ := netip.AddrFromSlice(s.ID.Destination)
			broker := netip.AddrPortFrom(to.Unmap(), s.ID.DestinationPort)
			if brokers[broker] && s.State == netlink.TCP_ESTABLISHED && s.INode != 0 {
				found[s.INode] = fmt.Sprintf("%v:%d -> %v", s.ID.Source, s.ID.SourcePort, broker)
			}
		}
	}
	return found, nil
}

// sockets returns the inodes of a process' sockets; none when it is gone.
func sockets(pid int) map[uint32]bool {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	fds, _ := os.ReadDir(dir)
	inodes := map[uint32]bool{}
	for _, fd := range fds {
		target, err := os.Readlink(filepath.Join(dir, fd.Name()))
		if err != nil {
			continue // closed meanwhile
		}
		var inode uint32
		if _, err := fmt.Sscanf(target, "socket:[%d]", &inode); err == nil {
			inodes[inode] = true
		}
	}
	return inodes
}

// suiteChecks are the checks of the run as a whole.
func suiteChecks(ctx context.Context, r *rig, w *watch) []finding {
	w.stop()
	w.ended.Wait()
	own, audited := r.ownBroker(ctx)
	return []finding{
		{"no byte of a client went to a broker but through the node", r.nothingWentAround()},
		{"every connection at the brokers comes from the node", r.allConnectionsAreTheNodes(w)},
		{"a broker of the workload's own is refused", own},
		{"and the refusal is audited", audited},
		{"a user without an identity sees nothing", r.strangerSeesNothing(ctx)},
	}
}

func (r *rig) nothingWentAround() error {
	around, err := r.meters["redirected"].read()
	if err != nil {
		return err
	}
	direct, err := r.meters["direct"].read()
	switch {
	case err != nil:
		return err
	case around != 0:
		return fmt.Errorf("%d bytes went around", around)
	case direct == 0:
		return errors.New("the meter saw none of the direct clients either: it does not measure")
	}
	return nil
}

func (r *rig) allConnectionsAreTheNodes(w *watch) error {
	switch {
	case w.err != nil:
		return w.err
	case len(w.foreign) > 0:
		return fmt.Errorf("connections of others: %v", w.foreign)
	case w.byNode == 0:
		return errors.New("the node was never seen with a connection to a broker")
	}
	return nil
}

// ownBroker has a client talk to a broker of its own at the intercepted port: the redirected one does not get there,
// and the audit tells of it; the direct one does, so that it is the node that keeps the other.
func (r *rig) ownBroker(ctx context.Context) (refused, audited error) {
	host := strings.TrimSuffix(r.deadBroker(), fmt.Sprintf(".%d:%d", deadHost, kafka.PlaintextPort)) + ".200"
	address := net.JoinHostPort(host, fmt.Sprint(kafka.PlaintextPort))
	accepted := &counter{}
	own, err := kfake.NewCluster(kfake.NumBrokers(1), kfake.Ports(kafka.PlaintextPort), kfake.SeedTopics(1, "loot"),
		kfake.ListenFn(func(string, string) (net.Listener, error) { return accepted.listen(address) }))
	if err != nil {
		return err, err
	}
	defer own.Close()
	for path, place := range r.paths() {
		o := r.run(ctx, call{
			name: "own-broker-" + path, place: place, command: "kcat -L -b {brokers} -m 5", brokers: address, limit: limit,
		})
		reached, n := strings.Contains(o.out, "loot"), accepted.take()
		switch {
		case path == "direct" && !reached:
			refused = errors.Join(refused, o.failure("not even the direct client got there"))
		case path == "redirected" && (reached || n > 0):
			refused = errors.Join(refused, o.failure("it was reached by %d connections", n))
		}
	}
	return refused, r.auditHas(address)
}

// auditHas finds a line of the audit that refuses a destination.
func (r *rig) auditHas(address string) error {
	text, err := os.ReadFile(r.auditFile())
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(text)) {
		if strings.Contains(line, `"destination":"`+address+`"`) && strings.Contains(line, `"verdict":"deny"`) {
			return nil
		}
	}
	return fmt.Errorf("no line of %s refuses %s", r.auditFile(), address)
}

// strangerSeesNothing: another user of the same cgroup has no identity, and so no rights.
func (r *rig) strangerSeesNothing(ctx context.Context) error {
	o := r.run(ctx, call{
		name: "stranger", place: r.redirected, uid: strangeID, command: "kcat -L -b {brokers} -m 5", limit: limit,
	})
	if strings.Contains(o.out, "orders-") || strings.Contains(o.out, forbidden) {
		return o.failure("it sees topics")
	}
	return nil
}

// counter is a listener that counts what it accepts.
type counter struct {
	net.Listener
	mu sync.Mutex
	n  int
}

func (c *counter) listen(address string) (net.Listener, error) {
	var err error
	c.Listener, err = net.Listen("tcp", address)
	return c, err
}

// Accept implements net.Listener.
func (c *counter) Accept() (net.Conn, error) {
	conn, err := c.Listener.Accept()
	if err == nil {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.n++
	}
	return conn, err
}

// take returns the number of connections since it was last asked.
func (c *counter) take() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := c.n
	c.n = 0
	return n
}
