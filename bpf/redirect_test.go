package bpf

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func at(address string, port uint16) string {
	return netip.AddrPortFrom(netip.MustParseAddr(address), port).String()
}

func TestEveryConnectToABrokersPortIsRedirected(t *testing.T) {
	const v4, v6 = 0, 1
	for _, c := range []struct {
		name     string
		step     step
		listener int
		to       string // in the record
		peer     string // for the client
	}{
		{"IPv4", step{Do: "connect", To: "192.0.2.7"}, v4, "192.0.2.7", "192.0.2.7"},
		{"IPv4 loopback", step{Do: "connect", To: "127.0.0.1"}, v4, "127.0.0.1", "127.0.0.1"},
		{"IPv4 unspecified", step{Do: "connect", To: "0.0.0.0"}, v4, "127.0.0.1", "127.0.0.1"},
		{"IPv6", step{Do: "connect", To: "2001:db8::7"}, v6, "2001:db8::7", "2001:db8::7"},
		{"IPv6 without IPv4", step{Do: "connect", To: "2001:db8::7", V6Only: true}, v6, "2001:db8::7", "2001:db8::7"},
		{"IPv6 loopback", step{Do: "connect", To: "::1"}, v6, "::1", "::1"},
		{"IPv6 unspecified", step{Do: "connect", To: "::"}, v6, "::1", "::1"},
		{"mapped", step{Do: "connect", To: "192.0.2.7", V6: true}, v4, "192.0.2.7", "::ffff:192.0.2.7"},
		{"mapped unspecified", step{Do: "connect", To: "0.0.0.0", V6: true}, v4, "127.0.0.1", "::ffff:127.0.0.1"},
		{"without blocking", step{Do: "connect without blocking", To: "192.0.2.7"}, v4, "192.0.2.7", "192.0.2.7"},
		{"with fast open", step{Do: "send with fast open", To: "192.0.2.7"}, v4, "192.0.2.7", "192.0.2.7"},
		// The record hangs on the subflow, which getpeername(2) of the MPTCP socket does not ask.
		{"MPTCP", step{Do: "connect", To: "192.0.2.7", Proto: unix.IPPROTO_MPTCP}, v4, "192.0.2.7", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t)
			c.step.To = at(c.step.To, brokerPort)
			got := r.run(c.step).outcome()
			if got.Error != "" {
				t.Fatalf("the client got %s", got.Error)
			}
			if c.peer != "" && got.Peer != at(c.peer, brokerPort) {
				t.Errorf("the client's peer is %s, want %s", got.Peer, at(c.peer, brokerPort))
			}
			record := r.record(c.listener)
			if want := at(c.to, brokerPort); record.Destination().String() != want {
				t.Errorf("the record says %s, want %s", record.Destination(), want)
			}
			if n := r.handshakes(); n != 0 {
				t.Errorf("%d handshake entries are left", n)
			}
			r.programs.count(t, map[string]uint64{"redirected": 1, "handshake_begun": 1, "handed_over": 1})
		})
	}
}

func TestRedirectUnderOtherTCPSettings(t *testing.T) {
	for _, c := range []struct{ name, sysctl, value, do string }{
		// 0x1 and 0x4: client without a cookie; 0x2, 0x200 and 0x400: every listener, without a cookie.
		{"fast open on the listener", "net/ipv4/tcp_fastopen", "1543", "send with fast open"},
		{"SYN cookies for every connection", "net/ipv4/tcp_syncookies", "2", "connect"},
	} {
		t.Run(c.name, func(t *testing.T) {
			enterNewNetns(t)
			writeSysctl(t, c.sysctl, c.value)
			r := newRig(t)
			for range 3 {
				got := r.run(step{Do: c.do, To: at("192.0.2.7", brokerPort)}).outcome()
				if got.Error != "" {
					t.Errorf("the client got %s", got.Error)
				}
				if to := r.record(0).Destination().String(); to != at("192.0.2.7", brokerPort) {
					t.Errorf("the record says %s", to)
				}
			}
			if n := r.handshakes(); n != 0 {
				t.Errorf("%d handshake entries are left", n)
			}
		})
	}
}

