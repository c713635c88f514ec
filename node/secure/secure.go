// Package secure is TLS for sessions that are idle most of the time: while nothing comes, nobody holds a buffer.
package secure

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// Conn is a connection with TLS. As of tls.Conn, its reads belong to one goroutine at a time.
type Conn struct {
	*tls.Conn
	socket *socket
}

// Server speaks TLS to a client of which read has been read already.
func Server(conn net.Conn, read []byte, conf *tls.Config) *Conn {
	s := newSocket(conn, read)
	return &Conn{tls.Server(s, conf), s}
}

// Client speaks TLS to a server.
func Client(conn net.Conn, conf *tls.Config) *Conn {
	s := newSocket(conn, nil)
	return &Conn{tls.Client(s, conf), s}
}

// Read may end without a close_notify, as it does when the other side dies: Kafka's frames tell by themselves where
// they end.
func (c *Conn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if errors.Is(err, io.ErrUnexpectedEOF) {
		err = io.EOF
	}
	return n, err
}

// TryRead is Read that does not wait: unix.EAGAIN tells that nothing is there. Where the connection below is no socket
// it waits.
func (c *Conn) TryRead(b []byte) (int, error) {
	c.socket.try = true
	defer func() { c.socket.try = false }()
	return c.Read(b)
}

// Wait waits until TryRead may find something, an end included; or for the deadline of reads.
func (c *Conn) Wait() error { return c.socket.wait() }

// CloseWrite ends our direction, behind all that was written: with close_notify and, for those that do not heed it, the
// end of the stream below.
func (c *Conn) CloseWrite() error {
	err := c.Conn.CloseWrite()
	half, ok := c.socket.Conn.(interface{ CloseWrite() error })
	if !ok {
		return err
	}
	return errors.Join(err, half.CloseWrite())
}

// socket is what TLS reads from.
type socket struct {
	net.Conn
	raw  syscall.RawConn // nil: Conn is no socket
	read []byte          // ahead of what comes
	try  bool            // do not wait

	header [recordHeader]byte // of the record that is read
	have   int                // bytes of header
	left   int                // bytes of the record behind it
}

// A record has a header of 5 bytes, which ends with the length of the rest (RFC 8446, section 5.1).
const recordHeader = 5

// small is how much is read where it is not known how long the record is.
const small = 512

func newSocket(conn net.Conn, read []byte) *socket {
	s := &socket{Conn: conn, read: read}
	if sc, ok := conn.(syscall.Conn); ok {
		if raw, err := sc.SyscallConn(); err == nil {
			s.raw = raw
		}
	}
	return s
}

// Read reads for TLS, and not beyond the end of a long record: tls.Conn keeps for ever a buffer as large as the most it
// ever had to hold, which else would be two records and more.
func (s *socket) Read(b []byte) (n int, err error) {
	if s.left > 0 {
		b = b[:min(len(b), s.left)]
	} else {
		b = b[:min(len(b), small)]
	}
	n, err = s.readSome(b)
	s.passed(b[:n])
	return n, err
}

// passed follows the records.
func (s *socket) passed(b []byte) {
	for len(b) > 0 {
		if s.left > 0 {
			n := min(s.left, len(b))
			s.left, b = s.left-n, b[n:]
			continue
		}
		n := copy(s.header[s.have:], b)
		s.have, b = s.have+n, b[n:]
		if s.have == recordHeader {
			s.have, s.left = 0, int(s.header[3])<<8|int(s.header[4])
		}
	}
}

// readSome: EAGAIN is a net.Error that is temporary, after which TLS goes on where it was.
func (s *socket) readSome(b []byte) (n int, err error) {
	if len(s.read) > 0 {
		n = copy(b, s.read)
		if s.read = s.read[n:]; len(s.read) == 0 {
			s.read = nil
		}
		return n, nil
	}
	if !s.try || s.raw == nil {
		return s.Conn.Read(b)
	}
	rerr := s.raw.Read(func(fd uintptr) bool {
		n, err = unix.Read(int(fd), b)
		for errors.Is(err, unix.EINTR) {
			n, err = unix.Read(int(fd), b)
		}
		return true
	})
	switch {
	case rerr != nil:
		return 0, rerr
	case err != nil:
		return 0, err
	case n == 0 && len(b) > 0:
		return 0, io.EOF
	}
	return n, nil
}

func (s *socket) wait() error {
	if len(s.read) > 0 || s.raw == nil {
		return nil
	}
	return s.raw.Read(func(fd uintptr) bool {
		var one [1]byte
		_, _, err := unix.Recvfrom(int(fd), one[:], unix.MSG_PEEK)
		return !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR)
	})
}
