package kafka

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"syscall"
)

// Place says where and as whom a process runs. The zero Place is the caller's own.
type Place struct {
	Cgroup string // path of a cgroup2 directory the process is created in; empty: the caller's
	UID    uint32 // user id; 0: the caller's
	GID    uint32 // group id, used with UID
}

// Start starts cmd in this place. The process is created inside the cgroup (clone3, kernel 5.7), so that no socket of
// it can predate its membership, leads a process group of its own, and is killed when this process ends.
func (p Place) Start(cmd *exec.Cmd) error {
	attr := &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if p.UID != 0 {
		attr.Credential = &syscall.Credential{Uid: p.UID, Gid: p.GID}
	}
	if p.Cgroup != "" {
		dir, err := os.Open(p.Cgroup)
		if err != nil {
			return fmt.Errorf("open cgroup for %s: %w", cmd.Path, err)
		}
		defer func() { _ = dir.Close() }()
		attr.UseCgroupFD, attr.CgroupFD = true, int(dir.Fd())
	}
	cmd.SysProcAttr = attr
	return startFromSteadyThread(cmd)
}

// Kill kills the whole process group that Start made. It is no error if nothing of it is left.
func Kill(cmd *exec.Cmd) error {
	if err := syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL); !errors.Is(err, syscall.ESRCH) {
		return err
	}
	return nil
}

type start struct {
	cmd    *exec.Cmd
	result chan error
}

// The parent death signal fires when the *thread* that forked ends (prctl(2)), and the Go runtime ends threads whose
// goroutine returns locked. So all processes are forked from one thread that never ends.
var steadyThread = sync.OnceValue(func() chan<- start {
	starts := make(chan start)
	go func() {
		runtime.LockOSThread()
		for s := range starts {
			s.result <- s.cmd.Start()
		}
	}()
	return starts
})

func startFromSteadyThread(cmd *exec.Cmd) error {
	s := start{cmd, make(chan error)}
	steadyThread() <- s
	return <-s.result
}