func TestARefusedConnectLeavesNoHandshakeEntry(t *testing.T) {
	r := newRig(t)
	for _, l := range r.listeners {
		_ = l.Close()
	}
	steps := slices.Repeat([]step{
		{Do: "connect", To: at("192.0.2.7", brokerPort)}, {Do: "connect", To: at("2001:db8::7", brokerPort)},
	}, 50)
	c := r.run(steps...)
	for range steps {
		if got := c.outcome(); got.Error != "ECONNREFUSED" {
			t.Fatalf("the client got %q", got.Error)
		}
	}
	if n := r.handshakes(); n != 0 {
		t.Errorf("%d handshake entries are left", n)
	}
	r.programs.count(t, map[string]uint64{"redirected": 100, "handshake_begun": 100})
}

func TestTheRecordOutlivesItsClient(t *testing.T) {
	r := newRig(t)
	c := r.run(step{Do: "connect", To: at("192.0.2.7", brokerPort)})
	if got := c.outcome(); got.Error != "" {
		t.Fatalf("the client got %s", got.Error)
	}
	pid := uint32(c.cmd.Process.Pid)
	c.end()
	if record := r.record(0); record.TGID != pid {
		t.Errorf("the record is of process %d, want %d", record.TGID, pid)
	}
	if _, err := r.programs.Task(pid); !errors.Is(err, ErrNoTask) {
		t.Errorf("the ended process reads as %v", err)
	}
}

func TestASocketThatConnectsAgainGetsANewRecord(t *testing.T) {
	r := newRig(t)
	foreign := listen(t, "127.0.0.1:0").Addr().String()
	c := r.run(
		step{Do: "connect", To: at("192.0.2.7", brokerPort)},
		step{Do: "disconnect", Socket: 1},
		step{Do: "connect", Socket: 1, To: at("192.0.2.8", brokerPort)},
		step{Do: "disconnect", Socket: 1},
		step{Do: "connect", Socket: 1, To: foreign},
	)
	for _, peer := range []string{at("192.0.2.7", brokerPort), "", at("192.0.2.8", brokerPort), "", foreign} {
		if got := c.outcome(); got != (outcome{Peer: peer}) {
			t.Errorf("the client got %+v, want peer %q", got, peer)
		}
	}
	for _, to := range []string{"192.0.2.7", "192.0.2.8"} {
		if record := r.record(0); record.Destination().String() != at(to, brokerPort) {
			t.Errorf("the record says %s, want %s", record.Destination(), to)
		}
	}
	if n := r.handshakes(); n != 0 {
		t.Errorf("%d handshake entries are left", n)
	}
	r.programs.count(t, map[string]uint64{
		"redirected": 2, "passed_foreign": 1, "handshake_begun": 2, "handed_over": 2,
	})
}

func TestANetworkNamespaceThatIsNotEnrolledIsRefused(t *testing.T) {
	r := newRig(t)
	steps := []step{
		{Do: "connect", To: at("192.0.2.7", brokerPort)},
		{Do: "connect", To: at("2001:db8::7", brokerPort)},
		{Do: "connect", To: at("192.0.2.7", brokerPort), V6: true},
	}
	c := startClient(t, r.clients, plan{Steps: steps}, unix.CLONE_NEWNET)
	for range steps {
		if got := c.outcome(); got.Error != "ECONNREFUSED" {
			t.Errorf("the client got %q", got.Error)
		}
	}
	r.programs.count(t, map[string]uint64{"refused_not_enrolled": 3})

	if err := r.programs.Unenrol(r.cookie); err != nil {
		t.Fatal(err)
	}
	if got := r.run(steps[0]).outcome(); got.Error != "ECONNREFUSED" {
		t.Errorf("after Unenrol the client got %q", got.Error)
	}
	r.programs.count(t, map[string]uint64{"refused_not_enrolled": 4})
}

