package main

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"github.com/twmb/franz-go/pkg/kmsg"
	"golang.org/x/sys/unix"

	"klamm/node"
	"klamm/test/kafka"
	"klamm/test/stage"
)

// TestMain makes the test binary klamm itself when its command line is one of klamm's.
func TestMain(m *testing.M) {
	stage.Main()
	if len(os.Args) > 1 && !strings.HasPrefix(os.Args[1], "-test.") {
		for name, take := range takings {
			if os.Getenv(name) != "" {
				take()
			}
		}
		main()
	}
	os.Exit(m.Run())
}

// Variables that are set for a process that has to do without something.
const (
	withoutBPF   = "KLAMM_TEST_WITHOUT_BPF"
	withoutBPFFS = "KLAMM_TEST_WITHOUT_BPFFS"
	// The number of a capability that not even root has.
	withoutCapability = "KLAMM_TEST_WITHOUT_CAPABILITY"
)

var takings = map[string]func(){withoutBPF: forbidBPF, withoutBPFFS: hideBPFFS,
	withoutCapability: dropCapability}

// forbidBPF makes bpf(2) what it is on a kernel that was built without it.
func forbidBPF() {
	const loadWord, jumpIfEqual, ret = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K,
		unix.BPF_RET | unix.BPF_K
	filter := []unix.SockFilter{
		{Code: loadWord}, // the number of the system call, seccomp(2)
		{Code: jumpIfEqual, K: unix.SYS_BPF, Jf: 1},
		{Code: ret, K: unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)},
		{Code: ret, K: unix.SECCOMP_RET_ALLOW},
	}
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC,
		uintptr(unsafe.Pointer(&program))); errno != 0 {
		panic(errno)
	}
}

// hideBPFFS takes the BPF file system away from the main goroutine.
func hideBPFFS() {
	runtime.LockOSThread()
	err := errors.Join(unix.Unshare(unix.CLONE_NEWNS), unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	if node.HasBPFFS(node.BPFFS) {
		err = errors.Join(err, unix.Unmount(node.BPFFS, unix.MNT_DETACH))
	}
	if err != nil {
		panic(err)
	}
}

// dropCapability executes this program again without the capability: after execve(2) root has those of the bounding
// set.
func dropCapability() {
	runtime.LockOSThread()
	capability, err := strconv.Atoi(os.Getenv(withoutCapability))
	if err == nil {
		err = errors.Join(os.Unsetenv(withoutCapability),
			unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(capability), 0, 0, 0))
	}
	if err == nil {
		err = unix.Exec("/proc/self/exe", os.Args, os.Environ())
	}
	panic(err)
}

// command is a klamm of its own process.
func command(t *testing.T, place kafka.Place, env string, args ...string) (cmd *exec.Cmd, out, errOut *stage.Text) {
	t.Helper()
	out, errOut = new(stage.Text), new(stage.Text)
	cmd = exec.Command("/proc/self/exe", args...)
	cmd.Env, cmd.Stdout, cmd.Stderr = append(os.Environ(), env), out, errOut
	if err := place.Start(cmd); err != nil {
		t.Fatal(err)
	}
	return cmd, out, errOut
}

