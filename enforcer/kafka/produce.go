package kafka

import (
	"crypto/sha256"
	"time"
	"unsafe"

	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/audit"
	"klamm/enforcer/kafka/authz"
	"klamm/enforcer/kafka/records"
	"klamm/enforcer/kafka/wire"
	"klamm/enforcer/policy"
)

// produced is the evidence of a produce between its request and its answer.
type produced struct {
	acks    int16
	parts   []producedPart
	batches audit.Batches // of all partitions, in order
	line    audit.Batches // those of the line being written
	index   map[partitionName]int
}

type producedPart struct {
	topic      *topic
	decision   policy.Decision
	partition  int32
	first, end int // its batches
	answered   bool
}

const (
	// maxProduced is how many partitions or batches one request may have: it bounds the memory of their evidence. (With
	// Kafka's max.request.size of 1 MiB it cannot have a quarter of it.)
	maxProduced = 1 << 16
	// maxReused is how many partitions and batches an entry keeps room for when it is used again.
	maxReused = 64
)

func (p produced) reset() produced {
	if cap(p.parts)+cap(p.batches) > maxReused {
		return produced{}
	}
	return produced{parts: p.parts[:0], batches: p.batches[:0]}
}

func (p *produced) weight() int64 {
	const part, batch = unsafe.Sizeof(producedPart{}), unsafe.Sizeof(audit.Batch{})
	return int64(cap(p.parts))*int64(part) + int64(cap(p.batches))*int64(batch)
}

// produceInPlace decides a produce without decoding it, where everything in it is allowed, and takes its evidence.
// Otherwise nothing was decided, and the decoded request must be.
func (s *session) produceInPlace(e *wire.Entry[pending], frame []byte, view *policy.View) bool {
	return s.scanProduce(e, frame, view, false)
}

// produceEvidence takes the evidence of the produce that is forwarded, after it was decided.
func (s *session) produceEvidence(e *wire.Entry[pending], frame []byte, view *policy.View) error {
	e.V.produce = e.V.produce.reset()
	switch {
	case s.scanProduce(e, frame, view, true):
		return nil
	case len(e.V.produce.parts) > maxProduced || len(e.V.produce.batches) > maxProduced:
		return refuse(audit.OutOfMemory, "a Produce with more than %d partitions or batches", maxProduced)
	}
	return refuse(audit.Undecodable, "Produce v%d with record batches that are not of magic 2", e.V.Version)
}

func (s *session) scanProduce(e *wire.Entry[pending], frame []byte, view *policy.View, decided bool) bool {
	p := &e.V
	c := wire.Cursor{B: frame, Off: wire.SizePrefix + p.Len, Flex: wire.Flexible(p.Key, p.Version)}
	txn := c.String()
	if txn != nil && !decided && !s.mayTransact(txn, view) {
		return false
	}
	p.kind = acked
	p.produce.acks = c.I16()
	c.I32() // timeout_ms
	for range c.Array(3) {
		name, id := topicRef(&c, p.Version >= 13)
		name, known := s.upTopics.resolve(s.conn.Cluster, name, id)
		if c.Bad || !known {
			return false
		}
		t, _ := s.upTopics.get(name, view)
		if !decided && !t.write.Allowed {
			return false
		}
		for range c.Array(5) {
			part := producedPart{topic: t, decision: t.write, partition: c.I32(), first: len(p.produce.batches)}
			transactional, ok := p.produce.take(c.Bytes())
			if !ok || (transactional && txn == nil && !decided) {
				return false
			}
			part.end = len(p.produce.batches)
			p.produce.parts = append(p.produce.parts, part)
			if len(p.produce.parts) > maxProduced {
				return false
			}
			c.SkipTags()
		}
		c.SkipTags()
	}
	c.SkipTags()
	p.keeps += p.produce.weight()
	return !c.Bad && c.Off == len(frame)
}

func topicRef(c *wire.Cursor, byID bool) (name []byte, id authz.TopicID) {
	if byID {
		copy(id[:], c.Take(len(id)))
		return nil, id
	}
	return c.String(), id
}

// maxTransactionalID is how many bytes of one a connection remembers. Longer ones are decided where nothing is kept.
const maxTransactionalID = 1024

// mayTransact decides the transactional id of a produce, remembering the connection's last one.
func (s *session) mayTransact(id []byte, view *policy.View) bool {
	if len(id) > maxTransactionalID {
		return false
	}
	if string(id) != s.txnID || s.txnView != view {
		s.txnID, s.txnView = string(id), view
		d := view.Decide(kmsg.ACLResourceTypeTransactionalId, s.txnID, kmsg.ACLOperationWrite)
		s.txnAllowed = d.Allowed && !d.WouldDeny // what would be denied is decided where it goes on record
	}
	return s.txnAllowed
}

