// Package kubernetes runs a real Kubernetes node for outside checks: etcd, the API server and its controllers, a
// kubelet, containerd with NRI, runc, CNI (scripts/setup kubernetes). It is a network namespace of its own, linked to
// another host, which is where the program that checks is. It takes root, and the root of the repository as working
// directory.
package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"syscall"
	"time"
)

// The program runs twice. Outside it makes what needs this machine, and removes it however the run ended. Inside,
// started by itself in a mount and a network namespace of its own, it is the broker's host and keeps the node.

const endTimeout = 60 * time.Second // of the program inside, once it was told to end

// Enter runs this program again, with these arguments and then those of [New], in a mount and a network namespace of
// its own. On return nothing is left of the node; its logs are in dir, unless all went well. prepare may be nil; it
// writes more into dir, and tells of images that the node is to have beside ClientImage. What the program inside prints
// goes to out.
func Enter(
	ctx context.Context, prepare func(dir string) ([]*Image, error), out io.Writer, args ...string,
) (dir string, err error) {
	if err := sweep(); err != nil {
		fmt.Fprintln(os.Stderr, "remove what an earlier run left:", err)
	}
	if dir, err = os.MkdirTemp("", fmt.Sprintf("%s%d-", rigs, os.Getpid())); err != nil {
		return dir, err
	}
	var more []*Image
	if prepare != nil {
		if more, err = prepare(dir); err != nil {
			return dir, err
		}
	}
	if err = makeImages(ctx, dir, more); err != nil {
		return dir, err
	}
	if err = runInside(ctx, dir, out, args); err != nil {
		return dir, err
	}
	return dir, os.RemoveAll(dir)
}

// runInside runs this program inside, with the node's directory and cgroup.
func runInside(ctx context.Context, dir string, out io.Writer, args []string) (err error) {
	c, err := newCgroup(filepath.Base(dir))
	defer func() { err = errors.Join(err, c.remove()) }()
	if err != nil {
		return err
	}
	cmd := exec.Command("/proc/self/exe", slices.Concat(args, []string{dir, c.unified})...)
	cmd.Env = append(os.Environ(), "TMPDIR="+dir) // the broker's data goes with the rest
	cmd.Stdout, cmd.Stderr = out, os.Stderr
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
