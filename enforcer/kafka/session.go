package kafka

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/audit"
	"klamm/enforcer/kafka/authz"
	"klamm/enforcer/kafka/wire"
	"klamm/enforcer/policy"
)

const (
	maxInFlight    = 256              // answers owed to one client; more wait in its socket (Kafka clients: 5 to 1000)
	resolveTimeout = 5 * time.Second  // for looking topics up
	handledRequest = 2                // times its decoded size: itself, and the part or the answer a verdict makes of it
	drainTimeout   = 10 * time.Second // for each answer that is owed when the client has ended
)

// session is one connection. The request loop and the answer loop each own a pipe, a trail and their topic cache; they
// meet at the queue.
type session struct {
	*Shared
	conn  *Conn
	queue *wire.Queue[pending]
	up    *wire.Pipe // client to broker
	down  *wire.Pipe // broker to client

	memory     accounts
	life       context.Context //nolint:containedctx // of what waits for others than the two sides
	die        context.CancelFunc
	left       atomic.Bool // drained: both sides are told the end
	brokerLeft atomic.Bool // the client is told the end
	hurried    atomic.Bool // the client still gets what it is owed, if it takes it
	fatal      atomic.Pointer[error]

	bound    atomic.Pointer[binding]
	login    atomic.Pointer[login]
	renewing atomic.Bool // a login that follows another is under way
	mu       sync.Mutex  // guards making a binding, and what follows
	holder   holder
	expiry   *time.Timer
	over     bool

	// of the request loop
	upTrail  *audit.Trail
	upTopics topicCache
	ctx      *authz.Ctx // reused by requests that are decided in place
	fetchSes *authz.FetchSession
	shareSes *authz.ShareSession
	mirrored int64    // what these two take of the budget
	allowed  struct { // of requests that are decided in place
		fetch, shareFetch func(name []byte, id authz.TopicID) bool
		shareGroup        func(name []byte) bool
	}
	clientID string
	sequence int32     // correlation ids toward the broker are ours
	upFor    *binding  // whom upTrail speaks of
	renewed  time.Time // when the node's own login was, last

	// of the request loop, and of the answer loop while that waits for it
	offered string   // the mechanism of the SaslHandshake that is under way
	attempt *attempt // nil outside of an exchange

	txnID      string // the transactional id decided last, under txnView
	txnView    *policy.View
	txnAllowed bool

	shareGroup   string // the share group decided last, under shareView
	shareView    *policy.View
	shareAllowed bool

	// of the answer loop
	downTrail  *audit.Trail
	downFor    *binding // whom downTrail speaks of
	downTopics topicCache
	fetch      fetchReader
}

// pending is a request that is owed an answer.
type pending struct {
	wire.Header
	clientID string
	sequence int32
	started  time.Time
	who      *binding // whose request it is; nil where it is our own
	kind     kind
	ctx      *authz.Ctx // its checks, and what its edit needs; nil where decided in place
	edit     func(*authz.Ctx, kmsg.Response)
	fetch    *authz.FetchSession
	view     *policy.View     // a Fetch or ShareFetch was decided under it
	follows  *policy.Decision // of a follower's fetch
	produce  produced
	keeps    int64       // bytes of memory until it is answered, about
	reply    chan []byte // for the answer to a request of our own
}

type entry = *wire.Entry[pending]

// kind says how the broker's answer is handled.
type kind uint8

const (
	relay         kind = iota // its bytes go through
	edited                    // decoded, changed, encoded
	fetched                   // streamed, record batches hashed
	acked                     // a produce: offsets and errors belong in the audit
	greeted                   // SaslHandshake: success opens an exchange
	authenticated             // SaslAuthenticate: success makes what the client claims count
	learned                   // a Metadata whose bytes go through: its topic ids are taken up
	ours                      // of our own: the client hears nothing of it
)

// Error is a refusal that ends the connection.
type Error struct {
	Reason audit.Reason
	err    error
}

func (e *Error) Error() string { return e.err.Error() }
func (e *Error) Unwrap() error { return e.err }

func refuse(r audit.Reason, format string, args ...any) error {
	return &Error{r, fmt.Errorf(format, args...)}
}

