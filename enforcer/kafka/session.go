package kafka

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/audit"
	"klamm/enforcer/kafka/authz"
	"klamm/enforcer/kafka/wire"
	"klamm/enforcer/policy"
)

const (
	maxInFlight    = 256              // answers owed to one client; more wait in its socket (Kafka clients: 5 to 1000)
	resolveTimeout = 5 * time.Second  // for looking topic ids up
	handledRequest = 2                // times its decoded size: itself, and the part or the answer a verdict makes of it
	copiedRequest  = 3                // times its bytes: the copy, its encoding to compare, what is sent instead
	drainTimeout   = 10 * time.Second // for the answers that are owed when one side has ended
)

// session is one connection. The request loop and the answer loop each own a pipe, a trail and their topic cache; they
// meet at the queue.
type session struct {
	*Shared
	conn  Conn
	queue *wire.Queue[pending]
	up    *wire.Pipe // client to broker
	down  *wire.Pipe // broker to client

	left  atomic.Bool // drained: both sides are told the end
	bound atomic.Pointer[binding]
	mu    sync.Mutex // guards making a binding

	// of the request loop
	upTrail  *audit.Trail
	upTopics topicCache
	ctx      *authz.Ctx // reused by requests that are decided in place
	fetchSes *authz.FetchSession
	allowed  func(name []byte, id authz.TopicID) bool
	clientID string
	sequence int32 // correlation ids toward the broker are ours
	sasl     sasl

	txnID      string // the transactional id decided last, under txnView
	txnView    *policy.View
	txnAllowed bool

	// of the answer loop
	downTrail  *audit.Trail
	downTopics topicCache
	fetch      fetchReader
}

// binding is the view of the current policy for the current principal.
type binding struct {
	policy  *policy.Policy
	subject policy.Subject
	view    *policy.View
}

// pending is a request that is owed an answer.
type pending struct {
	wire.Header
	clientID string
	sequence int32
	started  time.Time
	kind     kind
	ctx      *authz.Ctx // its checks, and what its edit needs; nil where decided in place
	edit     func(*authz.Ctx, kmsg.Response)
	fetch    *authz.FetchSession
	view     *policy.View // a fetch was decided under it
	produce  produced
}

// kind says how the broker's answer is handled.
type kind uint8

const (
	relay   kind = iota // its bytes go through
	edited              // decoded, changed, encoded
	fetched             // streamed, record batches hashed
	acked               // a produce: offsets and errors belong in the audit
	login               // SaslAuthenticate: success makes the principal count
	learned             // a Metadata whose bytes go through: its topic ids are taken up
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
func Serve(ctx context.Context, shared *Shared, c Conn) error {
	s := &session{Shared: shared, conn: c, ctx: new(authz.Ctx),
		upTrail: c.Audit.Trail(c.Subject), downTrail: c.Audit.Trail(c.Subject)}
	s.allowed = s.mayRead
	s.fetch.init()
	s.queue = wire.NewQueue[pending](c.Client, maxInFlight)
	s.up = wire.NewPipe(c.Client, c.Broker, shared.Requests, onRecord(s.upTrail), nil)
	s.down = wire.NewPipe(c.Broker, c.Client, shared.Answers, onRecord(s.downTrail), s.queue.Written)
	shared.Metrics.open.Inc()
	defer shared.Metrics.open.Dec()

	stop := context.AfterFunc(ctx, s.abort)
	defer stop()
	shared.sessions.add(s)
	defer shared.sessions.remove(s)
	var up error
	var wg sync.WaitGroup
	wg.Go(func() {
		up = guard(s.requests)
		s.endRequests(up)
	})
	down := guard(s.answers)
	if !s.left.Load() {
		s.abort() // also wakes the request loop
	}
	wg.Wait()
	s.abort()
	err := s.finish(up, down)
	s.up.Close()
	s.down.Close()
	return err
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

// endRequests acts on the end of the request loop. A drained client, and one that only ended its own direction, still
// gets the answers it is owed; anything else ends both directions at once.
func (s *session) endRequests(err error) {
	if errors.Is(err, wire.ErrStopped) && s.leave() == nil {
		s.linger()
		return
	}
	if errors.Is(err, io.EOF) && closeWrite(s.conn.Broker) == nil {
		_ = s.conn.Broker.SetReadDeadline(time.Now().Add(drainTimeout))
		return
	}
	s.abort()
}

func (s *session) abort() {
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
	err := up
	var refusal *Error
	if !errors.As(up, &refusal) && (errors.As(down, &refusal) || isOrderly(up)) {
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
	return err == nil || errors.Is(err, io.EOF) || errors.Is(err, wire.ErrClosed) || errors.As(err, &op) ||
		errors.Is(err, net.ErrClosed) || errors.Is(err, wire.ErrStopped)
}

// view is what the subject may do now, by the current policy and the principal the broker accepted.
func (s *session) view() *policy.View {
	current := s.Policy.Load()
	if b := s.bound.Load(); b != nil && b.policy == current {
		return b.view
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.bind(s.conn.Policy, current)
}

func (s *session) bind(subject policy.Subject, p *policy.Policy) *policy.View {
	b := &binding{p, subject, p.For(subject)}
	s.bound.Store(b)
	return b.view
}

func (p *pending) reset(h wire.Header, clientID string) {
	h.ClientID = nil // in place, and about to be overwritten
	*p = pending{Header: h, clientID: clientID, started: time.Now(), produce: p.produce.reset()}
}

// fromPipe names the refusals among a pipe's errors.
func fromPipe(err error) error {
	for cause, reason := range map[error]audit.Reason{wire.ErrBudget: audit.OutOfMemory, wire.ErrStalled: audit.BadFrame} {
		if errors.Is(err, cause) {
			return &Error{reason, err}
		}
	}
	return err
}
