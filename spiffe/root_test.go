package spiffe

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"klamm/test/bounds"
)

const nobody = 65534

// jailed runs a program below a root of its own, as nobody, and returns the root.
func jailed(t *testing.T) (root string, cmd *exec.Cmd) {
	t.Helper()
	root = t.TempDir()
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Fatal(err)
	}
	code, err := os.ReadFile(busybox)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "busybox"), code, 0o755); err != nil {
		t.Fatal(err)
	}
	for dir := root; strings.HasPrefix(dir, os.TempDir()+"/"); dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	cmd = &exec.Cmd{Path: "/busybox", Args: []string{"busybox", "sleep", "1000"}, Dir: "/",
		SysProcAttr: &syscall.SysProcAttr{Chroot: root, Pdeathsig: unix.SIGKILL,
			Credential: &syscall.Credential{Uid: nobody, Gid: nobody, Groups: []uint32{4242}}}}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { kill(t, cmd) })
	return root, cmd
}

// laidOut puts a token where kubelet would: a link to a link to the file.
func laidOut(t *testing.T, root, file, token string) {
	t.Helper()
	dir := filepath.Join(root, filepath.Dir(file))
	version := filepath.Join(dir, "..2026_11_25")
	link := filepath.Join(dir, filepath.Base(file))
	err := errors.Join(os.MkdirAll(version, 0o755),
		os.WriteFile(filepath.Join(version, filepath.Base(file)), []byte(token), 0o644))
	if _, missing := os.Lstat(link); missing != nil {
		err = errors.Join(err, os.Symlink("..2026_11_25", filepath.Join(dir, "..data")),
			os.Symlink("..data/"+filepath.Base(file), link))
	}
	if err != nil {
		t.Fatal(err)
	}
}

func subjectOf(t *testing.T, pid int) subject {
	t.Helper()
	peer := peerOf(t, pid)
	return subject{process{Process: Process{PID: peer.TGID, UID: peer.UID, GID: peer.GID, PodUID: podUID}}, peer}
}