func TestAnExemptCgroupPassesWithAllBelowIt(t *testing.T) {
	r := newRig(t)
	broker := listen(t, at("127.0.0.1", brokerPort))
	exempt := makeCgroup(t, "clients", "exempt")
	inner := makeCgroup(t, "clients", "exempt", "inner")
	connect := plan{Steps: []step{{Do: "connect", To: broker.Addr().String()}}}

	if err := r.programs.Exempt(cgroupID(t, exempt)); err != nil {
		t.Fatal(err)
	}
	for _, cgroup := range []string{exempt, inner} {
		if got := startClient(t, cgroup, connect, 0).outcome(); got.Error != "" {
			t.Errorf("the client got %s", got.Error)
		}
		acceptFrom(t, broker)
	}
	r.programs.count(t, map[string]uint64{"passed_exempt": 2})

	if got := startClient(t, r.clients, connect, 0).outcome(); got.Error != "" {
		t.Errorf("the client got %s", got.Error)
	}
	r.record(0)
	if err := r.programs.Unexempt(cgroupID(t, exempt)); err != nil {
		t.Fatal(err)
	}
	if got := startClient(t, inner, connect, 0).outcome(); got.Error != "" {
		t.Errorf("the client got %s", got.Error)
	}
	r.record(0)
	r.programs.count(t, map[string]uint64{
		"passed_exempt": 2, "redirected": 2, "handshake_begun": 2, "handed_over": 2,
	})
}

func TestAStampedSocketPasses(t *testing.T) {
	r := newRig(t)
	broker := listen(t, at("127.0.0.1", brokerPort))
	s := step{Do: "connect", To: broker.Addr().String()}
	fd, err := s.socket()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(fd) }()
	if err := r.programs.Stamp(fd); err != nil {
		t.Fatal(err)
	}
	if got := s.run(fd); got.Error != "" {
		t.Errorf("the socket got %s", got.Error)
	}
	acceptFrom(t, broker)
	r.programs.count(t, map[string]uint64{"passed_stamped": 1})
}

func TestAConnectStraightToTheListenerIsRefused(t *testing.T) {
	r := newRig(t)
	var steps []step
	for _, to := range []string{"127.0.0.1", "127.1.2.3", "0.0.0.0", "::1", "::"} {
		steps = append(steps, step{Do: "connect", To: at(to, r.port)})
	}
	for _, to := range []string{"127.0.0.1", "0.0.0.0"} {
		steps = append(steps, step{Do: "connect", To: at(to, r.port), V6: true})
	}
	c := r.run(steps...)
	for _, s := range steps {
		if got := c.outcome(); got.Error != "ECONNREFUSED" {
			t.Errorf("connect to %s got %q", s.To, got.Error)
		}
	}
	r.programs.count(t, map[string]uint64{"refused_direct": uint64(len(steps))})
}

func TestAPortThatIsNoBrokersIsLeftAlone(t *testing.T) {
	r := newRig(t)
	for _, address := range []string{"127.0.0.1", "::1"} {
		foreign := listen(t, at(address, 0)).Addr().String()
		if got := r.run(step{Do: "connect", To: foreign}).outcome(); got != (outcome{Peer: foreign}) {
			t.Errorf("the client got %+v, want peer %s", got, foreign)
		}
	}
	if err := r.programs.SetDestinations(nil, nil); err != nil {
		t.Fatal(err)
	}
	broker := listen(t, at("127.0.0.1", brokerPort)).Addr().String()
	if got := r.run(step{Do: "connect", To: broker}).outcome(); got != (outcome{Peer: broker}) {
		t.Errorf("after SetPorts the client got %+v, want peer %s", got, broker)
	}
	r.programs.count(t, map[string]uint64{"passed_foreign": 3})
}

func TestNobodyElseMayBindTheListenersPort(t *testing.T) {
	r := newRig(t)
	for _, l := range r.listeners {
		_ = l.Close()
	}
	for _, c := range []struct {
		name string
		step step
		want string
	}{
		{"IPv4 loopback", step{To: "127.0.0.1"}, "EPERM"},
		{"IPv4 unspecified", step{To: "0.0.0.0"}, "EPERM"},
		{"IPv6 loopback", step{To: "::1"}, "EPERM"},
		{"IPv6 unspecified", step{To: "::"}, "EPERM"},
		{"mapped loopback", step{To: "127.0.0.1", V6: true}, "EPERM"},
		{"MPTCP", step{To: "127.0.0.1", Proto: unix.IPPROTO_MPTCP}, "EPERM"},
		{"an address to which no redirect goes", step{To: "127.0.0.2"}, ""},
		{"UDP", step{To: "127.0.0.1", Proto: unix.IPPROTO_UDP}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.step.Do, c.step.To = "bind", at(c.step.To, r.port)
			client := startClient(t, r.clients, plan{Steps: []step{c.step}}, 0)
			if got := client.outcome(); got.Error != c.want {
				t.Errorf("got %q, want %q", got.Error, c.want)
			}
		})
	}
	t.Run("the node itself", func(t *testing.T) {
		s := step{Do: "bind", To: at("127.0.0.1", r.port)}
		fd, err := s.socket()
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = unix.Close(fd) }()
		if err := r.programs.Stamp(fd); err != nil {
			t.Fatal(err)
		}
		if got := s.run(fd); got.Error != "" {
			t.Errorf("got %s", got.Error)
		}
	})
}

