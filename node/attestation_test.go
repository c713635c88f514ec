package node

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"klamm/bpf"
	"klamm/spiffe"
)

// The test binary is its own workload: started again with this variable, it connects to the address in it and does what
// its standard input says, line by line, each of which it answers with one.
const lifeVariable = "KLAMM_TEST_LIFE"

func init() {
	to, is := os.LookupEnv(lifeVariable)
	if !is {
		return
	}
	if err := live(to); err != nil {
		fmt.Fprintln(os.Stderr, "workload:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func live(to string) error {
	if address, err := netip.ParseAddrPort(to); err == nil {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0) // survives execve
		if err == nil {
			err = unix.Connect(fd, &unix.SockaddrInet4{Addr: address.Addr().As4(), Port: int(address.Port())})
		}
		if err != nil {
			return err
		}
	}
	fmt.Println("ready")
	// By the byte: what is not read yet is for the program that is executed next.
	for line := ""; ; {
		b := make([]byte, 1)
		switch _, err := os.Stdin.Read(b); {
		case errors.Is(err, io.EOF): // the test is over
			return nil
		case err != nil:
			return err
		}
		if line += string(b); b[0] != '\n' {
			continue
		}
		command, argument, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		if err := lifeCommands[command](argument); err != nil {
			return err
		}
		line = ""
	}
}

var lifeCommands = map[string]func(string) error{
	"execute": func(string) error {
		if err := os.Setenv(lifeVariable, "again"); err != nil {
			return err
		}
		return unix.Exec("/proc/self/exe", os.Args[:1], os.Environ())
	},
	"setuid": func(uid string) error {
		n, err := strconv.Atoi(uid)
		if err == nil {
			err = syscall.Setuid(n)
		}
		fmt.Println(n)
		return err
	},
	"fork": func(string) error {
		pid, err := fork()
		fmt.Println(pid)
		return err
	},
}

// fork starts a child that is the same program image and has the same sockets, until standard input ends. It makes
// nothing but system calls: the Go runtime does not survive a fork.
//
//go:norace
//go:nosplit
func fork() (int, error) {
	pid, _, errno := syscall.RawSyscall(syscall.SYS_CLONE, uintptr(syscall.SIGCHLD), 0, 0)
	if errno != 0 {
		return 0, errno
	}
	if pid > 0 {
		return int(pid), nil
	}
	var b byte
	for {
		n, _, errno := syscall.RawSyscall(syscall.SYS_READ, 0, uintptr(unsafe.Pointer(&b)), 1)
		if n == 0 || errno != 0 && errno != syscall.EINTR {
			_, _, _ = syscall.RawSyscall(syscall.SYS_EXIT_GROUP, 0, 0, 0)
		}
	}
}

// mortal is a workload that lives by the test's word.
type mortal struct {
	t      *testing.T
	cmd    *exec.Cmd
	in     io.WriteCloser
	out    *bufio.Reader
	record bpf.Record
}

// stageOfLife is a redirect with an attestor that knows users by their uid.
type stageOfLife struct {
	t        *testing.T
	redirect *Redirect
	cgroup   string
	attestor *spiffe.Attestor
}

func userID(uid int) string { return fmt.Sprintf("spiffe://example.test/user/%d", uid) }

func newStageOfLife(t *testing.T) *stageOfLife {
	t.Helper()
	root, err := Cgroup2Mount()
	if err != nil {
		t.Fatal(err)
	}
	r, cgroup := openRedirect(t, 19192)
	var rules []spiffe.Rule
	for _, uid := range []uint32{61001, 61002} {
		rules = append(rules, spiffe.Rule{SPIFFEID: userID(int(uid)), UID: &uid})
	}
	processes := spiffe.NewProcesses(tasks{r}, root, nil)
	static, err := spiffe.NewStatic(rules, processes)
	if err != nil {
		t.Fatal(err)
	}
	a := spiffe.NewAttestor(processes, static)
	a.Follow(kernel{r.programs})
	r.followExecve(a.Executed)
	t.Cleanup(func() {
		if err := a.Close(); err != nil {
			t.Error(err)
		}
	})
	return &stageOfLife{t, r, cgroup, a}
}

// start starts a workload that connects.
func (s *stageOfLife) start(uid int) *mortal {
	s.t.Helper()
	m := s.startWith(uid, "192.0.2.7:19192")
	m.record = acceptOne(s.t, s.redirect).record
	if m.record.TGID != uint32(m.cmd.Process.Pid) {
		s.t.Fatalf("the connection is of %d, not of %d", m.record.TGID, m.cmd.Process.Pid)
	}
	return m
}

func (s *stageOfLife) startWith(uid int, life string) *mortal {
	s.t.Helper()
	dir, err := os.Open(s.cgroup)
	if err != nil {
		s.t.Fatal(err)
	}
	defer func() { _ = dir.Close() }()
	m := &mortal{t: s.t, cmd: exec.Command("/proc/self/exe")}
	m.cmd.Env = append(os.Environ(), lifeVariable+"="+life, "GORACE=atexit_sleep_ms=0")
	m.cmd.Stderr = os.Stderr
	m.cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd()),
		Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}}
	if m.in, err = m.cmd.StdinPipe(); err != nil {
		s.t.Fatal(err)
	}
	out, err := m.cmd.StdoutPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	m.out = bufio.NewReader(out)
	if err := m.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(m.reap)
	m.answer()
	return m
}

