//go:build guest

// Package systemd checks deploy/systemd/klamm.service, in a guest of make verify-kernels in which systemd runs it.
package systemd

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"klamm/test/kafka"
	"klamm/test/stage"
)

const unit = "klamm.service"

// Tests run in this order, on one boot, in a network namespace of their own.

func TestTheUnitIsUpBeforeOrdinaryServices(t *testing.T) {
	if state := property(t, unit, "ActiveState"); state != "active" {
		t.Fatalf("the unit is %s\n%s", state, journal())
	}
	const active = "ActiveEnterTimestampMonotonic"
	up, basic := moment(t, unit, active), moment(t, "basic.target", active)
	own := moment(t, "checks.service", "InactiveExitTimestampMonotonic")
	t.Logf("seconds since boot: klamm started %v, was up %v, basic.target %v, this service %v",
		moment(t, unit, "InactiveExitTimestampMonotonic"), up, basic, own)
	if up == 0 || up > basic || up > own {
		t.Error("ordinary services did not wait for it")
	}
	// What systemd does not know it says and ignores. FileDescriptorStorePreserve is of systemd 254; the unit tells what
	// becomes of older ones.
	for line := range strings.Lines(journal()) {
		if strings.Contains(line, "klamm.service:") && !strings.Contains(line, "FileDescriptorStorePreserve") {
			t.Error(line)
		}
	}
}

func TestAWorkloadIsRedirectedAndEnforced(t *testing.T) {
	w := orders(t)
	await(t, "the node to reach its cluster", func() error { return only(w, "orders") })
	nobodyCameDirectly(t)
}

func TestAnExecutableThatOnlyItsOwnerReadsIsKnown(t *testing.T) {
	const dir = "/srv/report"
	own, err := os.ReadFile("/proc/self/exe")
	if err := errors.Join(err, os.MkdirAll(dir, 0o700), os.WriteFile(dir+"/workload", own, 0o700),
		os.Chown(dir, stage.ReportUID, stage.ReportUID),
		os.Chown(dir+"/workload", stage.ReportUID, stage.ReportUID)); err != nil {
		t.Fatal(err)
	}
	w := stage.StartWorkload(t, kafka.Place{UID: stage.ReportUID, GID: stage.ReportUID}, dir+"/workload")
	if err := only(w, "payroll"); err != nil {
		t.Error(err)
	}
}

func TestANetworkNamespaceIsEnrolled(t *testing.T) {
	runtime.LockOSThread() // ends with the test
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatal(err)
	}
	if err := up("lo", netip.Prefix{}); err != nil {
		t.Fatal(err)
	}
	await(t, "a connect to be redirected", func() error {
		conn, err := net.DialTimeout("tcp", brokerAddr, stage.Patience)
		if err != nil {
			return err
		}
		return conn.Close()
	})
}

// heartbeat is for how long the kernel takes a node that is away for one that restarts; then it refuses.
const heartbeat = 5 * time.Second

func TestAConnectWaitsWhileTheUnitRestarts(t *testing.T) {
	for name, verb := range map[string][]string{
		"restart": {"restart", "--no-block"}, "kill -9": {"kill", "--signal=KILL"},
	} {
		t.Run(name, func(t *testing.T) {
			w := orders(t)
			await(t, "the node to serve", func() error { return only(w, "orders") })
			stop := keepConnecting(t)
			longest := time.Duration(0)
			for range 5 {
				longest = max(longest, again(t, w, verb))
			}
			made, waited, refused := stop()
			t.Logf("%d connects, one waited %v, %d were refused; the node was away for %v at most", made, waited, refused,
				longest)
			if refused > 0 && longest < heartbeat {
				t.Errorf("connects were refused\n%s", journal())
			}
			nobodyCameDirectly(t)
		})
	}
}

// again makes the node another process, and has a client connect while there is none. It returns for how long the node
// was away.
func again(t *testing.T, w *stage.Workload, verb []string) time.Duration {
	t.Helper()
	before := property(t, unit, "MainPID")
	began := time.Now()
	systemctl(t, append(verb, unit)...)
	await(t, "the end of the node", func() error {
		if pid := property(t, unit, "MainPID"); pid == before {
			return errors.New("it is still there")
		}
		return nil
	})
	conn, err := dial(w)
	connected := time.Since(began)
	await(t, "the next node", func() error {
		if state := property(t, unit, "ActiveState"); state != "active" {
			return errors.New(state)
		}
		return nil
	})
	away := time.Since(began)
	switch {
	case err == nil:
		defer func() { _ = conn.Close() }()
		if err := sees(conn, "orders"); err != nil {
			t.Errorf("a client that connected while no node was there: %v", err)
		}
	case connected < heartbeat:
		t.Errorf("a client could not connect %v after the node's end: %v\n%s", connected, err, journal())
	}
	return away
}

