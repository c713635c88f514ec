package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"klamm/test/kafka"
	"klamm/test/stage"
)

// controlSocket serves a node's socket until the test ends.
func controlSocket(t *testing.T, h http.HandlerFunc) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "klamm.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: h}
	go func() { _ = server.Serve(l) }()
	t.Cleanup(func() { server.Close() })
	return path
}

// listenAt listens at 127.0.0.1:9092 in a process' network namespace until the test ends, and says hello there: what
// the node's listener is to a redirected connect, the whole answer here.
func listenAt(t *testing.T, pid int) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", pid))
		if err != nil {
			done <- err
			return
		}
		defer ns.Close()
		if err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- err
			return
		}
		l, err := net.Listen("tcp", "127.0.0.1:9092")
		if err != nil {
			done <- err
			return
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				_, _ = io.WriteString(conn, "hello\n")
				conn.Close()
			}
		}()
		done <- nil
	}()
	return <-done
}

// bundle is an OCI bundle whose process makes one connect, in a network namespace of its own, and whose hook is klamm.
func bundle(t *testing.T, hook ...string) (dir string) {
	t.Helper()
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Fatalf("%v: scripts/setup runc installs it", err)
	}
	code, err := os.ReadFile(busybox)
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	type object = map[string]any
	var namespaces []object
	for _, kind := range []string{"pid", "network", "ipc", "uts", "mount"} {
		namespaces = append(namespaces, object{"type": kind})
	}
	config, err := json.Marshal(object{
		"ociVersion": "1.0.2",
		"process":    object{"cwd": "/", "user": object{}, "args": []string{"/busybox", "nc", "127.0.0.1", "9092"}},
		"root":       object{"path": "rootfs"},
		"mounts":     []object{{"destination": "/proc", "type": "proc", "source": "proc"}},
		"linux":      object{"namespaces": namespaces},
		"hooks": object{"createRuntime": []object{{
			"path": self, "args": append([]string{"klamm", "hook"}, hook...), "env": os.Environ()}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	dir = t.TempDir()
	rootfs := filepath.Join(dir, "rootfs")
	if err = errors.Join(os.MkdirAll(filepath.Join(rootfs, "proc"), 0o755),
		os.WriteFile(filepath.Join(rootfs, "busybox"), code, 0o755),
		os.WriteFile(filepath.Join(dir, "config.json"), config, 0o600)); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestAHookHasAContainerEnrolledBeforeItStarts(t *testing.T) {
	there := controlSocket(t, func(w http.ResponseWriter, r *http.Request) {
		pid, err := strconv.Atoi(r.FormValue("pid"))
		if err == nil && r.Method == http.MethodPost && r.URL.Path == "/v1/enrol" {
			err = listenAt(t, pid)
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.WriteHeader(http.StatusNoContent)
	})
	missing := filepath.Join(t.TempDir(), "klamm.sock")
	for name, test := range map[string]struct {
		hook []string
		out  string // of the container's first connect
		err  string
	}{
		"a node":                            {[]string{"--socket", there}, "hello\n", ""},
		"a node, required":                  {[]string{"--socket", there, "--require"}, "hello\n", ""},
		"no node, and the container starts": {[]string{"--socket", missing}, "", "Connection refused"},
		"no node, but required":             {[]string{"--socket", missing, "--require"}, "", "the node is not there"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := bundle(t, test.hook...)
			id := fmt.Sprintf("klamm-test-%d-%s", os.Getpid(), filepath.Base(t.TempDir()))
			var out, errOut stage.Text
			cmd := exec.Command("runc", "--root", filepath.Join(dir, "state"), "run", "--bundle", dir, id)
			cmd.Stdout, cmd.Stderr = &out, &errOut
			err := cmd.Run()
			if out.String() != test.out || !strings.Contains(errOut.String(), test.err) ||
				(err != nil) != (test.err != "") {
				t.Errorf("%v, output %q, errors %q", err, out.String(), errOut.String())
			}
		})
	}
}

func TestAHookSaysWhyAContainerIsNotEnrolled(t *testing.T) {
	fails := controlSocket(t, func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, "no memory", http.StatusInternalServerError)
	})
	end := make(chan struct{})
	hangs := controlSocket(t, func(http.ResponseWriter, *http.Request) { <-end })
	defer close(end)
	const state = `{"ociVersion": "1.0.2", "id": "c1", "status": "creating", "pid": 42, "bundle": "/b"}`
	for name, test := range map[string]struct {
		stdin string
		args  []string
		code  int
		says  string
	}{
		"the node fails":               {state, []string{"--socket", fails}, 0, "container c1 is not enrolled"},
		"the node fails, and why":      {state, []string{"--socket", fails}, 0, "the node says: no memory"},
		"the node fails, but required": {state, []string{"--socket", fails, "--require"}, 1, "the node says: no memory"},
		"the node hangs, but required": {state, []string{"--socket", hangs, "--require"}, 1, "did not answer within 2s"},
		"no state":                     {"", nil, 1, "read the container's state from standard input"},
		"a state that is none":         {"[]", nil, 1, "read the container's state from standard input"},
		"a state without a process":    {`{"id": "c1", "status": "stopped"}`, nil, 1, "createRuntime"},
		"no node":                      {state, []string{"--socket", "/missing"}, 0, "the node is not there: dial unix"},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := exec.Command("/proc/self/exe", append([]string{"hook"}, test.args...)...)
			cmd.Stdin = strings.NewReader(test.stdin)
			var errOut stage.Text
			cmd.Stderr = &errOut
			began := time.Now()
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			if code := exitCode(t, cmd); code != test.code || !strings.Contains(errOut.String(), test.says) {
				t.Errorf("exit code %d, %q", code, errOut.String())
			}
			if took := time.Since(began); took > 2*hookTimeout {
				t.Errorf("it took %s", took)
			}
		})
	}
}

