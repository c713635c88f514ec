// Package enforcer is the data path and all that decides on it. It is given connections whose client is known and whose
// broker is dialled; it knows neither how they were redirected nor how the client was identified.
package enforcer

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"klamm/enforcer/audit"
	"klamm/enforcer/kafka"
	"klamm/enforcer/kafka/wire"
	"klamm/enforcer/policy"
	"klamm/spiffe"
)

// Options configure an Enforcer. All fields without a remark are required.
type Options struct {
	Policy   *policy.Policy
	Audit    *audit.Log
	MaxFrame int   // largest request frame, in bytes
	Memory   int64 // bytes for frames that are held whole; at least MinMemory(MaxFrame)
	Metrics  prometheus.Registerer
	Tokens   kafka.Tokens // may be nil: no issuer is trusted
	// CloseOnLoss ends connections whose workload is no longer who it was; else only its rights end.
	CloseOnLoss bool
}

// Enforcer enforces one policy on all connections of a node.
type Enforcer struct {
	audit  *audit.Log
	policy atomic.Pointer[policy.Policy]
	kafka  kafka.Shared
	opaque opaqueMetrics
	relays relays
}

// New makes an Enforcer.
func New(o Options) *Enforcer {
	e := &Enforcer{audit: o.Audit, opaque: newOpaqueMetrics(o.Metrics)}
	e.policy.Store(o.Policy)
	e.kafka = kafka.Shared{
		Policy:   &e.policy,
		Requests: wire.NewBudget(held(o.Memory)),
		Answers:  wire.NewBudget(held(o.Memory)),
		Decoded:  wire.NewBudget(o.Memory / 4),
		Kept:     wire.NewBudget(o.Memory / 8),
		MaxFrame: o.MaxFrame,
		Tokens:   o.Tokens, CloseOnLoss: o.CloseOnLoss,
		Metrics: kafka.NewMetrics(o.Metrics),
	}
	return e
}

// held is the part of the memory for requests, and that for answers; a quarter is for what is decoded, an eighth for
// what is kept of requests. They are separate because what waits for one may hold another.
func held(memory int64) int64 { return memory / 16 * 5 }

// MinMemory is the least memory with which a request of maxFrame bytes fits, also one that is decided by its parts.
func MinMemory(maxFrame int64) int64 {
	frame := wire.SizePrefix + maxFrame
	return max((wire.HeldSize(int(frame))+4)/5*16, 4*(frame+wire.BaseBuffer))
}

// SetPolicy replaces the policy; every connection decides by it from its next frame on, and opaque ones that it does
// not allow any more are closed.
func (e *Enforcer) SetPolicy(p *policy.Policy) {
	e.policy.Store(p)
	e.relays.look()
}

// Client is the client side of a connection.
type Client struct {
	ID          string // unique on this node
	Identity    spiffe.Identity
	Destination netip.AddrPort // the broker the client connected to
	Cluster     string         // the configured cluster it belongs to; empty when there is none
}

func (c *Client) subject() audit.Subject {
	return audit.Subject{Connection: c.ID, Cluster: c.Cluster, Destination: c.Destination.String(), Identity: c.Identity}
}

// Conn is a connection to enforce policy on.
type Conn struct {
	Client
	Downstream, Upstream net.Conn
	Workload             kafka.Workload // whose identity is Client.Identity now
	Login                kafka.Login    // nil: the node does not log in for the workload
	AsWorkload           bool           // see kafka.Conn
	Kafka                kafka.Cluster
	AutoCreate           bool // the cluster's brokers create topics a Metadata request names (auto.create.topics.enable)
}

// Serve enforces policy on a connection until it ends, and closes both its sides. It is deep in the stack of every idle
// connection, so what it does before and behind is done elsewhere.
func (e *Enforcer) Serve(ctx context.Context, c *Conn) error {
	started := time.Now()
	if err := e.opened(c); err != nil {
		return err
	}
	return e.closed(c, started, kafka.Serve(ctx, &e.kafka, e.session(c)))
}

// opened puts on record that a connection begins, or closes it.
func (e *Enforcer) opened(c *Conn) error {
	trail := e.audit.Trail(c.subject())
	trail.Line("connection", audit.Allow).Str("state", "open").Send()
	err := trail.Flush()
	if err != nil {
		e.kafka.Metrics.Refuse(audit.AuditFailed)
		_ = c.Downstream.Close()
		_ = c.Upstream.Close()
	}
	return err
}

func (e *Enforcer) session(c *Conn) *kafka.Conn {
	subject := policy.Subject{Cluster: c.Cluster}
	if host, ok := c.Upstream.LocalAddr().(*net.TCPAddr); ok {
		subject.Host = host.AddrPort().Addr().Unmap() // what the broker sees, and would have seen without us
	}
	return &kafka.Conn{Client: c.Downstream, Broker: c.Upstream, Cluster: c.Kafka,
		Workload: c.Workload, Login: c.Login, AsWorkload: c.AsWorkload, AutoCreate: c.AutoCreate, Policy: subject,
		Audit: e.audit, Subject: c.subject()}
}

// closed puts on record that a connection has ended, and how.
func (e *Enforcer) closed(c *Conn, started time.Time, err error) error {
	c.Identity = *c.Workload.Identity()
	trail := e.audit.Trail(c.subject())
	line := trail.Line("connection", audit.Allow).Str("state", "closed").Dur("duration_ms", time.Since(started))
	if errors.Is(err, kafka.ErrDrained) {
		line, err = line.Bool("drained", true), nil
	}
	if err != nil {
		line = line.Str("error", err.Error())
	}
	line.Send()
	if ferr := trail.Flush(); err == nil {
		err = ferr
	}
	return err
}

// Drain ends all connections, those served later too: each takes no further request, answers what it owes, and closes
// both its sides in order. It begins with them one after the other, at random moments within spread, so that a group of
// consumers does not rebalance as one. It returns when all have ended; when ctx ends before, the rest is cut, and Drain
// tells how many these were. The last audit lines are written when Serve has returned.
func (e *Enforcer) Drain(ctx context.Context, spread time.Duration) (cut int) {
	var relays int
	var both sync.WaitGroup
	both.Go(func() { relays = e.relays.drain(ctx, spread) })
	cut = e.kafka.Drain(ctx, spread)
	both.Wait()
	return cut + relays
}

// Refuse puts on record that a connection is refused before a byte of it is read. The caller closes it.
func (e *Enforcer) Refuse(c Client, reason audit.Reason, cause error) error {
	e.kafka.Metrics.Refuse(reason)
	trail := e.audit.Trail(c.subject())
	trail.Line("refusal", audit.Deny).Str("reason", string(reason)).Str("error", cause.Error()).
		Str("hint", audit.Reasons[reason]).Send()
	return trail.Flush()
}

// Unenforced puts on record that a connection passed unseen, as the configuration allows: what says why.
func (e *Enforcer) Unenforced(c Client, what string) error {
	trail := e.audit.Trail(c.subject())
	trail.Line("unenforced", audit.Allow).Str("reason", what).Send()
	return trail.Flush()
}
