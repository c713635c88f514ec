package node

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"

	"klamm/bpf"
)

const (
	// acceptPauseMin and acceptPauseMax bound the pause after a failed accept(2), which doubles: for want of file
	// descriptors, trying at once would only burn the CPU.
	acceptPauseMin = 5 * time.Millisecond
	acceptPauseMax = time.Second
	// heartbeat is how often the node says that it accepts connections; heartbeatFor is how long that is believed. A
	// busy host may be late by seconds, and a client that waits in the backlog loses nothing.
	heartbeat    = 500 * time.Millisecond
	heartbeatFor = 5 * time.Second
	// downFor is how long a destination that could not be reached is refused without trying again.
	downFor = time.Second
)

// RedirectOptions are the options of OpenRedirect.
type RedirectOptions struct {
	// CgroupPath is the directory in cgroup2 whose processes are redirected, with all below. Default: the root, which
	// alone leaves no way around.
	CgroupPath string
	// Pins is where the programs outlive the process; see bpf.Options.
	Pins string
	// Ports are the brokers' ports from the first moment on; see SetDestinations.
	Ports []uint16
	// Before are what the node before this one left: its listeners, and its lock on the pins.
	Before inheritance
	// Manager keeps the listeners when the process ends, and is told that it lives. Default: none.
	Manager serviceManager
	// OnEvent is told what the kernel refused or let pass unenforced. Default: nobody is.
	OnEvent func(bpf.Event)
	Log     zerolog.Logger
}

// Redirect is the kernel's redirect and the listeners behind it. All methods may be called concurrently, but none after
// Close except Accept.
type Redirect struct {
	programs *bpf.Programs
	enrolled *enrolments
	onEvent  func(bpf.Event)
	manager  serviceManager
	accepted chan redirected
	beat     *time.Ticker
	closed   chan struct{}
	running  sync.WaitGroup
	stop     func() error
	close    func() error

	// The node's own Kafka clients may still dial, and metrics be read, while it closes.
	using sync.RWMutex
	gone  bool // the programs are closed

	acceptRefused, acceptFailed atomic.Uint64
}

// redirected is an accepted connection with its record.
type redirected struct {
	conn   *net.TCPConn
	record bpf.Record
}

// OpenRedirect attaches the programs and listens in the network namespace of the caller and in those of the processes
// that are redirected. Until Accept is called the enforcer counts as down. Where it fails, the error says what the user
// can do; see bpf.Load for its kinds.
func OpenRedirect(o RedirectOptions) (_ *Redirect, err error) {
	root, err := Cgroup2Mount()
	if err != nil {
		return nil, err
	}
	if o.CgroupPath == "" {
		o.CgroupPath = root
	}
	programs, err := bpf.Load(bpf.Options{CgroupPath: o.CgroupPath, ListenerCgroup: ownCgroup(root), Pins: o.Pins,
		Lock: o.Before.lock, Ports: o.Ports})
	if err != nil {
		return nil, err
	}
	r := &Redirect{programs: programs, onEvent: o.OnEvent, manager: o.Manager, accepted: make(chan redirected),
		beat: time.NewTicker(heartbeat), closed: make(chan struct{})}
	r.enrolled = newEnrolments(programs, o, r.listenFor)
	r.stop = sync.OnceValue(func() error {
		close(r.closed)
		r.beat.Stop()
		return r.enrolled.Close()
	})
	r.close = sync.OnceValue(r.shut)
	defer func() {
		if err != nil {
			err = errors.Join(err, r.Close())
		}
	}()
	if err := r.enrolled.begin(o.Before.listeners); err != nil {
		return nil, err
	}
	r.running.Go(func() { r.enrolled.follow(r.closed) })
	r.running.Go(r.events)
	return r, nil
}

// listenFor serves a listener until it is closed.
func (r *Redirect) listenFor(l *net.TCPListener) { r.running.Go(func() { r.serve(l) }) }

// control calls f with the file descriptor.
func control(c syscall.RawConn, f func(fd int) error) (err error) {
	return errors.Join(c.Control(func(fd uintptr) { err = f(int(fd)) }), err)
}

