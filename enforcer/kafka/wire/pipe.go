// Package wire is Kafka's framing: bytes in place, headers, the version of each, and answers in the order of requests.
package wire

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// ErrStalled ends a connection that holds memory for a frame whose rest does not come.
var ErrStalled = errors.New("the rest of a frame did not come in time")

// ErrStopped ends the reads of a pipe after Stop.
var ErrStopped = errors.New("no further frame is read")

// A frame that is held whole must arrive within stallTimeout and what it takes at stallRate bytes a second; one that
// Stop finds begun, within finishTimeout.
const (
	stallTimeout  = 30 * time.Second
	stallRate     = 256 << 10
	finishTimeout = 5 * time.Second
)

// Pipe is one direction of a connection. Bytes are read into one buffer, judged there, and written from there: Pass,
// Drop and Emit only note what is to go out; it goes out in one write when the pipe has to read more (or on Flush). A
// Pipe belongs to one goroutine; only Stop may come from others.
type Pipe struct {
	src io.Reader
	in  deadliner       // src, where its reads can be interrupted
	raw syscall.RawConn // of src, where it is a socket: lets an idle pipe wait without a buffer
	try tryReader       // src, where it is none but can do the same, as TLS over a socket does
	dst io.Writer

	budget *Budget
	share  int64 // bytes of budget the present buffer holds

	buf  *[]byte
	r, w int // buf[r:w] is read and not yet judged

	out  net.Buffers // judged, in order, not yet written; parts of buf or of others
	vec  net.Buffers // out while it is written: WriteTo consumes its receiver
	open bool        // the last element of out ends at buf[r]

	before, after func() error

	stopped  atomic.Bool
	finishBy time.Time // for the rest of a frame that Stop found begun; zero before

	readable func(fd uintptr) bool
	n        int
	err      error
}

// NewPipe carries src to dst. Before runs ahead of every write, after behind it; either may be nil, and an error of
// either ends the flush.
func NewPipe(src io.Reader, dst io.Writer, budget *Budget, before, after func() error) *Pipe {
	p := &Pipe{src: src, dst: dst, budget: budget, before: before, after: after}
	p.in, _ = src.(deadliner)
	p.try, _ = src.(tryReader)
	if sc, ok := src.(syscall.Conn); ok {
		if raw, err := sc.SyscallConn(); err == nil {
			p.raw = raw
		}
	}
	p.readable = p.tryRead
	return p
}

// Buffered is how many read bytes are not judged yet.
func (p *Pipe) Buffered() int { return p.w - p.r }

// Stop makes the pipe read no further frame: a Need that waits for one fails with ErrStopped, as does one that waits
// for the rest of a frame longer than finishTimeout. Stopped tells a reader that finds whole frames in the buffer.
func (p *Pipe) Stop() {
	p.stopped.Store(true)
	if p.in != nil {
		_ = p.in.SetReadDeadline(time.Unix(1, 0)) // fails on a closed socket, whose reads have ended
	}
}

// Stopped tells whether Stop was called.
func (p *Pipe) Stopped() bool { return p.stopped.Load() }

// Need returns the next n bytes in place, after reading as much as that takes. What was judged before is written first
// when it has to read. The bytes are valid until the next Need. io.EOF means the source ended between two frames.
func (p *Pipe) Need(n int) ([]byte, error) {
	b, err := p.inTime(n)
	for errors.Is(err, os.ErrDeadlineExceeded) && p.stopped.Load() {
		if p.w == p.r || (!p.finishBy.IsZero() && !time.Now().Before(p.finishBy)) {
			return nil, ErrStopped
		}
		if err = p.finish(); err == nil {
			b, err = p.inTime(n)
		}
	}
	if errors.Is(err, os.ErrDeadlineExceeded) && n > BaseBuffer {
		err = fmt.Errorf("%w: %d of %d bytes", ErrStalled, p.w-p.r, n)
	}
	return b, err
}

type deadliner interface{ SetReadDeadline(time.Time) error }

// tryReader is a source whose reads need not wait.
type tryReader interface {
	TryRead([]byte) (int, error) // unix.EAGAIN: nothing is there
	Wait() error                 // until there may be something
}

// inTime is need with a deadline where it holds memory beyond the base buffer.
func (p *Pipe) inTime(n int) ([]byte, error) {
	if p.in == nil || n <= BaseBuffer || p.w-p.r >= n || !p.finishBy.IsZero() {
		return p.need(n)
	}
	err := p.in.SetReadDeadline(time.Now().Add(stallTimeout + time.Duration(n)*time.Second/stallRate))
	if err == nil && p.stopped.Load() { // its deadline may just have been overwritten
		err = p.finish()
	}
	if err != nil {
		return nil, err
	}
	b, err := p.need(n)
	if err != nil {
		return nil, err
	}
	return b, p.in.SetReadDeadline(p.finishBy)
}

// finish bounds the rest of the frame that Stop found begun.
func (p *Pipe) finish() error {
	if p.finishBy.IsZero() {
		p.finishBy = time.Now().Add(finishTimeout)
	}
	return p.in.SetReadDeadline(p.finishBy)
}

