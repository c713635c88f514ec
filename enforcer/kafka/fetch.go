package kafka

import (
	"crypto/sha256"
	"encoding/binary"
	"hash"
	"time"

	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/audit"
	"klamm/enforcer/kafka/authz"
	"klamm/enforcer/kafka/records"
	"klamm/enforcer/kafka/wire"
	"klamm/enforcer/policy"
)

// maxLineBatches is how many batches one audit line lists; a partition with more gets several lines. Of ranges of
// acquired records it lists as many, and counts the rest.
const maxLineBatches = 256

// fetchReader walks a fetch answer once, front to back, while it is on its way to the client: from the pipe, passing
// what it has seen, or from memory. It allocates nothing in steady state.
type fetchReader struct {
	pipe *wire.Pipe // nil: from memory
	mem  []byte
	left int // bytes of the answer not yet taken
	flex bool

	sha     hash.Hash
	header  [records.HeaderLen]byte
	batches audit.Batches
	// of a ShareFetch
	acquired audit.Acquired
	omitted  int // acquired ranges beyond maxLineBatches
}

func (r *fetchReader) init() { r.sha = sha256.New() }

// take returns the next n bytes, valid until the next take.
func (r *fetchReader) take(n int) ([]byte, error) {
	if n < 0 || n > r.left {
		return nil, refuse(audit.BadAnswer, "a fetch answer ends before its content")
	}
	r.left -= n
	if r.pipe == nil {
		b := r.mem[:n]
		r.mem = r.mem[n:]
		return b, nil
	}
	b, err := r.pipe.Rest(n)
	if err != nil {
		return nil, fromPipe(err, audit.BadAnswer)
	}
	r.pipe.Pass(n)
	return b, nil
}

// some returns at least one and at most n of the next bytes: what is there already.
func (r *fetchReader) some(n int) ([]byte, error) {
	if r.pipe != nil {
		if _, err := r.pipe.Rest(min(n, 1)); err != nil {
			return nil, fromPipe(err, audit.BadAnswer)
		}
		n = min(n, r.pipe.Buffered())
	}
	return r.take(n)
}

func (r *fetchReader) int(n int) (int64, error) {
	b, err := r.take(n)
	if err != nil {
		return 0, err
	}
	switch n {
	case 2:
		return int64(int16(binary.BigEndian.Uint16(b))), nil
	case 4:
		return int64(int32(binary.BigEndian.Uint32(b))), nil
	}
	return int64(binary.BigEndian.Uint64(b)), nil
}

func (r *fetchReader) uvarint() (int, error) {
	v := 0
	for shift := 0; shift < 35; shift += 7 {
		b, err := r.take(1)
		if err != nil {
			return 0, err
		}
		v |= int(b[0]&0x7f) << shift
		if b[0] < 0x80 {
			return v, nil
		}
	}
	return 0, refuse(audit.BadAnswer, "a length in a fetch answer has more than 32 bits")
}

// length reads the length of an array or of bytes; null counts as empty.
func (r *fetchReader) length() (int, error) {
	if r.flex {
		n, err := r.uvarint()
		return max(0, n-1), err
	}
	n, err := r.int(4)
	return max(0, int(n)), err
}

func (r *fetchReader) tags() error {
	if !r.flex {
		return nil
	}
	n, err := r.uvarint()
	for ; n > 0 && err == nil; n-- {
		var size int
		if _, err = r.uvarint(); err == nil {
			if size, err = r.uvarint(); err == nil {
				_, err = r.take(size)
			}
		}
	}
	return err
}

// streamFetch passes an answer of n bytes on while it is read, hashing the batches.
func (s *session) streamFetch(p *pending, n int) error {
	s.fetch.pipe, s.fetch.mem, s.fetch.left = s.down, nil, n
	if _, err := s.fetch.take(wire.SizePrefix + 4); err != nil {
		return err
	}
	if wire.ResponseHeaderLen(p.Key, p.Version) > wire.SizePrefix+4 {
		s.fetch.flex = true
		if err := s.fetch.tags(); err != nil {
			return err
		}
	}
	if err := s.readFetch(p); err != nil {
		return err
	}
	s.Metrics.decided[p.Key][audit.Allow].Inc()
	if p.ctx != nil {
		s.auditChecks(s.downTrail, p, audit.Allow)
	}
	return nil
}

// auditFetch reads an answer that was held, as it goes to the client.
func (s *session) auditFetch(p *pending, body []byte) error {
	s.fetch.pipe, s.fetch.mem, s.fetch.left = nil, body, len(body)
	return s.readFetch(p)
}

func (s *session) readFetch(p *pending) error {
	r := &s.fetch
	r.flex = wire.Flexible(p.Key, p.Version)
	if p.Key == int16(kmsg.ShareFetch) {
		return s.readShareFetch(p)
	}
	if _, err := r.int(4); err != nil { // throttle_time_ms
		return err
	}
	if p.Version >= 7 {
		code, err := r.int(2)
		if err != nil {
			return err
		}
		id, err := r.take(4)
		if err != nil {
			return err
		}
		if p.fetch != nil && code == 0 && r.pipe != nil { // on its way still, as the broker sent it
			binary.BigEndian.PutUint32(id, uint32(p.fetch.Answered(int32(binary.BigEndian.Uint32(id)))))
		}
	}
	topics, err := r.length()
	for ; topics > 0 && err == nil; topics-- {
		err = s.readFetchTopic(p)
	}
	if err != nil {
		return err
	}
	return r.end()
}

// end reads the tagged fields of the whole answer, after which nothing may come.
func (r *fetchReader) end() error {
	err := r.tags()
	if err == nil && r.left != 0 {
		err = refuse(audit.BadAnswer, "a fetch answer has %d bytes too many", r.left)
	}
	return err
}

