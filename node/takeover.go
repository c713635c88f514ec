package node

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// takeOverSettle is how long after the programs were attached a connect(2) that had passed their place before may
	// still be on its way into the kernel's tables.
	takeOverSettle = time.Second
	// takeOverPasses bounds the looks at a host where connections keep appearing that the redirect does not take.
	takeOverPasses = 10
)

// takeOver ends connections to brokers that are older than the redirect, so that their clients connect again, through
// the node. Run it when the programs are attached and the namespaces enrolled, or clients find neither way.
type takeOver struct {
	mode EstablishedMode
	rate int // of connections ended per second, on average

	// broker tells of a destination, in the form that the function destination gives it, whether it is a broker's.
	broker func(netip.AddrPort) bool
	// exempt connections stay: of exempt processes, or of cgroups that are not redirected.
	exempt func(established) bool
	stamps int // file descriptor of bpf.Programs.Stamps: the node's own sockets are left alone

	report func(established)                          // once for each connection
	wait   func(context.Context, time.Duration) error // sleep, but in tests
}

// takeOverAction is what was done with an old connection.
type takeOverAction string

const (
	// takenDestroyed connections are ended: the client has got ECONNABORTED.
	takenDestroyed takeOverAction = "destroyed"
	// takenGone connections had ended by themselves.
	takenGone takeOverAction = "gone"
	// takenLeft connections go on past the node, because the mode is observe.
	takenLeft takeOverAction = "left"
	// takenExempt connections go on because exempt said so.
	takenExempt takeOverAction = "exempt"
	// takenPassive connections go on because their local port is listened on: this side is taken for a server whose
	// client has a broker's port. A client that connected from a port it listens on itself looks the same.
	takenPassive takeOverAction = "passive"
	// takenFailed connections go on, and err says why.
	takenFailed takeOverAction = "failed"
)

// takeOverSummary counts connections, each once.
type takeOverSummary map[takeOverAction]int

// established is a connection to a broker that is older than the redirect.
type established struct {
	tcpSocket
	netns  uint64         // inode
	broker netip.AddrPort // remote, as the function destination has it
	owners []owner        // processes that hold the socket; none when it is not known
	action takeOverAction
	err    error // of takenFailed

	in *outlook
}

// owner is a process that holds a socket. What could not be read is empty.
type owner struct {
	pid       int
	comm, exe string
}

// outlook is the view into one network namespace.
type outlook struct {
	*diag
	netns uint64
	known map[uint64]bool // cookies of what was found before
}

// run takes over the connections of the namespaces. It looks until nothing new is found, twice at least. The error says
// all that could not be looked at or ended. When ctx ends, what was not reached yet goes on unreported.
func (t *takeOver) run(ctx context.Context, namespaces []*netns) (takeOverSummary, error) {
	done := takeOverSummary{}
	if t.mode == RefuseNewOnly {
		return done, nil
	}
	outlooks, err := t.open(namespaces)
	defer func() {
		for _, o := range outlooks {
			o.Close()
		}
	}()
	errs := []error{err}
	for pass := 1; ; pass++ {
		var found []established
		for _, o := range outlooks {
			some, err := t.look(o)
			errs = append(errs, err)
			found = append(found, some...)
		}
		switch {
		case len(found) == 0 && pass > 1:
			return done, errors.Join(errs...)
		case pass == takeOverPasses:
			return done, errors.Join(append(errs, fmt.Errorf("after %d looks still new connections to brokers beside the "+
				"redirect, one of %s to %s: are their processes in node.cgroup?", pass, found[0].local, found[0].remote))...)
		}
		errs = append(errs, t.take(ctx, found, done))
		if ctx.Err() == nil {
			errs = append(errs, t.wait(ctx, takeOverSettle))
		}
		if ctx.Err() != nil {
			return done, errors.Join(errs...)
		}
	}
}

func (t *takeOver) open(namespaces []*netns) (outlooks []*outlook, err error) {
	for _, n := range namespaces {
		d, derr := openDiag(n, t.stamps)
		if derr != nil {
			err = errors.Join(err, derr)
			continue
		}
		outlooks = append(outlooks, &outlook{diag: d, netns: n.inode, known: map[uint64]bool{}})
	}
	return outlooks, err
}

// look finds what was not found before. The node's own sockets are not among it.
func (t *takeOver) look(o *outlook) (found []established, err error) {
	sockets, err := o.dump(func(s tcpSocket) bool {
		return !s.own && t.broker(destination(s.remote)) && !o.known[s.id.cookie()]
	}, stateEstablished, stateSynSent, stateSynRecv, stateFinWait1, stateFinWait2, stateCloseWait)
	if err != nil || len(sockets) == 0 {
		return nil, err
	}
	listeners, err := o.dump(func(tcpSocket) bool { return true }, stateListen)
	if err != nil {
		return nil, err
	}
	for _, s := range sockets {
		o.known[s.id.cookie()] = true
		c := established{tcpSocket: s, netns: o.netns, broker: destination(s.remote), in: o}
		if slices.ContainsFunc(listeners, s.acceptedBy) {
			c.action = takenPassive
		}
		found = append(found, c)
	}
	return found, nil
}