func (m *mortal) answer() string {
	m.t.Helper()
	line, err := m.out.ReadString('\n')
	if err != nil {
		m.t.Fatalf("the workload does not answer: %v", err)
	}
	return strings.TrimSuffix(line, "\n")
}

// does has the workload do something, and returns its answer.
func (m *mortal) does(command string) string {
	m.t.Helper()
	if _, err := io.WriteString(m.in, command+"\n"); err != nil {
		m.t.Fatal(err)
	}
	return m.answer()
}

// kill ends the workload; it is not reaped.
func (m *mortal) kill() {
	m.t.Helper()
	if err := m.cmd.Process.Kill(); err != nil {
		m.t.Fatal(err)
	}
}

// reap ends the workload and those it forked, and waits for it.
func (m *mortal) reap() {
	_ = m.in.Close()
	_ = m.cmd.Process.Kill()
	_ = m.cmd.Wait()
}

func (s *stageOfLife) attest(r bpf.Record) (*spiffe.Attested, error) {
	ctx, cancel := context.WithTimeout(context.Background(), redirectPatience)
	defer cancel()
	return s.attestor.Attest(ctx, peerOf(r))
}

// attested fails the test unless it is the user.
func (s *stageOfLife) attested(r bpf.Record, uid int) *spiffe.Attested {
	s.t.Helper()
	h, err := s.attest(r)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(h.Release)
	if id := h.Identity(); id.ID.String() != userID(uid) || id.Process.PID != r.TGID {
		s.t.Fatalf("it is %+v", id)
	}
	return h
}

func (s *stageOfLife) await(h *spiffe.Attested, what string, so func(*spiffe.Identity) bool) {
	s.t.Helper()
	changed := make(chan struct{}, 1)
	stop := h.Watch(func() {
		select {
		case changed <- struct{}{}:
		default:
		}
	})
	defer stop()
	for end := time.After(redirectPatience); !so(h.Identity()); {
		select {
		case <-changed:
		case <-end:
			s.t.Fatalf("%s: the identity is still %+v", what, *h.Identity())
		}
	}
}

func lostBy(reason error) func(*spiffe.Identity) bool {
	return func(id *spiffe.Identity) bool { return errors.Is(id.Lost, reason) }
}

func TestAnIdentityEndsWithItsProcessOrProgram(t *testing.T) {
	s := newStageOfLife(t)
	for name, test := range map[string]struct {
		happens func(*mortal)
		want    error
	}{
		"it exits and nobody reaps it": {func(m *mortal) { m.kill() }, spiffe.ErrGone},
		"it exits and is reaped":       {func(m *mortal) { m.reap() }, spiffe.ErrGone},
		"it executes another program, which keeps the socket": {func(m *mortal) { m.does("execute") },
			spiffe.ErrChanged},
		"it is moved to another cgroup": {func(m *mortal) {
			other := cgroupOfClients(t)
			t.Cleanup(m.reap) // before the cgroup is removed
			pid := []byte(strconv.Itoa(m.cmd.Process.Pid))
			if err := os.WriteFile(filepath.Join(other, "cgroup.procs"), pid, 0); err != nil {
				t.Error(err)
			}
		}, spiffe.ErrChanged},
	} {
		t.Run(name, func(t *testing.T) {
			m := s.start(61001)
			h := s.attested(m.record, 61001)
			test.happens(m)
			s.await(h, name, lostBy(test.want))
			if _, err := s.attest(m.record); !errors.Is(err, test.want) {
				t.Errorf("attested again: %v", err)
			}
		})
	}
	root := s.start(0)
	h, err := s.attest(root.record)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Release()
	root.does("setuid 61002")
	s.await(h, "setuid", lostBy(spiffe.ErrChanged))
}

