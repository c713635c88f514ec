// Package wire is Kafka's framing: bytes in place, headers, the version of each, and answers in the order of requests.
package wire

import (
	"bytes"
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

// ErrStalled ends a connection on which the rest of a frame does not come: who has begun to send one has it.
var ErrStalled = errors.New("the rest of a frame did not come in time")

// ErrStopped ends the reads of a pipe after Stop.
var ErrStopped = errors.New("no further frame is read")

// The rest of a frame must arrive within stallTimeout and what it takes at stallRate bytes a second; of one that Stop
// finds begun, within finishTimeout. Of a frame that is streamed, something must come within stallTimeout.
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

	account *Account
	share   int64 // what the present buffer takes of the budget

	buf  *[]byte
	r, w int // buf[r:w] is read and not yet judged
	end  int // of the next read: behind a frame that is held whole, no more is read than is cheap to move

	out  net.Buffers // judged, in order, not yet written; parts of buf or of others
	vec  net.Buffers // out while it is written: WriteTo consumes its receiver
	open bool        // the last element of out ends at buf[r]

	before, after func() error

	stopped  atomic.Bool
	finishBy time.Time    // for the rest of a frame that Stop found begun; zero before
	hurry    atomic.Int64 // see Hurry; 0: none

	readable func(fd uintptr) bool
	n        int
	err      error
}

// NewPipe carries src to dst; account is the pipe's own, which Close closes. Before runs ahead of every write, after
// behind it; either may be nil, and an error of either ends the flush.
func NewPipe(src io.Reader, dst io.Writer, account *Account, before, after func() error) *Pipe {
	p := &Pipe{src: src, dst: dst, account: account, before: before, after: after}
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

// Hurry ends the pipe's reads once nothing has come for so long, whatever is under way then.
func (p *Pipe) Hurry(limit time.Duration) error {
	if p.in == nil {
		return errors.ErrUnsupported
	}
	p.hurry.Store(int64(limit))
	return p.in.SetReadDeadline(time.Now().Add(limit))
}

// Hurries tells whether Hurry was called.
func (p *Pipe) Hurries() bool { return p.hurry.Load() != 0 }

// Need returns the next n bytes in place, after reading as much as that takes. What was judged before is written first
// when it has to read. The bytes are valid until the next Need. It waits as long as it takes for a frame to begin, and
// not as long for the rest of one. io.EOF means the source ended between two frames, io.ErrUnexpectedEOF within one.
func (p *Pipe) Need(n int) ([]byte, error) { return p.frame(n, false) }

// Rest is Need within a frame of which nothing may be left in the buffer: one that is streamed.
func (p *Pipe) Rest(n int) ([]byte, error) { return p.frame(n, true) }

// frame is Need; begun tells that a part of the frame was read before.
func (p *Pipe) frame(n int, begun bool) ([]byte, error) {
	if p.w-p.r >= n {
		return (*p.buf)[p.r : p.r+n : p.r+n], nil
	}
	b, err := p.inTime(n, begun)
	for errors.Is(err, os.ErrDeadlineExceeded) && p.stopped.Load() {
		if p.w == p.r || (!p.finishBy.IsZero() && !time.Now().Before(p.finishBy)) {
			return nil, ErrStopped
		}
		if err = p.finish(); err == nil {
			b, err = p.inTime(n, begun)
		}
	}
	ended := errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) // the latter of TLS without its close_notify
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded) && !p.Hurries():
		err = fmt.Errorf("%w: %d of %d bytes", ErrStalled, p.w-p.r, n)
	case ended && (begun || p.w > p.r):
		err = fmt.Errorf("%w: %d of %d bytes of a frame", io.ErrUnexpectedEOF, p.w-p.r, n)
	case ended:
		err = io.EOF
	}
	return b, err
}

type deadliner interface{ SetReadDeadline(time.Time) error }

// tryReader is a source whose reads need not wait.
type tryReader interface {
	TryRead([]byte) (int, error) // unix.EAGAIN: nothing is there
	Wait() error                 // until there may be something
}

// inTime is need with a deadline where the frame has begun.
func (p *Pipe) inTime(n int, begun bool) ([]byte, error) {
	if !begun && p.w == p.r {
		if b, err := p.need(1); err != nil || n == 1 {
			return b, err
		}
	}
	if p.w-p.r >= n || p.in == nil || !p.finishBy.IsZero() || p.Hurries() {
		return p.need(n)
	}
	if err := p.Flush(); err != nil { // which takes the time of whom it is for
		return nil, err
	}
	by := time.Now().Add(stallTimeout + time.Duration(n)*time.Second/stallRate)
	if err := p.deadline(by); err != nil {
		return nil, err
	}
	b, err := p.need(n)
	if err != nil {
		return nil, err
	}
	return b, p.deadline(p.finishBy)
}

