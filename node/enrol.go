package node

import (
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"klamm/bpf"
)

// sweepPeriod is how often the node looks for network namespaces in which no process is left, and how long at most one
// outlives its container.
const sweepPeriod = 2 * time.Second

// inheritance is what one node leaves to the next.
type inheritance struct {
	listeners []*os.File
	lock      *os.File // on the pins
}

// enrolments are the network namespaces in which the node listens: its own, those of the processes that are redirected,
// found at start, and those that the kernel or a container runtime tells of. In any other broker-bound connects are
// refused, so a namespace that is noticed late costs its clients a retry.
type enrolments struct {
	programs *bpf.Programs
	cgroup   string         // of the processes that are redirected
	manager  serviceManager // keeps the listeners when the process ends
	serve    func(*net.TCPListener)
	log      zerolog.Logger
	host     uint64 // cookie of the node's own
	searched time.Time

	mu     sync.Mutex // also makes one of two enrolments of the same namespace wait for the other
	known  map[uint64]*enrolment
	closed bool
}

// enrolment is a network namespace in which the node listens.
type enrolment struct {
	*netns
	listener
	empty bool // no process was in it the last time
}

func newEnrolments(programs *bpf.Programs, o RedirectOptions, serve func(*net.TCPListener)) *enrolments {
	return &enrolments{programs: programs, cgroup: o.CgroupPath, manager: o.Manager, serve: serve, log: o.Log,
		known: map[uint64]*enrolment{}}
}

// begin takes over the listeners of a node before this one, and enrols the node's own namespace and those that are
// there.
func (e *enrolments) begin(before []*os.File) (err error) {
	if e.host, err = ownCookie(); err != nil {
		return err
	}
	e.adopt(before)
	if err := e.enrol("/proc/thread-self/ns/net", e.host); err != nil {
		return err
	}
	for inode, pid := range namespacesOf(processesIn(e.cgroup)) {
		if err := e.enrol(netnsPath(pid), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
			e.log.Warn().Err(err).Uint64("netns", inode).Msg("no listener in a network namespace; brokers are refused there")
		}
	}
	return nil
}

// errOther says that a network namespace is not the one that was meant: a pid was used again.
var errOther = errors.New("it is another network namespace")

// enrol listens in the network namespace of a path, if it has the cookie (0: any). It is no error if the node does
// already.
func (e *enrolments) enrol(path string, cookie uint64) error {
	ns, err := openNetns(path)
	if err != nil {
		return err
	}
	if cookie != 0 && ns.cookie != cookie {
		return errors.Join(fmt.Errorf("network namespace %s: %w", path, errOther), ns.Close())
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed || e.known[ns.cookie] != nil {
		return ns.Close()
	}
	ports, err := e.programs.Ports()
	if err != nil {
		return errors.Join(err, ns.Close())
	}
	var l listener
	err = ns.do(func() (err error) {
		l, err = listen(e.programs.Stamp, func(port uint16) bool { return slices.Contains(ports, port) })
		return err
	})
	if err != nil {
		return errors.Join(fmt.Errorf("network namespace %s: %w", path, err), ns.Close())
	}
	return e.add(&enrolment{netns: ns, listener: l})
}

// add puts a listener into service. e.mu is held.
func (e *enrolments) add(n *enrolment) error {
	if err := e.programs.Enrol(n.cookie, n.port); err != nil {
		return errors.Join(err, n.listener.Close(), n.netns.Close())
	}
	e.known[n.cookie] = n
	for _, l := range n.tcp {
		e.serve(l)
	}
	if err := e.manager.keep(n.name(), n.files()); err != nil {
		e.log.Warn().Err(err).Msg("a listener will not outlive the node; clients are refused while it restarts")
	}
	e.log.Debug().Uint64("netns", n.inode).Uint16("port", n.port).Msg("network namespace enrolled")
	return nil
}

// name is what the manager knows the listeners by.
func (n *enrolment) name() string { return "netns-" + strconv.FormatUint(n.cookie, 10) }

// files are the listeners' file descriptors, duplicates.
func (n *enrolment) files() (files []*os.File) {
	for _, l := range n.tcp {
		if f, err := l.File(); err == nil { // fails for want of descriptors only: then it is not kept
			files = append(files, f)
		}
	}
	return files
}

// adopt takes over listeners that another process opened. What is none of the kind is closed.
func (e *enrolments) adopt(files []*os.File) {
	e.mu.Lock()
	defer e.mu.Unlock()
	found := map[uint64]*enrolment{}
	for _, f := range files {
		l, ns, err := adoptListener(f, e.programs.Stamp)
		if err != nil {
			e.log.Warn().Err(err).Msg("a listener of the node before is of no use")
			continue
		}
		n := found[ns.cookie]
		switch port := uint16(l.Addr().(*net.TCPAddr).Port); {
		case n == nil:
			found[ns.cookie] = &enrolment{netns: ns, listener: listener{port, []*net.TCPListener{l}}}
		case n.port == port:
			n.tcp = append(n.tcp, l)
			_ = ns.Close()
		default: // of an older node still
			_, _ = l.Close(), ns.Close()
		}
	}
	for _, n := range found {
		if err := e.add(n); err != nil {
			e.log.Warn().Err(err).Msg("a listener of the node before is of no use")
		}
	}
}

// noticed enrols the namespace of an event. It is called by one goroutine.
func (e *enrolments) noticed(event bpf.Event) {
	err := e.enrol(netnsPath(int(event.TID)), event.NetnsCookie)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, errOther) {
		err = e.search(event.NetnsCookie)
	}
	if err != nil {
		e.log.Warn().Err(err).Str("comm", event.Comm.String()).Uint32("pid", event.TGID).
			Msg("no listener in a network namespace; brokers are refused there")
	}
}

