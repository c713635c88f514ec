package kafka

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/twmb/franz-go/pkg/kerr"
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
	start time.Time

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

// Serve enforces policy on one connection until either side ends it, and closes both. A nil error is an orderly end.
func Serve(ctx context.Context, shared *Shared, c Conn) error {
	s := &session{Shared: shared, conn: c, start: time.Now(), ctx: new(authz.Ctx),
		upTrail: c.Audit.Trail(c.Subject), downTrail: c.Audit.Trail(c.Subject)}
	s.allowed = s.mayRead
	s.fetch.init()
	s.queue = wire.NewQueue[pending](c.Client, maxInFlight)
	s.up = wire.NewPipe(c.Client, c.Broker, shared.Requests, s.upTrail.Flush, nil)
	s.down = wire.NewPipe(c.Broker, c.Client, shared.Answers, s.downTrail.Flush, s.queue.Written)
	shared.Metrics.open.Inc()
	defer shared.Metrics.open.Dec()

	stop := context.AfterFunc(ctx, s.abort)
	defer stop()
	var up error
	var wg sync.WaitGroup
	wg.Go(func() {
		up = guard(s.requests)
		s.endRequests(up)
	})
	down := guard(s.answers)
	s.abort()
	wg.Wait()
	err := s.finish(up, down)
	s.up.Close()
	s.down.Close()
	return err
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

// endRequests acts on the end of the request loop. A client that only ended its own direction still gets the answers
// it is owed; anything else ends both directions at once.
func (s *session) endRequests(err error) {
	half, ok := s.conn.Broker.(interface{ CloseWrite() error })
	if errors.Is(err, io.EOF) && ok && half.CloseWrite() == nil {
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
	if !errors.As(err, &refusal) && (errors.As(down, &refusal) || err == nil || errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed)) {
		err = down
	}
	if errors.As(err, &refusal) {
		s.Metrics.Refuse(refusal.Reason)
		s.upTrail.Line("refusal", audit.Deny).Str("reason", string(refusal.Reason)).Str("error", refusal.Error()).
			Str("hint", audit.Reasons[refusal.Reason]).Send()
	} else if isOrderly(err) {
		err = nil
	}
	if ferr := errors.Join(s.upTrail.Flush(), s.downTrail.Flush()); ferr != nil {
		return &Error{audit.AuditFailed, ferr}
	}
	return err
}

func isOrderly(err error) bool {
	var op *net.OpError // a reset or a time-out of either side
	return err == nil || errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) || errors.Is(err, wire.ErrClosed) || errors.As(err, &op)
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

// requests is the loop from client to broker.
func (s *session) requests() error {
	for {
		b, err := s.up.Need(wire.SizePrefix)
		if err != nil {
			return fromPipe(err)
		}
		size := int(int32(binary.BigEndian.Uint32(b)))
		if size < wire.MinRequest || size > s.MaxFrame {
			return s.notKafka(b, size)
		}
		frame, err := s.up.Need(wire.SizePrefix + size)
		if err != nil {
			return fromPipe(err)
		}
		h, err := wire.ParseHeader(frame[wire.SizePrefix:])
		if err != nil {
			return &Error{audit.BadFrame, err}
		}
		if err := s.request(frame, h); err != nil {
			return errors.Join(err, s.up.Flush()) // what was judged before still goes
		}
	}
}

// notKafka refuses what does not begin like a request. A TLS client hears an alert it can show.
func (s *session) notKafka(b []byte, size int) error {
	const handshake, alert, fatal, accessDenied = 0x16, 0x15, 2, 49 // RFC 8446, 5.1 and 6
	if b[0] == handshake && b[1] == 3 {
		_, err := s.conn.Client.Write([]byte{alert, 3, 3, 0, 2, fatal, accessDenied})
		return errors.Join(refuse(audit.TLSRefused, "the client speaks TLS"), err)
	}
	return refuse(audit.BadFrame, "a frame of %d bytes; the limit is %d", size, s.MaxFrame)
}

// request decides one frame and sends on what may pass.
func (s *session) request(frame []byte, h wire.Header) error {
	if string(h.ClientID) != s.clientID {
		s.clientID = string(h.ClientID)
	}
	if h.Key > kmsg.MaxKey || apiNames[h.Key] == "" {
		return refuse(audit.UnknownAPI, "API key %d", h.Key)
	}
	e := s.queue.New()
	e.V.reset(h, s.clientID)
	api := &authz.Table[h.Key]
	if api.Decide == nil || h.Version < api.Min || h.Version > api.Max {
		return s.unsupported(e, frame)
	}
	view := s.view()
	switch kmsg.Key(h.Key) {
	case kmsg.Produce:
		if s.produceInPlace(e, frame, view) {
			return s.forward(e, frame)
		}
	case kmsg.Fetch:
		s.ctx.View, s.ctx.Fetch = view, s.fetchSes
		if authz.FetchInPlace(s.ctx, h.Version, frame[wire.SizePrefix+h.Len:], s.allowed) {
			s.fetchSes = s.ctx.Fetch
			e.V.kind, e.V.fetch, e.V.view = fetched, s.fetchSes, view
			return s.forward(e, frame)
		}
	}
	return s.decide(e, frame, view)
}

// decide is the way of every request that is not decided in place: decode, ask the handler, act on its verdict.
func (s *session) decide(e *wire.Entry[pending], frame []byte, view *policy.View) error {
	h := e.V.Header
	weight, err := wire.CheckRequest(h.Key, h.Version, frame[wire.SizePrefix+h.Len:])
	if err != nil {
		return &Error{audit.Undecodable, err}
	}
	if weight = weight*handledRequest + int64(len(frame))*copiedRequest; weight > wire.BaseBuffer {
		if err := s.Decoded.Acquire(weight); err != nil {
			return &Error{audit.OutOfMemory, err}
		}
		defer s.Decoded.Release(weight)
	}
	// A copy, because a verdict may keep parts of the request until the answer comes.
	body := append([]byte(nil), frame[wire.SizePrefix+h.Len:]...)
	req := kmsg.RequestForKey(h.Key)
	req.SetVersion(h.Version)
	if err := req.ReadFrom(body); err != nil {
		return refuse(audit.Undecodable, "%s v%d of %d bytes: %w", apiName(h.Key), h.Version, len(body), err)
	}
	ctx := &authz.Ctx{View: view, Topics: s.conn.Cluster, Fetch: s.fetchSes, AutoCreate: s.conn.AutoCreate}
	v := authz.Table[h.Key].Decide(ctx, req)
	if len(ctx.Missing) > 0 {
		if err := s.up.Flush(); err != nil {
			return err
		}
		s.resolve(ctx)
		ctx.Checks = nil
		v = authz.Table[h.Key].Decide(ctx, req)
	}
	if h.Key == int16(kmsg.Fetch) {
		s.fetchSes = ctx.Fetch
	}
	e.V.ctx, e.V.edit = ctx, v.Edit

	switch {
	case v.Close != "":
		s.auditChecks(s.upTrail, &e.V, audit.Allow)
		return refuse(audit.Denied, "%s", v.Close)
	case v.Answer != nil:
		return s.answer(e, frame, v.Answer, audit.Allow)
	}
	if v.Edit != nil {
		e.V.kind = edited
	}
	out := frame
	if v.Forward != nil {
		out = wire.AppendRequest(nil, frame[wire.SizePrefix:wire.SizePrefix+h.Len], 0, v.Forward)
	} else if canonical := req.AppendTo(nil); string(canonical) != string(frame[wire.SizePrefix+h.Len:]) {
		// Bytes that say more than what was decoded, or say it twice, are not forwarded: the broker gets what was judged.
		out = wire.AppendRequest(nil, frame[wire.SizePrefix:wire.SizePrefix+h.Len], 0, req)
	}
	switch kmsg.Key(h.Key) {
	case kmsg.Produce:
		if !s.produceEvidence(e, out, view) {
			return refuse(audit.Undecodable, "Produce v%d with record batches that are not of magic 2", h.Version)
		}
	case kmsg.Fetch:
		e.V.fetch, e.V.view = ctx.Fetch, view
		if v.Edit == nil {
			e.V.kind = fetched
		}
	case kmsg.Metadata:
		if v.Edit == nil {
			e.V.kind = learned
		}
	case kmsg.SASLHandshake:
		s.sasl.handshake(req.(*kmsg.SASLHandshakeRequest))
	case kmsg.SASLAuthenticate:
		e.V.kind = login
		s.sasl.authenticate(req.(*kmsg.SASLAuthenticateRequest).SASLAuthBytes)
		defer clear(body)
	}
	if err := s.send(e, frame, out); err != nil {
		return err
	}
	if v.Barrier {
		if err := s.up.Flush(); err != nil {
			return err
		}
		if h.Key == int16(kmsg.SASLAuthenticate) {
			clear(frame) // a password may stand in it
		}
		if err := s.queue.WaitEmpty(); err != nil {
			return err
		}
		s.upTrail.Become(s.conn.Subject)
	}
	return nil
}

// resolve looks up the ids a handler missed. A cluster that does not answer leaves them unknown, and so refused.
func (s *session) resolve(c *authz.Ctx) {
	ctx, cancel := context.WithTimeout(context.Background(), resolveTimeout)
	defer cancel()
	_ = s.conn.Cluster.Resolve(ctx, c.Missing)
	c.Missing, c.Resolved = nil, true
}

// unsupported answers a key or version that is hidden from ApiVersions.
func (s *session) unsupported(e *wire.Entry[pending], frame []byte) error {
	resp := authz.Unsupported(e.V.Key, e.V.Version)
	if resp == nil {
		return refuse(audit.UnknownAPI, "%s v%d", apiName(e.V.Key), e.V.Version)
	}
	s.Metrics.Refuse(audit.UnsupportedVersion)
	e.V.ctx = &authz.Ctx{}
	return s.answer(e, frame, resp, audit.Deny)
}

// answer gives our own answer in its turn; the verdict is at least the one given, and what the checks say.
func (s *session) answer(e *wire.Entry[pending], frame []byte, resp kmsg.Response, verdict audit.Verdict) error {
	s.auditChecks(s.upTrail, &e.V, verdict)
	if err := s.upTrail.Flush(); err != nil {
		return &Error{audit.AuditFailed, err}
	}
	e.Ours = wire.AppendResponse(nil, e.V.Correlation, resp)
	s.up.Drop(len(frame))
	return s.push(e)
}

func (s *session) push(e *wire.Entry[pending]) error {
	if s.queue.Full() {
		if err := s.up.Flush(); err != nil {
			return err
		}
	}
	return s.queue.Push(e)
}

// forward sends a frame on as it came.
func (s *session) forward(e *wire.Entry[pending], frame []byte) error { return s.send(e, frame, frame) }

// send forwards out, which is the frame itself or stands in for it.
func (s *session) send(e *wire.Entry[pending], frame, out []byte) error {
	e.V.sequence = s.sequence
	s.sequence++
	binary.BigEndian.PutUint32(out[wire.CorrelationAt:], uint32(e.V.sequence))
	if e.V.kind == acked && e.V.produce.acks == 0 {
		s.auditProduce(s.upTrail, &e.V, nil)
		s.queue.Free(e)
	} else if err := s.push(e); err != nil {
		return err
	}
	if &out[0] == &frame[0] {
		s.up.Pass(len(frame))
		return nil
	}
	s.up.Drop(len(frame))
	s.up.Emit(out)
	return nil
}

// answers is the loop from broker to client.
func (s *session) answers() error {
	for {
		b, err := s.down.Need(wire.SizePrefix + 4)
		if err != nil {
			return fromPipe(err)
		}
		size, sequence := int(int32(binary.BigEndian.Uint32(b))), int32(binary.BigEndian.Uint32(b[wire.SizePrefix:]))
		e := s.queue.Next()
		for e != nil && e.Ours != nil {
			s.down.Emit(e.Ours)
			s.queue.Done()
			e = s.queue.Next()
		}
		if e == nil || sequence != e.V.sequence || size < 4 {
			return refuse(audit.BadAnswer, "the broker sent %d bytes for request %d, which is not what comes next", size, sequence)
		}
		binary.BigEndian.PutUint32(b[wire.SizePrefix:], uint32(e.V.Correlation))
		if err := s.broker(&e.V, wire.SizePrefix+size); err != nil {
			return err
		}
		s.queue.Done()
	}
}

// broker handles one answer of n bytes.
func (s *session) broker(p *pending, n int) error {
	k := p.kind
	if k == fetched && p.view != s.view() {
		k, p.edit = edited, func(c *authz.Ctx, r kmsg.Response) { authz.FilterFetch(c, r.(*kmsg.FetchResponse)) }
		p.view = s.view()
		p.ctx = &authz.Ctx{View: p.view, Topics: s.conn.Cluster}
	}
	switch k {
	case fetched:
		return s.streamFetch(p, n)
	case relay:
		if err := s.stream(n); err != nil {
			return err
		}
		s.auditChecks(s.downTrail, p, audit.Allow)
		return nil
	}
	frame, err := s.down.Need(n)
	if err != nil {
		return fromPipe(err)
	}
	if p.edit != nil {
		if frame, err = s.edit(p, frame); err != nil {
			return err
		}
		s.down.Drop(n)
		s.down.Emit(frame)
	}
	body := frame[min(len(frame), wire.ResponseHeaderLen(p.Key, p.Version)):]
	switch p.kind {
	case acked:
		s.auditProduce(s.downTrail, p, body)
	case login:
		s.loggedIn(body)
		s.auditChecks(s.downTrail, p, audit.Allow)
	case learned:
		_, weight, err := s.decode(p, frame)
		s.Decoded.Release(weight)
		if err != nil {
			return err
		}
		s.auditChecks(s.downTrail, p, audit.Allow)
	default:
		if p.Key == int16(kmsg.Fetch) {
			if err := s.auditFetch(p, body); err != nil {
				return err
			}
		}
		s.auditChecks(s.downTrail, p, audit.Allow)
	}
	if p.edit == nil {
		s.down.Pass(n)
	}
	return nil
}

// edit decodes an answer, lets the verdict change it, and encodes it anew.
func (s *session) edit(p *pending, frame []byte) ([]byte, error) {
	resp, weight, err := s.decode(p, frame)
	defer s.Decoded.Release(weight)
	if err != nil {
		return nil, err
	}
	checks := len(p.ctx.Checks)
	p.ctx.Missing, p.ctx.Resolved = nil, false
	p.edit(p.ctx, resp)
	if len(p.ctx.Missing) > 0 {
		s.resolve(p.ctx)
		p.ctx.Checks = p.ctx.Checks[:checks]
		again, weight, err := s.decode(p, frame)
		defer s.Decoded.Release(weight)
		if err != nil {
			return nil, err
		}
		p.edit(p.ctx, again)
		resp = again
	}
	return wire.AppendResponse(nil, p.Correlation, resp), nil
}

// decode reads a whole answer; what it says of topic ids is taken up. The weight is what it holds of the budget, also
// when it fails.
func (s *session) decode(p *pending, frame []byte) (resp kmsg.Response, weight int64, err error) {
	c := wire.Cursor{B: frame, Off: wire.SizePrefix + 4, Flex: wire.ResponseHeaderLen(p.Key, p.Version) > wire.SizePrefix+4}
	c.SkipTags()
	if c.Bad {
		return nil, 0, refuse(audit.BadAnswer, "%s v%d: no response header", apiName(p.Key), p.Version)
	}
	body := frame[c.Off:]
	req := kmsg.RequestForKey(p.Key)
	req.SetVersion(p.Version)
	if refusesVersion(p.Key, body) {
		req.SetVersion(0)
	}
	if weight, err = wire.CheckResponse(p.Key, req.GetVersion(), body); err != nil {
		return nil, 0, &Error{audit.BadAnswer, err}
	}
	if weight += int64(len(frame)); weight <= wire.BaseBuffer {
		weight = 0
	} else if err = s.Decoded.Acquire(weight); err != nil {
		return nil, 0, &Error{audit.OutOfMemory, err}
	}
	resp = req.ResponseKind()
	if err = resp.ReadFrom(body); err != nil {
		return nil, weight, refuse(audit.BadAnswer, "%s v%d of %d bytes: %w", apiName(p.Key), p.Version, len(frame), err)
	}
	if m, ok := resp.(*kmsg.MetadataResponse); ok {
		s.conn.Cluster.Learn(m)
	}
	return resp, weight, nil
}

// refusesVersion: a broker that does not know the ApiVersions version it is asked in answers in version 0 (KIP-511).
func refusesVersion(key int16, body []byte) bool {
	return key == int16(kmsg.ApiVersions) && len(body) >= 2 &&
		int16(binary.BigEndian.Uint16(body)) == kerr.UnsupportedVersion.Code
}

// stream passes n bytes as they come.
func (s *session) stream(n int) error {
	for n > 0 {
		if _, err := s.down.Need(1); err != nil {
			return fromPipe(err)
		}
		k := min(n, s.down.Buffered())
		s.down.Pass(k)
		n -= k
	}
	return nil
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
