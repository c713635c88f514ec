package spiffe

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"klamm/test/bounds"
)

// procTasks tells facts of real processes from /proc, in place of the BPF program. It has no exec id to read: the
// executable's inode stands in for it. change, when set, falsifies what the n-th look sees.
type procTasks struct {
	looks  atomic.Int32
	change func(look int32, f *TaskFacts)
}

func (t *procTasks) Task(pid uint32) (TaskFacts, error) {
	var f TaskFacts
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return f, unix.ESRCH
	}
	var exe, proc, pidfs unix.Stat_t
	if err = unix.Stat(exeLink(pid), &exe); err != nil {
		return f, unix.ESRCH
	}
	if err = unix.Stat(fmt.Sprintf("/proc/%d", pid), &proc); err != nil {
		return f, unix.ESRCH
	}
	fd, err := unix.PidfdOpen(int(pid), 0)
	if err != nil {
		return f, err
	}
	defer unix.Close(fd)
	if err = unix.Fstat(fd, &pidfs); err != nil {
		return f, err
	}
	var ticks uint64
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+2:]))
	if _, err = fmt.Sscan(fields[19], &ticks); err != nil {
		return f, err
	}
	f = TaskFacts{StartBoottime: ticks * 1e7, ExecID: exe.Ino, PidInode: pidfs.Ino, ExeInode: exe.Ino,
		ExeDev: uint32(exe.Dev), UID: proc.Uid, GID: proc.Gid, CgroupID: 1}
	if look := t.looks.Add(1); t.change != nil {
		t.change(look, &f)
	}
	return f, nil
}

// peerOf is what connect(2) would have recorded of a process now.
func peerOf(t *testing.T, pid int) Peer {
	t.Helper()
	f, err := new(procTasks).Task(uint32(pid))
	if err != nil {
		t.Fatal(err)
	}
	return Peer{TGID: uint32(pid), UID: f.UID, GID: f.GID, StartBoottime: f.StartBoottime, ExecID: f.ExecID,
		PidInode: f.PidInode, ExeInode: f.ExeInode, ExeDev: f.ExeDev, CgroupID: f.CgroupID, Comm: "test"}
}

// copyOf installs a copy of a program in a directory of the test's own.
func copyOf(t *testing.T, program string) string {
	t.Helper()
	from, err := exec.LookPath(program)
	if err != nil {
		t.Fatal(err)
	}
	code, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	to := filepath.Join(t.TempDir(), program)
	if err = os.WriteFile(to, code, 0o755); err != nil {
		t.Fatal(err)
	}
	return to
}

// started runs a program until the test ends, as user 65534, and returns when it executes.
func started(t *testing.T, program string, args ...string) *exec.Cmd {
	t.Helper()
	for dir := filepath.Dir(program); strings.HasPrefix(dir, os.TempDir()+"/"); dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command(program, args...)
	nobody := &syscall.Credential{Uid: 65534, Gid: 65534}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: nobody, Pdeathsig: unix.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { kill(t, cmd) })
	return cmd
}

func kill(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	if cmd.ProcessState != nil {
		return
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Error(err)
	}
	if err := cmd.Wait(); err == nil {
		t.Error("the process ended by itself before it was killed")
	}
}

