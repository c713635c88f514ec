package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// cgroup is a cgroup2 directory of our own.
type cgroup struct{ path string }

func newCgroup(name string) (*cgroup, error) {
	root, err := cgroup2Root()
	if err != nil {
		return nil, err
	}
	c := &cgroup{filepath.Join(root, fmt.Sprintf("klamm-clients-%d-%s", os.Getpid(), name))}
	if err := os.Mkdir(c.path, 0o755); err != nil {
		return nil, fmt.Errorf("make a cgroup: %w: this needs root", err)
	}
	return c, nil
}

// cgroup2Root returns where cgroup2 is mounted: /sys/fs/cgroup, or beside version 1 below it.
func cgroup2Root() (string, error) {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(mounts)) {
		if fields := strings.Fields(line); fields[2] == "cgroup2" {
			return fields[1], nil
		}
	}
	return "", errors.New("find cgroup2: it is not mounted")
}

// pids returns the processes in the cgroup.
func (c *cgroup) pids() ([]int, error) {
	file, err := os.Open(filepath.Join(c.path, "cgroup.procs"))
	if err != nil {
		return nil, err
	}
	defer func() { _ = file.Close() }()
	var pids []int
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		pid, err := strconv.Atoi(lines.Text())
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", file.Name(), err)
		}
		pids = append(pids, pid)
	}
	return pids, lines.Err()
}

// kill kills what is left in the cgroup.
func (c *cgroup) kill() error {
	pids, err := c.pids()
	for _, pid := range pids {
		if gone := syscall.Kill(pid, syscall.SIGKILL); !errors.Is(gone, syscall.ESRCH) {
			err = errors.Join(err, gone)
		}
	}
	return err
}

// remove removes the cgroup; a killed process leaves it only when it was waited for, so this may take a moment.
func (c *cgroup) remove() error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	return poll(ctx, func() (bool, error) {
		err := os.Remove(c.path)
		if errors.Is(err, syscall.EBUSY) {
			return false, nil
		}
		return true, err
	})
}
