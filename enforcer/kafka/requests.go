package kafka

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"time"

	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/audit"
	"klamm/enforcer/kafka/authz"
	"klamm/enforcer/kafka/wire"
	"klamm/enforcer/policy"
)

// requests is the loop from client to broker.
func (s *session) requests() error {
	for !s.up.Stopped() {
		b, err := s.up.Need(wire.SizePrefix)
		if err != nil {
			return fromPipe(err, audit.BadFrame)
		}
		if isTLS(b) {
			return s.refuseTLS()
		}
		size := int(int32(binary.BigEndian.Uint32(b)))
		if size < wire.MinRequest || size > s.MaxFrame {
			return refuse(audit.BadFrame, "a frame of %d bytes; the limit is %d", size, s.MaxFrame)
		}
		if b, err = s.up.Need(wire.SizePrefix + 2); err != nil {
			return fromPipe(err, audit.BadFrame)
		}
		if err := s.oversized(size, b[wire.SizePrefix:]); err != nil {
			return err
		}
		if err := s.renew(); err != nil {
			return err
		}
		frame, err := s.up.Need(wire.SizePrefix + size)
		if err != nil {
			return fromPipe(err, audit.BadFrame)
		}
		h, err := wire.ParseHeader(frame[wire.SizePrefix:])
		if err != nil {
			return &Error{audit.BadFrame, err}
		}
		if err := s.request(frame, h); err != nil {
			return err
		}
	}
	if err := s.up.Flush(); err != nil {
		return err
	}
	return wire.ErrStopped
}

// Of TLS records and alerts: RFC 8446, sections 5.1 and 6.
const (
	tlsAlert        = 0x15
	tlsHandshake    = 0x16
	tlsFatal        = 2
	tlsAccessDenied = 49
)

// isTLS tells a TLS handshake record from the length of a frame, which would be of 369 MB.
func isTLS(b []byte) bool { return b[0] == tlsHandshake && b[1] == 3 }

// refuseTLS gives the client an alert it can show.
func (s *session) refuseTLS() error {
	_, err := s.conn.Client.Write([]byte{tlsAlert, 3, 3, 0, 2, tlsFatal, tlsAccessDenied})
	return errors.Join(refuse(audit.TLSRefused, "the client speaks TLS"), err)
}

// request decides one frame and sends on what may pass.
func (s *session) request(frame []byte, h wire.Header) error {
	if string(h.ClientID) != s.clientID {
		s.clientID = string(h.ClientID)
	}
	if h.Key > kmsg.MaxKey || apiNames[h.Key] == "" {
		return refuse(audit.UnknownAPI, "API key %d", h.Key)
	}
	if isLogin(h.Key) {
		if err := s.up.Flush(); err != nil { // what follows wipes the pipe
			return err
		}
		defer s.up.Wipe()
	}
	now := time.Now()
	s.endsOpaque(h.Key)
	b := s.who(now)
	s.upSpeaksOf(b)
	e := s.queue.New()
	e.V.reset(h, s.clientID, now)
	e.V.who = b
	legal, err := s.admit(b, h.Key, now)
	if err != nil {
		return err
	}
	api := &authz.Table[h.Key]
	if api.Decide == nil || h.Version < api.Min || h.Version > api.Max {
		return s.unsupported(e, frame)
	}
	if !legal {
		return s.illegal(e, frame)
	}
	view := b.view
	switch kmsg.Key(h.Key) {
	case kmsg.Produce:
		if s.produceInPlace(e, frame, view) {
			return s.forward(e, frame)
		}
	case kmsg.Fetch:
		s.ctx.View, s.ctx.Fetch = view, s.fetchSes
		if authz.FetchInPlace(s.ctx, h.Version, frame[wire.SizePrefix+h.Len:], s.allowed.fetch) {
			s.fetchSes = s.ctx.Fetch
			e.V.kind, e.V.fetch, e.V.view = fetched, s.fetchSes, view
			return s.forward(e, frame)
		}
	case kmsg.ShareFetch:
		s.ctx.View, s.ctx.Share = view, s.shareSes
		body := frame[wire.SizePrefix+h.Len:]
		if authz.ShareFetchInPlace(s.ctx, h.Version, body, s.allowed.shareGroup, s.allowed.shareFetch) {
			e.V.kind, e.V.view = fetched, view
			s.auditAcks(&e.V, body)
			return s.forward(e, frame)
		}
	}
	return s.decide(e, frame, view)
}

