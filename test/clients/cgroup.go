package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"syscall"

	"klamm/test/host"
)

// cgroup is a cgroup2 directory of our own.
type cgroup struct{ path string }

func newCgroup(name string) (*cgroup, error) {
	path, err := host.NewCgroup("klamm-clients-" + name + "-")
	return &cgroup{path}, err
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
