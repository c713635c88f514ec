package bpf

import (
	"errors"
	"fmt"
	"runtime"
	"sync"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// taskReader asks the kernel what a process is, by a BPF task iterator.
type taskReader struct {
	program *ebpf.Program
	wanted  *ebpf.Variable

	mu sync.Mutex // from setting wanted to having read
}

func (r *taskReader) read(pid uint32) (TaskFacts, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.wanted.Set(pid); err != nil {
		return TaskFacts{}, fmt.Errorf("read process %d in the kernel: %w", pid, err)
	}
	found, err := iterate(r.program.FD(), &iterLinkInfo{tid: pid})
	runtime.KeepAlive(r.program)
	if err == nil && len(found) == 0 {
		err = ErrNoTask
	}
	if err != nil {
		return TaskFacts{}, fmt.Errorf("read process %d in the kernel: %w", pid, err)
	}
	var facts TaskFacts
	//nolint:gosec // the program writes one struct klamm_task, which TaskFacts is
	copy(unsafe.Slice((*byte)(unsafe.Pointer(&facts)), unsafe.Sizeof(facts)), found)
	return facts, nil
}

// iterLinkInfo is union bpf_iter_link_info for tasks. Linux before 6.1 takes it as well, because all but the first word
// is 0, and walks over all tasks.
type iterLinkInfo struct {
	tid uint32
	_   [2]uint32
}

// linkCreate and iterCreate are union bpf_attr of the commands of that name.
type (
	linkCreate struct {
		programFD, targetFD, attachType, flags uint32
		info                                   *iterLinkInfo
		infoLen, _                             uint32
	}
	iterCreate struct {
		linkFD, flags uint32
	}
)

// iterate runs an iterator, over one process where info names it, and returns what its program wrote. By own system
// calls, because cilium/ebpf cannot narrow an iterator to a process.
func iterate(programFD int, info *iterLinkInfo) (text []byte, err error) {
	link := linkCreate{
		programFD:  uint32(programFD),
		attachType: unix.BPF_TRACE_ITER,
		info:       info,
	}
	if info != nil {
		link.infoLen = uint32(unsafe.Sizeof(*info))
	}
	//nolint:gosec // bpf(2) takes a pointer to a structure of the command
	linkFD, err := sysBPF(unix.BPF_LINK_CREATE, unsafe.Pointer(&link), unsafe.Sizeof(link))
	if err != nil {
		return nil, fmt.Errorf("make an iterator: %w", err)
	}
	defer func() { err = errors.Join(err, unix.Close(linkFD)) }()

	iter := iterCreate{linkFD: uint32(linkFD)}
	//nolint:gosec // as above
	iterFD, err := sysBPF(unix.BPF_ITER_CREATE, unsafe.Pointer(&iter), unsafe.Sizeof(iter))
	if err != nil {
		return nil, fmt.Errorf("open the iterator: %w", err)
	}
	defer func() { err = errors.Join(err, unix.Close(iterFD)) }()
	return readIterator(iterFD, info != nil)
}

// readIterator reads all of it, or what one read gives. A read that has passed a million objects in vain fails with
// EAGAIN and goes on from there the next time.
func readIterator(fd int, one bool) (text []byte, err error) {
	buf := make([]byte, 64*unsafe.Sizeof(Holder{}))
	for {
		n, err := unix.Read(fd, buf)
		switch {
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
			continue
		case err != nil:
			return nil, fmt.Errorf("run the iterator: %w", err)
		}
		text = append(text, buf[:n]...)
		if n == 0 || one {
			return text, nil
		}
	}
}

func sysBPF(cmd uintptr, attr unsafe.Pointer, size uintptr) (int, error) {
	return ignoringEINTR(func() (int, error) {
		n, _, errno := unix.Syscall(unix.SYS_BPF, cmd, uintptr(attr), size)
		if errno != 0 {
			return -1, errno
		}
		return int(n), nil
	})
}

// ignoringEINTR: the Go runtime's own preemption signals may interrupt a system call.
func ignoringEINTR(call func() (int, error)) (int, error) {
	for {
		n, err := call()
		if !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}
