package authz

import (
	"slices"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// noTopic is a name no topic can have. An AddPartitionsToTxn that names it fails as a whole, whatever else it names.
const noTopic = "klamm:refused"

// addPartitionsToTxn: TransactionalId Write and Topic Write. It is all or nothing: when one topic is refused, the
// others get OPERATION_NOT_ATTEMPTED, or UNKNOWN_TOPIC_OR_PARTITION where there is none, and the transaction stays as
// it was. Which of them there are only the broker knows, so it is asked, with noTopic in place of the refused ones.
//
// Versions 4 and up (KIP-890) are for brokers, which verify what they append: Cluster ClusterAction, and no more.
func addPartitionsToTxn(c *Ctx, req *kmsg.AddPartitionsToTxnRequest) Verdict {
	if req.Version >= 4 {
		return c.onCluster(req, kmsg.ACLOperationClusterAction, "")
	}
	if !c.AllowTxn(req.TransactionalID, kmsg.ACLOperationWrite) {
		return Verdict{Answer: Refuse(req, kerr.TransactionalIDAuthorizationFailed, "")}
	}
	kept, out := sift(req.Topics, func(t *kmsg.AddPartitionsToTxnRequestTopic) *kerr.Error {
		return c.judgeTopic(false, t.Topic, TopicID{}, kmsg.ACLOperationWrite)
	})
	if len(out) == 0 {
		return Verdict{}
	}
	forward, part := *req, *req
	part.Topics = eachPartition(out[0].entries)
	refused := as[*kmsg.AddPartitionsToTxnResponse](Refuse(&part, out[0].err, "")).Topics
	forward.Topics = append(eachPartition(kept),
		kmsg.AddPartitionsToTxnRequestTopic{Topic: noTopic, Partitions: []int32{0}})
	return partly(c, &forward, len(kept), func(_ *Ctx, resp *kmsg.AddPartitionsToTxnResponse) {
		resp.Topics = slices.DeleteFunc(resp.Topics, func(t kmsg.AddPartitionsToTxnResponseTopic) bool {
			return t.Topic == noTopic
		})
		resp.Topics = slices.Concat(refused, resp.Topics)
	})
}

// eachPartition is the topics as a broker answers about them: each partition once, and no topic without one.
func eachPartition(topics []kmsg.AddPartitionsToTxnRequestTopic) []kmsg.AddPartitionsToTxnRequestTopic {
	topics = fold(slices.Clone(topics), func(t *kmsg.AddPartitionsToTxnRequestTopic) string { return t.Topic },
		func(first, other *kmsg.AddPartitionsToTxnRequestTopic) {
			first.Partitions = slices.Concat(first.Partitions, other.Partitions)
		})
	for i := range topics {
		topics[i].Partitions = once(topics[i].Partitions, func(p *int32) int32 { return *p })
	}
	return slices.DeleteFunc(topics, func(t kmsg.AddPartitionsToTxnRequestTopic) bool { return len(t.Partitions) == 0 })
}