func (s *session) readFetchTopic(p *pending) error {
	r := &s.fetch
	var id authz.TopicID
	var name []byte
	if p.Version >= 13 {
		b, err := r.take(len(id))
		if err != nil {
			return err
		}
		copy(id[:], b)
	} else {
		n, err := r.stringLength()
		if err != nil {
			return err
		}
		if name, err = r.take(n); err != nil {
			return err
		}
	}
	t := s.answered(p, name, id)
	partitions, err := r.length()
	for ; partitions > 0 && err == nil; partitions-- {
		err = s.readFetchPartition(p, t)
	}
	if err != nil {
		return err
	}
	return r.tags()
}

// answered is the topic that an answer tells of; nil where nobody knows it.
func (s *session) answered(p *pending, name []byte, id authz.TopicID) *topic {
	name, known := s.downTopics.resolve(s.conn.Cluster, name, id)
	if !known {
		return nil
	}
	t, _ := s.downTopics.get(name, p.view)
	return t
}

func (r *fetchReader) stringLength() (int, error) {
	if r.flex {
		n, err := r.uvarint()
		return n - 1, err
	}
	n, err := r.int(2)
	return int(n), err
}

func (s *session) readFetchPartition(p *pending, t *topic) error {
	r := &s.fetch
	partition, err := r.int(4)
	if err != nil {
		return err
	}
	fixed := 2 + 8 + 8 // error_code, high_watermark, last_stable_offset
	if p.Version >= 5 {
		fixed += 8 // log_start_offset
	}
	if _, err = r.take(fixed); err != nil {
		return err
	}
	aborted, err := r.length()
	for ; aborted > 0 && err == nil; aborted-- {
		if _, err = r.take(8 + 8); err == nil {
			err = r.tags()
		}
	}
	if err == nil && p.Version >= 11 {
		_, err = r.take(4) // preferred_read_replica
	}
	if err != nil {
		return err
	}
	if err = s.readRecords(p, t, int32(partition)); err != nil {
		return err
	}
	s.auditFetched(p, t, int32(partition))
	return r.tags()
}

// readRecords takes the evidence of a partition's batches. The last batch may be cut off by the fetch's size limit; a
// client discards it, and it is no evidence.
func (s *session) readRecords(p *pending, t *topic, partition int32) error {
	const head = records.MagicAt + 1
	r := &s.fetch
	r.batches = r.batches[:0]
	size, err := r.length()
	if err != nil || size == 0 {
		return err
	}
	// What was asked for was decided when it was asked; this is for a broker that answers something else.
	if t == nil || !p.read(t).Allowed {
		return refuse(audit.BadAnswer, "the broker sent records of a topic that was not asked for or may not be read")
	}
	for size >= head {
		b, err := r.take(head)
		if err != nil {
			return err
		}
		copy(r.header[:], b)
		h := records.Header(r.header[:])
		n, seen := h.Len(), head
		if n < head || (h.Magic() >= 2 && n < records.HeaderLen) {
			return refuse(audit.BadAnswer, "a record batch of %d bytes in a fetch answer", n)
		}
		if n > size {
			size -= head
			break
		}
		batch := audit.Batch{BaseOffset: h.BaseOffset(), LastOffset: h.BaseOffset(), Count: -1, Bytes: n, ProducerID: -1}
		if h.Magic() >= 2 {
			if b, err = r.take(records.HeaderLen - head); err != nil {
				return err
			}
			copy(r.header[head:], b)
			seen = records.HeaderLen
			batch.LastOffset, batch.Count = h.LastOffset(), h.Count()
			batch.ProducerID, batch.ProducerEpoch, batch.BaseSequence = h.ProducerID(), h.ProducerEpoch(), h.BaseSequence()
		}
		r.sha.Reset()
		for left := n - seen; left > 0; left -= len(b) {
			if b, err = r.some(left); err != nil {
				return err
			}
			r.sha.Write(b)
		}
		r.batches = append(r.batches, batch)
		r.sha.Sum(r.batches[len(r.batches)-1].SHA256[:0]) // there, because what Sum writes to is moved to the heap
		if len(r.batches) == maxLineBatches {
			s.auditFetched(p, t, partition)
		}
		size -= n
	}
	for size > 0 {
		b, err := r.some(size)
		if err != nil {
			return err
		}
		size -= len(b)
	}
	return nil
}

// read is the decision that lets a topic be read.
func (p *pending) read(t *topic) policy.Decision {
	if p.follows != nil {
		return *p.follows
	}
	return t.read
}

// auditFetched writes the line of what was read of a partition, if anything was.
func (s *session) auditFetched(p *pending, t *topic, partition int32) {
	r := &s.fetch
	if len(r.batches) == 0 {
		return
	}
	var count int32
	var bytes int
	for i := range r.batches {
		count += max(0, r.batches[i].Count)
		bytes += r.batches[i].Bytes
	}
	s.Metrics.bytes[1].Add(float64(bytes))
	read := p.read(t)
	e := s.downTrail.Line("operation", verdictOf(read)).Str("api", apiName(p.Key)).Int16("version", p.Version).
		Str("client_id", p.clientID).Str("topic", t.name).Int32("partition", partition).
		Int64("base_offset", r.batches[0].BaseOffset).Int64("last_offset", r.batches[len(r.batches)-1].LastOffset).
		Int32("count", count).Int("bytes", bytes).Array("batches", &r.batches).Str("rule", read.Rule)
	if len(r.acquired) > 0 {
		e = e.Array("acquired", &r.acquired)
	}
	if r.omitted > 0 {
		e = e.Int("acquired_omitted", r.omitted)
	}
	e.Int64("latency_us", time.Since(p.started).Microseconds()).Send()
	r.batches = r.batches[:0]
}
