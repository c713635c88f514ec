package main

import (
	"encoding/binary"
	"hash/crc32"
	"math/rand/v2"
	"time"

	"github.com/twmb/franz-go/pkg/kmsg"
)

// batch is a record batch of about so many bytes, never more: records of up to 1 MiB, of bytes that repeat nowhere.
func batch(size int) []byte {
	const header, overhead = 61, 30
	size -= header
	seed := rand.NewChaCha8([32]byte{1})
	now := time.Now().UnixMilli()
	var records []byte
	n := int32(0)
	for size-len(records) > 2*overhead {
		value := make([]byte, min(mib, size-len(records)-overhead))
		_, _ = seed.Read(value) // it never fails
		r := kmsg.Record{OffsetDelta: n, Value: value}
		r.Length = int32(len(r.AppendTo(nil)) - 1)
		records = r.AppendTo(records)
		n++
	}
	b := kmsg.RecordBatch{Magic: 2, Length: int32(len(records) + header - 12), PartitionLeaderEpoch: -1,
		LastOffsetDelta: n - 1, FirstTimestamp: now, MaxTimestamp: now, ProducerID: -1, ProducerEpoch: -1,
		FirstSequence: -1, NumRecords: n, Records: records}
	out := b.AppendTo(make([]byte, 0, len(records)+header))
	binary.BigEndian.PutUint32(out[17:], crc32.Checksum(out[21:], crc32.MakeTable(crc32.Castagnoli)))
	return out
}
