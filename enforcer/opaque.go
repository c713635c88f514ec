package enforcer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"

	"klamm/enforcer/audit"
	"klamm/enforcer/hello"
	"klamm/enforcer/kafka"
	"klamm/enforcer/policy"
	"klamm/spiffe"
)

const (
	// halfTimeout is how long one direction may be silent once the other has ended.
	halfTimeout = 10 * time.Second
	// quietFor is how long nothing must have passed for a drained connection to be closed: whoever is owed something
	// has it by then, or waits for what a broker has not yet.
	quietFor = 200 * time.Millisecond
)

// Opaque is a connection of a client that speaks TLS to the broker. Only its ClientHello is read: what is said inside
// is not decided on, and not on record.
type Opaque struct {
	Client
	Downstream, Upstream *net.TCPConn
	Workload             kafka.Workload // whose identity is Client.Identity now
	Hello                hello.Hello
	Read                 []byte      // all that was read of the client, the ClientHello first
	Names                hello.Names // of the broker
}

// The directions of a relay.
const (
	toBroker = iota
	toClient
	directions
)

// opaqueMetrics are the numbers of opaque connections.
type opaqueMetrics struct {
	open  prometheus.Gauge
	bytes [directions]prometheus.Counter
}

func newOpaqueMetrics(reg prometheus.Registerer) opaqueMetrics {
	open := prometheus.NewGauge(prometheus.GaugeOpts{Name: "klamm_opaque_connections",
		Help: "Open connections whose TLS passes unread."})
	relayed := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "klamm_opaque_bytes_total",
		Help: "Bytes of TLS that passed unread, by whom they were for."}, []string{"to"})
	reg.MustRegister(open, relayed)
	return opaqueMetrics{open, [directions]prometheus.Counter{relayed.WithLabelValues("broker"),
		relayed.WithLabelValues("client")}}
}

// refusal is why an opaque connection is refused, or ended.
type refusal struct {
	reason audit.Reason
	alert  hello.Alert
	err    error
}

func (r *refusal) Error() string { return r.err.Error() }
func (r *refusal) Unwrap() error { return r.err }

// errDrained is the end of a relay by Drain, errCut that by its context.
var (
	errDrained = errors.New("the connection was drained")
	errCut     = errors.New("the node ends")
)

// relay is an opaque connection.
type relay struct {
	Opaque
	enforcer *Enforcer
	trail    *audit.Trail
	host     policy.Subject // cluster and host
	started  time.Time

	moved [directions]atomic.Int64 // bytes
	last  atomic.Int64             // when bytes passed, in ns since started
	runs  atomic.Bool              // what the client said goes to the broker
	half  atomic.Bool              // one direction has ended

	mu    sync.Mutex
	cause error // why it was ended by us; nil: it was not
}

// Passthrough lets a connection pass unread as long as the policy allows that, and closes both its sides. Identity and
// policy are looked at again whenever they change.
func (e *Enforcer) Passthrough(ctx context.Context, o Opaque) error {
	r := &relay{Opaque: o, enforcer: e, trail: e.audit.Trail(o.subject()), started: time.Now(),
		host: policy.Subject{Cluster: o.Cluster}}
	defer r.close()
	if host, ok := o.Upstream.LocalAddr().(*net.TCPAddr); ok {
		r.host.Host = host.AddrPort().Addr().Unmap()
	}
	forget := o.Workload.Watch(r.look)
	defer forget()
	stop := context.AfterFunc(ctx, func() { r.end(errCut) })
	defer stop()
	decision, refused := r.judge()
	if refused == nil {
		if err := o.Hello.Agree(o.Names); err != nil {
			refused = &refusal{audit.TLSName, hello.UnrecognizedName, err}
		}
	}
	if refused != nil {
		return r.refuse(refused)
	}
	verdict := audit.Allow
	if decision.WouldDeny {
		verdict = audit.WouldDeny
	}
	r.line("connection", verdict).Str("state", "open").Str("rule", decision.Rule).Send()
	if err := r.trail.Flush(); err != nil {
		e.kafka.Metrics.Refuse(audit.AuditFailed)
		return err
	}
	return r.run(verdict)
}

// line begins a line. Each says that what passes is not looked at.
func (r *relay) line(event string, v audit.Verdict) *zerolog.Event {
	return r.trail.Line(event, v).Bool("opaque", true).Str("sni", r.Hello.ServerName)
}

// judge tells whether the connection may pass, by the identity and the policy of now.
func (r *relay) judge() (policy.Decision, *refusal) {
	is, was := r.Workload.Identity(), &r.Identity
	switch {
	case is.Lost != nil:
		return policy.Decision{}, &refusal{audit.IdentityLost, hello.AccessDenied, is.Lost}
	case is.ID != was.ID:
		return policy.Decision{}, &refusal{audit.IdentityChanged, hello.AccessDenied,
			fmt.Errorf("the workload was %q and is %q", was.ID, is.ID)}
	}
	d := r.enforcer.policy.Load().Passthrough(r.subject(is))
	if !d.Allowed {
		return d, &refusal{audit.Denied, hello.AccessDenied, errors.New("the policy does not let TLS of this workload pass " +
			"unread: no entry under connections has passthrough: true for it")}
	}
	return d, nil
}

func (r *relay) subject(is *spiffe.Identity) policy.Subject {
	s := r.host
	if !is.ID.IsZero() {
		s.SPIFFE = is.ID.String()
	}
	s.Facts = &policy.Facts{Identity: is}
	return s
}

// look ends the connection where it may not pass any more. One that does not pass yet is judged before it does.
func (r *relay) look() {
	if !r.runs.Load() {
		return
	}
	if _, refused := r.judge(); refused != nil {
		r.end(refused)
	}
}