func TestAnExecveIsNoticedBeforeTheNextLook(t *testing.T) {
	s := newStageOfLife(t)
	if err := s.redirect.Unnoticed(); err != nil {
		t.Fatal(err)
	}
	quickest := time.Hour
	for range 5 { // a look may come by chance
		m := s.start(61001)
		h := s.attested(m.record, 61001)
		begin := time.Now()
		m.does("execute")
		s.await(h, "execve", lostBy(spiffe.ErrChanged))
		quickest = min(quickest, time.Since(begin))
		m.reap()
	}
	if quickest > 500*time.Millisecond {
		t.Errorf("noticed after %v at best, which a look would do", quickest)
	}
}

func TestAForkedWorkerKeepsTheConnectionOfItsParent(t *testing.T) {
	s := newStageOfLife(t)
	m := s.start(61001)
	h := s.attested(m.record, 61001)
	child, err := strconv.Atoi(m.does("fork"))
	if err != nil {
		t.Fatal(err)
	}
	if id := h.Identity(); id.Process.PID != m.record.TGID || id.Lost != nil {
		t.Fatalf("while the parent lives it is %+v", id)
	}
	m.kill()
	s.await(h, "the child", func(id *spiffe.Identity) bool {
		return id.Process.PID == uint32(child) && id.ID.String() == userID(61001) && id.Lost == nil
	})
	if n := s.attestor.State().Inherited; n != 1 {
		t.Errorf("%d connections are inherited", n)
	}
	if err := unix.Kill(child, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	s.await(h, "the child's end", lostBy(spiffe.ErrGone))
}

func TestAWorkerThatBecameAnotherDoesNot(t *testing.T) {
	s := newStageOfLife(t)
	m := s.start(61001)
	h := s.attested(m.record, 61001)
	child := m.does("fork")
	other := cgroupOfClients(t)
	t.Cleanup(m.reap)
	if err := os.WriteFile(filepath.Join(other, "cgroup.procs"), []byte(child), 0); err != nil {
		t.Fatal(err)
	}
	if id := h.Identity(); id.Lost != nil {
		t.Fatalf("while the parent lives: %v", id.Lost)
	}
	m.kill()
	s.await(h, "its end", lostBy(spiffe.ErrGone))
}

func TestADescriptorThatWasPassedOnOutlivesItsOwnerInVain(t *testing.T) {
	s := newStageOfLife(t)
	m := s.start(61001)
	h := s.attested(m.record, 61001)
	stolen, err := steal(m.record)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(stolen) }()
	m.kill()
	s.await(h, "the owner's end", lostBy(spiffe.ErrGone))
}

// steal has what SCM_RIGHTS would give: the socket of a connection.
func steal(r bpf.Record) (int, error) {
	pidfd, err := unix.PidfdOpen(int(r.TGID), 0)
	if err != nil {
		return -1, err
	}
	defer func() { _ = unix.Close(pidfd) }()
	for fd := range 64 {
		got, err := unix.PidfdGetfd(pidfd, fd, 0)
		if err != nil {
			continue
		}
		cookie, err := unix.GetsockoptUint64(got, unix.SOL_SOCKET, unix.SO_COOKIE)
		if err == nil && cookie == r.ClientCookie {
			return got, nil
		}
		_ = unix.Close(got)
	}
	return -1, errors.New("the process has no such socket")
}

// TestAReusedPidIsAnotherProcess makes the kernel give a pid again, by ns_last_pid: it names the last one that was
// given.
func TestAReusedPidIsAnotherProcess(t *testing.T) {
	const lastPid = "/proc/sys/kernel/ns_last_pid"
	s := newStageOfLife(t)
	for range 3 {
		first := s.start(61001)
		h := s.attested(first.record, 61001)
		pid := first.cmd.Process.Pid
		first.reap()
		var second *mortal
		for end := time.Now().Add(redirectPatience); second == nil || second.cmd.Process.Pid != pid; {
			if time.Now().After(end) {
				t.Fatalf("the kernel does not give pid %d again", pid)
			}
			if second != nil { // somebody else on the host was faster
				second.reap()
				acceptOne(t, s.redirect)
			}
			if err := os.WriteFile(lastPid, []byte(strconv.Itoa(pid-1)), 0); err != nil {
				t.Fatal(err)
			}
			second = s.startWith(61002, "192.0.2.7:19192")
		}
		record := acceptOne(t, s.redirect).record
		if record.TGID != first.record.TGID {
			t.Fatalf("pids %d and %d", first.record.TGID, record.TGID)
		}
		again := s.attested(record, 61002)
		if _, err := s.attest(first.record); !errors.Is(err, spiffe.ErrChanged) {
			t.Errorf("the first connect is attested as the second process: %v", err)
		}
		s.await(h, "the first process' end", lostBy(spiffe.ErrGone))
		if id := again.Identity(); id.Lost != nil || id.ID.String() != userID(61002) {
			t.Errorf("the second process is %+v", id)
		}
	}
}
