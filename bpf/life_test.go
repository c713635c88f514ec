package bpf

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// connected runs a client whose first step connects, and returns its record.
func (r *rig) connected(p plan) (*client, Record) {
	r.t.Helper()
	c := startClient(r.t, r.clients, p, 0)
	if got := c.outcome(); got.Error != "" {
		r.t.Fatalf("the client got %s", got.Error)
	}
	return c, r.record(0)
}

func (r *rig) watch(pid uint32) {
	r.t.Helper()
	if err := r.programs.Watch(pid); err != nil {
		r.t.Fatal(err)
	}
}

// watched fails the test unless exactly these are.
func (r *rig) watched(want ...TaskFacts) {
	r.t.Helper()
	found, err := r.programs.Watched()
	if err != nil {
		r.t.Fatal(err)
	}
	got := map[TaskFacts]bool{}
	for _, f := range found {
		got[f] = true
	}
	for _, f := range want {
		if !got[f] || len(found) != len(want) {
			r.t.Fatalf("watched are %+v\nwant %+v", found, want)
		}
	}
}

var toBroker = step{Do: "connect", To: at("192.0.2.7", brokerPort)}

func TestAnExecveOfAWatchedProcessIsToldAndNoOther(t *testing.T) {
	r := newRig(t)
	if err := r.programs.Unnoticed(); err != nil {
		t.Fatal(err)
	}
	again := plan{Steps: []step{toBroker, {Do: "wait"}, {Do: "execute again"}, toBroker}}
	other, otherBefore := r.connected(again)
	c, before := r.connected(again)
	r.watch(otherBefore.TGID)
	r.watch(before.TGID)
	r.watched(otherBefore.TaskFacts, before.TaskFacts)
	if err := r.programs.Unwatch(otherBefore.TGID); err != nil {
		t.Fatal(err)
	}
	r.watched(before.TaskFacts)
	for _, c := range []*client{other, c} {
		c.proceed()
		if got := c.outcome(); got.Error != "" { // of the wait
			t.Fatal(got.Error)
		}
		c.outcome()
	}
	after := [2]Record{r.record(0), r.record(0)}[1]
	pid, err := r.programs.Executed()
	if err != nil || pid != before.TGID {
		t.Errorf("told of %d, %v; want %d", pid, err, before.TGID)
	}
	if after.TGID != before.TGID || after.SameProgram(before.TaskFacts) {
		t.Errorf("before %+v\nafter %+v", before.TaskFacts, after.TaskFacts)
	}
	r.watched(after.TaskFacts)
	c.kill()
	c.end()
	r.watched()
	r.programs.count(t, map[string]uint64{"redirected": 4, "handshake_begun": 4, "handed_over": 4})
}

func TestWhoHasASocketIsFound(t *testing.T) {
	for name, proto := range map[string]int{"TCP": 0, "MPTCP": unix.IPPROTO_MPTCP} {
		t.Run(name, func(t *testing.T) {
			if proto != 0 && !hasMPTCP() {
				t.Log("the kernel has no MPTCP, so nobody has such a socket")
				return
			}
			r := newRig(t)
			connect := step{Do: "connect", To: toBroker.To, Proto: proto}
			c, record := r.connected(plan{Steps: []step{connect, {Do: "wait"}, {Do: "fork"}, {Do: "only a socket"}}})
			_, other := r.connected(plan{Steps: []step{connect}})
			if got := r.holders(record); len(got) != 1 || got[0] != record.TaskFacts {
				t.Fatalf("before the fork: %+v", got)
			}
			c.proceed()
			c.outcome()
			c.outcome() // what comes after the fork
			got := r.holders(record)
			if len(got) != 2 {
				t.Fatalf("after the fork: %+v", got)
			}
			child := got[0]
			if child.TGID == record.TGID {
				child = got[1]
			}
			want := record.TaskFacts
			want.TGID, want.StartBoottime, want.PidInode = child.TGID, child.StartBoottime, child.PidInode
			if child != want {
				t.Errorf("the child is %+v\nwant %+v", child, want)
			}
			c.kill()
			if got := r.holders(record); len(got) != 1 || got[0] != child {
				t.Errorf("after its parent's end: %+v", got)
			}
			c.end()
			eventually(t, func() error {
				if got := r.holders(record); len(got) > 0 {
					return fmt.Errorf("nobody lives who has it, but %+v", got)
				}
				return nil
			})
			if got := r.holders(other); len(got) != 1 || got[0] != other.TaskFacts {
				t.Errorf("of another socket: %+v", got)
			}
		})
	}
}

