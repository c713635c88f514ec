package message

import (
	"encoding/binary"
	"hash/crc32"

	"github.com/twmb/franz-go/pkg/kmsg"
)

// Batch is a batch of uncompressed records (KIP-98).
type Batch struct {
	Values        []string
	Timestamp     int64 // of every record
	ProducerID    int64
	ProducerEpoch int16
	FirstSequence int32
	Transactional bool
	Corrupt       bool // the checksum is wrong
}

const (
	batchMagic        = 2
	transactionalFlag = 1 << 4
	lengthFrom, crcAt = 12, 17 // a batch's length counts what follows it, its checksum what follows that
)

// Default is a batch of no idempotent producer.
func (b *Batch) Default() { *b = Batch{ProducerID: -1, ProducerEpoch: -1, FirstSequence: -1} }

// AppendTo appends the batch as Produce carries it.
func (b *Batch) AppendTo(dst []byte) []byte {
	batch := kmsg.RecordBatch{Magic: batchMagic, PartitionLeaderEpoch: -1, FirstTimestamp: b.Timestamp,
		MaxTimestamp: b.Timestamp, LastOffsetDelta: int32(len(b.Values)) - 1, NumRecords: int32(len(b.Values)),
		ProducerID: b.ProducerID, ProducerEpoch: b.ProducerEpoch, FirstSequence: b.FirstSequence}
	if b.Transactional {
		batch.Attributes |= transactionalFlag
	}
	for i, value := range b.Values {
		r := kmsg.Record{OffsetDelta: int32(i), Value: []byte(value)}
		r.Length = int32(len(r.AppendTo(nil)) - 1) // its own length is one byte: zero, or small
		batch.Records = r.AppendTo(batch.Records)
	}
	raw := batch.AppendTo(nil)
	binary.BigEndian.PutUint32(raw[lengthFrom-4:], uint32(len(raw)-lengthFrom))
	crc := crc32.Checksum(raw[crcAt+4:], crc32.MakeTable(crc32.Castagnoli))
	if b.Corrupt {
		crc++
	}
	binary.BigEndian.PutUint32(raw[crcAt:], crc)
	return append(dst, raw...)
}
