// Package records reads Kafka's record batches in place.
package records

import "encoding/binary"

// Sizes and offsets, in bytes, of the record batch header of magic 2 (KIP-98).
const (
	HeaderLen = 61 // records follow
	prefixLen = 12 // base_offset and batch_length, which the length does not count
	MagicAt   = 16 // the same place in every message format
)

// Header is the header of a batch of magic 2; it must be at least HeaderLen long.
type Header []byte

// BaseOffset is the offset of the first record.
func (h Header) BaseOffset() int64 { return int64(binary.BigEndian.Uint64(h)) }

// Len is the length of the whole batch with its header, in bytes. It may be any number: the header is not checked.
func (h Header) Len() int { return prefixLen + int(int32(binary.BigEndian.Uint32(h[8:]))) }

// Magic is the message format: 2, or 0 and 1 for message sets from before Kafka 0.11.
func (h Header) Magic() int8 { return int8(h[MagicAt]) }

// Transactional tells whether the batch belongs to a transaction.
func (h Header) Transactional() bool { return binary.BigEndian.Uint16(h[21:])&0x10 != 0 }

// LastOffset is the offset of the last record, which may have been compacted away.
func (h Header) LastOffset() int64 {
	return h.BaseOffset() + int64(int32(binary.BigEndian.Uint32(h[23:])))
}

// ProducerID is the idempotent producer's id, or -1.
func (h Header) ProducerID() int64 { return int64(binary.BigEndian.Uint64(h[43:])) }

// ProducerEpoch is the idempotent producer's epoch, or -1.
func (h Header) ProducerEpoch() int16 { return int16(binary.BigEndian.Uint16(h[51:])) }

// BaseSequence is the sequence of the first record, or -1.
func (h Header) BaseSequence() int32 { return int32(binary.BigEndian.Uint32(h[53:])) }

// Count is the number of records.
func (h Header) Count() int32 { return int32(binary.BigEndian.Uint32(h[57:])) }