// acceptedBy tells whether the socket may come from the listener. A socket that connects shares its port with a
// listener only where both have SO_REUSEADDR.
func (s *tcpSocket) acceptedBy(l tcpSocket) bool {
	at, own := l.local.Addr(), s.local.Addr()
	return l.local.Port() == s.local.Port() &&
		(at == own || at == netip.IPv6Unspecified() || at == netip.IPv4Unspecified() && own.Is4())
}

// take deals with what was found, in no order, so that the members of a consumer group or the connections of one client
// do not end together.
func (t *takeOver) take(ctx context.Context, found []established, done takeOverSummary) error {
	inodes := map[uint32]bool{}
	for _, c := range found {
		inodes[c.inode] = true
	}
	owners := socketOwners("/proc", inodes)
	//nolint:gosec // as interval
	rand.Shuffle(len(found), func(i, j int) { found[i], found[j] = found[j], found[i] })
	var failed error
	for i := range found {
		c := &found[i]
		c.owners = owners[c.inode]
		switch {
		case c.action == takenPassive:
		case t.exempt(*c):
			c.action = takenExempt
		case t.mode == Observe:
			c.action = takenLeft
		default:
			if done[takenDestroyed] > 0 {
				if err := t.wait(ctx, t.interval()); err != nil {
					return errors.Join(failed, err)
				}
			}
			c.destroy()
		}
		done[c.action]++
		t.report(*c)
		if c.err != nil {
			failed = fmt.Errorf("connections to brokers go on past the node, %d so far: %w", done[takenFailed], c.err)
		}
	}
	return failed
}

// interval is half to one and a half of what the rate says: clients that were started together fall apart.
func (t *takeOver) interval() time.Duration {
	mean := time.Second / time.Duration(t.rate)
	return mean/2 + rand.N(mean+1) //nolint:gosec // jitter needs no secrecy
}

func (c *established) destroy() {
	switch c.err = c.in.destroy(c.tcpSocket); {
	case c.err == nil:
		c.action = takenDestroyed
	case errors.Is(c.err, errSocketGone):
		c.action, c.err = takenGone, nil
	default:
		c.action = takenFailed
	}
}

// socketOwners finds the processes that hold sockets, by the inodes of these. Processes that cannot be read, as they
// have ended or a security module forbids it, are left out.
func socketOwners(proc string, inodes map[uint32]bool) map[uint32][]owner {
	found := map[uint32][]owner{}
	processes, _ := filepath.Glob(filepath.Join(proc, "[0-9]*"))
	for _, dir := range processes {
		for inode := range heldSockets(filepath.Join(dir, "fd"), inodes) {
			found[inode] = append(found[inode], readOwner(dir))
		}
	}
	return found
}

// heldSockets are those of the wanted sockets that a directory like /proc/PID/fd has; none if it cannot be read.
func heldSockets(dir string, wanted map[uint32]bool) map[uint32]bool {
	held := map[uint32]bool{}
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		link, _ := os.Readlink(filepath.Join(dir, e.Name()))
		digits, is := strings.CutPrefix(link, "socket:[")
		inode, err := strconv.ParseUint(strings.TrimSuffix(digits, "]"), 10, 32)
		if is && err == nil && wanted[uint32(inode)] {
			held[uint32(inode)] = true
		}
	}
	return held
}

func readOwner(dir string) owner {
	pid, _ := strconv.Atoi(filepath.Base(dir))
	comm, _ := os.ReadFile(filepath.Join(dir, "comm"))
	exe, _ := os.Readlink(filepath.Join(dir, "exe"))
	return owner{pid: pid, comm: strings.TrimSuffix(string(comm), "\n"), exe: exe}
}

// sleep waits, or returns the error of ctx when that ends earlier.
func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// CheckTakeOver ends a connection of its own in a network namespace of its own, to see whether the kernel lets it.
func CheckTakeOver() (err error) {
	n, err := makeNetns()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, n.Close()) }()
	var server net.Listener
	var client net.Conn
	err = n.do(func() (err error) {
		if server, err = net.Listen("tcp", "127.0.0.1:0"); err == nil {
			client, err = net.Dial("tcp", server.Addr().String())
		}
		return err
	})
	if server != nil {
		defer func() { _ = server.Close() }()
	}
	if err != nil {
		return err
	}
	defer func() { _ = client.Close() }()
	d, err := openDiag(n, noStamps)
	if err != nil {
		return err
	}
	defer d.Close()
	local := netip.MustParseAddrPort(client.LocalAddr().String())
	own, err := d.dump(func(s tcpSocket) bool { return s.local == local }, stateEstablished)
	if err != nil {
		return err
	}
	if len(own) != 1 {
		return fmt.Errorf("sock_diag lists %d sockets at %s instead of one", len(own), local)
	}
	if err := d.destroy(own[0]); err != nil {
		return err
	}
	if _, err := client.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNABORTED) {
		return fmt.Errorf("a connection that was ended says %w, not %w", err, unix.ECONNABORTED)
	}
	return nil
}
