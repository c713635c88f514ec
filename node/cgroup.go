package node

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// Cgroup2Mount returns where the root of cgroup2 is mounted: /sys/fs/cgroup, or /sys/fs/cgroup/unified on hosts that
// use cgroup v1 beside it. A container with a cgroup namespace of its own sees only a part of cgroup2: an error.
func Cgroup2Mount() (string, error) {
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup2"))
	if err != nil {
		return "", fmt.Errorf("look for cgroup2: %w", err)
	}
	for _, m := range mounts {
		if id, err := cgroupID(m.Mountpoint); err == nil && id == rootCgroupID {
			return m.Mountpoint, nil
		}
	}
	if len(mounts) > 0 {
		return "", fmt.Errorf("%s is only a part of the host's cgroup2: run the node in the host's cgroup namespace, or"+
			" mount the host's /sys/fs/cgroup into its container", mounts[0].Mountpoint)
	}
	return "", errors.New("cgroup2 is not mounted: mount -t cgroup2 none /sys/fs/cgroup/unified")
}

// rootCgroupID is the id of the root of cgroup2 on every kernel.
const rootCgroupID = 1

// cgroupID returns the id of a cgroup2 directory: its inode.
func cgroupID(path string) (uint64, error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(path, &fs); err != nil {
		return 0, &os.PathError{Op: "statfs", Path: path, Err: err}
	}
	if fs.Type != unix.CGROUP2_SUPER_MAGIC {
		return 0, fmt.Errorf("%s is not in cgroup2", path)
	}
	var s unix.Stat_t
	if err := unix.Stat(path, &s); err != nil {
		return 0, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	return s.Ino, nil
}

// ownCgroup returns the directory of this process in cgroup2; the root where it cannot tell.
func ownCgroup(root string) string {
	all, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return root
	}
	for line := range strings.Lines(string(all)) {
		if path, is := strings.CutPrefix(line, "0::"); is {
			own := filepath.Join(root, strings.TrimSuffix(path, "\n"))
			if _, err := cgroupID(own); err == nil {
				return own
			}
		}
	}
	return root
}

// processesIn are the processes in a cgroup2 directory and below it. Cgroups and processes that end meanwhile are left
// out.
func processesIn(cgroup string) (pids []int) {
	_ = filepath.WalkDir(cgroup, func(path string, d fs.DirEntry, unreadable error) error {
		if unreadable != nil || !d.IsDir() {
			return nil //nolint:nilerr // as said above
		}
		procs, err := os.ReadFile(filepath.Join(path, "cgroup.procs"))
		if err != nil {
			return nil //nolint:nilerr // or threaded: those above it tell of its processes
		}
		for line := range strings.Lines(string(procs)) {
			// 0 is a process in a pid namespace that this one does not see.
			if pid, err := strconv.Atoi(strings.TrimSpace(line)); err == nil && pid > 0 {
				pids = append(pids, pid)
			}
		}
		return nil
	})
	return pids
}

// BPFFS is where hosts have their BPF file system.
const BPFFS = "/sys/fs/bpf"

// HasBPFFS tells whether a BPF file system is mounted at path.
func HasBPFFS(path string) bool {
	var fs unix.Statfs_t
	return unix.Statfs(path, &fs) == nil && fs.Type == unix.BPF_FS_MAGIC
}

// MountBPFFS mounts a BPF file system at path, readable by root only, unless there is one already. It needs
// CAP_SYS_ADMIN.
func MountBPFFS(path string) error {
	if HasBPFFS(path) {
		return nil
	}
	if err := os.MkdirAll(path, 0o700); err != nil {
		return fmt.Errorf("make a place for the BPF file system: %w", err)
	}
	if err := unix.Mount("bpffs", path, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
		return fmt.Errorf("mount the BPF file system at %s: %w: run as root, or: mount -t bpf bpffs %s", path, err, path)
	}
	return nil
}