// searchPause keeps those who make namespaces by the thousand from keeping the node busy.
const searchPause = 100 * time.Millisecond

// search enrols a namespace whose thread has ended, or moved on, by another that is still there. If there is none, it
// is over, or will be noticed again.
func (e *enrolments) search(cookie uint64) error {
	if time.Since(e.searched) < searchPause {
		return nil
	}
	e.searched = time.Now()
	for _, pid := range namespacesOf(processesIn(e.cgroup)) {
		err := e.enrol(netnsPath(pid), cookie)
		if err == nil || !errors.Is(err, os.ErrNotExist) && !errors.Is(err, errOther) {
			return err
		}
	}
	return nil
}

// in calls f on a thread in an enrolled namespace.
func (e *enrolments) in(cookie uint64, f func() error) error {
	e.mu.Lock()
	n := e.known[cookie]
	e.mu.Unlock()
	if n == nil {
		return fmt.Errorf("network namespace %d has ended", cookie)
	}
	return n.do(f)
}

// follow closes the listeners of namespaces that have no process any more, until done: a listener keeps its namespace
// alive, with all its devices.
func (e *enrolments) follow(done <-chan struct{}) {
	tick := time.NewTicker(sweepPeriod)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			e.sweep()
		case <-done:
			return
		}
	}
}

// sweep: twice empty is over, for a namespace may be enrolled before its first process is in it.
func (e *enrolments) sweep() {
	pids := processesIn(e.cgroup)
	inhabited := namespacesOf(pids)
	e.mu.Lock()
	defer e.mu.Unlock()
	var threads map[uint64]int
	for _, n := range e.known {
		if n.cookie == e.host {
			continue
		}
		_, there := inhabited[n.inode]
		if !there && n.empty {
			if threads == nil {
				threads = namespacesOf(threadsOf(pids))
			}
			_, there = threads[n.inode]
			if !there {
				e.end(n)
				continue
			}
		}
		n.empty = !there
	}
}

// release closes the listeners of a namespace at once.
func (e *enrolments) release(cookie uint64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if n := e.known[cookie]; n != nil && cookie != e.host {
		e.end(n)
	}
}

// end takes a namespace out of service. e.mu is held.
func (e *enrolments) end(n *enrolment) {
	delete(e.known, n.cookie)
	err := errors.Join(e.programs.Unenrol(n.cookie), e.manager.drop(n.name()), n.listener.Close(), n.netns.Close())
	if err != nil {
		e.log.Warn().Err(err).Uint64("netns", n.inode).Msg("leaving a network namespace")
	}
}

// all are the enrolled namespaces, as open descriptors that the caller closes.
func (e *enrolments) all() (open []*netns) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, n := range e.known {
		if ns, err := n.dup(); err == nil { // fails for want of descriptors
			open = append(open, ns)
		}
	}
	return open
}

// listeners are all listeners, as duplicates to be handed over.
func (e *enrolments) listeners() (files []*os.File) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, n := range e.known {
		files = append(files, n.files()...)
	}
	return files
}

// Close stops listening everywhere. The kernel keeps the ports: what connects there is refused, or waits for who takes
// over.
func (e *enrolments) Close() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.closed = true
	var errs []error
	for _, n := range e.known {
		errs = append(errs, n.listener.Close(), n.netns.Close())
	}
	clear(e.known)
	return errors.Join(errs...)
}
