package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"time"
)

// The program runs twice. Outside it makes what needs this machine, and removes it however the run ended. Inside,
// started by itself in a mount and a network namespace of its own, it is the broker's host and keeps the node.

const endTimeout = 60 * time.Second // of the program inside, once it was told to end

// runInside runs this program inside, with the rig's directory and cgroup. On return nothing is left of the node.
func runInside(ctx context.Context, dir string) (err error) {
	c, err := newCgroup(filepath.Base(dir))
	defer func() { err = errors.Join(err, c.remove()) }()
	if err != nil {
		return err
	}
	cmd := exec.Command("/proc/self/exe", "inside", dir, c.unified)
	cmd.Env = append(os.Environ(), "TMPDIR="+dir) // the broker's data goes with the rest
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
