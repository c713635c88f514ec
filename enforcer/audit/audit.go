// Package audit writes one zerolog JSON line per operation: who, when, what, the verdict, and the hash of the payload.
package audit

import (
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"klamm/spiffe"
)

func init() { zerolog.TimeFieldFormat = time.RFC3339Nano }

// Log is where the lines of all connections end up.
type Log struct {
	mu   sync.Mutex
	w    io.Writer
	node string
}

// New writes lines to w; node names this host in every line.
func New(w io.Writer, node string) *Log {
	return &Log{w: w, node: node}
}

// Open appends to the file at path, which only its owner may read; "" and "-" are standard output.
func Open(path, node string) (*Log, io.Closer, error) {
	if path == "" || path == "-" {
		return New(os.Stdout, node), io.NopCloser(nil), nil
	}
	f, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, nil, fmt.Errorf("opening the audit file: %w", err)
	}
	return New(f, node), f, nil
}

// Subject is whom a trail's lines are about.
type Subject struct {
	Connection  string // unique on this node
	Cluster     string // name of the configured cluster; empty where the destination is in none
	Destination string // host:port the client connected to
	Identity    spiffe.Identity
	Principal   string // SASL principal the broker accepted; empty before
	Login       Login
}

// Login is what is known of the SASL login that the broker accepted, beside its principal. The zero value is none.
type Login struct {
	Mechanism       string
	Token           *spiffe.Evidence // of OAUTHBEARER, where we verified its token
	DelegationToken string           // id of the token (KIP-48) of a SCRAM login as its owner
	AccessKeyID     string           // of AWS_MSK_IAM
	Region          string           // of AWS_MSK_IAM
}

// Trail collects the lines of one direction of a connection and writes them with one write per Flush. It belongs to one
// goroutine.
type Trail struct {
	log *Log
	zl  zerolog.Logger
	buf *[]byte // nil while there are no lines: an idle connection keeps nothing
	err error
}

// buffers hold the lines of a burst.
var buffers = sync.Pool{New: func() any { return new([]byte) }}

// maxPending is how many bytes of lines a trail holds before it writes on its own.
const maxPending = 64 << 10

// Trail starts the lines about a subject.
func (l *Log) Trail(s Subject) *Trail {
	t := &Trail{log: l}
	t.Become(s)
	return t
}

// Become changes the subject for the lines that follow: its identity changed, or the broker accepted a SASL login.
func (t *Trail) Become(s Subject) {
	ctx := zerolog.New(t).With().Str("node", t.log.node).Str("conn", s.Connection)
	p := &s.Identity.Process
	for _, f := range []struct{ key, value string }{
		{"cluster", s.Cluster},
		{"destination", s.Destination},
		{"spiffe_id", s.Identity.ID.String()},
		{"identity_source", s.Identity.Source},
		{"identity_rule", s.Identity.Rule},
		{"principal", s.Principal},
		{"sasl_mechanism", s.Login.Mechanism},
		{"delegation_token", s.Login.DelegationToken},
		{"aws_access_key_id", s.Login.AccessKeyID},
		{"aws_region", s.Login.Region},
		{"exe", p.Exe},
		{"exe_sha256", p.ExeSHA256},
		{"comm", p.Comm},
		{"cgroup", p.Cgroup},
		{"unit", p.Unit},
		{"container_id", p.ContainerID},
		{"pod_uid", p.PodUID},
		{"pod_namespace", p.Namespace},
		{"pod", p.Pod},
		{"container", p.Container},
	} {
		if f.value != "" {
			ctx = ctx.Str(f.key, f.value)
		}
	}
	if p.PID != 0 {
		ctx = ctx.Uint32("pid", p.PID).Uint32("uid", p.UID).Uint32("gid", p.GID)
	}
	if len(s.Identity.Claims) > 0 {
		ctx = ctx.Interface("claims", s.Identity.Claims)
	}
	if all := s.evidence(); len(all) > 0 {
		ctx = ctx.Array("evidence", all)
	}
	if s.Identity.Lost != nil {
		ctx = ctx.Str("identity_lost", s.Identity.Lost.Error())
	}
	t.zl = ctx.Logger()
}

// Line starts a line: what happened ("operation", "connection", "refusal") and how it was decided.
func (t *Trail) Line(event string, v Verdict) *zerolog.Event {
	e := t.zl.Info()
	if v == Deny || v == WouldDeny {
		e = t.zl.Warn()
	}
	return e.Timestamp().Str("event", event).Str("verdict", string(v))
}

// Write takes a line from zerolog. It does not fail: Flush tells of what could not be written.
func (t *Trail) Write(line []byte) (int, error) {
	if t.buf == nil {
		t.buf = buffers.Get().(*[]byte)
	}
	*t.buf = append(*t.buf, line...)
	if len(*t.buf) >= maxPending {
		t.flush()
	}
	return len(line), nil
}

// Flush writes the collected lines. An error means that they may not be on record, and what they tell of must not
// happen.
func (t *Trail) Flush() error {
	if t.buf != nil {
		t.flush()
	}
	err := t.err
	t.err = nil
	return err
}

func (t *Trail) flush() {
	t.log.mu.Lock()
	_, err := t.log.w.Write(*t.buf)
	t.log.mu.Unlock()
	if err != nil {
		t.err = fmt.Errorf("writing the audit: %w", err)
	}
	*t.buf = (*t.buf)[:0]
	buffers.Put(t.buf)
	t.buf = nil
}

// Verdict is how an operation was decided.
type Verdict string

// The verdicts.
const (
	Allow     Verdict = "allow"
	Deny      Verdict = "deny"
	WouldDeny Verdict = "would_deny" // passed, for the rule set that refuses it only observes
)

// Batch is the evidence of one record batch.
type Batch struct {
	BaseOffset, LastOffset int64 // of the broker; in a produce, known with its answer
	Count                  int32 // records, by the batch's header
	Bytes                  int   // of the whole batch
	ProducerID             int64 // -1 without an idempotent producer
	ProducerEpoch          int16
	BaseSequence           int32
	SHA256                 [32]byte // of the record bytes: all that follows the batch header, as forwarded
}

func (b *Batch) fields() *zerolog.Event {
	e := zerolog.Dict().Int64("base_offset", b.BaseOffset).Int64("last_offset", b.LastOffset).
		Int32("count", b.Count).Int("bytes", b.Bytes)
	if b.ProducerID >= 0 {
		e = e.Int64("producer_id", b.ProducerID).Int16("producer_epoch", b.ProducerEpoch).
			Int32("base_sequence", b.BaseSequence)
	}
	return e.Hex("sha256", b.SHA256[:])
}

// Batches is a list of batches in one line.
type Batches []Batch

// MarshalZerologArray writes the batches into a line. As Dict, for Object allocates.
func (b *Batches) MarshalZerologArray(a *zerolog.Array) {
	for i := range *b {
		a.Dict((*b)[i].fields())
	}
}

// AcquiredRange are records that a member of a share group has for itself until it acknowledges them (KIP-932).
type AcquiredRange struct {
	First, Last int64
	Deliveries  int16 // how often they have been delivered, this time included
}

// Acquired is a list of ranges in one line.
type Acquired []AcquiredRange

// MarshalZerologArray writes the ranges into a line.
func (l *Acquired) MarshalZerologArray(a *zerolog.Array) {
	for _, r := range *l {
		a.Dict(zerolog.Dict().Int64("first_offset", r.First).Int64("last_offset", r.Last).Int16("deliveries", r.Deliveries))
	}
}
