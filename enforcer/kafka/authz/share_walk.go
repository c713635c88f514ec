package authz

import (
	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/kafka/wire"
)

// ShareFetchInPlace decides a ShareFetch without decoding it, where the answer is a plain yes: one of a running session
// in which nothing is refused, that names only what the session has. It tells whether that was so; otherwise the
// decoded request must be decided. group and topic decide by name and by id.
func ShareFetchInPlace(
	c *Ctx, version int16, body []byte, group func(name []byte) bool, topic func(name []byte, id TopicID) bool,
) bool {
	w := WalkShare(kmsg.ShareFetch, version, body)
	if w.Bad || w.renews || w.epoch == shareOpens || w.epoch == shareCloses ||
		!c.Share.steady(w.group, w.member, w.epoch, c.View) || !group(w.group) {
		return false
	}
	for w.NextTopic() {
		if !topic(nil, w.ID) {
			return false
		}
		for w.NextPartition() {
			if !c.Share.has(w.ID, w.Partition) {
				return false
			}
		}
	}
	forgets := w.Array(leastForgotten) > 0
	if forgets || w.SkipTags() > 0 || w.tagged || w.Bad || w.Off != len(body) {
		return false
	}
	c.Share.epoch = nextEpoch(w.epoch)
	return true
}

// Fewest bytes of what stands in lists: a topic, a partition, a batch of acknowledgements, a forgotten topic.
const (
	leastShareTopic     = 16 + 1 + 1
	leastSharePartition = 4 + 1 + 1
	leastAckBatch       = 8 + 8 + 1 + 1
	leastForgotten      = 16 + 1 + 1
)

// ShareWalk steps through the topics and partitions of an encoded ShareFetch or ShareAcknowledge.
type ShareWalk struct {
	wire.Cursor
	ID        TopicID
	Partition int32
	Acks      Acks // of the partition

	group, member     []byte
	epoch             int32
	topics, partsLeft int
	tagged, renews    bool
}

// Acks sums up the acknowledgements of one partition.
type Acks struct {
	Batches     int
	First, Last int64
	Records     [ackRenew + 1]int64 // by AcknowledgeType; 0 are offsets without a record
}

// WalkShare begins at the start of the body; a walk that meets what it does not understand ends with Bad.
func WalkShare(key kmsg.Key, version int16, body []byte) ShareWalk {
	w := ShareWalk{Cursor: wire.Cursor{B: body, Flex: true}}
	w.group, w.member, w.epoch = w.String(), w.String(), w.I32()
	if key == kmsg.ShareFetch {
		w.Take(4 + 4 + 4 + 4 + 4) // max_wait_ms, min_bytes, max_bytes, max_records, batch_size
		if version >= 2 {
			w.Take(1) // share_acquire_mode
		}
	}
	if version >= 2 {
		w.renews = w.I8() != 0 // is_renew_ack
	}
	w.topics = w.Array(leastShareTopic)
	return w
}

// NextTopic goes on to the next topic, whose id is then in ID.
func (w *ShareWalk) NextTopic() bool {
	if w.topics == 0 || w.Bad {
		return false
	}
	w.topics--
	copy(w.ID[:], w.Take(len(w.ID)))
	w.partsLeft = w.Array(leastSharePartition)
	return !w.Bad
}

// NextPartition goes on to the topic's next partition, and has to be called until it finds none.
func (w *ShareWalk) NextPartition() bool {
	if w.partsLeft == 0 || w.Bad {
		w.skipTags() // of the topic
		return false
	}
	w.partsLeft--
	w.Partition, w.Acks = w.I32(), Acks{}
	for range w.Array(leastAckBatch) {
		w.Acks.add(w.I64(), w.I64(), w.types())
		w.skipTags()
	}
	w.skipTags()
	return !w.Bad
}

func (w *ShareWalk) skipTags() { w.tagged = w.SkipTags() > 0 || w.tagged }

func (w *ShareWalk) types() []byte { return w.Take(w.Array(1)) }

// add counts by type: one type is of all offsets, several are of one each.
func (a *Acks) add(first, last int64, types []byte) {
	if a.Batches == 0 {
		a.First = first
	}
	a.Batches++
	a.Last = last
	each := int64(1)
	if len(types) == 1 {
		each = last - first + 1
	}
	for _, t := range types {
		if int(t) < len(a.Records) {
			a.Records[t] += each
		}
	}
}
