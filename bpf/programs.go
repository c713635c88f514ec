package bpf

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// Close lets go of the programs. Those that are pinned stay in force; others are detached, and from then on nothing is
// redirected or refused.
func (p *Programs) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	var errs []error
	// Connect first: what is already redirected then still finds its way.
	for i := len(p.hooks) - 1; i >= 0; i-- {
		if l := p.hooks[i].link; l != nil {
			errs = append(errs, l.Close())
		}
	}
	p.hooks = nil
	if p.events != nil {
		errs = append(errs, p.events.Close())
	}
	errs = append(errs, p.life.close(), p.objects.Close(), p.pins.close())
	for _, c := range p.cgroups {
		errs = append(errs, c.Close())
	}
	p.cgroups = nil
	return errors.Join(errs...)
}

// Network is where a port that others use too, like 443, is a broker's.
type Network struct {
	Prefix netip.Prefix // an IPv4 network is not written as a mapped one
	Port   uint16
}

func (n Network) key() redirectKlammNetwork {
	address, bits := n.Prefix.Addr().As16(), n.Prefix.Bits()
	if n.Prefix.Addr().Is4() {
		bits += 96
	}
	return redirectKlammNetwork{Bits: uint32(32 + bits), Port: uint32(n.Port), To: words(address)}
}

// SetDestinations replaces what is broker-bound: a connect to one of the ports, on any address, or to the port of a
// network in it.
func (p *Programs) SetDestinations(ports []uint16, networks []Network) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	var set redirectKlammPorts
	for _, port := range ports {
		set.Anywhere[port/64] |= 1 << (port % 64)
	}
	wanted := map[redirectKlammNetwork]bool{}
	for _, n := range networks {
		set.Somewhere[n.Port/64] |= 1 << (n.Port % 64)
		wanted[n.key()] = true
		if err := p.objects.KlammNetworks.Put(n.key(), uint8(1)); err != nil {
			return fmt.Errorf("set port %d of %s as a broker's: %w", n.Port, n.Prefix, err)
		}
	}
	if err := p.objects.KlammPorts.Put(uint32(0), &set); err != nil {
		return fmt.Errorf("set the broker ports %v: %w", ports, err)
	}
	return p.forgetNetworks(wanted)
}

func (p *Programs) forgetNetworks(but map[redirectKlammNetwork]bool) error {
	var stale []redirectKlammNetwork
	var n redirectKlammNetwork
	var one uint8
	all := p.objects.KlammNetworks.Iterate()
	for all.Next(&n, &one) {
		if !but[n] {
			stale = append(stale, n)
		}
	}
	errs := []error{all.Err()}
	for _, n := range stale {
		if err := p.objects.KlammNetworks.Delete(n); !errors.Is(err, ebpf.ErrKeyNotExist) {
			errs = append(errs, err)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("take brokers' networks out of the redirect: %w", err)
	}
	return nil
}

// Ports are the ports that are broker-bound on any address.
func (p *Programs) Ports() ([]uint16, error) { return readPorts(p.objects.KlammPorts) }

func readPorts(m *ebpf.Map) (ports []uint16, err error) {
	var set redirectKlammPorts
	if err := m.Lookup(uint32(0), &set); err != nil {
		return nil, fmt.Errorf("read the broker ports: %w", err)
	}
	for port := range 65536 {
		if set.Anywhere[port/64]>>(port%64)&1 == 1 {
			ports = append(ports, uint16(port))
		}
	}
	return ports, nil
}

// addPorts leaves those that are there.
func (p *Programs) addPorts(ports []uint16) error {
	var set redirectKlammPorts
	err := p.objects.KlammPorts.Lookup(uint32(0), &set)
	for _, port := range ports {
		set.Anywhere[port/64] |= 1 << (port % 64)
	}
	if err == nil {
		err = p.objects.KlammPorts.Put(uint32(0), &set)
	}
	if err != nil {
		return fmt.Errorf("set the broker ports %v: %w", ports, err)
	}
	return nil
}

// FailModes says what passes where it cannot be enforced. The zero value refuses.
type FailModes struct {
	PassDown       bool // broker-bound connects while the heartbeat is over
	PassUnenrolled bool // and those in a network namespace without a listener
}

// SetFailModes sets what Load has found, refusal in the beginning.
func (p *Programs) SetFailModes(m FailModes) error {
	return p.configure(func(c *redirectKlammConfig) {
		c.PassDown, c.PassUnenrolled = b2u(m.PassDown), b2u(m.PassUnenrolled)
	})
}

// CutEstablished lets the second line stop also what was connected before the programs were attached. Without it only
// what begins a connection is stopped.
func (p *Programs) CutEstablished(cut bool) error {
	return p.configure(func(c *redirectKlammConfig) { c.CutEstablished = b2u(cut) })
}

// Beat says that the enforcer is up for so long. Once that is over, and before the first beat, it counts as down.
func (p *Programs) Beat(d time.Duration) error {
	now, err := sinceBoot()
	if err != nil {
		return err
	}
	return p.configure(func(c *redirectKlammConfig) { c.Deadline = now + uint64(d) })
}

// Up tells whether the enforcer counts as up.
func (p *Programs) Up() (bool, error) {
	var c redirectKlammConfig
	now, err := sinceBoot()
	if err == nil {
		err = p.objects.KlammConfig.Lookup(uint32(0), &c)
	}
	return now <= c.Deadline, err
}

func (p *Programs) configure(change func(*redirectKlammConfig)) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	change(&p.config)
	if err := p.objects.KlammConfig.Put(uint32(0), &p.config); err != nil {
		return fmt.Errorf("configure the eBPF programs: %w", err)
	}
	return nil
}

