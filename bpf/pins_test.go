package bpf

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// pinsDir is a directory on a BPF file system of the test's own.
func pinsDir(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("bpffs", dir, "bpf", 0, "mode=0700"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return filepath.Join(dir, "klamm")
}

func loadPinned(t testing.TB, dir string) *Programs {
	t.Helper()
	p, err := Load(Options{CgroupPath: testCgroup, Pins: dir, Ports: []uint16{brokerPort}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Close() })
	return p
}

// get is the client's error for a connect to a broker.
func get(t testing.TB, cgroup string) string {
	t.Helper()
	return startClient(t, cgroup, plan{Steps: []step{{Do: "connect", To: at("127.0.0.1", brokerPort)}}}, 0).outcome().Error
}

func closed(t testing.TB, p *Programs) {
	t.Helper()
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestPinsKeepBrokersRefusedUntilTheyAreRemoved(t *testing.T) {
	enterNewNetns(t)
	dir, clients := pinsDir(t), makeCgroup(t, "clients")
	broker := listen(t, at("127.0.0.1", brokerPort))
	closed(t, loadPinned(t, dir))
	if got := get(t, clients); got != "ECONNREFUSED" {
		t.Errorf("after the process that loaded them the client got %q", got)
	}
	p := loadPinned(t, dir)
	if err := Uninstall(dir); !errors.Is(err, ErrRunning) {
		t.Errorf("they can be removed while they are used: %v", err)
	}
	if _, err := Load(Options{CgroupPath: testCgroup, Pins: dir}); !errors.Is(err, ErrRunning) {
		t.Errorf("they can be used twice: %v", err)
	}
	closed(t, p)
	if err := errors.Join(Uninstall(dir), Uninstall(dir)); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error { // the kernel detaches a moment after the last reference is gone
		if got := get(t, clients); got != "" {
			return fmt.Errorf("after Uninstall the client got %q", got)
		}
		return nil
	})
	acceptFrom(t, broker)
}

func TestTheNextProcessFindsWhatTheLastOneSet(t *testing.T) {
	enterNewNetns(t)
	dir := pinsDir(t)
	p := loadPinned(t, dir)
	if err := errors.Join(p.Enrol(42, 4242), p.Exempt(4711), p.SetDestinations([]uint16{brokerPort, 7777}, nil),
		p.SetFailModes(FailModes{PassUnenrolled: true}), p.Beat(time.Hour)); err != nil {
		t.Fatal(err)
	}
	closed(t, p)
	p = loadPinned(t, dir)
	ports, err := p.Ports()
	enrolled, err1 := p.Enrolled()
	exempt, err2 := p.Exempted()
	up, err3 := p.Up()
	if err := errors.Join(err, err1, err2, err3); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(ports, []uint16{7777, brokerPort}) || enrolled[42] != 4242 || len(exempt) != 1 || !up ||
		p.config.PassUnenrolled != 1 {
		t.Errorf("ports %v, enrolled %v, exempt %v, up %v, %+v", ports, enrolled, exempt, up, p.config)
	}
}

func TestAnotherLayoutTakesThePortsAndTheLinksOver(t *testing.T) {
	enterNewNetns(t)
	dir, clients := pinsDir(t), makeCgroup(t, "clients")
	_ = listen(t, at("127.0.0.1", brokerPort))
	p := loadPinned(t, dir)
	if err := p.SetDestinations([]uint16{7777}, nil); err != nil {
		t.Fatal(err)
	}
	now := p.pins.generation
	closed(t, p)
	// What a node before this one would have left, and one that crashed while it pinned.
	if err := errors.Join(os.Rename(filepath.Join(dir, now), filepath.Join(dir, "v0-before")),
		os.MkdirAll(filepath.Join(dir, now+"-new", "maps"), 0o700)); err != nil {
		t.Fatal(err)
	}
	p = loadPinned(t, dir)
	if ports, err := p.Ports(); err != nil || !slices.Equal(ports, []uint16{7777, brokerPort}) {
		t.Errorf("the ports are %v, %v", ports, err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 || left[0].Name() != now {
		t.Errorf("pinned are %v, %v", left, err)
	}
	if got := get(t, clients); got != "ECONNREFUSED" {
		t.Errorf("the client got %q", got)
	}
	p.count(t, map[string]uint64{"refused_enforcer_down": 1}) // once: there are no two programs at a hook
}

func TestWhatIsSeveredIsPutBack(t *testing.T) {
	enterNewNetns(t)
	dir, clients := pinsDir(t), makeCgroup(t, "clients")
	_ = listen(t, at("127.0.0.1", brokerPort))
	p := loadPinned(t, dir)
	if wrong, err := p.Repair(); len(wrong) > 0 || err != nil {
		t.Errorf("nothing was wrong, repaired %v, %v", wrong, err)
	}
	severed := map[string]bool{"connect4": true, "egress": true}
	for _, h := range p.hooks {
		if d, is := h.link.(interface{ Detach() error }); is && severed[h.name] {
			if err := d.Detach(); err != nil {
				t.Fatal(err)
			}
		}
	}
	if got := get(t, clients); got != "" {
		t.Fatalf("the links are not severed: the client got %q", got)
	}
	if err := os.Remove(p.pins.path("links", "sockops")); err != nil {
		t.Fatal(err)
	}
	wrong, err := p.Repair()
	slices.Sort(wrong)
	if err != nil || !slices.Equal(wrong, []string{"connect4", "egress", "sockops"}) {
		t.Errorf("repaired %v, %v", wrong, err)
	}
	if got := get(t, clients); got != "ECONNREFUSED" {
		t.Errorf("after Repair the client got %q", got)
	}
	closed(t, p)
	if got := get(t, clients); got != "ECONNREFUSED" {
		t.Errorf("what Repair put back is not pinned: the client got %q", got)
	}
}

// The acceptance of an upgrade: programs are swapped under load and nothing gets through.
func TestProgramsAreSwappedUnderLoad(t *testing.T) {
	const workers = 2
	swaps, connects := 50, int64(60_000)
	if testing.Short() {
		swaps, connects = 5, 6_000
	}
	enterNewNetns(t)
	dir := pinsDir(t)
	p := loadPinned(t, dir)
	sink := listen(t, "127.0.0.1:0")
	leaked := listen(t, at("127.0.0.1", brokerPort))
	if err := errors.Join(p.Enrol(netnsCookie(t, sink), portOf(sink)), p.Beat(time.Hour)); err != nil {
		t.Fatal(err)
	}
	var made, failed atomic.Int64
	var enough atomic.Bool
	var running sync.WaitGroup
	own, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = own.Close() }()
	for range workers {
		running.Go(func() {
			runtime.LockOSThread() // ends with the goroutine
			if err := unix.Setns(int(own.Fd()), unix.CLONE_NEWNET); err != nil {
				failed.Add(1)
			}
			to := &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: brokerPort} // unix.Connect writes into it
			for !enough.Load() {
				if connectAndReset(to) != nil {
					failed.Add(1)
				}
				made.Add(1)
			}
		})
	}
	go func() {
		for {
			c, err := sink.AcceptTCP()
			if err != nil {
				return
			}
			_ = c.Close()
		}
	}()
	for n := 0; n < swaps || made.Load() < connects; n++ {
		closed(t, p)
		p = loadPinned(t, dir)
	}
	enough.Store(true)
	running.Wait()
	if failed.Load() > 0 {
		t.Errorf("%d of %d connects failed", failed.Load(), made.Load())
	}
	if err := leaked.SetDeadline(time.Now()); err != nil {
		t.Fatal(err)
	}
	if _, err := leaked.AcceptTCP(); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a connect went to the broker: %v", err)
	}
}

// connectAndReset leaves no port behind in TIME_WAIT.
func connectAndReset(to unix.Sockaddr) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	return errors.Join(unix.Connect(fd, to), unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER,
		&unix.Linger{Onoff: 1}), unix.Close(fd))
}