// serve accepts until the listener is closed.
func (r *Redirect) serve(l *net.TCPListener) {
	pause := acceptPauseMin
	for {
		conn, err := l.AcceptTCP()
		switch {
		case errors.Is(err, net.ErrClosed):
			return
		case err != nil:
			r.acceptFailed.Add(1)
			select {
			case <-time.After(pause):
			case <-r.closed:
				return
			}
			pause = min(2*pause, acceptPauseMax)
			continue
		}
		pause = acceptPauseMin
		record, err := r.record(conn)
		if err != nil {
			r.acceptRefused.Add(1)
			reset(conn)
			continue
		}
		select {
		case r.accepted <- redirected{conn, record}:
		case <-r.closed:
			reset(conn)
		}
	}
}

func (r *Redirect) record(conn *net.TCPConn) (record bpf.Record, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return bpf.Record{}, err
	}
	err = control(raw, func(fd int) (err error) {
		record, err = r.programs.Record(fd)
		return err
	})
	return record, err
}

// events acts on what the kernel tells, until the programs are closed.
func (r *Redirect) events() {
	for {
		e, err := r.programs.Event()
		switch {
		case errors.Is(err, os.ErrClosed):
			return
		case err != nil:
			r.enrolled.log.Error().Err(err).Msg("what the kernel tells is not read; enrolment is slower")
			continue
		}
		if e.Unenrolled() {
			r.enrolled.noticed(e)
		}
		if e.Reason() != "" && r.onEvent != nil {
			r.onEvent(e)
		}
	}
}

// Unnoticed says why an execve is not noticed at once; see bpf.Programs.Unnoticed.
func (r *Redirect) Unnoticed() error { return r.programs.Unnoticed() }

// followExecve tells of the execve of watched processes until the redirect is closed; see bpf.Programs.Watch.
func (r *Redirect) followExecve(executed func(pid uint32)) {
	r.running.Go(func() {
		for {
			pid, err := r.programs.Executed()
			switch {
			case errors.Is(err, os.ErrClosed):
				return
			case err != nil:
				r.enrolled.log.Error().Err(err).Msg("what the kernel tells of execve is not read; it is noticed later")
				continue
			}
			executed(pid)
		}
	})
}

// Accept waits for the next redirected connection. A connection that has no record was not redirected: it is reset and
// counted, never returned. The error is net.ErrClosed after Close, and none other. While nobody calls Accept there is
// no heartbeat, and the enforcer counts as down.
func (r *Redirect) Accept() (net.Conn, bpf.Record, error) {
	for {
		select {
		case a := <-r.accepted:
			return a.conn, a.record, nil
		case <-r.beat.C:
			if err := errors.Join(r.programs.Beat(heartbeatFor), r.manager.tell("WATCHDOG=1")); err != nil {
				r.enrolled.log.Error().Err(err).Msg("no heartbeat: the enforcer may count as down")
			}
		case <-r.closed:
			return nil, bpf.Record{}, fmt.Errorf("accept a redirected connection: %w", net.ErrClosed)
		}
	}
}

// Begin makes the enforcer count as up: Accept is about to be called.
func (r *Redirect) Begin() error { return r.programs.Beat(heartbeatFor) }

// End makes the enforcer count as down, without waiting for the heartbeat to be over: nobody will accept what waits.
func (r *Redirect) End() error { return r.programs.Beat(0) }

// Dial connects to a broker itself, over plain TCP: from the network namespace of the calling thread, or from the
// client's, in which alone loopback destinations mean something. In the client's own namespace it also connects from
// the address that the client was bound to, because brokers' ACLs and descriptions of groups name hosts.
func (r *Redirect) Dial(
	ctx context.Context, record bpf.Record, client net.Addr, fromClient bool,
) (conn *net.TCPConn, err error) {
	to, from := record.Destination(), netip.AddrPort{}
	inHost := r.IsHost(record.NetnsCookie)
	inClient := fromClient || to.Addr().IsLoopback()
	if inHost || inClient {
		from = boundTo(client, to.Addr())
	}
	dial := func() error {
		conn, err = r.Dialer().DialTCP(ctx, "tcp", from, to)
		return err
	}
	if inHost || !inClient {
		return conn, dial()
	}
	return conn, r.enrolled.in(record.NetnsCookie, dial)
}

