package message

import (
	"testing"

	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
)

func TestABatchIsOneThatClientsRead(t *testing.T) {
	b := Batch{Values: []string{"a", "bc"}, Timestamp: 17, ProducerID: 5, ProducerEpoch: 1, FirstSequence: 3}
	for _, corrupt := range []bool{false, true} {
		b.Corrupt = corrupt
		answer := &kmsg.FetchResponseTopicPartition{RecordBatches: b.AppendTo(nil)}
		fetched, _ := kgo.ProcessFetchPartition(kgo.ProcessFetchPartitionOpts{}, answer, nil, nil)
		if corrupt {
			if fetched.Err == nil {
				t.Error("a wrong checksum passes")
			}
			continue
		}
		if fetched.Err != nil || len(fetched.Records) != 2 || string(fetched.Records[1].Value) != "bc" ||
			fetched.Records[1].Timestamp.UnixMilli() != 17 || fetched.Records[1].ProducerID != 5 {
			t.Errorf("got %+v, error %v", fetched.Records, fetched.Err)
		}
	}
}
