package spiffe

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

const (
	// maxTokenFile is the largest file of a workload that is read, in bytes.
	maxTokenFile = 64 << 10
	// maxFileReaders is how many files of workloads are read at a time, and maxReadersPerOwner how many of one pod, or
	// of one user outside of pods: a workload may have its file on a file system that never answers.
	maxFileReaders     = 64
	maxReadersPerOwner = 4
)

// errBusy says that as many files of a workload are being read as may be.
var errBusy = errors.New("earlier reads of its files have not ended: do they lie on a file system that hangs?")

// fileReaders bounds the reads of workloads' files.
type fileReaders struct {
	slots chan struct{}
	mu    sync.Mutex
	of    map[string]int // by owner
}

func newFileReaders() *fileReaders {
	return &fileReaders{slots: make(chan struct{}, maxFileReaders), of: map[string]int{}}
}

func (r *fileReaders) enter(owner string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.of[owner] == maxReadersPerOwner {
		return false
	}
	r.of[owner]++
	return true
}

func (r *fileReaders) leave(owner string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.of[owner]--; r.of[owner] == 0 {
		delete(r.of, owner)
	}
}

// readFile reads a regular file of at most maxTokenFile bytes as the process sees it: below its root, and only if it
// may read it itself. fs.ErrNotExist or fs.ErrPermission where it has no such file.
func (ps *Processes) readFile(ctx context.Context, p subject, file string) ([]byte, error) {
	owner := cmp.Or(p.PodUID, fmt.Sprint("uid ", p.UID))
	text, err := during(ctx, ps, ps.files.slots, p.peer, func() ([]byte, error) {
		if !ps.files.enter(owner) {
			return nil, errBusy
		}
		defer ps.files.leave(owner)
		text, err := readBelowRoot(p.peer.TGID, file)
		if err != nil {
			return nil, fmt.Errorf("read %s of process %d: %w", file, p.peer.TGID, err)
		}
		return text, nil
	})
	if err != nil { // it may have been read of another process
		return nil, err
	}
	return text, nil
}

// readBelowRoot reads by the rules of openat2(2): symbolic links, absolute ones too, lead to what is below the process'
// root, never to the node's files, and none into other processes (/proc/PID/fd). The file is looked at before it is
// opened, since opening a device or a pipe alone may do something, or wait.
func readBelowRoot(pid uint32, file string) ([]byte, error) {
	root, err := unix.Open(fmt.Sprintf("/proc/%d/root", pid), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer func() { _ = unix.Close(root) }()
	found, err := openBelow(root, file)
	if err != nil {
		return nil, err
	}
	defer func() { _ = unix.Close(found) }()
	var st unix.Stat_t
	if err = unix.Fstat(found, &st); err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, errors.New("it is no regular file")
	}
	if st.Size > maxTokenFile {
		return nil, fmt.Errorf("it has %d bytes, more than %d", st.Size, maxTokenFile)
	}
	who, err := readRightsOf(pid)
	if err != nil {
		return nil, err
	}
	if !who.mayRead(st) {
		return nil, fmt.Errorf("user %d may not: %w", who.uid, fs.ErrPermission)
	}
	f, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", found), os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	text, err := io.ReadAll(io.LimitReader(f, maxTokenFile+1))
	if len(text) > maxTokenFile {
		return nil, fmt.Errorf("it has more than %d bytes", maxTokenFile)
	}
	return text, err
}

// openBelow is an O_PATH descriptor of a file below root.
func openBelow(root int, file string) (int, error) {
	how := unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS}
	for range 16 {
		fd, err := unix.Openat2(root, file, &how)
		// EAGAIN: something was renamed while ".." was being resolved.
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
			return fd, err
		}
	}
	return -1, unix.EAGAIN
}

// readRights are those a process opens files with.
type readRights struct {
	uid, gid uint32
	groups   []uint32
}

func readRightsOf(pid uint32) (readRights, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return readRights{}, err
	}
	return parseReadRights(string(text))
}

// parseReadRights reads the text of /proc/PID/status (proc_pid_status(5)): of Uid and Gid the fourth is that for files.
func parseReadRights(text string) (readRights, error) {
	var c readRights
	seen := map[string]bool{}
	lines := bufio.NewScanner(strings.NewReader(text))
	for lines.Scan() {
		name, value, _ := strings.Cut(lines.Text(), ":")
		if name != "Uid" && name != "Gid" && name != "Groups" || seen[name] {
			continue
		}
		seen[name] = true
		var ids []uint32
		for word := range strings.FieldsSeq(value) {
			id, err := strconv.ParseUint(word, 10, 32)
			if err != nil {
				return readRights{}, fmt.Errorf("/proc/PID/status: %q is no id", word)
			}
			ids = append(ids, uint32(id))
		}
		switch {
		case name == "Groups":
			c.groups = ids
		case len(ids) != 4:
			return readRights{}, fmt.Errorf("/proc/PID/status: %d ids of %s, want 4", len(ids), name)
		case name == "Uid":
			c.uid = ids[3]
		default:
			c.gid = ids[3]
		}
	}
	if !seen["Uid"] || !seen["Gid"] || !seen["Groups"] {
		return readRights{}, errors.New("/proc/PID/status: Uid, Gid or Groups is missing")
	}
	return c, lines.Err()
}

// mayRead goes by the file's mode, as inode(7) has it: only the first class that fits counts. Capabilities of other
// users than root, and access control lists, do not.
func (c readRights) mayRead(st unix.Stat_t) bool {
	switch {
	case c.uid == 0:
		return true
	case c.uid == st.Uid:
		return st.Mode&unix.S_IRUSR != 0
	case c.gid == st.Gid || slices.Contains(c.groups, st.Gid):
		return st.Mode&unix.S_IRGRP != 0
	}
	return st.Mode&unix.S_IROTH != 0
}
