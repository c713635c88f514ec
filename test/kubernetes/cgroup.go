package kubernetes

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"klamm/test/host"
)

// cgroup is a cgroup of the same path in every hierarchy of this host: the kubelet wants its root in all of them.
type cgroup struct {
	unified string   // its directory in cgroup2
	dirs    []string // all of its directories
}

// rigs is what the names of all rigs' directories begin with. The process id of the program outside follows.
const rigs = "klamm-kubernetes-"

// sweep removes the nodes of rigs whose program outside was killed.
func sweep() error {
	mounts, err := hierarchies()
	if err != nil {
		return err
	}
	left := map[string]*cgroup{}
	for _, m := range mounts {
		dirs, err := filepath.Glob(filepath.Join(m.dir, rigs+"*"))
		if err != nil {
			return err
		}
		for _, dir := range dirs {
			name := filepath.Base(dir)
			var pid int
			if _, err := fmt.Sscanf(name, rigs+"%d-", &pid); err != nil || syscall.Kill(pid, 0) == nil {
				continue
			}
			if left[name] == nil {
				left[name] = &cgroup{}
			}
			left[name].add(m, dir)
		}
	}
	var failures []error
	for _, c := range left {
		failures = append(failures, c.remove())
	}
	return errors.Join(failures...)
}

// hierarchy is a mount of a cgroup file system.
type hierarchy struct {
	dir     string
	unified bool // cgroup2
}

func hierarchies() ([]hierarchy, error) {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return nil, err
	}
	var found []hierarchy
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 2 && (f[2] == "cgroup" || f[2] == "cgroup2") {
			found = append(found, hierarchy{f[1], f[2] == "cgroup2"})
		}
	}
	return found, nil
}

func (c *cgroup) add(h hierarchy, dir string) {
	c.dirs = append(c.dirs, dir)
	if h.unified {
		c.unified = dir
	}
}

func newCgroup(name string) (*cgroup, error) {
	c := &cgroup{}
	mounts, err := hierarchies()
	if err != nil {
		return c, err
	}
	for _, m := range mounts {
		dir := filepath.Join(m.dir, name)
		if err := os.Mkdir(dir, 0o755); err != nil {
			return c, fmt.Errorf("make a cgroup (run as root): %w", err)
		}
		c.add(m, dir)
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