func TestASocketBoundToADeviceReachesTheListener(t *testing.T) {
	enterNewNetns(t)
	const device = "klamm0"
	veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: device}, PeerName: "klamm1"}
	if err := netlink.LinkAdd(veth); err != nil {
		t.Fatal(err)
	}
	r := newRig(t)
	got := r.run(step{Do: "connect", To: at("192.0.2.7", brokerPort), Device: device}).outcome()
	if got.Error != "" {
		t.Errorf("the client got %s", got.Error)
	}
	interf, err := netlink.LinkByName(device)
	if err != nil {
		t.Fatal(err)
	}
	if record := r.record(0); record.Ifindex != uint32(interf.Attrs().Index) {
		t.Errorf("the record says device %d, want %d", record.Ifindex, interf.Attrs().Index)
	}
}

// limitOptionMemory sets the limit of the test's own network namespace. Linux 6.1 has one limit for all of them, which
// shows in the first only: that of a thread the test has not moved.
func limitOptionMemory(t *testing.T, bytes string) {
	t.Helper()
	const name = "net/core/optmem_max"
	if _, err := os.Stat(filepath.Join("/proc/sys", name)); err == nil {
		writeSysctl(t, name, bytes)
		return
	}
	elsewhere := func(call func()) {
		var done sync.WaitGroup
		done.Go(call)
		done.Wait()
	}
	elsewhere(func() {
		before, err := os.ReadFile(filepath.Join("/proc/sys", name))
		if err != nil {
			t.Error(err)
			return
		}
		t.Cleanup(func() { elsewhere(func() { writeSysctl(t, name, string(before)) }) })
		writeSysctl(t, name, bytes)
	})
}

func TestNoMemoryForARecordIsARefusal(t *testing.T) {
	enterNewNetns(t)
	r := newRig(t)
	limitOptionMemory(t, "64")
	if got := r.run(step{Do: "connect", To: at("192.0.2.7", brokerPort)}).outcome(); got.Error != "ECONNREFUSED" {
		t.Errorf("the client got %q", got.Error)
	}
	r.programs.count(t, map[string]uint64{"refused_no_storage": 1})
}

func TestAFullHandshakeMapMeansNoRecord(t *testing.T) {
	r := newRig(t)
	handshake := r.programs.objects.KlammHandshake
	for i := range handshake.MaxEntries() {
		if err := handshake.Put(redirectKlammTuple{ClientPort: i}, redirectKlammRecord{}); err != nil {
			t.Fatal(err)
		}
	}
	if got := r.run(step{Do: "connect", To: at("192.0.2.7", brokerPort)}).outcome(); got.Error != "" {
		t.Errorf("the client got %s", got.Error)
	}
	if _, err := onFD(t, r.accept(0), r.programs.Record); !errors.Is(err, ErrNoRecord) {
		t.Errorf("the accepted socket has: %v", err)
	}
	r.programs.count(t, map[string]uint64{"redirected": 1, "handshake_no_entry": 1, "accepted_without_record": 1})
}