// refuse tells the client in its own protocol, before anything is sent to the broker.
func (r *relay) refuse(why *refusal) error {
	r.enforcer.kafka.Metrics.Refuse(why.reason)
	r.refusalLine(why).Send()
	err := r.trail.Flush()
	_, werr := r.Downstream.Write(why.alert.Bytes())
	return errors.Join(why, err, werr)
}

func (r *relay) refusalLine(why *refusal) *zerolog.Event {
	return r.line("refusal", audit.Deny).Str("reason", string(why.reason)).Str("error", why.Error()).
		Str("hint", audit.Reasons[why.reason])
}

// run relays until both directions have ended.
func (r *relay) run(verdict audit.Verdict) error {
	metrics := &r.enforcer.opaque
	metrics.open.Inc()
	defer metrics.open.Dec()
	r.enforcer.relays.add(r)
	defer r.enforcer.relays.remove(r)
	r.runs.Store(true)
	r.look() // for what has changed since it was judged
	var up error
	var wg sync.WaitGroup
	wg.Go(func() { up = r.pump(toBroker) })
	down := r.pump(toClient)
	wg.Wait()
	return r.finish(verdict, up, down)
}

// finish puts the end on record.
func (r *relay) finish(verdict audit.Verdict, up, down error) error {
	r.mu.Lock()
	cause := r.cause
	r.mu.Unlock()
	var refused *refusal
	if errors.As(cause, &refused) {
		r.enforcer.kafka.Metrics.Refuse(refused.reason)
		r.refusalLine(refused).Send()
	}
	line := r.line("connection", verdict).Str("state", "closed").Dur("duration_ms", time.Since(r.started)).
		Int64("bytes_to_broker", r.moved[toBroker].Load()).Int64("bytes_to_client", r.moved[toClient].Load())
	err := cause
	if cause == nil {
		err = errors.Join(ended("client", up), ended("broker", down))
	}
	switch {
	case errors.Is(err, errDrained):
		line, err = line.Bool("drained", true), nil
	case err != nil:
		line = line.Str("error", err.Error())
	}
	line.Send()
	return errors.Join(err, r.trail.Flush())
}

// ended leaves what is worth a word of how the direction from a side has ended.
func ended(side string, err error) error {
	if err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		return nil
	}
	return fmt.Errorf("from the %s: %w", side, err)
}

// ends are source and destination of a direction.
func (r *relay) ends(to int) (src, dst *net.TCPConn) {
	if to == toBroker {
		return r.Downstream, r.Upstream
	}
	return r.Upstream, r.Downstream
}

// pump carries one direction to its end. An end in order is passed on; anything else ends both directions, with a
// reset, as the one side would see it of the other.
func (r *relay) pump(to int) error {
	src, dst := r.ends(to)
	err := r.carry(to, src, dst)
	if errors.Is(err, io.EOF) {
		err = dst.CloseWrite()
		r.half.Store(true)
		if err == nil {
			return dst.SetReadDeadline(time.Now().Add(halfTimeout))
		}
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		_ = errors.Join(src.SetLinger(0), dst.SetLinger(0)) // they may be closed
	}
	r.close()
	return err
}

// carry moves the bytes that are there by splice(2), and waits without holding anything: a splice that waits itself
// would hold a pipe.
func (r *relay) carry(to int, src, dst *net.TCPConn) error {
	if to == toBroker {
		n, err := dst.Write(r.Read)
		r.passed(to, int64(n))
		if err != nil {
			return err
		}
		r.Read = nil
	}
	raw, err := src.SyscallConn()
	if err != nil {
		return err
	}
	part := &io.LimitedReader{R: src}
	for {
		if part.N, err = available(raw); err != nil {
			return err
		}
		n, err := dst.ReadFrom(part)
		r.passed(to, n)
		if err != nil {
			return err
		}
		if r.half.Load() {
			if err := src.SetReadDeadline(time.Now().Add(halfTimeout)); err != nil {
				return err
			}
		}
	}
}

func (r *relay) passed(to int, n int64) {
	r.moved[to].Add(n)
	r.enforcer.opaque.bytes[to].Add(float64(n))
	r.last.Store(int64(time.Since(r.started)))
}

// available waits until there are bytes, and tells how many. io.EOF is the end.
func available(raw syscall.RawConn) (n int64, err error) {
	werr := raw.Read(func(fd uintptr) bool {
		var there int
		if there, err = unix.IoctlGetInt(int(fd), unix.SIOCINQ); err != nil || there > 0 {
			n = int64(there)
			return true
		}
		var one [1]byte // an end and an error are told by a read alone
		k, _, perr := unix.Recvfrom(int(fd), one[:], unix.MSG_PEEK)
		switch {
		case errors.Is(perr, unix.EAGAIN), errors.Is(perr, unix.EINTR):
			return false
		case perr != nil:
			err = os.NewSyscallError("recvfrom", perr)
		case k == 0:
			err = io.EOF
		default:
			n = int64(k)
		}
		return true
	})
	return n, errors.Join(werr, err)
}

// end closes the connection for a reason of ours; the first counts.
func (r *relay) end(cause error) {
	r.mu.Lock()
	if r.cause == nil {
		r.cause = cause
	}
	r.mu.Unlock()
	r.close()
}

func (r *relay) close() {
	_ = r.Downstream.Close()
	_ = r.Upstream.Close()
}

// drain ends the connection once nothing has passed for a while: where a frame ends inside TLS cannot be told.
func (r *relay) drain() {
	r.mu.Lock()
	defer r.mu.Unlock()
	left := time.Duration(r.last.Load()) + quietFor - time.Since(r.started)
	if left > 0 {
		time.AfterFunc(left, r.drain)
		return
	}
	if r.cause == nil {
		r.cause = errDrained
	}
	r.close()
}