// Serve enforces policy on one connection until either side ends it, and closes both. A nil error is an orderly end,
// and ErrDrained one by Drain.
func Serve(ctx context.Context, shared *Shared, c *Conn) error {
	s := newSession(ctx, shared, c)
	s.queue = wire.NewQueue[pending](toClient{s}, maxInFlight, s.memory.kept)
	s.up = wire.NewPipe(c.Client, c.Broker, s.memory.requested, onRecord(s.upTrail), nil)
	s.down = wire.NewPipe(c.Broker, c.Client, s.memory.answered, s.beforeAnswers, s.queue.Written)
	shared.Metrics.open.Inc()
	defer shared.Metrics.open.Dec()

	stop := context.AfterFunc(ctx, s.abort)
	defer stop()
	shared.sessions.add(s)
	defer shared.sessions.remove(s)
	unwatch := c.Workload.Watch(func() { go s.changed() })
	defer unwatch()
	s.changed() // it may have been before it was watched
	var up error
	var wg sync.WaitGroup
	wg.Go(func() {
		up = guard(s.requests)
		s.endRequests(up)
	})
	down := guard(s.answers)
	s.endAnswers(down)
	wg.Wait()
	s.abort()
	s.settle()
	err := s.finish(up, down)
	s.up.Close()
	s.down.Close()
	s.memory.close()
	return err
}

func newSession(ctx context.Context, shared *Shared, c *Conn) *session {
	s := &session{Shared: shared, conn: c, ctx: new(authz.Ctx),
		upTrail: c.Audit.Trail(c.Subject), downTrail: c.Audit.Trail(c.Subject)}
	s.life, s.die = context.WithCancel(ctx)
	s.memory = shared.open(c.owner(), s.evicted, s.life.Done())
	_ = s.holder.missing(&s.conn.Subject.Identity) // it is taken up at once, as the present identity is
	s.allowed.fetch = func(name []byte, id authz.TopicID) bool { return s.mayRead(kmsg.Fetch, name, id) }
	s.allowed.shareFetch = func(name []byte, id authz.TopicID) bool { return s.mayRead(kmsg.ShareFetch, name, id) }
	s.allowed.shareGroup = s.mayShare
	s.fetch.init()
	return s
}

// onRecord writes the lines of what is about to happen; an error keeps it from happening.
func onRecord(t *audit.Trail) func() error {
	return func() error {
		if err := t.Flush(); err != nil {
			return &Error{audit.AuditFailed, err}
		}
		return nil
	}
}

// guard turns a panic of a loop into an error: a defect ends its connection, not the node.
func guard(loop func() error) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = refuse(audit.Internal, "panic: %v", r)
		}
	}()
	return loop()
}

// endRequests acts on the end of the request loop. A drained client, one that only ended its own direction, and one
// whose request is refused still get the answers they are owed; anything else ends both directions at once.
func (s *session) endRequests(err error) {
	var refusal *Error
	switch {
	case s.brokerLeft.Load():
		s.linger()
	case errors.Is(err, wire.ErrStopped) && s.leave() == nil:
		s.linger()
		return
	case errors.As(err, &refusal):
		if refusal.Reason == audit.AuditFailed || refusal.Reason == audit.Internal {
			break
		}
		// A broker takes a request when it has answered those before (Processor.processCompletedReceives mutes the
		// channel), so they are answered when it closes for this one.
		if s.up.Flush() == nil && s.hurry() == nil {
			_ = closeWrite(s.conn.Broker) // where it can be told that no more comes
			_ = s.queue.WaitEmpty()
		}
	case errors.Is(err, io.EOF) && closeWrite(s.conn.Broker) == nil:
		_ = s.down.Hurry(drainTimeout)
		return
	}
	s.abort()
}

// hurry bounds the answers that are still owed: each to come from the broker, and each write to be taken by the client.
func (s *session) hurry() error {
	s.hurried.Store(true)
	return errors.Join(s.down.Hurry(drainTimeout), s.limitWrite())
}

func (s *session) limitWrite() error {
	if !s.hurried.Load() {
		return nil
	}
	return s.conn.Client.SetWriteDeadline(time.Now().Add(drainTimeout))
}

// beforeAnswers runs before answers go out.
func (s *session) beforeAnswers() error { return errors.Join(onRecord(s.downTrail)(), s.limitWrite()) }

// toClient writes our own answers.
type toClient struct{ *session }

