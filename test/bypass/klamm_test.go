package bypass

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"

	"klamm/node"
)

var klammBinary = flag.String("klamm", builtBinary(), "the klamm binary that guards; if empty, the node in this binary")

// builtBinary is that of make build.
func builtBinary() string {
	if verify {
		return "../../bin/klamm"
	}
	return ""
}

// nodeVariable makes this binary a node with the klamm.yaml it names, as the command klamm node does.
const nodeVariable = "KLAMM_BYPASS_NODE"

func runNode(file string) error {
	config, err := node.Load(file)
	if err != nil {
		return err
	}
	n, err := node.Open(config, zerolog.New(os.Stderr))
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	return errors.Join(n.Run(ctx, func() {}), n.Close())
}

// klamm is a node in a world's host.
type klamm struct {
	world *world
	cmd   *exec.Cmd
	done  <-chan struct{} // when it has ended
	log   bytes.Buffer
}

const metricsAddress = "127.0.0.1:9464"

// config is klamm.yaml.
const config = `node: {name: node-1, cgroup: %[1]s, pins: "%[2]s/bpf/klamm", socket: "%[2]s/klamm.sock"}
intercept: {ports: [%[3]d]%[4]s}
clusters:
  - name: main
    bootstrap: ["%[5]s"]
    cidrs: [10.98.9.0/24, "fd98:0:0:9::/64", 10.97.0.9/32, "fd97::9/128", 127.0.0.0/8, "::1/128"]
identities: [{name: workload, spiffe-id: "spiffe://example.test/workload", uid: %[6]d}]
policies: [policy.yaml]
audit: {file: audit.jsonl}
metrics: {listen: "` + metricsAddress + `"}
`

const policyText = `apiVersion: klamm/v1
rules:
  - {name: all, principals: ["*"], allow: [{topic: "*", operations: [Describe]}]}
`

// guard starts a node in the world, with more in its section intercept. It ends with the test.
func (w *world) guard(t testing.TB, intercept string) {
	t.Helper()
	b, err := theBackend()
	if err != nil {
		t.Fatal(err)
	}
	pins := filepath.Join(w.dir, "bpf")
	if err := os.Mkdir(pins, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		t.Fatal(err)
	}
	if !node.HasBPFFS(pins) {
		if err := node.MountBPFFS(pins); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := unix.Unmount(pins, unix.MNT_DETACH); err != nil {
				t.Error(err)
			}
		})
	}
	file := filepath.Join(w.dir, "klamm.yaml")
	text := fmt.Sprintf(config, w.cgroup, w.dir, brokerPort, cmp.Or(intercept, mutation()), b.address, workloadUID)
	for name, text := range map[string]string{file: text, filepath.Join(w.dir, "policy.yaml"): policyText} {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	w.node = &klamm{world: w}
	w.node.start(t)
	t.Cleanup(func() {
		w.node.kill(t)
		if t.Failed() {
			t.Logf("the node's log:\n%s", w.node.log.String())
		}
	})
}

// theBinary guards. With MUTATE=1 it is another, with an address rule off.
func theBinary(t testing.TB) string {
	t.Helper()
	binary := *klammBinary
	if os.Getenv("MUTATE") == "1" {
		var err error
		if binary, err = mutated(); err != nil {
			t.Fatal(err)
		}
	}
	return binary
}

// mutated is where TestMain removes it.
var mutated = sync.OnceValues(func() (string, error) {
	binary := filepath.Join(os.TempDir(), fmt.Sprintf("klamm-mutated-%d", os.Getpid()))
	if out, err := exec.Command("../../scripts/mutated-klamm", binary).CombinedOutput(); err != nil {
		return "", fmt.Errorf("scripts/mutated-klamm: %w\n%s", err, out)
	}
	return binary, nil
})

// noFirewall switches the third line of defence off.
const noFirewall = ", firewall: false"

func mutation() string {
	if os.Getenv("MUTATE") == "1" {
		return noFirewall
	}
	return ""
}

func (k *klamm) start(t testing.TB) {
	t.Helper()
	file := filepath.Join(k.world.dir, "klamm.yaml")
	if *klammBinary != "" {
		k.cmd = exec.Command(theBinary(t), "node", "-c", file)
	} else {
		k.cmd = exec.Command("/proc/self/exe")
		k.cmd.Env = append(os.Environ(), nodeVariable+"="+file)
	}
	k.cmd.Stdout, k.cmd.Stderr = &k.log, &k.log
	if err := k.world.startIn(k.world.host, k.cmd, nodeCgroup, &syscall.SysProcAttr{}); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = k.cmd.Wait() // it is killed in the end
	}()
	k.done = done
	k.awaitReady(t)
}

func (k *klamm) awaitReady(t testing.TB) {
	t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		answer, err := k.get("/readyz")
		if err == nil && strings.HasPrefix(answer, "ready") {
			return
		}
		select {
		case <-k.done:
			t.Fatalf("the node did not start:\n%s", k.log.String())
		default:
		}
		if time.Now().After(end) {
			t.Fatalf("the node is not ready: %s %v\n%s", answer, err, k.log.String())
		}
	}
}

// get asks the node's HTTP endpoint, which is in the host's namespace.
func (k *klamm) get(path string) (string, error) {
	transport := &http.Transport{DisableKeepAlives: true,
		DialContext: func(_ context.Context, network, address string) (conn net.Conn, err error) {
			err = k.world.host.do(func() (err error) {
				conn, err = net.DialTimeout(network, address, time.Second)
				return err
			})
			return conn, err
		}}
	client := http.Client{Transport: transport, Timeout: 5 * time.Second}
	resp, err := client.Get("http://" + metricsAddress + path)
	if err != nil {
		return "", err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	return string(body), err
}

// kill ends the node as a crash does.
func (k *klamm) kill(t testing.TB) {
	t.Helper()
	if err := k.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		t.Error(err)
	}
	<-k.done
}

// signal is for stopping it and letting it go on.
func (k *klamm) signal(t testing.TB, s syscall.Signal) {
	t.Helper()
	if err := k.cmd.Process.Signal(s); err != nil {
		t.Fatal(err)
	}
}

// line is an audit line.
type line struct {
	Event, State, Reason, Destination string
	PID                               int
}

// audited tells whether the audit has the connection of a process to a destination.
func (k *klamm) audited(t testing.TB, pid int, destination string) bool {
	t.Helper()
	return k.audit(t, func(l line) bool {
		return l.Event == "connection" && l.State == "open" && l.PID == pid && l.Destination == destination
	})
}

// audit tells whether the audit has a line.
func (k *klamm) audit(t testing.TB, is func(line) bool) bool {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(k.world.dir, "audit.jsonl"))
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range bytes.Split(text, []byte("\n")) {
		var l line
		if json.Unmarshal(text, &l) == nil && is(l) {
			return true
		}
	}
	return false
}