func (p *Pipe) need(n int) ([]byte, error) {
	for p.w-p.r < n {
		if err := p.Flush(); err != nil {
			return nil, err
		}
		if err := p.room(n); err != nil {
			return nil, err
		}
		if err := p.fill(); err != nil {
			if errors.Is(err, io.EOF) && p.w > p.r {
				err = io.ErrUnexpectedEOF
			}
			return nil, err
		}
	}
	return (*p.buf)[p.r : p.r+n : p.r+n], nil
}

// Pass lets the next n bytes through; they must have been returned by Need.
func (p *Pipe) Pass(n int) {
	if n == 0 {
		return
	}
	if p.open {
		last := &p.out[len(p.out)-1]
		*last = (*last)[:len(*last)+n]
	} else {
		p.out = append(p.out, (*p.buf)[p.r:p.r+n])
		p.open = true
	}
	p.r += n
}

// Drop discards the next n bytes; they must have been returned by Need.
func (p *Pipe) Drop(n int) {
	p.r += n
	p.open = false
}

// Emit sends b behind what was passed so far. The pipe keeps b until the next flush.
func (p *Pipe) Emit(b []byte) {
	p.out = append(p.out, b)
	p.open = false
}

// Flush writes what was passed and emitted.
func (p *Pipe) Flush() error {
	if len(p.out) == 0 {
		return nil
	}
	if p.before != nil {
		if err := p.before(); err != nil {
			return err
		}
	}
	var err error
	if len(p.out) == 1 {
		_, err = p.dst.Write(p.out[0])
	} else {
		p.vec = p.out
		_, err = p.vec.WriteTo(p.dst)
	}
	clear(p.out)
	p.out, p.open = p.out[:0], false
	if err != nil || p.after == nil {
		return err
	}
	return p.after()
}

// Wipe overwrites all of the buffer that is not still to be judged: a password may have stood there. Flush first.
func (p *Pipe) Wipe() {
	if p.buf != nil {
		clear((*p.buf)[:p.r])
		clear((*p.buf)[p.w:])
	}
}

// Close overwrites the buffer, and gives it and its budget back. The pipe must not be used after it.
func (p *Pipe) Close() {
	p.out, p.r, p.w = nil, 0, 0
	p.Wipe()
	p.release()
}

// room makes space for n unjudged bytes. Nothing waits to be written, so all before r is free.
func (p *Pipe) room(n int) error {
	if p.r == p.w {
		p.r, p.w = 0, 0
		if p.share > 0 && n <= BaseBuffer {
			p.release()
		}
	}
	if p.buf == nil {
		return p.take(n)
	}
	if len(*p.buf) >= n {
		if len(*p.buf)-p.r < n {
			p.w = copy(*p.buf, (*p.buf)[p.r:p.w])
			p.r = 0
		}
		return nil
	}
	// The old share is given back first: who holds one while he waits for more may wait for himself.
	old, r, w := p.buf, p.r, p.w
	p.budget.Release(p.share)
	p.share = 0
	if err := p.take(n); err != nil {
		return err
	}
	p.r, p.w = 0, copy(*p.buf, (*old)[r:w])
	putBuffer(old)
	return nil
}

func (p *Pipe) take(n int) error {
	share := HeldSize(n)
	if share > 0 {
		if err := p.budget.Acquire(share); err != nil {
			return err
		}
	}
	p.buf, p.share = getBuffer(n), share
	return nil
}

func (p *Pipe) release() {
	if p.buf == nil {
		return
	}
	putBuffer(p.buf)
	p.buf = nil
	p.budget.Release(p.share)
	p.share = 0
}

func (p *Pipe) fill() error {
	if p.try != nil {
		return p.fillPatiently()
	}
	if p.raw == nil {
		if p.buf == nil {
			p.buf = getBuffer(0)
		}
		n, err := p.src.Read((*p.buf)[p.w:])
		p.w += n
		if n > 0 {
			return nil
		}
		return err
	}
	if err := p.raw.Read(p.readable); err != nil {
		return err
	}
	p.w += p.n
	return p.err
}

// tryRead reads what the socket has. When it has nothing and nothing is pending, the buffer goes back to the pool for
// as long as the wait lasts: an idle connection holds none.
func (p *Pipe) tryRead(fd uintptr) bool {
	if p.buf == nil {
		p.buf = getBuffer(0)
	}
	n, err := unix.Read(int(fd), (*p.buf)[p.w:])
	for errors.Is(err, unix.EINTR) {
		n, err = unix.Read(int(fd), (*p.buf)[p.w:])
	}
	switch {
	case errors.Is(err, unix.EAGAIN):
		p.rest()
		return false
	case err == nil && n == 0:
		err = io.EOF
	}
	p.n, p.err = max(n, 0), err
	return true
}

// rest gives the buffer back as long as the pipe waits for the next frame.
func (p *Pipe) rest() {
	if p.r == p.w {
		p.r, p.w = 0, 0
		p.release()
	}
}

func (p *Pipe) fillPatiently() error {
	for {
		if p.buf == nil {
			p.buf = getBuffer(0)
		}
		n, err := p.try.TryRead((*p.buf)[p.w:])
		p.w += n
		switch {
		case n > 0:
			return nil
		case !errors.Is(err, unix.EAGAIN):
			return err
		}
		p.rest()
		if err := p.try.Wait(); err != nil {
			return err
		}
	}
}