// decoded is a request while it is decided.
type decoded struct {
	req     kmsg.Request
	body    []byte
	keeps   int64 // bytes of memory, at most, that last where a verdict keeps parts of it
	account *wire.Account
	share   int64 // of the account
}

// shrink gives back what it takes of the budget, but for n bytes.
func (d *decoded) shrink(n int64) {
	if n < d.share {
		d.account.Release(d.share - n)
		d.share = n
	}
}

// decodeRequest decodes a copy of the frame's body, because a verdict may keep parts of the request until the answer
// comes: but of a produce, which is large.
func (s *session) decodeRequest(e entry, frame []byte) (d decoded, err error) {
	h := e.V.Header
	weight, err := wire.CheckRequest(h.Key, h.Version, frame[wire.SizePrefix+h.Len:])
	if err != nil {
		return d, &Error{audit.Undecodable, err}
	}
	d = decoded{body: frame[wire.SizePrefix+h.Len:], keeps: weight}
	share := weight*handledRequest + int64(len(frame)) // the frame again, as it is to go out
	if kmsg.Key(h.Key) != kmsg.Produce {               // of which nothing is kept but names
		share += int64(len(d.body))
		d.keeps += int64(len(d.body))
	}
	if share <= wire.BaseBuffer {
		share = 0
	} else if err := s.memory.decoding.Acquire(share); err != nil {
		return d, fromPipe(err, audit.OutOfMemory)
	}
	d.account, d.share = s.memory.decoding, share
	if kmsg.Key(h.Key) != kmsg.Produce {
		d.body = bytes.Clone(d.body)
	}
	d.req = kmsg.RequestForKey(h.Key)
	d.req.SetVersion(h.Version)
	if err := d.req.ReadFrom(d.body); err != nil {
		clear(d.body)
		d.shrink(0)
		return d, refuse(audit.Undecodable, "%s v%d of %d bytes: %w", apiName(h.Key), h.Version, len(d.body), err)
	}
	return d, nil
}

// decide is the way of every request that is not decided in place: decode, ask the handler, act on its verdict.
func (s *session) decide(e entry, frame []byte, view *policy.View) error {
	h := e.V.Header
	d, err := s.decodeRequest(e, frame)
	if err != nil {
		return err
	}
	defer d.shrink(0)
	req := d.req
	if isLogin(h.Key) {
		defer clear(d.body) // a password may stand in it
		if answered, err := s.beforeLogin(e, frame, req, e.V.who); answered || err != nil {
			return err
		}
	}
	ctx := &authz.Ctx{View: view, Topics: s.conn.Cluster, Groups: s.conn.Cluster, Fetch: s.fetchSes, Share: s.shareSes,
		AutoCreate: s.conn.AutoCreate, Principal: e.V.who.own()}
	v := authz.Table[h.Key].Decide(ctx, req)
	if len(ctx.Missing) > 0 || ctx.Stale {
		if err := s.up.Flush(); err != nil {
			return err
		}
		s.resolve(ctx)
		ctx.Checks = nil
		v = authz.Table[h.Key].Decide(ctx, req)
	}
	if ctx.Unmet != nil {
		s.conn.Cluster.Recall(*ctx.Unmet)
	}
	s.fetchSes, s.shareSes = ctx.Fetch, ctx.Share
	if err := s.mirror(h.Key); err != nil {
		return err
	}
	e.V.ctx, e.V.edit = ctx, v.Edit
	e.V.keeps = weigh(ctx.Checks)

	switch {
	case v.Close != "" && v.Forward == nil:
		s.auditChecks(s.upTrail, &e.V, audit.Allow)
		return refuse(audit.Denied, "%s", v.Close)
	case v.Answer != nil:
		e.Ours = wire.AppendResponse(nil, e.V.Correlation, v.Answer)
		d.shrink(0)
		return s.giveOurs(e, frame, audit.Allow)
	}
	if v.Edit != nil {
		e.V.kind = edited
		e.V.keeps += d.keeps
	}
	forward := v.Forward
	if forward == nil {
		forward = req
	}
	// What goes out is what was judged. The client's own bytes do where they say just that: no more, and nothing twice.
	judged := make([]byte, 0, len(frame))
	judged = wire.AppendRequest(judged, frame[wire.SizePrefix:wire.SizePrefix+h.Len], h.Correlation, forward)
	out := judged
	if bytes.Equal(judged, frame) {
		out = frame
	}
	switch kmsg.Key(h.Key) {
	case kmsg.Produce:
		if err := s.produceEvidence(e, out, view); err != nil {
			return err
		}
	case kmsg.Fetch:
		e.V.fetch, e.V.view, e.V.follows = ctx.Fetch, view, ctx.Follows
		if v.Edit == nil {
			e.V.kind = fetched
		}
	case kmsg.ShareFetch:
		e.V.view = view
		if v.Edit == nil {
			e.V.kind = fetched
		}
		s.auditAcks(&e.V, out[wire.SizePrefix+h.Len:])
	case kmsg.ShareAcknowledge:
		s.auditAcks(&e.V, out[wire.SizePrefix+h.Len:])
	case kmsg.Metadata:
		if v.Edit == nil {
			e.V.kind = learned
		}
	case kmsg.SASLAuthenticate:
		defer clear(judged)
	}
	// To send may mean to wait for the broker, whose answers need memory to be decoded.
	if &out[0] == &frame[0] {
		d.shrink(0)
	}
	d.shrink(int64(len(out)))
	if err := s.send(e, frame, out); err != nil {
		return err
	}
	if v.Close != "" {
		return refuse(audit.Denied, "%s", v.Close)
	}
	if v.Barrier {
		if err := s.up.Flush(); err != nil {
			return err
		}
		return s.queue.WaitEmpty()
	}
	return nil
}