func TestANetworkNamespaceHasItsShareOfTheHandshakesOnly(t *testing.T) {
	const share = 4096 // KLAMM_HANDSHAKES
	r := newRig(t)
	enrolled := r.programs.objects.KlammEnrolled
	begun := func() (l redirectKlammListener) {
		if err := enrolled.Lookup(r.cookie, &l); err != nil {
			t.Fatal(err)
		}
		return l
	}
	connect := func() error {
		if got := r.run(step{Do: "connect", To: at("192.0.2.7", brokerPort)}).outcome(); got.Error != "" {
			t.Errorf("the client got %s", got.Error)
		}
		_, err := onFD(t, r.accept(0), r.programs.Record)
		return err
	}
	if err := enrolled.Put(r.cookie, redirectKlammListener{Port: r.port, Handshakes: share - 1}); err != nil {
		t.Fatal(err)
	}
	if err := connect(); err != nil || begun().Handshakes != share-1 {
		t.Errorf("with room for one: %v, then %d are on their way", err, begun().Handshakes)
	}
	if err := enrolled.Put(r.cookie, redirectKlammListener{Port: r.port, Handshakes: share}); err != nil {
		t.Fatal(err)
	}
	if err := connect(); !errors.Is(err, ErrNoRecord) || begun().Handshakes != share {
		t.Errorf("with room for none: %v, then %d are on their way", err, begun().Handshakes)
	}
	r.programs.count(t, map[string]uint64{"redirected": 2, "handshake_begun": 1, "handed_over": 1,
		"handshake_no_entry": 1, "accepted_without_record": 1})
}

func TestARecordOfAnotherVersionIsRefused(t *testing.T) {
	r := newRig(t)
	if got := r.run(step{Do: "connect", To: at("192.0.2.7", brokerPort)}).outcome(); got.Error != "" {
		t.Fatalf("the client got %s", got.Error)
	}
	_, err := onFD(t, r.accept(0), func(fd int) (Record, error) {
		record, err := r.programs.Record(fd)
		if err != nil {
			return record, err
		}
		record.Version++
		if err := r.programs.objects.KlammAccepted.Put(int32(fd), &record); err != nil {
			return record, err
		}
		return r.programs.Record(fd)
	})
	if !errors.Is(err, ErrRecordVersion) {
		t.Errorf("got %v", err)
	}
}

func TestWhatTheRecordSaysOfTheProcess(t *testing.T) {
	r := newRig(t)
	connect := step{Do: "connect", To: at("192.0.2.7", brokerPort)}
	c := startClient(t, r.clients, plan{UID: 4711, Steps: []step{connect, {Do: "execute again"}, connect}}, 0)
	if got := c.outcome(); got.Error != "" {
		t.Fatalf("the client got %s", got.Error)
	}
	record := r.record(0)
	if got := c.outcome(); got.Error != "" {
		t.Fatalf("the client got %s", got.Error)
	}
	again := r.record(0)

	var pidfd, exe, netns unix.Stat_t
	if err := errors.Join(unix.Fstat(c.pidFD, &pidfd), unix.Stat("/proc/self/exe", &exe),
		unix.Stat("/proc/thread-self/ns/net", &netns)); err != nil {
		t.Fatal(err)
	}
	var kind unix.Statfs_t
	if err := unix.Fstatfs(c.pidFD, &kind); err != nil {
		t.Fatal(err)
	}
	if kind.Type != unix.PID_FS_MAGIC { // before 6.9 all processes share an inode
		pidfd.Ino = 0
	}
	pid := uint32(c.cmd.Process.Pid)
	for _, f := range []struct {
		name      string
		got, want any
	}{
		{"version", record.Version, uint32(recordVersion)},
		{"tgid", record.TGID, pid},
		{"uid", record.UID, uint32(4711)},
		{"gid", record.GID, uint32(4711)},
		{"pidfs inode", record.PidInode, pidfd.Ino},
		{"inode of the executable", record.ExeInode, exe.Ino},
		{"device of the executable", record.ExeDev, unix.Major(exe.Dev)<<20 | unix.Minor(exe.Dev)},
		{"cgroup", record.CgroupID, cgroupID(t, r.clients)},
		{"network namespace's cookie", record.NetnsCookie, r.cookie},
		{"network namespace's inode", uint64(record.NetnsInum), netns.Ino},
		{"start", record.StartBoottime / 1e7, startTicks(t, pid)},
		{"comm of the leader", record.Comm.String(), "exe"},
		{"family", record.Family, uint16(unix.AF_INET)},
		{"protocol", record.Protocol, uint32(unix.IPPROTO_TCP)},
		{"device of the socket", record.Ifindex, uint32(0)},
	} {
		if !reflect.DeepEqual(f.got, f.want) {
			t.Errorf("%s is %v, want %v", f.name, f.got, f.want)
		}
	}
	if record.TID == 0 || record.ConnectTime <= record.StartBoottime || record.ClientCookie == 0 {
		t.Errorf("thread %d, connected at %d, socket %d", record.TID, record.ConnectTime, record.ClientCookie)
	}

	now, err := r.programs.Task(pid)
	if err != nil {
		t.Fatal(err)
	}
	if again.PidInode != record.PidInode || again.StartBoottime != record.StartBoottime || again.ExecID <= record.ExecID {
		t.Errorf("before execve %+v, after it %+v", record.TaskFacts, again.TaskFacts)
	}
	if now != again.TaskFacts {
		t.Errorf("the process is %+v, the record says %+v", now, again.TaskFacts)
	}
	if !again.SameProgram(now) || record.SameProgram(now) {
		t.Error("a process that called execve is the same program, or one that did not is another")
	}
}