// keepConnecting has a client connect all the time until stop is called. Anything but success and refusal fails the
// test.
func keepConnecting(t *testing.T) (stop func() (made int, waited time.Duration, refused int)) {
	w := orders(t)
	var enough atomic.Bool
	var running sync.WaitGroup
	var made, refused int
	var waited time.Duration
	running.Go(func() {
		// Paced, or an emulated machine has time for nothing else.
		pace := time.NewTicker(20 * time.Millisecond)
		defer pace.Stop()
		for ; !enough.Load(); made++ {
			<-pace.C
			began := time.Now()
			conn, err := dial(w)
			waited = max(waited, time.Since(began))
			switch {
			case err == nil:
				_ = conn.Close()
			case errors.Is(err, syscall.ECONNREFUSED):
				refused++
			default:
				t.Errorf("connect %d: %v", made, err)
			}
		}
	})
	return func() (int, time.Duration, int) {
		enough.Store(true)
		running.Wait()
		return made, waited, refused
	}
}

func TestAHungNodeIsStartedAgain(t *testing.T) {
	w := orders(t)
	pid, err := strconv.Atoi(property(t, unit, "MainPID"))
	if err := errors.Join(err, syscall.Kill(pid, syscall.SIGSTOP)); err != nil {
		t.Fatal(err)
	}
	await(t, "a connect to be refused", func() error { return refused(w) })
	await(t, "the watchdog", func() error {
		if property(t, unit, "MainPID") == strconv.Itoa(pid) {
			return errors.New("the process that hangs is still there")
		}
		return nil
	})
	await(t, "the node to serve", func() error { return only(w, "orders") })
	nobodyCameDirectly(t)
}

func TestNobodyPassesWhileTheUnitIsStopped(t *testing.T) {
	w := orders(t)
	systemctl(t, "stop", unit)
	for range 100 {
		if err := refused(w); err != nil {
			t.Fatal(err)
		}
	}
	nobodyCameDirectly(t)
	systemctl(t, "start", unit)
	await(t, "the node to serve", func() error { return only(w, "orders") })
	nobodyCameDirectly(t)
}

// Every line of the unit that takes a right away is in force.
func TestTheUnitHasNoRightsItDoesNotNeed(t *testing.T) {
	status, err := os.ReadFile("/proc/" + property(t, unit, "MainPID") + "/status")
	if err != nil {
		t.Fatal(err)
	}
	const caps = 1<<unix.CAP_SYS_ADMIN | 1<<unix.CAP_NET_ADMIN | 1<<unix.CAP_SYS_PTRACE | 1<<unix.CAP_DAC_READ_SEARCH
	for _, want := range []string{
		fmt.Sprintf("CapEff:\t%016x\n", caps), fmt.Sprintf("CapBnd:\t%016x\n", caps),
		"NoNewPrivs:\t1\n", "Seccomp:\t2\n",
	} {
		if !strings.Contains(string(status), want) {
			t.Errorf("/proc/PID/status does not say %q:\n%s", want, status)
		}
	}
	out, err := exec.Command("systemd-analyze", "security", "--no-pager", unit).CombinedOutput()
	t.Logf("%s", out)
	if err != nil {
		t.Error(err)
	}
}

func TestUninstallRemovesEverything(t *testing.T) {
	w := orders(t)
	if out, err := klamm("uninstall"); err == nil {
		t.Errorf("it uninstalls below a running node: %s", out)
	}
	systemctl(t, "disable", "--now", unit)
	if out, err := klamm("uninstall"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if err := only(w, "orders", "payroll", "public"); err != nil {
		t.Errorf("a client does not see all that the broker has: %v", err)
	}
	if broker.arrivedFrom(pod) == 0 {
		t.Error("the client's connection is not direct")
	}
	left, err := filepath.Glob("/sys/fs/bpf/klamm*")
	if err != nil || len(left) > 0 {
		t.Errorf("pins are left: %v, %v", left, err)
	}
	if _, err := os.Stat("/run/klamm/klamm.sock"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the control socket is left: %v", err)
	}
}

// The kernel was told by its command line to be locked down, or was not.
func TestTheKernelIsLockedDownAsAsked(t *testing.T) {
	line, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	state, err := os.ReadFile("/sys/kernel/security/lockdown")
	if err != nil {
		t.Fatal(err)
	}
	asked := strings.Contains(string(line), "lockdown=integrity")
	if got := strings.Contains(string(state), "[integrity]"); got != asked {
		t.Errorf("command line %sstate %s", line, state)
	}
}
