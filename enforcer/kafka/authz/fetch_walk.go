package authz

import (
	"encoding/binary"

	"klamm/enforcer/kafka/wire"
)

// FetchInPlace decides a fetch of version 4 and up without decoding it, where the answer is a plain yes: a consumer
// that lists only what it may read, in a session that is steady or in none. It tells whether that was so; otherwise
// nothing has changed and the decoded request must be decided. allowed decides one topic, named by name or, from
// version 13, by id.
func FetchInPlace(c *Ctx, version int16, body []byte, allowed func(name []byte, id TopicID) bool) bool {
	w := fetchWalk{version: version, Cursor: wire.Cursor{B: body, Flex: version >= 12}}
	if version <= 14 && w.I32() >= 0 {
		return false // a follower
	}
	w.Take(4 + 4 + 4 + 1) // max_wait, min_bytes, max_bytes, isolation_level
	var id, epoch int32 = 0, -1
	if version >= 7 {
		id, epoch = w.I32(), w.I32()
	}
	incremental := isIncremental(epoch)
	if epoch == fetchOpens || incremental && !c.Fetch.steady(id, epoch, c.View) || !incremental && c.Fetch.renames(id) {
		return false
	}
	session := w.Off - (4 + 4) // where its id and epoch are
	update := w                // the request is walked twice: to decide, then to note the positions
	for w.nextTopic() {
		if !allowed(w.name, w.id) {
			return false
		}
		for w.nextPartition() {
			if incremental && c.Fetch.parts[string(w.name)][w.partition] == nil {
				return false
			}
		}
	}
	if version >= 7 && w.Array(4) > 0 {
		return false // forgotten topics
	}
	if version >= 11 && w.String() == nil { // rack_id may not be null
		return false
	}
	if w.SkipTags() > 0 || w.tagged || w.Bad || w.Off != len(body) {
		return false
	}
	if !incremental {
		c.Fetch = nil
		return true
	}
	for update.nextTopic() {
		parts := c.Fetch.parts[string(update.name)]
		for update.nextPartition() {
			*parts[update.partition] = update.part
		}
	}
	c.Fetch.next(body[session:])
	return true
}

// next puts the id and the epoch that the broker knows where the client has its own.
func (m *FetchSession) next(session []byte) {
	binary.BigEndian.PutUint32(session, uint32(m.broker.Load()))
	binary.BigEndian.PutUint32(session[4:], uint32(m.brokerEpoch))
	m.epoch, m.brokerEpoch = nextEpoch(m.epoch), nextEpoch(m.brokerEpoch)
}

// fetchWalk steps through the topics and partitions of an encoded fetch.
type fetchWalk struct {
	wire.Cursor
	version           int16
	started, tagged   bool
	topics, partsLeft int
	name              []byte // the topic's name, or the bytes of its id
	id                TopicID
	partition         int32
	part              fetchPart
}

func (w *fetchWalk) nextTopic() bool {
	if !w.started {
		w.started, w.topics = true, w.Array(5)
	}
	if w.topics == 0 || w.Bad {
		return false
	}
	w.topics--
	if w.version >= 13 {
		w.name = w.Take(len(w.id))
		copy(w.id[:], w.name)
	} else {
		w.name = w.String()
	}
	w.partsLeft = w.Array(16)
	return !w.Bad
}

func (w *fetchWalk) nextPartition() bool {
	if w.partsLeft == 0 {
		w.tagged = w.SkipTags() > 0 || w.tagged // of the topic
		return false
	}
	w.partsLeft--
	w.partition = w.I32()
	w.part = fetchPart{leaderEpoch: -1, lastEpoch: -1, logStart: -1}
	if w.version >= 9 {
		w.part.leaderEpoch = w.I32()
	}
	w.part.offset = w.I64()
	if w.version >= 12 {
		w.part.lastEpoch = w.I32()
	}
	if w.version >= 5 {
		w.part.logStart = w.I64()
	}
	w.part.maxBytes = w.I32()
	w.tagged = w.SkipTags() > 0 || w.tagged
	return !w.Bad
}