func startTicks(t *testing.T, pid uint32) uint64 {
	t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, fields, _ := strings.Cut(string(stat), ") ")
	var ticks uint64
	if _, err := fmt.Sscan(strings.Fields(fields)[19], &ticks); err != nil {
		t.Fatal(err)
	}
	return ticks
}

func TestLoadSaysWhatIsMissing(t *testing.T) {
	t.Run("privilege", func(t *testing.T) {
		c := startClient(t, makeCgroup(t, "clients"), plan{
			UID: 4711, Steps: []step{{Do: "load the programs", To: testCgroup}},
		}, 0)
		if got := c.outcome().Error; !strings.HasPrefix(got, "true") || !strings.Contains(got, "run as root") {
			t.Errorf("got %s", got)
		}
	})
	t.Run("a cgroup", func(t *testing.T) {
		if _, err := Load(Options{CgroupPath: "/nowhere"}); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("cgroup2", func(t *testing.T) {
		_, err := Load(Options{CgroupPath: t.TempDir()})
		if err == nil || !strings.Contains(err.Error(), "is it a directory of cgroup2?") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("room beside another program", func(t *testing.T) {
		program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
			Name: "greedy", Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Connect, License: "GPL",
			Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
		})
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = program.Close() }()
		dir, err := os.Open(testCgroup)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = dir.Close() }()
		if err := link.RawAttachProgram(link.RawAttachProgramOptions{
			Target: int(dir.Fd()), Program: program, Attach: ebpf.AttachCGroupInet4Connect,
		}); err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := link.RawDetachProgram(link.RawDetachProgramOptions{
				Target: int(dir.Fd()), Program: program, Attach: ebpf.AttachCGroupInet4Connect,
			}); err != nil {
				t.Error(err)
			}
		}()
		_, err = Load(Options{CgroupPath: testCgroup})
		if !errors.Is(err, ErrForeignProgram) || !strings.Contains(err.Error(), "greedy") {
			t.Errorf("got %v", err)
		}
	})
}

func TestNothingIsRedirectedAfterClose(t *testing.T) {
	r := newRig(t)
	if err := r.programs.Close(); err != nil {
		t.Fatal(err)
	}
	broker := listen(t, at("127.0.0.1", brokerPort)).Addr().String()
	if got := r.run(step{Do: "connect", To: broker}).outcome(); got != (outcome{Peer: broker}) {
		t.Errorf("the client got %+v", got)
	}
}

func TestEveryCounterHasAName(t *testing.T) {
	for reason, name := range counterNames {
		if name == "" {
			t.Errorf("counter %d has no name", reason)
		}
	}
}

func TestTheRecordIsLaidOutAsInC(t *testing.T) {
	type field struct{ offset, size uintptr }
	var flatten func(reflect.Type, uintptr) []field
	flatten = func(s reflect.Type, base uintptr) (fields []field) {
		for i := range s.NumField() {
			switch f := s.Field(i); {
			case f.Type.Size() == 0:
			case f.Type.Kind() == reflect.Struct:
				fields = append(fields, flatten(f.Type, base+f.Offset)...)
			default:
				fields = append(fields, field{base + f.Offset, f.Type.Size()})
			}
		}
		return fields
	}
	got := flatten(reflect.TypeFor[Record](), 0)
	want := flatten(reflect.TypeFor[redirectKlammRecord](), 0)
	if !slices.Equal(got, want) || unsafe.Sizeof(Record{}) != unsafe.Sizeof(redirectKlammRecord{}) {
		t.Errorf("Go has %v, C has %v", got, want)
	}
}
