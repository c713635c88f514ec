package bypass

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// rings: io_uring, where a kernel thread may connect in the place of the process.
var rings = []vector{
	{name: "io_uring", want: intercepted, attack: ringConnect(0, 0)},
	{name: "io_uring over IPv6", want: intercepted, attack: ringConnect6},
	{name: "io_uring, IOSQE_ASYNC: by a worker thread", want: intercepted, attack: ringConnect(0, sqeAsync)},
	{name: "io_uring, SQPOLL: by a polling kernel thread", want: intercepted, attack: ringConnect(setupSQPoll, 0)},
	{name: "io_uring, socket and connect linked, by direct descriptors", want: intercepted, attack: ringDirect},
	{name: "io_uring, direct connect to the node's listener", want: refused, uncontrolled: noListener,
		attack: ringListener},
}

// What of <linux/io_uring.h> is used.
const (
	setupSQPoll = 1 << 1 // IORING_SETUP_SQPOLL

	enterGetEvents = 1 << 0 // IORING_ENTER_GETEVENTS
	enterWakeUp    = 1 << 1 // IORING_ENTER_SQ_WAKEUP

	sqeFixedFile = 1 << 0 // IOSQE_FIXED_FILE
	sqeLink      = 1 << 2 // IOSQE_IO_LINK
	sqeAsync     = 1 << 4 // IOSQE_ASYNC

	opConnect = 16
	opSend    = 26
	opRecv    = 27
	opSocket  = 45 // Linux 5.19

	registerFiles = 2 // IORING_REGISTER_FILES

	offsetSQ, offsetCQ, offsetSQEs = 0, 0x8000000, 0x10000000

	ringEntries = 8
	sqeSize     = 64
	cqeSize     = 16
)

// ringParams is struct io_uring_params.
type ringParams struct {
	sqEntries, cqEntries, flags, threadCPU, threadIdle, features, wqFD uint32
	_                                                                  [3]uint32
	sq, cq                                                             ringOffsets
}

// ringOffsets is struct io_sqring_offsets and struct io_cqring_offsets; "last" is array in one and cqes in the other,
// with fields in between that differ.
type ringOffsets struct {
	head, tail, mask, entries, a, b, c, d uint32
	address                               uint64
}

// sqe is struct io_uring_sqe.
type sqe struct {
	op, flags uint8
	priority  uint16
	fd        int32
	offset    uint64 // of connect: the length of the address; of socket: its type
	address   uint64
	length    uint32 // of socket: its protocol
	opFlags   uint32
	userData  uint64
	_         [2]uint16
	fileIndex uint32
	_         [2]uint64
}

type ring struct {
	fd             int
	params         ringParams
	sq, cq, sqes   []byte
	submitted      uint32
	heldAlive      [][]byte
	wakeUpIsNeeded bool
}

func newRing(flags uint32) (*ring, error) {
	r := &ring{params: ringParams{flags: flags, threadIdle: 1000}, wakeUpIsNeeded: flags&setupSQPoll != 0}
	fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, ringEntries, uintptr(unsafe.Pointer(&r.params)), 0)
	if errno == unix.EPERM { // kernel.io_uring_disabled
		return nil, fmt.Errorf("%w: io_uring_setup: %w", errUnsupported, errno)
	}
	if errno != 0 {
		return nil, unsupported(os.NewSyscallError("io_uring_setup", errno))
	}
	r.fd = int(fd)
	var errs [3]error
	r.sq, errs[0] = r.share(offsetSQ, r.params.sq.c+r.params.sqEntries*4)
	r.cq, errs[1] = r.share(offsetCQ, r.params.cq.b+r.params.cqEntries*cqeSize)
	r.sqes, errs[2] = r.share(offsetSQEs, r.params.sqEntries*sqeSize)
	return r, errors.Join(errs[:]...)
}

