package kafka

import (
	"encoding/binary"

	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/audit"
	"klamm/enforcer/kafka/authz"
)

// fetches tells whether the answer carries records.
func (p *pending) fetches() bool {
	return p.Key == int16(kmsg.Fetch) || p.Key == int16(kmsg.ShareFetch)
}

// mayShare decides the group of a ShareFetch, remembering the connection's last one.
func (s *session) mayShare(group []byte) bool {
	if view := s.ctx.View; string(group) != s.shareGroup || s.shareView != view {
		s.shareGroup, s.shareView = string(group), view
		d := view.Decide(kmsg.ACLResourceTypeGroup, s.shareGroup, kmsg.ACLOperationRead)
		s.shareAllowed = d.Allowed && !d.WouldDeny // what would be denied is decided where it goes on record
	}
	return s.shareAllowed
}

// auditAcks writes a line for each partition whose records a request that is forwarded acknowledges.
func (s *session) auditAcks(p *pending, body []byte) {
	w := authz.WalkShare(kmsg.Key(p.Key), p.Version, body)
	for w.NextTopic() {
		name, _ := s.upTopics.resolve(s.conn.Cluster, nil, w.ID)
		t, _ := s.upTopics.get(name, p.who.view)
		for w.NextPartition() {
			if w.Acks.Batches == 0 {
				continue
			}
			s.upTrail.Line("operation", verdictOf(t.read)).Str("api", apiName(p.Key)).Int16("version", p.Version).
				Str("client_id", p.clientID).Str("topic", t.name).Int32("partition", w.Partition).
				Int64("acknowledges_from", w.Acks.First).Int64("acknowledges_to", w.Acks.Last).
				Int64("accepted", w.Acks.Records[1]).Int64("released", w.Acks.Records[2]).
				Int64("rejected", w.Acks.Records[3]).Int64("renewed", w.Acks.Records[4]).Str("rule", t.read.Rule).Send()
		}
	}
}

func (s *session) readShareFetch(p *pending) error {
	r := &s.fetch
	if _, err := r.take(4 + 2); err != nil { // throttle_time_ms, error_code
		return err
	}
	if err := r.text(); err != nil { // error_message
		return err
	}
	if _, err := r.take(4); err != nil { // acquisition_lock_timeout_ms
		return err
	}
	topics, err := r.length()
	for ; topics > 0 && err == nil; topics-- {
		err = s.readShareTopic(p)
	}
	if err != nil {
		return err
	}
	if err := r.nodes(); err != nil {
		return err
	}
	return r.end()
}

// text skips a nullable string.
func (r *fetchReader) text() error {
	n, err := r.length()
	if err == nil {
		_, err = r.take(n)
	}
	return err
}

// nodes skips the addresses of other brokers, which a client learns from where it is told that a partition has moved.
func (r *fetchReader) nodes() error {
	n, err := r.length()
	for ; n > 0 && err == nil; n-- {
		if _, err = r.take(4); err != nil { // node_id
			break
		}
		if err = r.text(); err != nil { // host
			break
		}
		if _, err = r.take(4); err != nil { // port
			break
		}
		if err = r.text(); err == nil { // rack
			err = r.tags()
		}
	}
	return err
}

func (s *session) readShareTopic(p *pending) error {
	r := &s.fetch
	var id authz.TopicID
	b, err := r.take(len(id))
	if err != nil {
		return err
	}
	copy(id[:], b)
	t := s.answered(p, nil, id)
	partitions, err := r.length()
	for ; partitions > 0 && err == nil; partitions-- {
		err = s.readSharePartition(p, t)
	}
	if err != nil {
		return err
	}
	return r.tags()
}

func (s *session) readSharePartition(p *pending, t *topic) error {
	r := &s.fetch
	partition, err := r.int(4)
	if err != nil {
		return err
	}
	for range 2 { // of the records, and of the acknowledgements
		if _, err = r.take(2); err == nil { // error_code
			err = r.text() // error_message
		}
		if err != nil {
			return err
		}
	}
	if _, err = r.take(4 + 4); err == nil { // current_leader: leader_id, leader_epoch
		err = r.tags()
	}
	if err != nil {
		return err
	}
	if err := s.readRecords(p, t, int32(partition)); err != nil {
		return err
	}
	if err := r.readAcquired(); err != nil {
		return err
	}
	s.auditFetched(p, t, int32(partition))
	r.acquired, r.omitted = r.acquired[:0], 0
	return r.tags()
}

func (r *fetchReader) readAcquired() error {
	n, err := r.length()
	for ; n > 0 && err == nil; n-- {
		var b []byte
		if b, err = r.take(8 + 8 + 2); err != nil {
			break
		}
		if len(r.acquired) < maxLineBatches {
			r.acquired = append(r.acquired, audit.AcquiredRange{
				First: int64(binary.BigEndian.Uint64(b)), Last: int64(binary.BigEndian.Uint64(b[8:])),
				Deliveries: int16(binary.BigEndian.Uint16(b[16:])),
			})
		} else {
			r.omitted++
		}
		err = r.tags()
	}
	return err
}