func TestAWorkloadsFileIsReadAsTheWorkloadSeesIt(t *testing.T) {
	root, cmd := jailed(t)
	host := filepath.Join(t.TempDir(), "secret")
	write := func(name string, mode os.FileMode, uid, gid int) error {
		file := filepath.Join(root, name)
		return errors.Join(os.WriteFile(file, []byte("inside "+name), mode), os.Chmod(file, mode), os.Chown(file, uid, gid))
	}
	link := func(to, name string) error { return os.Symlink(to, filepath.Join(root, name)) }
	if err := errors.Join(
		os.WriteFile(host, []byte("OF THE HOST"), 0o644),
		os.Mkdir(filepath.Join(root, "dir"), 0o755),
		os.Mkdir(filepath.Join(root, "proc"), 0o755),
		write("readable", 0o644, 0, 0),
		write("own", 0o400, nobody, 0),
		write("own unreadable", 0o044, nobody, 0),
		write("group", 0o040, 0, nobody),
		write("group unreadable", 0o004, 0, nobody),
		write("supplementary", 0o040, 0, 4242),
		write("root's", 0o600, 0, 0),
		write("another's", 0o600, 1000, 1000),
		link(host, "absolute"),
		link("../../../../../../../../.."+host, "dots"),
		link("/readable", "absolute inside"),
		link("loop", "loop"),
		link(fmt.Sprintf("/proc/%d/root%s", os.Getpid(), host), "magic"),
		unix.Mkfifo(filepath.Join(root, "pipe"), 0o644),
		unix.Mknod(filepath.Join(root, "device"), unix.S_IFCHR|0o644, int(unix.Mkdev(1, 5))), // /dev/zero
		os.WriteFile(filepath.Join(root, "huge"), filled(maxTokenFile+1), 0o644),
		os.WriteFile(filepath.Join(root, "large"), filled(maxTokenFile), 0o644),
		unix.Mount("proc", filepath.Join(root, "proc"), "proc", 0, ""),
	); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(filepath.Join(root, "proc"), unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	laidOut(t, root, "/run/secrets/klamm/token", "of the pod")
	ps := NewProcesses(new(procTasks), "", nil)
	p := subjectOf(t, cmd.Process.Pid)
	for file, want := range map[string]struct {
		text string
		err  error // nil: any
	}{
		"/run/secrets/klamm/token": {"of the pod", nil},
		"/readable":                {"inside readable", nil},
		"/absolute inside":         {"inside readable", nil},
		"/own":                     {"inside own", nil},
		"/group":                   {"inside group", nil},
		"/supplementary":           {"inside supplementary", nil},
		"/../../readable":          {"inside readable", nil},
		"/own unreadable":          {"", fs.ErrPermission},
		"/group unreadable":        {"", fs.ErrPermission},
		"/root's":                  {"", fs.ErrPermission},
		"/another's":               {"", fs.ErrPermission},
		"/absolute":                {"", fs.ErrNotExist},
		"/dots":                    {"", fs.ErrNotExist},
		"/gone":                    {"", fs.ErrNotExist},
		"/loop":                    {"", unix.ELOOP},
		"/magic":                   {"", unix.ELOOP},
		"/proc/self/root/readable": {"", unix.ELOOP},
		"/pipe":                    {"", nil},
		"/device":                  {"", nil},
		"/dir":                     {"", nil},
		"/huge":                    {"", nil},
	} {
		text, err := ps.readFile(t.Context(), p, file)
		if string(text) != want.text || (err == nil) != (want.text != "") || want.err != nil && !errors.Is(err, want.err) {
			t.Errorf("%s: %q, %v; want %q, %v", file, text, err, want.text, want.err)
		}
	}
	if text, err := ps.readFile(t.Context(), p, "/large"); len(text) != maxTokenFile {
		t.Errorf("%d bytes, %v", len(text), err)
	}
}

func filled(n int) []byte { return []byte(strings.Repeat("x", n)) }

func TestNothingIsReadOfAProcessThatIsNotTheOneThatConnected(t *testing.T) {
	root, cmd := jailed(t)
	laidOut(t, root, "/token", "x")
	p := subjectOf(t, cmd.Process.Pid)
	tasks := new(procTasks)
	ps := NewProcesses(tasks, "", nil)
	changed := p
	changed.peer.ExecID++
	if text, err := ps.readFile(t.Context(), changed, "/token"); text != nil || !errors.Is(err, ErrChanged) {
		t.Errorf("it executed another program: %q, %v", text, err)
	}
	// The facts are compared after the file was read: what changed meanwhile is noticed.
	tasks.change = func(_ int32, f *TaskFacts) { f.StartBoottime++ }
	if text, err := ps.readFile(t.Context(), p, "/token"); text != nil || !errors.Is(err, ErrChanged) {
		t.Errorf("its pid was reused: %q, %v", text, err)
	}
	tasks.change = nil
	kill(t, cmd)
	if text, err := ps.readFile(t.Context(), p, "/token"); text != nil || !errors.Is(err, ErrGone) {
		t.Errorf("it has exited: %q, %v", text, err)
	}
}

func TestReadsThatHangAreOnlySoManyPerPod(t *testing.T) {
	_, cmd := jailed(t)
	p := subjectOf(t, cmd.Process.Pid)
	ps := NewProcesses(new(procTasks), "", nil)
	for range maxReadersPerOwner {
		if !ps.files.enter(podUID) {
			t.Fatal("refused too early")
		}
	}
	if _, err := ps.readFile(t.Context(), p, "/token"); !errors.Is(err, errBusy) {
		t.Error(err)
	}
	other := p
	other.PodUID = staticUID
	if _, err := ps.readFile(t.Context(), other, "/token"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("another pod is held up: %v", err)
	}
	ps.files.leave(podUID)
	if _, err := ps.readFile(t.Context(), p, "/token"); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}

// A FUSE file system that nobody serves: each access waits for its server for ever.
func TestAFileSystemThatHangsHoldsNobodyUpForLong(t *testing.T) {
	root, cmd := jailed(t)
	dev, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if errors.Is(err, fs.ErrNotExist) {
		if err = unix.Mknod(filepath.Join(root, "fuse"), unix.S_IFCHR|0o600, int(unix.Mkdev(10, 229))); err == nil {
			dev, err = unix.Open(filepath.Join(root, "fuse"), unix.O_RDWR|unix.O_CLOEXEC, 0)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(root, "hangs")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	options := "rootmode=40755,user_id=0,group_id=0,allow_other,fd=" + strconv.Itoa(dev)
	if err := unix.Mount("fuse", dir, "fuse", 0, options); err != nil {
		t.Fatal(err)
	}
	ps := NewProcesses(new(procTasks), "", nil)
	p := subjectOf(t, cmd.Process.Pid)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err = ps.readFile(ctx, p, "/hangs/token")
	if err == nil || ctx.Err() == nil {
		t.Errorf("it did not hang: %v", err)
	}
	if len(ps.files.slots) != 1 {
		t.Errorf("%d reads hang", len(ps.files.slots))
	}
	if err := errors.Join(unix.Close(dev), unix.Unmount(dir, unix.MNT_DETACH)); err != nil {
		t.Fatal(err)
	}
	for len(ps.files.slots) > 0 { // the close has ended it
		time.Sleep(time.Millisecond)
	}
}

func TestRightsToReadAreThoseOfTheProcess(t *testing.T) {
	status := "Name:\tx\nUmask:\t0022\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nFDSize:\t64\nGroups:\t9 10 \nVmPeak:\t1 kB\n"
	got, err := parseReadRights(status)
	if err != nil || got.uid != 4 || got.gid != 8 || len(got.groups) != 2 || got.groups[1] != 10 {
		t.Errorf("%+v, %v", got, err)
	}
	for _, wrong := range []string{"", "Uid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\n", "Uid:\t1\nGid:\t5\t6\t7\t8\nGroups:\n",
		strings.Replace(status, "\t4", "\t-4", 1), strings.Replace(status, "\t8", "\t4294967296", 1)} {
		if got, err := parseReadRights(wrong); err == nil {
			t.Errorf("%q: %+v", wrong, got)
		}
	}
}

func FuzzParseReadRights(f *testing.F) {
	f.Add("Uid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nGroups:\t9 10\n")
	f.Add("Name:\tUid:\nUid:\t0\t0\t0\t0\nGroups:\n")
	f.Fuzz(func(t *testing.T, text string) {
		bounds.Check(t, len(text), 64, func() {
			if got, err := parseReadRights(text); err != nil && (got.uid != 0 || got.gid != 0 || got.groups != nil) {
				t.Errorf("%+v with %v", got, err)
			}
		})
	})
}