func b2u(b bool) uint8 {
	if b {
		return 1
	}
	return 0
}

// StopEvents makes Event and Executed return.
func (p *Programs) StopEvents() error { return errors.Join(p.events.Close(), p.life.executed.Close()) }

// Event waits for something that happened in the kernel. It is for one goroutine; after StopEvents the error is
// os.ErrClosed.
func (p *Programs) Event() (Event, error) {
	for {
		r, err := p.events.Read()
		if err != nil {
			return Event{}, fmt.Errorf("read the events of the eBPF programs: %w", err)
		}
		if e, ok := parseEvent(r.RawSample); ok {
			return e, nil
		}
	}
}

// Enrol names the listener of a network namespace, by the port on which it listens at 127.0.0.1 and ::1. cookie is
// SO_NETNS_COOKIE of any socket made in it. Broker-bound connects are refused in a namespace that is not enrolled.
func (p *Programs) Enrol(cookie uint64, port uint16) error {
	if err := p.objects.KlammEnrolled.Put(cookie, redirectKlammListener{Port: port}); err != nil {
		return fmt.Errorf("enrol network namespace %d with port %d: %w", cookie, port, err)
	}
	return nil
}

// Unenrol undoes Enrol; it is no error if cookie is not enrolled.
func (p *Programs) Unenrol(cookie uint64) error {
	if err := p.objects.KlammEnrolled.Delete(cookie); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("take network namespace %d out of the redirect: %w", cookie, err)
	}
	return nil
}

// Exempt lets the processes in a cgroup and below it connect to brokers directly: meant for brokers on this host.
// cgroupID is the inode of the directory in cgroup2. A process is exempt by the cgroup in which it is when it connects.
// Cgroups deeper than 31 levels cannot be exempted.
func (p *Programs) Exempt(cgroupID uint64) error {
	err := p.objects.KlammExempt.Update(cgroupID, uint64(0), ebpf.UpdateNoExist)
	if err != nil && !errors.Is(err, ebpf.ErrKeyExist) {
		return fmt.Errorf("exempt cgroup %d: %w", cgroupID, err)
	}
	return nil
}

// Unexempt undoes Exempt; it is no error if cgroupID is not exempt.
func (p *Programs) Unexempt(cgroupID uint64) error {
	if err := p.objects.KlammExempt.Delete(cgroupID); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("redirect cgroup %d again: %w", cgroupID, err)
	}
	return nil
}

