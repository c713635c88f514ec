package host

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// NewCgroup makes a cgroup at the root of cgroup2, on hybrid hosts too, and the named ones below it. It takes root.
func NewCgroup(prefix string, below ...string) (string, error) {
	root, err := cgroup2()
	if err != nil {
		return "", err
	}
	dir, err := os.MkdirTemp(root, prefix)
	if err != nil {
		return "", fmt.Errorf("make a cgroup (run as root): %w", err)
	}
	for _, name := range below {
		if err := os.MkdirAll(filepath.Join(dir, name), 0o755); err != nil {
			return "", errors.Join(fmt.Errorf("make a cgroup: %w", err), RemoveCgroup(dir))
		}
	}
	return dir, nil
}

func cgroup2() (string, error) {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 2 && f[2] == "cgroup2" {
			return f[1], nil
		}
	}
	return "", errors.New("cgroup2 is not mounted: mount -t cgroup2 none /sys/fs/cgroup/unified")
}

// busyTimeout bounds the wait for the kernel to let go of a process that was waited for.
const busyTimeout = 5 * time.Second

// RemoveCgroup removes a cgroup and all below it. Their processes have ended.
func RemoveCgroup(dir string) error {
	var all []string
	err := filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
		if err == nil && e.IsDir() {
			all = append(all, path)
		}
		return err
	})
	for _, path := range slices.Backward(all) {
		err = errors.Join(err, removeBusy(path))
	}
	return err
}

func removeBusy(dir string) error {
	for deadline := time.Now().Add(busyTimeout); ; time.Sleep(time.Millisecond) {
		err := os.Remove(dir)
		if !errors.Is(err, syscall.EBUSY) || time.Now().After(deadline) {
			return err
		}
	}
}
