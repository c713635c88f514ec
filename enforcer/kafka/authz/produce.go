package authz

import (
	"encoding/binary"
	"slices"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// produce: Topic Write, and TransactionalId Write when a batch is transactional, whatever AddPartitionsToTxn allowed
// before (with KIP-890 a produce adds its partitions itself). With acks=0 a refusal closes the connection, as in a
// broker, so that the producer notices; what is allowed is written all the same.
func produce(c *Ctx, req *kmsg.ProduceRequest) Verdict {
	if transactional(req) && !c.allowTxn(req.TransactionID) {
		part := *req
		part.Topics = eachProduced(req.Topics)
		return refuseProduce(req, Refuse(&part, kerr.TransactionalIDAuthorizationFailed, ""))
	}
	byID := req.Version >= 13
	kept, out := sift(req.Topics, func(t *kmsg.ProduceRequestTopic) *kerr.Error {
		return c.judgeTopic(byID, t.Topic, t.TopicID, kmsg.ACLOperationWrite)
	})
	if len(out) == 0 {
		return Verdict{}
	}
	forward, part := *req, *req
	forward.Topics = kept
	if req.Acks == 0 {
		v := refuseProduce(req, nil)
		if len(kept) > 0 {
			v.Forward = &forward
		}
		return v
	}
	var refused []kmsg.ProduceResponseTopic
	for _, o := range out {
		part.Topics = eachProduced(o.entries)
		refused = append(refused, as[*kmsg.ProduceResponse](Refuse(&part, o.err, "")).Topics...)
	}
	return partly(c, &forward, len(kept), func(_ *Ctx, resp *kmsg.ProduceResponse) {
		resp.Topics = append(resp.Topics, refused...)
	})
}

// eachProduced is the topics as a broker answers about them: each partition once, and no topic without one.
func eachProduced(topics []kmsg.ProduceRequestTopic) []kmsg.ProduceRequestTopic {
	topics = fold(slices.Clone(topics), func(t *kmsg.ProduceRequestTopic) metadataName {
		return metadataName{t.Topic, t.TopicID}
	}, func(first, other *kmsg.ProduceRequestTopic) {
		first.Partitions = slices.Concat(first.Partitions, other.Partitions)
	})
	for i := range topics {
		topics[i].Partitions = once(topics[i].Partitions, func(p *kmsg.ProduceRequestTopicPartition) int32 {
			return p.Partition
		})
	}
	return slices.DeleteFunc(topics, func(t kmsg.ProduceRequestTopic) bool { return len(t.Partitions) == 0 })
}

func refuseProduce(req *kmsg.ProduceRequest, answer kmsg.Response) Verdict {
	if req.Acks == 0 {
		return Verdict{Close: "a produce request with acks=0 was refused"}
	}
	return Verdict{Answer: answer}
}

// allowTxn is AllowTxn for an id that may be missing: nobody may write in a transaction without a name.
func (c *Ctx) allowTxn(id *string) bool {
	if id == nil {
		c.Checks = append(c.Checks, Check{Type: kmsg.ACLResourceTypeTransactionalId, Operation: kmsg.ACLOperationWrite})
		return false
	}
	return c.AllowTxn(*id, kmsg.ACLOperationWrite)
}

// The header of a record batch, magic 2.
const (
	batchLength     = 8  // int32: bytes after this field
	batchAttributes = 21 // int16
	batchHeader     = 61

	attributeTransactional = 0x10
)

// transactional tells whether a batch of the request says that it belongs to a transaction.
func transactional(req *kmsg.ProduceRequest) bool {
	for i := range req.Topics {
		for _, p := range req.Topics[i].Partitions {
			for b := p.Records; len(b) >= batchHeader; {
				if binary.BigEndian.Uint16(b[batchAttributes:])&attributeTransactional != 0 {
					return true
				}
				size := int64(binary.BigEndian.Uint32(b[batchLength:])) + batchLength + 4
				b = b[min(size, int64(len(b))):]
			}
		}
	}
	return false
}
