package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"klamm/test/host"
)

// The program runs twice. Outside it makes what needs this machine, and removes it however the run ended. Inside,
// started by itself in a mount and a network namespace of its own, it is the broker's host and keeps the node.

// cgroup is a cgroup of the same path in every hierarchy of this host: the kubelet wants its root in all of them.
type cgroup struct {
	unified string   // its directory in cgroup2
	dirs    []string // all of its directories
}

const endTimeout = 60 * time.Second // of the program inside, once it was told to end

// runInside runs this program inside, with the rig's directory. Whatever is left of the rig is gone on return.
func runInside(ctx context.Context, dir string) (err error) {
	c, err := newCgroup(filepath.Base(dir))
	defer func() { err = errors.Join(err, c.remove()) }()
	if err != nil {
		return err
	}
	cmd := exec.Command("/proc/self/exe", "inside", dir)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWNET, Setpgid: true, Pdeathsig: syscall.SIGKILL,
	}
	// The parent death signal is of the thread that forked: see prctl(2).
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("enter namespaces of our own (run as root): %w", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	select {
	case err = <-ended:
		return err
	case <-ctx.Done():
	}
	_ = cmd.Process.Signal(syscall.SIGTERM)
	select {
	case err = <-ended:
	case <-time.After(endTimeout):
		err = errors.Join(cmd.Process.Kill(), <-ended)
	}
	return errors.Join(ctx.Err(), err)
}

func newCgroup(name string) (*cgroup, error) {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return &cgroup{}, err
	}
	c := &cgroup{}
	for line := range strings.Lines(string(mounts)) {
		f := strings.Fields(line)
		if len(f) < 4 || f[2] != "cgroup" && f[2] != "cgroup2" {
			continue
		}
		dir := filepath.Join(f[1], name)
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return c, fmt.Errorf("make a cgroup (run as root): %w", err)
		}
		c.dirs = append(c.dirs, dir)
		if f[2] == "cgroup2" {
			c.unified = dir
		}
	}
	if c.unified == "" {
		return c, errors.New("cgroup2 is not mounted: mount -t cgroup2 none /sys/fs/cgroup/unified")
	}
	return c, nil
}

// remove kills all processes in the cgroup, which are the node, its pods and their shims, and removes it.
func (c *cgroup) remove() error {
	var err error
	if c.unified != "" {
		if err = os.WriteFile(filepath.Join(c.unified, "cgroup.kill"), []byte("1"), 0); err != nil {
			err = fmt.Errorf("kill the node: %w", err)
		}
	}
	for _, dir := range slices.Backward(c.dirs) {
		err = errors.Join(err, host.RemoveCgroup(dir))
	}
	return err
}