func (r *ring) share(offset int64, size uint32) ([]byte, error) {
	return unix.Mmap(r.fd, offset, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
}

func word(b []byte, at uint32) *uint32 { return (*uint32)(unsafe.Pointer(&b[at])) }

// pointer is the address of bytes that live as long as the ring.
func (r *ring) pointer(b []byte) uint64 {
	r.heldAlive = append(r.heldAlive, b)
	return uint64(uintptr(unsafe.Pointer(&b[0])))
}

// do submits entries and returns their results, in order; an errno is negative.
func (r *ring) do(entries ...sqe) ([]int32, error) {
	mask := *word(r.sq, r.params.sq.mask)
	for i, e := range entries {
		e.userData = uint64(i)
		slot := r.submitted & mask
		*(*sqe)(unsafe.Pointer(&r.sqes[slot*sqeSize])) = e
		*word(r.sq, r.params.sq.c+4*slot) = slot
		r.submitted++
	}
	atomic.StoreUint32(word(r.sq, r.params.sq.tail), r.submitted)
	flags, results := uintptr(enterGetEvents), make([]int32, len(entries))
	if r.wakeUpIsNeeded {
		flags |= enterWakeUp
	}
	submit := len(entries)
	for done := 0; done < len(entries); {
		_, _, errno := unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(r.fd), uintptr(submit), 1, flags, 0, 0)
		if errno != 0 && errno != unix.EINTR {
			return nil, os.NewSyscallError("io_uring_enter", errno)
		}
		submit = 0
		head := word(r.cq, r.params.cq.head)
		for ; *head != atomic.LoadUint32(word(r.cq, r.params.cq.tail)); done++ {
			at := r.params.cq.b + (*head&*word(r.cq, r.params.cq.mask))*cqeSize
			index := binary.NativeEndian.Uint64(r.cq[at:])
			results[index] = int32(binary.NativeEndian.Uint32(r.cq[at+8:]))
			atomic.AddUint32(head, 1)
		}
	}
	runtime.KeepAlive(r.heldAlive)
	return results, nil
}

func (r *ring) connecting(fd int, to netip.AddrPort, flags uint8) sqe {
	address := rawAddress(to)
	return sqe{op: opConnect, flags: flags, fd: int32(fd), address: r.pointer(address), offset: uint64(len(address))}
}

func ringConnect(setup uint32, flags uint8) func(*attacker) error {
	return func(a *attacker) error {
		r, err := newRing(setup)
		if err != nil {
			return err
		}
		defer func() { _ = unix.Close(r.fd) }()
		fd, err := socket(familyOf(a.to), unix.SOCK_STREAM, unix.IPPROTO_TCP)
		if err != nil {
			return err
		}
		defer func() { _ = unix.Close(fd) }()
		results, err := r.do(r.connecting(fd, a.to, flags))
		if err != nil {
			return err
		}
		if results[0] < 0 {
			return os.NewSyscallError("connect by io_uring", syscall.Errno(-results[0]))
		}
		return a.speak(fd)
	}
}

func ringConnect6(a *attacker) error {
	a.to = at(broker6)
	return ringConnect(0, 0)(a)
}

// ringDirect has a socket that no descriptor table of a process ever had.
func ringDirect(a *attacker) error {
	r, err := newRing(0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(r.fd) }()
	slots := []byte{0xff, 0xff, 0xff, 0xff} // one, free
	if _, _, errno := unix.Syscall6(unix.SYS_IO_URING_REGISTER, uintptr(r.fd), registerFiles,
		uintptr(unsafe.Pointer(&slots[0])), 1, 0, 0); errno != 0 {
		return unsupported(os.NewSyscallError("io_uring_register", errno))
	}
	frame, answer := a.frame(), make([]byte, 8)
	results, err := r.do(
		sqe{op: opSocket, flags: sqeLink, fd: unix.AF_INET, offset: unix.SOCK_STREAM, fileIndex: 1},
		r.connecting(0, a.to, sqeFixedFile|sqeLink),
		sqe{op: opSend, flags: sqeFixedFile | sqeLink, address: r.pointer(frame), length: uint32(len(frame))},
		sqe{op: opRecv, flags: sqeFixedFile, address: r.pointer(answer), length: uint32(len(answer))})
	if err != nil {
		return err
	}
	if results[0] == -int32(unix.EINVAL) {
		return fmt.Errorf("%w: IORING_OP_SOCKET", errUnsupported)
	}
	for i, step := range []string{"socket", "connect", "send", "receive"} {
		if results[i] < 0 {
			return fmt.Errorf("%s by io_uring: %w", step, syscall.Errno(-results[i]))
		}
	}
	return nil
}

func ringListener(a *attacker) error {
	to, err := listener(loopback4)
	if err != nil {
		return err
	}
	a.to = to
	return ringConnect(0, sqeAsync)(a)
}