// take notes the batches of one partition. It fails where they are not what Produce v3 and up may carry: whole batches
// of magic 2.
func (p *produced) take(b []byte) (transactional, ok bool) {
	for len(b) > 0 {
		if len(b) < records.HeaderLen {
			return false, false
		}
		h := records.Header(b)
		n := h.Len()
		if h.Magic() != 2 || n < records.HeaderLen || n > len(b) || len(p.batches) > maxProduced {
			return false, false
		}
		transactional = transactional || h.Transactional()
		p.batches = append(p.batches, audit.Batch{
			BaseOffset: h.BaseOffset(), LastOffset: h.LastOffset(), Count: h.Count(), Bytes: n,
			ProducerID: h.ProducerID(), ProducerEpoch: h.ProducerEpoch(), BaseSequence: h.BaseSequence(),
			SHA256: sha256.Sum256(b[records.HeaderLen:n]),
		})
		b = b[n:]
	}
	return transactional, true
}

// auditProduce writes a line per partition when its outcome is known: from the broker's answer, or, for acks=0, when it
// is forwarded.
func (s *session) auditProduce(t *audit.Trail, p *pending, answer []byte) {
	c := wire.Cursor{B: answer, Flex: wire.Flexible(p.Key, p.Version)}
	for range c.Array(3) {
		name, id := topicRef(&c, p.Version >= 13)
		name, _ = s.downTopics.resolve(s.conn.Cluster, name, id)
		for range c.Array(14) {
			partition, code, offset := c.I32(), c.I16(), c.I64()
			if p.Version >= 2 {
				c.I64() // log_append_time_ms
			}
			if p.Version >= 5 {
				c.I64() // log_start_offset
			}
			if p.Version >= 8 {
				for range c.Array(5) {
					c.I32()
					c.String()
					c.SkipTags()
				}
				c.String()
			}
			c.SkipTags()
			if part := p.produce.find(name, partition); part != nil {
				part.answered = true
				s.auditProduced(t, p, part, code, offset)
			}
		}
		c.SkipTags()
	}
	if p.produce.acks == 0 {
		for i := range p.produce.parts {
			s.auditProduced(t, p, &p.produce.parts[i], 0, -1)
		}
	} else {
		s.auditUnanswered(t, p)
	}
	verdict := audit.Allow
	for i := range p.produce.parts {
		verdict = worse(verdict, verdictOf(p.produce.parts[i].decision))
	}
	s.auditChecks(t, p, verdict)
}

// auditUnanswered tells of partitions whose outcome nobody will learn.
func (s *session) auditUnanswered(t *audit.Trail, p *pending) {
	for i := range p.produce.parts {
		if part := &p.produce.parts[i]; !part.answered {
			s.auditProduced(t, p, part, outcomeUnknown, -1)
		}
	}
}

// outcomeUnknown stands for the error code where no answer came; Kafka's UNKNOWN_SERVER_ERROR is -1.
const outcomeUnknown = -2

// find finds a partition that is not answered yet; among many by an index.
func (p *produced) find(topic []byte, partition int32) *producedPart {
	const few = 64
	if len(p.parts) > few && p.index == nil {
		p.index = make(map[partitionName]int, len(p.parts))
		for i := range p.parts {
			p.index[partitionName{p.parts[i].topic.name, p.parts[i].partition}] = i
		}
	}
	if p.index != nil {
		i, is := p.index[partitionName{string(topic), partition}]
		if !is || p.parts[i].answered {
			return nil
		}
		return &p.parts[i]
	}
	for i := range p.parts {
		if part := &p.parts[i]; part.partition == partition && part.topic.name == string(topic) && !part.answered {
			return part
		}
	}
	return nil
}

type partitionName struct {
	topic     string
	partition int32
}

func (s *session) auditProduced(t *audit.Trail, p *pending, part *producedPart, code int16, offset int64) {
	batches := p.produce.batches[part.first:part.end]
	var count int32
	var bytes int
	for i := range batches {
		if b := &batches[i]; offset >= 0 {
			b.LastOffset += offset - b.BaseOffset
			b.BaseOffset = offset
			offset = b.LastOffset + 1
		}
		count += batches[i].Count
		bytes += batches[i].Bytes
	}
	v := verdictOf(part.decision)
	s.Metrics.bytes[0].Add(float64(bytes))
	p.produce.line = batches
	e := t.Line("operation", v).Str("api", "Produce").Int16("version", p.Version).Str("client_id", p.clientID).
		Int16("acks", p.produce.acks).Str("topic", part.topic.name).Int32("partition", part.partition).
		Int32("count", count).Int("bytes", bytes).Array("batches", &p.produce.line).Str("rule", part.decision.Rule)
	switch {
	case p.produce.acks == 0:
		e = e.Str("outcome", "unacknowledged")
	case code == outcomeUnknown:
		e = e.Str("outcome", "unknown")
	default:
		e = e.Str("outcome", errorName(code))
	}
	e.Int64("latency_us", time.Since(p.started).Microseconds()).Send()
}