// boundTo is the address, without a port, that a redirected client has on its way to a destination. One that was not
// bound has got loopback from the redirect, which says nothing unless that is where it wanted to go.
func boundTo(client net.Addr, to netip.Addr) netip.AddrPort {
	tcp, _ := client.(*net.TCPAddr)
	if tcp == nil {
		return netip.AddrPort{}
	}
	from := tcp.AddrPort().Addr().Unmap()
	if from.Is4() != to.Unmap().Is4() || from.IsLoopback() && !to.Unmap().IsLoopback() {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(from, 0)
}

// IsHost tells whether a network namespace is the node's own.
func (r *Redirect) IsHost(cookie uint64) bool { return cookie == r.enrolled.host }

// Dialer returns a dialer for the node itself: its sockets are stamped before they connect, so they are not redirected.
// They are plain TCP, since the stamp of an MPTCP socket is not on the subflow that connects.
func (r *Redirect) Dialer() *net.Dialer {
	d := &net.Dialer{Control: func(_, _ string, c syscall.RawConn) error { return control(c, r.prepare) }}
	d.SetMultipathTCP(false)
	return d
}

// Down makes clients see for a second what the node saw: a broker that refuses connections.
func (r *Redirect) Down(record bpf.Record) error {
	cookie, to := record.NetnsCookie, record.Destination()
	r.running.Go(func() {
		select {
		case <-time.After(2 * downFor):
			_ = r.programs.Forget(cookie, to) // an entry that stays has no effect
		case <-r.closed:
		}
	})
	return r.programs.Down(cookie, to, downFor)
}

// prepare stamps a socket that is about to connect. Its port is chosen by connect(2) even where it is bound to an
// address (Linux 4.2): bind(2) would take one for all destinations, and an address would have 28,000 in all.
func (r *Redirect) prepare(fd int) error {
	return errors.Join(unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1), r.stamp(fd))
}

func (r *Redirect) stamp(fd int) error {
	r.using.RLock()
	defer r.using.RUnlock()
	if r.gone {
		return net.ErrClosed
	}
	return r.programs.Stamp(fd)
}

// SetDestinations replaces what is broker-bound; see bpf.Programs.SetDestinations.
func (r *Redirect) SetDestinations(ports []uint16, networks []bpf.Network) error {
	return r.programs.SetDestinations(ports, networks)
}

// Ports are the ports that are broker-bound on any address.
func (r *Redirect) Ports() ([]uint16, error) { return r.programs.Ports() }

// SetFailModes sets what passes where it cannot be enforced.
func (r *Redirect) SetFailModes(m bpf.FailModes) error { return r.programs.SetFailModes(m) }

// Repair attaches what was severed; see bpf.Programs.Repair.
func (r *Redirect) Repair() (wrong []string, err error) { return r.programs.Repair() }

// Task returns what a process is now; see bpf.Programs.Task.
func (r *Redirect) Task(pid uint32) (bpf.TaskFacts, error) { return r.programs.Task(pid) }

// Counters returns the kernel's counters (see bpf.Programs.Counters) and two of the listeners:
//
//	accept_refused  accepted connections that were reset, because they had no record or its version was not ours
//	accept_failed   failures of accept(2), such as for want of file descriptors; the clients wait meanwhile
func (r *Redirect) Counters() (map[string]uint64, error) {
	r.using.RLock()
	defer r.using.RUnlock()
	if r.gone {
		return nil, net.ErrClosed
	}
	counters, err := r.programs.Counters()
	if err != nil {
		return nil, err
	}
	maps.Copy(counters, map[string]uint64{
		"accept_refused": r.acceptRefused.Load(),
		"accept_failed":  r.acceptFailed.Load(),
	})
	return counters, nil
}

// Stop stops listening, and Accept with it. From then on clients are refused, or wait in the backlog of a listener that
// is kept.
func (r *Redirect) Stop() error { return r.stop() }

// Close stops listening and lets go of the programs. Where they are pinned clients are refused from then on, elsewhere
// they connect directly. Connections that Accept has returned stay open.
func (r *Redirect) Close() error { return r.close() }

// shut stops the listeners first, since they use the programs. A client that connects in between is refused.
func (r *Redirect) shut() error {
	err := errors.Join(r.stop(), r.programs.StopEvents())
	r.running.Wait()
	r.using.Lock()
	defer r.using.Unlock()
	r.gone = true
	return errors.Join(err, r.programs.Close())
}
