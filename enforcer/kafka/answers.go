package kafka

import (
	"encoding/binary"
	"errors"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/audit"
	"klamm/enforcer/kafka/authz"
	"klamm/enforcer/kafka/wire"
)

// answers is the loop from broker to client.
func (s *session) answers() error {
	for {
		b, err := s.down.Need(wire.SizePrefix + 4)
		if err != nil {
			return fromPipe(err, audit.BadAnswer)
		}
		size, sequence := int(int32(binary.BigEndian.Uint32(b))), int32(binary.BigEndian.Uint32(b[wire.SizePrefix:]))
		e := s.queue.Next()
		for e != nil && e.Ours != nil {
			s.down.Emit(e.Ours)
			s.queue.Done()
			e = s.queue.Next()
		}
		if e == nil || sequence != e.V.sequence || size < 4 {
			err := refuse(audit.BadAnswer, "the broker sent %d bytes for request %d, which is not the next one", size, sequence)
			return errors.Join(err, s.down.Flush()) // those before are answers
		}
		if e.V.kind == ours {
			if err := s.replied(&e.V, wire.SizePrefix+size); err != nil {
				return err
			}
			s.queue.Done()
			// Nothing of it goes out, which is when entries are removed otherwise.
			if err := errors.Join(s.down.Flush(), s.queue.Written()); err != nil {
				return err
			}
			continue
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
	s.downSpeaksOf(p.who)
	if p.fetches() {
		s.refilter(p)
	}
	switch p.kind {
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
		return fromPipe(err, audit.BadAnswer)
	}
	original := frame
	switch {
	case p.kind == greeted || p.kind == authenticated:
		frame, err = s.afterLogin(p, frame)
	case p.edit != nil:
		frame, err = s.edit(p, frame)
	case p.kind == learned:
		err = s.learn(p, frame)
	}
	if err != nil {
		return errors.Join(err, s.down.Flush()) // nothing of this one
	}
	changed := &frame[0] != &original[0]
	if changed {
		s.down.Replace(n, frame)
	}
	body := frame[min(len(frame), wire.ResponseHeaderLen(p.Key, p.Version)):]
	switch p.kind {
	case acked:
		s.auditProduce(s.downTrail, p, body)
	case greeted, authenticated:
		s.downSpeaksOf(p.who)
		s.auditChecks(s.downTrail, p, audit.Allow)
	default:
		if p.fetches() {
			if err := s.auditFetch(p, body); err != nil {
				return err
			}
		}
		s.auditChecks(s.downTrail, p, audit.Allow)
	}
	if !changed {
		s.down.Pass(n)
	}
	return nil
}

// refilter makes a fetch answer that is decided by another view than the present one be decided anew.
func (s *session) refilter(p *pending) {
	view := s.view()
	if p.view == view {
		return
	}
	merge := p.edit
	if p.ctx == nil {
		p.ctx = &authz.Ctx{Topics: s.conn.Cluster}
	}
	p.kind, p.view, p.ctx.View = edited, view, view
	p.edit = func(c *authz.Ctx, r kmsg.Response) {
		if merge != nil {
			merge(c, r)
		} else if f, ok := r.(*kmsg.FetchResponse); ok && p.fetch != nil && f.ErrorCode == 0 {
			f.SessionID = p.fetch.Answered(f.SessionID)
		}
		authz.FilterFetched(c, r)
	}
}

// learn takes up the topic ids of an answer.
func (s *session) learn(p *pending, frame []byte) error {
	_, weight, err := s.decode(p, frame)
	s.memory.decoding.Release(weight)
	return err
}

// edit decodes an answer, lets the verdict change it, and encodes it anew.
func (s *session) edit(p *pending, frame []byte) ([]byte, error) {
	resp, weight, err := s.decode(p, frame)
	defer func() { s.memory.decoding.Release(weight) }()
	if err != nil {
		return nil, err
	}
	checks := len(p.ctx.Checks)
	p.ctx.Missing, p.ctx.Resolved = nil, false
	p.edit(p.ctx, resp)
	if len(p.ctx.Missing) > 0 {
		s.memory.decoding.Release(weight) // others may need it meanwhile
		weight = 0
		s.resolve(p.ctx)
		p.ctx.Checks = p.ctx.Checks[:checks]
		if resp, weight, err = s.decode(p, frame); err != nil {
			return nil, err
		}
		p.edit(p.ctx, resp)
	}
	const more = 512 // than there was, for what is merged into it
	return wire.AppendResponse(make([]byte, 0, len(frame)+more), p.Correlation, resp), nil
}

// decode reads a whole answer; what it says of topic ids is taken up. The weight is what it holds of the budget, also
// when it fails.
func (s *session) decode(p *pending, frame []byte) (resp kmsg.Response, weight int64, err error) {
	c := wire.Cursor{B: frame, Off: wire.SizePrefix + 4}
	c.Flex = wire.ResponseHeaderLen(p.Key, p.Version) > c.Off
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
	} else if err = s.memory.decoding.Acquire(weight); err != nil {
		return nil, 0, fromPipe(err, audit.OutOfMemory)
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
		if _, err := s.down.Rest(1); err != nil {
			return fromPipe(err, audit.BadAnswer)
		}
		k := min(n, s.down.Buffered())
		s.down.Pass(k)
		n -= k
	}
	return nil
}