// deadline sets one of the pipe's own. Stop and Hurry may have set theirs just before.
func (p *Pipe) deadline(t time.Time) error {
	err := p.in.SetReadDeadline(t)
	switch limit := p.hurry.Load(); {
	case err != nil:
		return err
	case limit != 0:
		return p.in.SetReadDeadline(time.Now().Add(time.Duration(limit)))
	case p.stopped.Load() && p.finishBy.IsZero():
		return p.finish()
	}
	return nil
}

// finish bounds the rest of the frame that Stop found begun.
func (p *Pipe) finish() error {
	if p.finishBy.IsZero() {
		p.finishBy = time.Now().Add(finishTimeout)
	}
	return p.in.SetReadDeadline(p.finishBy)
}

func (p *Pipe) need(n int) ([]byte, error) {
	for first := true; p.w-p.r < n; first = false {
		if err := p.Flush(); err != nil {
			return nil, err
		}
		if err := p.room(n, first); err != nil {
			return nil, err
		}
		if limit := p.hurry.Load(); limit != 0 {
			if err := p.in.SetReadDeadline(time.Now().Add(time.Duration(limit))); err != nil {
				return nil, err
			}
		}
		if err := p.fill(); err != nil {
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

// Replace sends b instead of the next n bytes, which must have been returned by Need. It takes the place of a large
// frame, so that nothing but the pipe's share of the budget is held until it is written.
func (p *Pipe) Replace(n int, b []byte) {
	if p.share == 0 {
		p.Drop(n)
		p.Emit(b)
		return
	}
	k := copy((*p.buf)[p.r:p.r+n], b)
	p.Pass(k)
	p.Drop(n - k)
	if k < len(b) {
		p.Emit(bytes.Clone(b[k:]))
	}
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
	p.Forget()
	if err != nil || p.after == nil {
		return err
	}
	return p.after()
}

// Forget drops what was passed and emitted and is not written.
func (p *Pipe) Forget() {
	clear(p.out)
	p.out, p.open = p.out[:0], false
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
	p.account.Close()
}

// room makes space for n unjudged bytes. Nothing waits to be written, so all before r is free. A buffer that does not
// fit the next frame goes back, as does one that others wait for, before the frame is read.
func (p *Pipe) room(n int, first bool) error {
	share := HeldSize(n)
	if p.r == p.w {
		p.r, p.w = 0, 0
	}
	if p.buf != nil && p.share > 0 && (p.share != share || first && p.account.Crowded()) {
		p.exchange(0)
		p.account.Release(p.share)
		p.share = 0
	}
	if share > p.share {
		if err := p.account.Acquire(share); err != nil {
			return err
		}
		p.share = share
	}
	switch {
	case p.buf == nil && n > BaseBuffer: // else as late as there is something to read
		p.buf = getBuffer(n)
	case p.buf != nil && len(*p.buf) < n:
		p.exchange(n)
	case p.buf != nil && len(*p.buf)-p.r < n:
		p.w = copy(*p.buf, (*p.buf)[p.r:p.w])
		p.r = 0
	}
	if p.buf != nil {
		p.end = min(len(*p.buf), p.r+n+BaseBuffer)
	}
	return nil
}

// exchange changes the buffer for one with room for n bytes, and for all that is not judged.
func (p *Pipe) exchange(n int) {
	old, left := p.buf, (*p.buf)[p.r:p.w]
	if n = max(n, len(left)); n == 0 {
		p.buf = nil
	} else {
		p.buf = getBuffer(n)
		p.r, p.w = 0, copy(*p.buf, left)
	}
	clear(left) // a password may stand there
	putBuffer(old)
}

func (p *Pipe) release() {
	if p.buf == nil {
		return
	}
	putBuffer(p.buf)
	p.buf = nil
	p.account.Release(p.share)
	p.share = 0
}

// ready makes sure of a buffer to read into.
func (p *Pipe) ready() {
	if p.buf == nil {
		p.buf = getBuffer(0)
		p.end = len(*p.buf)
	}
}

func (p *Pipe) fill() error {
	if p.try != nil {
		return p.fillPatiently()
	}
	if p.raw == nil {
		p.ready()
		n, err := p.src.Read((*p.buf)[p.w:p.end])
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
	p.ready()
	n, err := unix.Read(int(fd), (*p.buf)[p.w:p.end])
	for errors.Is(err, unix.EINTR) {
		n, err = unix.Read(int(fd), (*p.buf)[p.w:p.end])
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
		p.ready()
		n, err := p.try.TryRead((*p.buf)[p.w:p.end])
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