// resolve looks up what a handler missed: ids, or which topics there are. A cluster that does not answer leaves it
// unknown, and so refused.
func (s *session) resolve(c *authz.Ctx) {
	ctx, cancel := context.WithTimeout(context.Background(), resolveTimeout)
	defer cancel()
	if len(c.Missing) > 0 {
		_ = s.conn.Cluster.Resolve(ctx, c.Missing)
	}
	if c.Stale && s.conn.Cluster.Relist(ctx) != nil {
		c.Groups = unlisted{c.Groups}
	}
	c.Missing, c.Stale, c.Resolved, c.Renewed = nil, false, true, true
}

// unlisted is a cluster of which it is not known which topics it has now.
type unlisted struct{ authz.Groups }

// TopicNames is no list.
func (unlisted) TopicNames() ([]string, uint64) { return nil, 0 }

// unsupported answers a key or version that is hidden from ApiVersions.
func (s *session) unsupported(e entry, frame []byte) error {
	resp := authz.Unsupported(e.V.Key, e.V.Version)
	if resp == nil {
		return refuse(audit.UnknownAPI, "%s v%d", apiName(e.V.Key), e.V.Version)
	}
	if s.attempt != nil || isLogin(e.V.Key) { // a login that cannot go on ends the connection, as it does at a broker
		cause := refuse(audit.UnsupportedVersion, "%s v%d", apiName(e.V.Key), e.V.Version)
		return s.refuseWith(e, frame, resp, cause)
	}
	s.Metrics.Refuse(audit.UnsupportedVersion)
	e.V.ctx = &authz.Ctx{}
	return s.deny(e, frame, resp)
}

// deny gives our own answer to what is refused.
func (s *session) deny(e entry, frame []byte, resp kmsg.Response) error {
	e.Ours = wire.AppendResponse(nil, e.V.Correlation, resp)
	return s.giveOurs(e, frame, audit.Deny)
}

// giveOurs gives our own answer in its turn; the verdict is at least the one given, and what the checks say.
func (s *session) giveOurs(e entry, frame []byte, verdict audit.Verdict) error {
	s.auditChecks(s.upTrail, &e.V, verdict)
	if err := onRecord(s.upTrail)(); err != nil {
		return err
	}
	e.V.ctx, e.V.keeps = nil, int64(len(e.Ours))
	s.up.Drop(len(frame))
	return s.push(e)
}

func (s *session) push(e entry) error {
	if e.V.keeps > wire.BaseBuffer || s.queue.Full() {
		if err := s.up.Flush(); err != nil {
			return err
		}
	}
	if err := s.queue.Keep(e, e.V.keeps); err != nil {
		return fromPipe(err, audit.OutOfMemory)
	}
	return s.queue.Push(e)
}

// forward sends a frame on as it came.
func (s *session) forward(e entry, frame []byte) error { return s.send(e, frame, frame) }

// send forwards out, which is the frame itself or stands in for it.
func (s *session) send(e entry, frame, out []byte) error {
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
	} else {
		s.up.Replace(len(frame), out)
	}
	return nil
}
