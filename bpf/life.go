package bpf

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"runtime"
	"slices"
	"sync"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/ringbuf"
)

// Holder is a process that has a descriptor of a client's socket (struct klamm_holder of record.h).
type Holder struct {
	Socket    uint64 // Record.ClientCookie
	TaskFacts        // UID, GID and CgroupID are those of the thread group leader
}

var _ [unsafe.Sizeof(Holder{})]byte = [80]byte{}

// maxSought is max_entries of klamm_sought.
const maxSought = 1024

// life follows processes: their execve, what they are now, and which of them have a socket. It ends with the process.
type life struct {
	tasks, holders  *ebpf.Program // iterators
	watched, sought *ebpf.Map
	exec            link.Link // nil where it could not be attached
	unattached      error     // why
	executed        *ringbuf.Reader

	mu    sync.Mutex        // guards words with the map they mirror
	words map[uint32]uint64 // of watched, but zeros

	looking sync.Mutex // from setting sought to having read
}

func newLife(o *redirectObjects) (l *life, err error) {
	l = &life{tasks: o.KlammWatchedTasks, holders: o.KlammHolders, watched: o.KlammWatched, sought: o.KlammSought,
		words: map[uint32]uint64{}}
	if l.executed, err = ringbuf.NewReader(o.KlammExecuted); err != nil {
		return nil, fmt.Errorf("read what the kernel tells of execve: %w", err)
	}
	l.exec, err = link.AttachRawTracepoint(link.RawTracepointOptions{Name: "sched_process_exec", Program: o.KlammExec})
	if err != nil {
		l.unattached = fmt.Errorf("attach to the tracepoint sched_process_exec: %w", err)
	}
	return l, nil
}

// close is for a nil life, too.
func (l *life) close() error {
	if l == nil {
		return nil
	}
	err := l.executed.Close()
	if l.exec != nil {
		err = errors.Join(err, l.exec.Close())
	}
	return err
}

// Unnoticed says why Executed tells of nothing; nil where it does.
func (p *Programs) Unnoticed() error { return p.life.unattached }

// Watch makes Executed and Watched tell of a process, by its thread group id in the init pid namespace.
func (p *Programs) Watch(pid uint32) error { return p.life.watch(pid, 1) }

// Unwatch undoes Watch.
func (p *Programs) Unwatch(pid uint32) error { return p.life.watch(pid, 0) }

func (l *life) watch(pid uint32, bit uint64) error {
	word, place := pid/64, pid%64
	l.mu.Lock()
	defer l.mu.Unlock()
	bits := l.words[word]&^(1<<place) | bit<<place
	if err := l.watched.Put(word, bits); err != nil {
		return fmt.Errorf("have the kernel watch process %d: %w", pid, err)
	}
	if l.words[word] = bits; bits == 0 {
		delete(l.words, word)
	}
	return nil
}

// Executed waits for a watched process to execute another program. It is for one goroutine; after StopEvents the error
// is os.ErrClosed. What it misses, for want of room or of the tracepoint, Watched shows.
func (p *Programs) Executed() (pid uint32, err error) {
	for {
		r, err := p.life.executed.Read()
		if err != nil {
			return 0, fmt.Errorf("read what the kernel tells of execve: %w", err)
		}
		if len(r.RawSample) >= 4 {
			return binary.NativeEndian.Uint32(r.RawSample), nil
		}
	}
}

// Watched are all watched processes that are there, as they are now.
func (p *Programs) Watched() ([]TaskFacts, error) {
	facts, err := walk[TaskFacts](p.life.tasks)
	if err != nil {
		return nil, fmt.Errorf("read the watched processes in the kernel: %w", err)
	}
	return facts, nil
}

// Holders are the processes that have descriptors of sockets, which are named by Record.ClientCookie. It walks the open
// files of all processes of the host.
func (p *Programs) Holders(sockets []uint64) (found []Holder, err error) {
	l := p.life
	l.looking.Lock()
	defer l.looking.Unlock()
	for some := range slices.Chunk(sockets, maxSought) {
		holders, err := l.find(some)
		if err != nil {
			return nil, fmt.Errorf("find who has a socket: %w", err)
		}
		found = append(found, holders...)
	}
	return found, nil
}

// find is for at most maxSought sockets.
func (l *life) find(sockets []uint64) (found []Holder, err error) {
	defer func() {
		for _, s := range sockets {
			if derr := l.sought.Delete(s); !errors.Is(derr, ebpf.ErrKeyNotExist) {
				err = errors.Join(err, derr)
			}
		}
	}()
	for _, s := range sockets {
		if err := l.sought.Put(s, uint8(1)); err != nil {
			return nil, err
		}
	}
	all, err := walk[Holder](l.holders)
	once := map[Holder]struct{}{} // a process may have several descriptors
	for _, h := range all {
		once[h] = struct{}{}
	}
	return slices.Collect(maps.Keys(once)), err
}

// walk runs an iterator whose program writes values of T, which holds no pointers.
func walk[T any](program *ebpf.Program) (all []T, err error) {
	defer runtime.KeepAlive(program)
	text, err := iterate(program.FD(), nil)
	if err != nil {
		return nil, err
	}
	var one T
	size := int(unsafe.Sizeof(one))
	for ; len(text) >= size; text = text[size:] {
		//nolint:gosec // of the same length, and without pointers
		copy(unsafe.Slice((*byte)(unsafe.Pointer(&one)), size), text)
		all = append(all, one)
	}
	if len(text) > 0 {
		return nil, fmt.Errorf("the iterator wrote %d bytes too many", len(text))
	}
	return all, nil
}