// exitCode waits for the end.
func exitCode(t *testing.T, cmd *exec.Cmd) int {
	t.Helper()
	if err := cmd.Wait(); err != nil && !errors.As(err, new(*exec.ExitError)) {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode()
}

// seen is how many topics a client sees.
func seen(t *testing.T, conn net.Conn) int {
	t.Helper()
	resp, err := stage.Ask(conn, stage.AllTopics())
	if err != nil {
		t.Fatal(err)
	}
	m, ok := resp.(*kmsg.MetadataResponse)
	if !ok {
		t.Fatalf("the answer is a %T", resp)
	}
	return len(m.Topics)
}

func TestTheNodeObeysSignals(t *testing.T) {
	broker := stage.StartBroker(t)
	cgroup, dir := stage.NewCgroup(t), t.TempDir()
	stage.Load(t, dir, cgroup, broker.Addr(), stage.OrdersOnly, nil)
	cmd, out, log := command(t, kafka.Place{}, "", "node", "-c", filepath.Join(dir, "klamm.yaml"))
	says := func(word string) {
		t.Helper()
		stage.Await(t, "the log to say "+word, func() bool { return strings.Contains(log.String(), word) })
	}
	hangup := func(policy string) {
		t.Helper()
		stage.WriteFile(t, filepath.Join(dir, "policy.yaml"), policy)
		if err := cmd.Process.Signal(syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
	}
	says("redirecting")
	w := stage.StartWorkload(t, kafka.Place{Cgroup: cgroup, UID: stage.ReportUID, GID: stage.ReportUID}, "")
	conn := w.Dial(t, broker.Addr())
	if got := seen(t, conn); got != 0 {
		t.Errorf("before, the client sees %d topics", got)
	}
	hangup(strings.Replace(stage.OrdersOnly, stage.Orders, stage.Report, 1))
	says("policy reloaded")
	if got := seen(t, conn); got != 1 {
		t.Errorf("after SIGHUP the client sees %d topics, not 1", got)
	}
	hangup("apiVersion: klamm/v1\nruls: []\n")
	says("the policy was not reloaded")
	says("the policy in force is kept: ")
	says(dir + "/policy.yaml:2:1: unknown key")
	if got := seen(t, conn); got != 1 {
		t.Errorf("after a bad policy the client sees %d topics, not 1", got)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if code := exitCode(t, cmd); code != 0 || out.String() != "" {
		t.Errorf("exit code %d, stdout %q, log\n%s", code, out, log)
	}
	if _, err := stage.End(conn); err != nil && !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the connection: %v", err)
	}
	if direct := w.Dial(t, broker.Addr()); seen(t, direct) != 3 {
		t.Error("after the node's end a client does not reach the broker directly")
	}
}

func TestWhatStopsTheNodeIsOneClearLine(t *testing.T) {
	// Not t.TempDir, which nobody else may enter.
	dir, err := os.MkdirTemp("", "klamm-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	cgroup := stage.NewCgroup(t)
	good := fmt.Sprintf("node: {cgroup: %s, pins: \"\", socket: \"\"}\n"+
		"clusters: [{name: main, bootstrap: [\"127.0.0.1:9092\"]}]\n"+
		"metrics: {listen: \"\"}\nintercept: {firewall: false}\n", cgroup)
	for name, text := range map[string]string{
		"good.yaml": good, "bad.yaml": "clusters: [{name: main}]\n", "audit.yaml": good + "audit: {file: gone/audit}\n",
		"policy.yaml": good + "policies: [gone.yaml]\n",
	} {
		stage.WriteFile(t, filepath.Join(dir, name), text)
		if err := os.Chmod(filepath.Join(dir, name), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, path := range []string{dir, cgroup} {
		if err := os.Chmod(path, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	nobody := kafka.Place{UID: 65534, GID: 65534}
	for _, c := range []struct {
		name  string
		file  string
		place kafka.Place
		env   string
		want  string
	}{
		{"a configuration that is not there", "gone.yaml", kafka.Place{}, "", "read the configuration: open "},
		{"a bad configuration", "bad.yaml", kafka.Place{}, "", "bad.yaml:1:12: "},
		{"a policy that is not there", "policy.yaml", kafka.Place{}, "", "reading the policy: open "},
		{"a place for the audit that is not there", "audit.yaml", kafka.Place{}, "", "opening the audit file: open "},
		{"missing privilege", "good.yaml", nobody, "", "run as root"},
		{"a kernel without eBPF", "good.yaml", kafka.Place{}, withoutBPF + "=1",
			"load the eBPF programs: the kernel is not fit"},
	} {
		t.Run(c.name, func(t *testing.T) {
			cmd, out, errOut := command(t, c.place, c.env, "node", "-c", filepath.Join(dir, c.file))
			code, said := exitCode(t, cmd), errOut.String()
			if code != 1 || out.String() != "" || strings.Count(said, "\n") != 1 || !strings.HasPrefix(said, "klamm: ") ||
				!strings.Contains(said, c.want) {
				t.Errorf("exit code %d, stdout %q, stderr\n%s", code, out, said)
			}
		})
	}
}

func TestEveryCapabilityOfTheNodeIsNeededAndNamed(t *testing.T) {
	dir, cgroup := t.TempDir(), stage.NewCgroup(t)
	stage.Load(t, dir, cgroup, stage.DownAddr(t), stage.OrdersOnly, nil)
	for name, capability := range map[string]int{
		"CAP_SYS_ADMIN": unix.CAP_SYS_ADMIN, "CAP_NET_ADMIN": unix.CAP_NET_ADMIN, "CAP_SYS_PTRACE": unix.CAP_SYS_PTRACE,
		"CAP_DAC_READ_SEARCH": unix.CAP_DAC_READ_SEARCH,
	} {
		t.Run(name, func(t *testing.T) {
			cmd, out, errOut := command(t, kafka.Place{}, fmt.Sprintf("%s=%d", withoutCapability, capability),
				"node", "-c", filepath.Join(dir, "klamm.yaml"))
			code, said := exitCode(t, cmd), errOut.String()
			if code != 1 || out.String() != "" || strings.Count(said, "\n") != 1 ||
				!strings.HasPrefix(said, "klamm: not permitted: without "+name+" the node cannot ") {
				t.Errorf("exit code %d, stdout %q, stderr\n%s", code, out, said)
			}
		})
	}
}

// inProcess runs klamm in this process.
func inProcess(t *testing.T, args ...string) (code int, out []byte, errOut string) {
	t.Helper()
	var stdout, stderr bytes.Buffer
	code = run(t.Context(), args, &stdout, &stderr)
	return code, stdout.Bytes(), stderr.String()
}
