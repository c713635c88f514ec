package kafka

import (
	"context"
	"errors"
	"maps"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"time"
)

// ErrDrained is the end of a session by Drain: all that it owed is answered.
var ErrDrained = errors.New("the connection was drained")

// A side that was told the end has lingerTimeout to end its own direction. A client is given up quietTimeout after the
// last byte it sent.
const (
	lingerTimeout = 2 * time.Second
	quietTimeout  = 200 * time.Millisecond
)

// sessions are those that are open; the zero value has none.
type sessions struct {
	mu       sync.Mutex
	open     map[*session]struct{}
	draining bool
	ended    chan struct{} // tells Drain that none is open; nil before
}

func (o *sessions) add(s *session) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.open == nil {
		o.open = map[*session]struct{}{}
	}
	o.open[s] = struct{}{}
	if o.draining {
		s.up.Stop()
	}
}

func (o *sessions) remove(s *session) {
	o.mu.Lock()
	defer o.mu.Unlock()
	delete(o.open, s)
	if len(o.open) > 0 {
		return
	}
	select {
	case o.ended <- struct{}{}:
	default: // nobody waits for it, or was told already
	}
}

// all returns the open sessions, in the random order of a map.
func (o *sessions) all() []*session {
	o.mu.Lock()
	defer o.mu.Unlock()
	return slices.Collect(maps.Keys(o.open))
}

// Drain ends all sessions, those that begin later at once: each takes no further request but one it has begun to read,
// answers what it owes, and closes both its sides in order. The open ones are stopped one after the other, at random
// moments within spread. It returns when all have ended; when ctx ends before, it cuts the rest and tells how many
// these were. Call it once.
func (s *Shared) Drain(ctx context.Context, spread time.Duration) (cut int) {
	ended := make(chan struct{}, 1)
	s.sessions.mu.Lock()
	s.sessions.draining, s.sessions.ended = true, ended
	s.sessions.mu.Unlock()

	start, open := time.Now(), s.sessions.all()
	for i, one := range open {
		jitter := rand.N(spread + 1) //nolint:gosec // it is no secret
		turn := (time.Duration(i)*spread + jitter) / time.Duration(len(open))
		select {
		case <-ctx.Done():
		case <-time.After(time.Until(start.Add(turn))):
		}
		one.up.Stop()
	}
	for open = s.sessions.all(); len(open) > 0; open = s.sessions.all() {
		select {
		case <-ctx.Done():
			for _, one := range open {
				one.abort()
			}
			return len(open)
		case <-ended:
		}
	}
	return 0
}

// leave tells both sides the end of a drained session, behind the last answer to the client and the last request to the
// broker: what is owed no answer (acks=0) is read by the broker before its end.
func (s *session) leave() error {
	if err := s.queue.WaitEmpty(); err != nil {
		return err
	}
	s.left.Store(true)
	return errors.Join(closeWrite(s.conn.Client), closeWrite(s.conn.Broker),
		s.down.Hurry(lingerTimeout))
}

// closeWrite ends our direction of a connection, behind all that was written.
func closeWrite(c net.Conn) error {
	half, ok := c.(interface{ CloseWrite() error })
	if !ok {
		return errors.ErrUnsupported
	}
	return half.CloseWrite()
}

// linger drops what the client still sends, until it has read its end: to close a socket with bytes nobody read is a
// reset (RFC 2525, section 2.17), also of what the client has not read yet. It never got an answer to these requests,
// and they went nowhere.
func (s *session) linger() {
	s.up.Forget()
	for end := time.Now().Add(lingerTimeout); time.Now().Before(end); s.up.Drop(s.up.Buffered()) {
		if s.conn.Client.SetReadDeadline(time.Now().Add(quietTimeout)) != nil {
			return
		}
		if _, err := s.up.Need(1); err != nil {
			return
		}
	}
}
