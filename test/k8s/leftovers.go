package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// leftovers counts what a pod has on a node.
type leftovers struct {
	namespaces  int // network namespaces kept by a mount
	devices     int // of the node
	cgroups     int // in cgroup2
	descriptors int // of klamm
	enrolled    int // network namespaces, by klamm's own word
}

func (l leftovers) within(m leftovers) bool {
	return l.namespaces <= m.namespaces && l.devices <= m.devices && l.cgroups <= m.cgroups &&
		l.descriptors <= m.descriptors && l.enrolled <= m.enrolled
}

func (r *rig) leftovers(ctx context.Context) (leftovers, error) {
	var l leftovers
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return l, err
	}
	l.namespaces = strings.Count(string(mounts), "nsfs ")
	// sysfs would show the devices of the namespace it was mounted in.
	devices, err := exec.CommandContext(ctx, "ip", "-n", "node", "-brief", "link").Output()
	if err != nil {
		return l, fmt.Errorf("list the node's devices: %w", err)
	}
	l.devices = strings.Count(string(devices), "\n")
	err = filepath.WalkDir(r.node.Cgroup, func(_ string, e fs.DirEntry, err error) error {
		if err == nil && e.IsDir() {
			l.cgroups++
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil // removed meanwhile
		}
		return err
	})
	if err != nil {
		return l, err
	}
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", r.node.PID("klamm")))
	if err != nil {
		return l, fmt.Errorf("list klamm's file descriptors: %w", err)
	}
	l.descriptors = len(fds)
	status, err := r.status(ctx)
	l.enrolled = len(status.Namespaces)
	return l, err
}