func digest(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// attestor attests one connect at a time.
type attestor struct{ *Attestor }

func (a attestor) Attest(ctx context.Context, peer Peer) (Identity, error) {
	attested, err := a.Attestor.Attest(ctx, peer)
	if err != nil {
		return Identity{}, err
	}
	defer attested.Release()
	return *attested.Identity(), nil
}

func static(t *testing.T, tasks Tasks, rules ...Rule) attestor {
	t.Helper()
	return byRules(t, NewProcesses(tasks, "", nil), rules...)
}

func byRules(t *testing.T, processes *Processes, rules ...Rule) attestor {
	t.Helper()
	s, err := NewStatic(rules, processes)
	if err != nil {
		t.Fatal(err)
	}
	a := NewAttestor(processes, s)
	t.Cleanup(func() {
		if err := a.Close(); err != nil {
			t.Error(err)
		}
	})
	return attestor{a}
}

const orders = "spiffe://example.test/ns/shop/sa/orders"

func TestARealProcessIsAttestedByItsSelectors(t *testing.T) {
	exe := copyOf(t, "sleep")
	cmd := started(t, exe, "1000")
	self, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	cgroup, err := cgroup2Path(string(self))
	if err != nil {
		t.Fatal(err)
	}
	nobody, root := uint32(65534), uint32(0)
	for name, test := range map[string]struct {
		rule Rule
		want bool
	}{
		"the right uid":                    {Rule{UID: &nobody}, true},
		"a wrong uid":                      {Rule{UID: &root}, false},
		"a wrong gid beside the right uid": {Rule{UID: &nobody, GID: &root}, false},
		"the executable's path":            {Rule{Exe: exe}, true},
		"an unknown executable":            {Rule{Exe: "/usr/bin/sleep"}, false},
		"path and hash":                    {Rule{Exe: exe, ExeSHA256: digest(t, exe)}, true},
		"the hash in capitals":             {Rule{ExeSHA256: strings.ToUpper(digest(t, exe))}, true},
		"the right path with another hash": {Rule{Exe: exe, ExeSHA256: strings.Repeat("0", 64)}, false},
		"a unit that it does not run in":   {Rule{UID: &nobody, Unit: "orders.service"}, false},
		"a cgroup that it does not run in": {Rule{UID: &nobody, Cgroup: "/not/here"}, false},
		"all selectors at once": {
			Rule{UID: &nobody, GID: &nobody, Exe: exe, ExeSHA256: digest(t, exe)}, true},
	} {
		t.Run(name, func(t *testing.T) {
			test.rule.SPIFFEID = orders
			id, err := static(t, new(procTasks), test.rule).Attest(t.Context(), peerOf(t, cmd.Process.Pid))
			if err != nil {
				t.Fatal(err)
			}
			if got := !id.ID.IsZero(); got != test.want {
				t.Errorf("attested: %v, want %v (%+v)", got, test.want, id)
			}
			p := id.Process
			if p.Exe != exe || p.UID != nobody || p.Cgroup != cgroup || p.Comm != "test" || p.Started.IsZero() {
				t.Errorf("facts are not those of the process: %+v", p)
			}
			if test.want && (id.Source != "static" || id.Rule != "identities[0]" || id.ID.String() != orders) {
				t.Errorf("identity is %+v", id)
			}
		})
	}
}

func TestTheFirstRuleThatMatchesWins(t *testing.T) {
	nobody := uint32(65534)
	cmd := started(t, copyOf(t, "sleep"), "1000")
	s := static(t, new(procTasks),
		Rule{SPIFFEID: orders, UID: &nobody, ExeSHA256: strings.Repeat("0", 64)},
		Rule{SPIFFEID: "spiffe://example.test/second", Name: "second", UID: &nobody},
		Rule{SPIFFEID: "spiffe://example.test/third", UID: &nobody})
	id, err := s.Attest(t.Context(), peerOf(t, cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	if id.Rule != "second" || id.ID.String() != "spiffe://example.test/second" {
		t.Errorf("identity is %+v", id)
	}
	if id.Process.ExeSHA256 == "" {
		t.Error("the hash a rule asked for is not among the facts")
	}
}

func TestAnExecAfterConnectIsNoticed(t *testing.T) {
	cmd := exec.Command("/bin/sh", "-c", "echo ready; read go; exec sleep 1000")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err = cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { kill(t, cmd) })
	if _, err = bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	peer := peerOf(t, cmd.Process.Pid)
	s := static(t, new(procTasks))
	if _, err = s.Attest(t.Context(), peer); err != nil {
		t.Fatalf("before exec: %v", err)
	}
	if _, err = fmt.Fprintln(in, "go"); err != nil {
		t.Fatal(err)
	}
	for peerOf(t, cmd.Process.Pid).ExecID == peer.ExecID { // until it has executed
		if t.Context().Err() != nil {
			t.Fatal("no exec")
		}
	}
	if _, err = s.Attest(t.Context(), peer); !errors.Is(err, ErrChanged) || !strings.Contains(err.Error(), "exec id") {
		t.Errorf("after exec: %v", err)
	}
}

func TestAProcessThatExitedIsGone(t *testing.T) {
	for _, reaped := range []bool{false, true} {
		cmd := started(t, copyOf(t, "sleep"), "1000")
		peer := peerOf(t, cmd.Process.Pid)
		s := static(t, new(procTasks))
		if _, err := s.Attest(t.Context(), peer); err != nil {
			t.Fatal(err)
		}
		if reaped {
			kill(t, cmd)
		} else { // a zombie: /proc/PID exists, the pidfd is readable
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			if err := unix.Waitid(unix.P_PID, cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := s.Attest(t.Context(), peer); !errors.Is(err, ErrGone) {
			t.Errorf("reaped %v: %v", reaped, err)
		}
	}
}

func TestAChildHasNoPartInItsParentsIdentity(t *testing.T) {
	// The parent connected and exited; its child holds the socket.
	cmd := exec.Command("/bin/sh", "-c", "sleep 1000 & echo $!; read go")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err = cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var child int
	if _, err = fmt.Fscanln(out, &child); err != nil {
		t.Fatal(err)
	}
	for comm := ""; comm != "sleep\n"; { // until then it is a copy of the shell
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", child))
		if err != nil {
			t.Fatal(err)
		}
		comm = string(b)
	}
	t.Cleanup(func() {
		if err := unix.Kill(child, unix.SIGKILL); err != nil {
			t.Error(err)
		}
	})
	peer := peerOf(t, cmd.Process.Pid)
	s := static(t, new(procTasks))
	if id, err := s.Attest(t.Context(), peer); err != nil || id.Process.PID != uint32(cmd.Process.Pid) {
		t.Fatalf("while the parent lives: %+v, %v", id, err)
	}
	if err = in.Close(); err != nil {
		t.Fatal(err)
	}
	if err = cmd.Wait(); err == nil {
		t.Fatal("read at the end of its input succeeded")
	}
	if _, err = s.Attest(t.Context(), peer); !errors.Is(err, ErrGone) {
		t.Errorf("after the parent has exited: %v", err)
	}
	if id, err := s.Attest(t.Context(), peerOf(t, child)); err != nil || id.Process.PID != uint32(child) {
		t.Errorf("the child for itself: %+v, %v", id, err)
	}
}

func TestWhatChangedIsNamed(t *testing.T) {
	cmd := started(t, copyOf(t, "sleep"), "1000")
	for what, change := range map[string]func(*TaskFacts){
		"start time (the pid was reused)":  func(f *TaskFacts) { f.StartBoottime++ },
		"pidfs inode (the pid was reused)": func(f *TaskFacts) { f.PidInode++ },
		"exec id":                          func(f *TaskFacts) { f.ExecID++ },
		"executable's inode":               func(f *TaskFacts) { f.ExeInode++ },
		"executable's device":              func(f *TaskFacts) { f.ExeDev++ },
		"uid":                              func(f *TaskFacts) { f.UID++ },
		"gid":                              func(f *TaskFacts) { f.GID++ },
		"cgroup id":                        func(f *TaskFacts) { f.CgroupID++ },
	} {
		// 1: between connect and the first look; 2: while the facts were read
		for look := int32(1); look <= 2; look++ {
			tasks := &procTasks{change: func(n int32, f *TaskFacts) {
				if n >= look {
					change(f)
				}
			}}
			_, err := static(t, tasks).Attest(t.Context(), peerOf(t, cmd.Process.Pid))
			if !errors.Is(err, ErrChanged) || !strings.Contains(err.Error(), what) {
				t.Errorf("%s changed before look %d: %v", what, look, err)
			}
			if got := tasks.looks.Load(); got != look {
				t.Errorf("%s: refused after %d looks, want %d", what, got, look)
			}
		}
	}
}

func TestAReusedPidIsToldByItsPidfdAlone(t *testing.T) {
	cmd := started(t, copyOf(t, "sleep"), "1000")
	// The kernel's answer agrees with the record.
	tasks := &procTasks{change: func(_ int32, f *TaskFacts) { f.PidInode++ }}
	peer := peerOf(t, cmd.Process.Pid)
	peer.PidInode++
	if _, err := static(t, tasks).Attest(t.Context(), peer); !errors.Is(err, ErrChanged) {
		t.Errorf("a pidfd of another inode: %v", err)
	}
}

func TestAKernelWithoutPidfsInodesIsServed(t *testing.T) {
	cmd := started(t, copyOf(t, "sleep"), "1000")
	tasks := &procTasks{change: func(_ int32, f *TaskFacts) { f.PidInode = 0 }}
	peer := peerOf(t, cmd.Process.Pid)
	peer.PidInode = 0
	if _, err := static(t, tasks).Attest(t.Context(), peer); err != nil {
		t.Error(err)
	}
}

func TestAVerifiedProcessIsLookedAtOncePerConnect(t *testing.T) {
	cmd := started(t, copyOf(t, "sleep"), "1000")
	tasks := new(procTasks)
	s := static(t, tasks)
	s.Follow(new(fakeKernel)) // which looks instead of tasks
	peer := peerOf(t, cmd.Process.Pid)
	for connect, want := range []int32{3, 4, 5} {
		if _, err := s.Attest(t.Context(), peer); err != nil {
			t.Fatal(err)
		}
		if got := tasks.looks.Load(); got != want {
			t.Errorf("after connect %d: %d looks, want %d", connect+1, got, want)
		}
	}
}

func TestAReplacedBinaryDoesNotInheritTheIdentity(t *testing.T) {
	exe := copyOf(t, "sleep")
	s := static(t, new(procTasks),
		Rule{SPIFFEID: "spiffe://example.test/by-hash", Exe: exe, ExeSHA256: digest(t, exe)})
	old := started(t, exe, "1000")
	attested := func(cmd *exec.Cmd) bool {
		id, err := s.Attest(t.Context(), peerOf(t, cmd.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		return !id.ID.IsZero()
	}
	if !attested(old) {
		t.Error("the original is not attested")
	}
	code, err := os.ReadFile(exe)
	if err != nil {
		t.Fatal(err)
	}
	if err = os.WriteFile(exe+".new", append(code, 0), 0o755); err != nil {
		t.Fatal(err)
	}
	if err = os.Rename(exe+".new", exe); err != nil {
		t.Fatal(err)
	}
	if attested(started(t, exe, "1000")) {
		t.Error("the replacement is attested as the original")
	}
	if !attested(old) {
		t.Error("the running original lost its identity by the file's replacement")
	}
}

func TestAFileMountedOverAPathIsNotTheProgramOfThatPath(t *testing.T) {
	trusted, other := copyOf(t, "sleep"), copyOf(t, "tail")
	cmd := exec.Command("unshare", "--mount", "--", "sh", "-c",
		`mount --bind "$1" "$0" && echo ready && exec "$0" -f /dev/null`, trusted, other)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err = cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { kill(t, cmd) })
	if _, err = bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	var peer Peer
	for exe := ""; exe != trusted; { // until it has executed
		if exe, err = os.Readlink(exeLink(uint32(cmd.Process.Pid))); err != nil || t.Context().Err() != nil {
			t.Fatal(err)
		}
		peer = peerOf(t, cmd.Process.Pid)
	}
	for name, test := range map[string]struct {
		rule Rule
		want bool
	}{
		"by path":                       {Rule{Exe: trusted}, false},
		"by path and the host's hash":   {Rule{Exe: trusted, ExeSHA256: digest(t, trusted)}, false},
		"by path and its own file hash": {Rule{Exe: trusted, ExeSHA256: digest(t, other)}, true},
	} {
		test.rule.SPIFFEID = orders
		id, err := static(t, new(procTasks), test.rule).Attest(t.Context(), peer)
		if err != nil {
			t.Fatal(err)
		}
		if id.ID.IsZero() == test.want {
			t.Errorf("%s: attested: %v, want %v", name, !test.want, test.want)
		}
	}
}

func TestHashingEndsWithItsContext(t *testing.T) {
	exe := copyOf(t, "sleep")
	cmd := started(t, exe, "1000")
	s := static(t, new(procTasks), Rule{SPIFFEID: orders, ExeSHA256: digest(t, exe)})
	for range hashers {
		s.processes.hashes.slots <- struct{}{} // others hash and do not end
	}
	if _, _, err := s.processes.verify(t.Context(), peerOf(t, cmd.Process.Pid)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if id, err := s.Attest(ctx, peerOf(t, cmd.Process.Pid)); !errors.Is(err, context.Canceled) || !id.ID.IsZero() {
		t.Errorf("%+v, %v", id, err)
	}
}

func TestADigestIsReadOnceForAnUnchangedFile(t *testing.T) {
	exe, err := exec.LookPath("sleep") // not a copy: a fresh file is not remembered
	if err != nil {
		t.Fatal(err)
	}
	h := newHasher()
	want := digest(t, exe)
	for range 2 {
		if got, err := h.sum(t.Context(), exe); err != nil || got != want {
			t.Fatalf("%s, %v", got, err)
		}
		for len(h.slots) < hashers {
			h.slots <- struct{}{} // from here on nothing can be read
		}
	}
	fresh := filepath.Join(t.TempDir(), "fresh")
	h = newHasher()
	for _, content := range []string{"one", "two"} {
		if err = os.WriteFile(fresh, []byte(content), 0o755); err != nil {
			t.Fatal(err)
		}
		if got, err := h.sum(t.Context(), fresh); err != nil || got != digest(t, fresh) {
			t.Errorf("after %q was written: %s, %v", content, got, err)
		}
	}
}

func TestTheCacheIsBounded(t *testing.T) {
	b := newBounded[int, int](3)
	for i := range 100 {
		b.put(i, i)
		if v, ok := b.get(i); !ok || v != i {
			t.Fatalf("%d is not there after it was put", i)
		}
	}
	if len(b.m) != 3 {
		t.Errorf("it holds %d, want 3", len(b.m))
	}
}

func TestTheCgroup2PathIsFoundAmongTheHierarchies(t *testing.T) {
	for text, want := range map[string]string{
		"0::/system.slice/a.service\n":           "/system.slice/a.service",
		"12:pids:/x\n1:name=systemd:/y\n0::/z\n": "/z",
		"0::/\n":                                 "/",
		"0::/a b (deleted)\n":                    "/a b (deleted)",
		"0::/../other\n":                         "",
		"0::/..\n":                               "",
		"0::/..hidden\n":                         "/..hidden",
		"4:memory:/only/v1\n":                    "",
		"":                                       "",
		"1:name=0::/fake:/\n0::/system.slice/true\n": "/system.slice/true",
	} {
		got, err := cgroup2Path(text)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%q gives %q, %v; want %q", text, got, err, want)
		}
	}
}

func TestTheUnitIsTheOneTheSystemManagerMade(t *testing.T) {
	for cgroup, want := range map[string]string{
		"/system.slice/orders.service":                  "orders.service",
		"/system.slice/system-orders.slice/o@1.service": "o@1.service",
		"/system.slice/docker-abc.scope":                "docker-abc.scope",
		"/system.slice/orders.service/below/fake.scope": "orders.service",
		"/init.scope":                   "init.scope",
		"/system.slice/_cgroup.service": "cgroup.service",
		"/user.slice/user-1000.slice/user@1000.service/app.slice/orders.service": "user@1000.service",
		"/orders/orders.service": "",
		"/system.slice":          "",
		"/":                      "",
		"":                       "",
	} {
		if got := unitOf(cgroup); got != want {
			t.Errorf("%s is of unit %q, want %q", cgroup, got, want)
		}
	}
}

func TestACgroupSelectorEndsAtComponents(t *testing.T) {
	for _, test := range []struct {
		pattern, cgroup string
		want            bool
	}{
		{"/a/b", "/a/b", true},
		{"/a/b", "/a/b/c", true},
		{"/a/b", "/a/bc", false},
		{"/a/b", "/a", false},
		{"/a/b/*", "/a/b/c", true},
		{"/a/b/*", "/a/b", false},
		{"/a/b/*", "/a/bc/d", false},
	} {
		if got := cgroupMatches(test.pattern, test.cgroup); got != test.want {
			t.Errorf("%s selects %s: %v, want %v", test.pattern, test.cgroup, got, test.want)
		}
	}
}

func TestAWrongRuleIsRefusedByTheNameOfItsField(t *testing.T) {
	uid := uint32(1)
	for name, test := range map[string]struct {
		rule  Rule
		field string
	}{
		"no selector":             {Rule{SPIFFEID: orders}, "spiffe-id"},
		"no SPIFFE ID":            {Rule{UID: &uid}, "spiffe-id"},
		"a URL":                   {Rule{UID: &uid, SPIFFEID: "https://example.test/x"}, "spiffe-id"},
		"a trust domain alone":    {Rule{UID: &uid, SPIFFEID: "spiffe://example.test"}, "spiffe-id"},
		"a relative path":         {Rule{SPIFFEID: orders, Exe: "bin/orders"}, "exe"},
		"a path with dots":        {Rule{SPIFFEID: orders, Exe: "/usr/../bin/orders"}, "exe"},
		"a short hash":            {Rule{SPIFFEID: orders, ExeSHA256: "abc1"}, "exe-sha256"},
		"a hash that is no hex":   {Rule{SPIFFEID: orders, ExeSHA256: strings.Repeat("x", 64)}, "exe-sha256"},
		"the root cgroup":         {Rule{SPIFFEID: orders, Cgroup: "/"}, "cgroup"},
		"all cgroups":             {Rule{SPIFFEID: orders, Cgroup: "/*"}, "cgroup"},
		"a star inside a cgroup":  {Rule{SPIFFEID: orders, Cgroup: "/a/*/b"}, "cgroup"},
		"a cgroup with a slash":   {Rule{SPIFFEID: orders, Cgroup: "/a/"}, "cgroup"},
		"a unit without its type": {Rule{SPIFFEID: orders, Unit: "orders"}, "unit"},
		"a slice as unit":         {Rule{SPIFFEID: orders, Unit: "system.slice"}, "unit"},
		"a path as unit":          {Rule{SPIFFEID: orders, Unit: "a.slice/b.service"}, "unit"},
		"any namespace":           {Rule{SPIFFEID: orders, Namespace: "*"}, "namespace"},
		"a namespace's beginning": {Rule{SPIFFEID: orders, Namespace: "shop*"}, "namespace"},
		"a namespace in capitals": {Rule{SPIFFEID: orders, Namespace: "Shop"}, "namespace"},
		"a long namespace":        {Rule{SPIFFEID: orders, Namespace: strings.Repeat("a", 64)}, "namespace"},
		"any pod":                 {Rule{SPIFFEID: orders, Namespace: "shop", Pod: "*"}, "pod"},
		"a star inside a pod":     {Rule{SPIFFEID: orders, Namespace: "shop", Pod: "a*b"}, "pod"},
		"a pod of any namespace":  {Rule{SPIFFEID: orders, Pod: "orders-*"}, "pod"},
		"a container's beginning": {Rule{SPIFFEID: orders, Namespace: "shop", Container: "app*"}, "container"},
		"a container of any pod":  {Rule{SPIFFEID: orders, Container: "app"}, "container"},
	} {
		err := test.rule.Validate()
		var field *FieldError
		if !errors.As(err, &field) || field.Field != test.field {
			t.Errorf("%s: %v, want an error of %s", name, err, test.field)
		}
		if _, err = NewStatic([]Rule{test.rule}, NewProcesses(new(procTasks), "", nil)); err == nil {
			t.Errorf("%s: an attestor was made of it", name)
		}
	}
}

func FuzzCgroup2Path(f *testing.F) {
	f.Add("12:pids:/x\n0::/system.slice/a.service\n")
	f.Add("0::/../x\n")
	f.Fuzz(func(t *testing.T, text string) {
		var p string
		var err error
		bounds.Check(t, len(text), 16, func() { p, err = cgroup2Path(text) })
		if err != nil {
			return
		}
		if strings.HasPrefix(p, "/../") {
			t.Errorf("%q leads out of the hierarchy", p)
		}
		if u := unitOf(p); strings.Contains(u, "/") {
			t.Errorf("%q is no unit", u)
		}
	})
}