func TestTheNodeEnrolsForAHook(t *testing.T) {
	cgroup, dir := stage.NewCgroup(t), t.TempDir()
	socket := filepath.Join(dir, "klamm.sock")
	stage.Load(t, dir, cgroup, stage.DownAddr(t), stage.OrdersOnly, stage.Config{
		"node":      fmt.Sprintf("{cgroup: %s, pins: \"\", socket: %s}", cgroup, socket),
		"intercept": "{firewall: false, ports: [19092], nri: " + socket + ".none}"})
	file := filepath.Join(dir, "klamm.yaml")
	_, _, log := command(t, kafka.Place{}, "", "node", "-c", file)
	stage.Await(t, "the node to redirect", func() bool { return strings.Contains(log.String(), "redirecting") })
	container := exec.Command("unshare", "--net", "sleep", "1000")
	if err := (kafka.Place{Cgroup: cgroup}).Start(container); err != nil { // it makes no socket: only the hook tells
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = container.Process.Kill(), container.Wait() })
	netns := func(pid int) uint64 {
		var s unix.Stat_t
		if err := unix.Stat(fmt.Sprintf("/proc/%d/ns/net", pid), &s); err != nil {
			t.Fatal(err)
		}
		return s.Ino
	}
	stage.Await(t, "the namespace", func() bool { return netns(container.Process.Pid) != netns(os.Getpid()) })

	hook := exec.Command("/proc/self/exe", "hook", "--socket", socket, "--require")
	hook.Stdin = strings.NewReader(fmt.Sprintf(`{"id": "c1", "pid": %d}`, container.Process.Pid))
	if out, err := hook.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	code, out, errOut := inProcess(t, "status", "-c", file)
	if want := fmt.Sprintf("net:[%d]", netns(container.Process.Pid)); !strings.Contains(string(out), want) {
		t.Errorf("klamm status does not tell of %s: exit code %d\n%s%s", want, code, out, errOut)
	}
	if !strings.Contains(string(out), "connect to the container runtime: dial unix") {
		t.Errorf("klamm status does not tell that there is no container runtime:\n%s", out)
	}
}

func TestTheHooksDefinitionIsTheCommand(t *testing.T) {
	text, err := os.ReadFile(filepath.Join("..", "..", "deploy", "oci", "klamm-hook.json"))
	if err != nil {
		t.Fatal(err)
	}
	var d struct {
		Version string
		Hook    struct {
			Path    string
			Args    []string
			Timeout int
		}
		Stages []string
	}
	if err = json.Unmarshal(text, &d); err != nil {
		t.Fatal(err)
	}
	cmd, _, err := newRootCommand().Find(d.Hook.Args[1:])
	if err != nil || cmd.Name() != "hook" || filepath.Base(d.Hook.Path) != d.Hook.Args[0] || d.Version != "1.0.0" ||
		time.Duration(d.Hook.Timeout)*time.Second <= hookTimeout || d.Stages[0] != "createRuntime" {
		t.Errorf("%+v, %v", d, err)
	}
}