func (c toClient) Write(b []byte) (int, error) {
	if err := c.limitWrite(); err != nil {
		return 0, err
	}
	return c.conn.Client.Write(b)
}

// endAnswers acts on the end of the answer loop. That the broker ended its direction between two answers the client
// hears in the same way, behind the answers: to close at once would be a reset where it is just sending.
func (s *session) endAnswers(err error) {
	switch {
	case s.left.Load(): // both sides were told
	case errors.Is(err, io.EOF) && s.endClient() == nil:
		s.brokerLeft.Store(true)
		s.die()
		s.up.Stop() // before the queue, or its waits end first and linger's deadline is overwritten
		s.queue.Close()
		_ = s.conn.Broker.SetWriteDeadline(time.Now()) // what waits for it waits in vain
	default:
		s.abort() // also wakes the request loop
	}
}

// endClient tells the client the end, which may have to wait for what is being written.
func (s *session) endClient() error {
	return errors.Join(s.conn.Client.SetWriteDeadline(time.Now().Add(drainTimeout)), closeWrite(s.conn.Client))
}

// end gives the connection up for a reason that neither loop sees; the first one counts.
func (s *session) end(err error) {
	s.fatal.CompareAndSwap(nil, &err)
	s.abort()
}

// settle keeps who the client is as it was at the end.
func (s *session) settle() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.over = true
	if s.expiry != nil {
		s.expiry.Stop()
	}
}

func (s *session) abort() {
	s.die()
	// The errors are of no use: both ends are given up.
	_ = s.conn.Client.Close()
	_ = s.conn.Broker.Close()
	s.queue.Close()
}

// finish writes what the loops left open, and tells how the connection ended.
func (s *session) finish(up, down error) error {
	for _, e := range s.queue.Open() {
		s.auditUnknown(&e.V)
	}
	s.upSpeaksOf(s.bound.Load())
	err := up
	var refusal *Error
	if fatal := s.fatal.Load(); fatal != nil {
		err = *fatal
	} else if !errors.As(up, &refusal) && (errors.As(down, &refusal) || isOrderly(up)) {
		err = down
	}
	switch {
	case errors.As(err, &refusal):
		s.Metrics.Refuse(refusal.Reason)
		s.upTrail.Line("refusal", audit.Deny).Str("reason", string(refusal.Reason)).Str("error", refusal.Error()).
			Str("hint", audit.Reasons[refusal.Reason]).Send()
	case isOrderly(err):
		err = nil
	}
	if lost := errors.Join(onRecord(s.upTrail)(), onRecord(s.downTrail)()); lost != nil && err == nil {
		s.Metrics.Refuse(audit.AuditFailed)
		err = lost
	}
	if err == nil && s.left.Load() {
		err = ErrDrained
	}
	return err
}

func isOrderly(err error) bool {
	var op *net.OpError // a reset or a time-out of either side
	var errno syscall.Errno
	return err == nil || errors.Is(err, io.EOF) || errors.Is(err, wire.ErrClosed) || errors.As(err, &op) ||
		errors.As(err, &errno) || errors.Is(err, net.ErrClosed) || errors.Is(err, wire.ErrStopped)
}

// upSpeaksOf makes the lines of the request loop be about who the client is by now.
func (s *session) upSpeaksOf(b *binding) {
	if b != s.upFor {
		s.upFor = b
		s.upTrail.Become(b.audit)
	}
}

// downSpeaksOf makes the lines of the answer loop be about who had asked.
func (s *session) downSpeaksOf(b *binding) {
	if b != s.downFor && b != nil {
		s.downFor = b
		s.downTrail.Become(b.audit)
	}
}

func (p *pending) reset(h wire.Header, clientID string, now time.Time) {
	h.ClientID = nil // in place, and about to be overwritten
	*p = pending{Header: h, clientID: clientID, started: now, produce: p.produce.reset()}
}

// fromPipe names the refusals among a pipe's errors; a frame that does not come whole is refused as cut.
func fromPipe(err error, cut audit.Reason) error {
	switch {
	case errors.Is(err, wire.ErrBudget):
		return &Error{audit.OutOfMemory, err}
	case errors.Is(err, wire.ErrStalled), errors.Is(err, io.ErrUnexpectedEOF):
		return &Error{cut, err}
	}
	return err
}