// holders fails the test where they are of another socket.
func (r *rig) holders(of Record) (facts []TaskFacts) {
	r.t.Helper()
	found, err := r.programs.Holders([]uint64{of.ClientCookie})
	if err != nil {
		r.t.Fatal(err)
	}
	for _, h := range found {
		if h.Socket != of.ClientCookie {
			r.t.Errorf("asked for %d, got %+v", of.ClientCookie, h)
		}
		facts = append(facts, h.TaskFacts)
	}
	return facts
}

func hasMPTCP() bool {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_MPTCP)
	if err == nil {
		_ = unix.Close(fd)
	}
	return err == nil
}

func TestMoreSocketsThanFitAreSoughtInTurns(t *testing.T) {
	r := newRig(t)
	_, record := r.connected(plan{Steps: []step{toBroker}})
	sought := make([]uint64, 2*maxSought+1)
	for i := range sought {
		sought[i] = 1<<63 + uint64(i) // nobody has them
	}
	sought[len(sought)-1] = record.ClientCookie
	found, err := r.programs.Holders(sought)
	if err != nil || len(found) != 1 || found[0].TaskFacts != record.TaskFacts {
		t.Errorf("%+v, %v", found, err)
	}
}

func TestADescriptorThatWasHandedOnIsFoundWithItsHolder(t *testing.T) {
	r := newRig(t)
	cmd := exec.Command("/proc/self/exe")
	_, record := r.connected(plan{Steps: []step{toBroker}})
	fd, err := unix.PidfdOpen(int(record.TGID), 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(fd) }()
	stolen := -1
	for n := 3; n < 64 && stolen < 0; n++ { // the one that is a socket of the same cookie
		got, err := unix.PidfdGetfd(fd, n, 0)
		if err != nil {
			continue
		}
		cookie, err := unix.GetsockoptUint64(got, unix.SOL_SOCKET, unix.SO_COOKIE)
		if err == nil && cookie == record.ClientCookie {
			stolen = got
			continue
		}
		_ = unix.Close(got)
	}
	if stolen < 0 {
		t.Fatal("the client has no such socket")
	}
	socket := os.NewFile(uintptr(stolen), "socket")
	own, err := r.programs.Task(uint32(os.Getpid()))
	if err != nil {
		t.Fatal(err)
	}
	got := map[TaskFacts]bool{}
	for _, f := range r.holders(record) {
		got[f] = true
	}
	if len(got) != 2 || !got[own] || !got[record.TaskFacts] {
		t.Errorf("pidfd_getfd(2): %v", got)
	}
	cmd.Env = append(os.Environ(), planVariable+`={"Steps":[{"Do":"only a socket"}]}`)
	cmd.ExtraFiles = []*os.File{socket}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = in.Close()
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	}()
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || !strings.Contains(line, `"Error":""`) {
		t.Fatalf("%s, %v", line, err)
	}
	_ = socket.Close()
	now := map[uint32]bool{}
	for _, f := range r.holders(record) {
		now[f.TGID] = true
	}
	if len(now) != 2 || !now[record.TGID] || !now[uint32(cmd.Process.Pid)] {
		t.Errorf("inherited through execve: %v, want %d and %d", now, record.TGID, cmd.Process.Pid)
	}
}

// BenchmarkExec measures execve with fork and exit, and what the tracepoint adds for a process that is not watched.
func BenchmarkExec(b *testing.B) {
	p := loaded(b)
	if err := p.Unnoticed(); err != nil {
		b.Fatal(err)
	}
	program := "/bin/true"
	if _, err := os.Stat(program); err != nil {
		b.Fatal(err)
	}
	stats, err := ebpf.EnableStats(unix.BPF_STATS_RUN_TIME)
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = stats.Close() }()
	for b.Loop() {
		if err := exec.Command(program).Run(); err != nil {
			b.Fatal(err)
		}
	}
	s, err := p.objects.KlammExec.Stats()
	if err != nil {
		b.Fatal(err)
	}
	b.ReportMetric(float64(s.Runtime.Nanoseconds())/float64(s.RunCount), "ns-klamm_exec/exec")
}

// BenchmarkWatched measures the look at all watched processes, which is made every second.
func BenchmarkWatched(b *testing.B) {
	p := loaded(b)
	if err := p.Watch(uint32(os.Getpid())); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, err := p.Watched(); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkHolders measures the search for the holders of a socket.
func BenchmarkHolders(b *testing.B) {
	p := loaded(b)
	for b.Loop() {
		if _, err := p.Holders([]uint64{1}); err != nil {
			b.Fatal(err)
		}
	}
}