// Exempted are the exempt cgroups, with how often a process in each has connected to a broker.
func (p *Programs) Exempted() (map[uint64]uint64, error) {
	connects := map[uint64]uint64{}
	var id, n uint64
	all := p.objects.KlammExempt.Iterate()
	for all.Next(&id, &n) {
		connects[id] = n
	}
	if err := all.Err(); err != nil {
		return nil, fmt.Errorf("read the exempt cgroups: %w", err)
	}
	return connects, nil
}

// Enrolled are the cookies of the network namespaces that have a listener, with its port.
func (p *Programs) Enrolled() (map[uint64]uint16, error) {
	ports := map[uint64]uint16{}
	var cookie uint64
	var l redirectKlammListener
	all := p.objects.KlammEnrolled.Iterate()
	for all.Next(&cookie, &l) {
		ports[cookie] = l.Port
	}
	if err := all.Err(); err != nil {
		return nil, fmt.Errorf("read the enrolled network namespaces: %w", err)
	}
	return ports, nil
}

// Down refuses connects to a destination in a network namespace for so long, as its host would where nobody listens:
// the node could not reach it.
func (p *Programs) Down(cookie uint64, to netip.AddrPort, d time.Duration) error {
	key := destination(cookie, to)
	until, err := sinceBoot()
	if err == nil {
		err = p.objects.KlammDown.Put(&key, until+uint64(d))
	}
	if err != nil {
		return fmt.Errorf("refuse connects to %s: %w", to, err)
	}
	return nil
}

// Forget removes what Down said, once its time is over.
func (p *Programs) Forget(cookie uint64, to netip.AddrPort) error {
	key := destination(cookie, to)
	var until uint64
	err := p.objects.KlammDown.Lookup(&key, &until)
	if err == nil {
		var now uint64
		if now, err = sinceBoot(); err == nil && now >= until {
			err = p.objects.KlammDown.Delete(&key)
		}
	}
	if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("forget that %s is down: %w", to, err)
	}
	return nil
}

func destination(cookie uint64, to netip.AddrPort) redirectKlammDestination {
	return redirectKlammDestination{NetnsCookie: cookie, Port: uint32(to.Port()), To: words(to.Addr().As16())}
}

func words(address [16]byte) (a redirectKlammAddress) {
	for i := range a.Word {
		a.Word[i] = binary.NativeEndian.Uint32(address[4*i:])
	}
	return a
}

// sinceBoot is bpf_ktime_get_boot_ns.
func sinceBoot() (uint64, error) {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &t); err != nil {
		return 0, fmt.Errorf("read the time since boot: %w", err)
	}
	return uint64(t.Nano()), nil
}

// StampOwn is the value of Stamps for the node's own sockets: KLAMM_STAMP_OWN.
const StampOwn = 1

// Stamp marks a socket as the node's own: it may connect to brokers and bind the listener's port. Stamp before
// connect(2) or bind(2). Sockets accepted by a stamped listener are not stamped.
func (p *Programs) Stamp(fd int) error {
	if err := p.objects.KlammStamp.Put(int32(fd), uint8(StampOwn)); err != nil {
		return fmt.Errorf("stamp the socket: %w", err)
	}
	return nil
}

// Stamps is the sk_storage map of the stamps, for sock_diag(7), which by its file descriptor tells what sockets have.
func (p *Programs) Stamps() *ebpf.Map { return p.objects.KlammStamp }

// Record returns who connected the accepted socket fd, and where to. ErrNoRecord and ErrRecordVersion are reasons to
// refuse it, as is any other error.
func (p *Programs) Record(fd int) (Record, error) {
	var r Record
	switch err := p.objects.KlammAccepted.Lookup(int32(fd), &r); {
	case errors.Is(err, ebpf.ErrKeyNotExist):
		return Record{}, ErrNoRecord
	case err != nil:
		return Record{}, fmt.Errorf("read the record of a socket: %w", err)
	case r.Version != recordVersion:
		return Record{}, fmt.Errorf("%w: it is %d, not %d", ErrRecordVersion, r.Version, recordVersion)
	}
	return r, nil
}

// Task returns what the process pid (a thread group id in the init pid namespace) is now; ErrNoTask if there is none.
func (p *Programs) Task(pid uint32) (TaskFacts, error) {
	return p.tasks.read(pid)
}
