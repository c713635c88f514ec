package authz

import (
	"slices"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// shareAcknowledge (KIP-932): Group Read, then Topic Read. It reaches the broker also when no topic is left: the share
// session's epoch counts on with it, and its last one closes the session.
func shareAcknowledge(c *Ctx, req *kmsg.ShareAcknowledgeRequest) Verdict {
	if err := c.judgeShare(req.GroupID, req.MemberID); err != nil {
		return Verdict{Answer: Refuse(req, err, "")}
	}
	kept, out := sift(req.Topics, func(t *kmsg.ShareAcknowledgeRequestTopic) *kerr.Error {
		return c.judgeTopic(true, "", t.TopicID, kmsg.ACLOperationRead)
	})
	if len(c.Missing) > 0 && !c.Resolved {
		return Verdict{}
	}
	switch mine := c.Share.is(*req.GroupID, *req.MemberID); {
	case !mine:
	case req.ShareSessionEpoch == shareCloses:
		c.Share = nil
	case req.ShareSessionEpoch != c.Share.epoch:
		return Verdict{Answer: Refuse(req, kerr.InvalidShareSessionEpoch, "")}
	default:
		c.Share.epoch = nextEpoch(c.Share.epoch)
	}
	if len(out) == 0 {
		return Verdict{}
	}
	forward := *req
	forward.Topics = kept
	var refused []kmsg.ShareAcknowledgeResponseTopic
	for _, o := range out {
		for i := range o.entries {
			refused = append(refused, refusedAcks(req, &o.entries[i], o.err))
		}
	}
	return Verdict{Forward: &forward, Edit: edit(func(_ *Ctx, resp *kmsg.ShareAcknowledgeResponse) {
		if resp.ErrorCode == 0 {
			resp.Topics = append(resp.Topics, refused...)
		}
	})}
}

func refusedAcks(
	req *kmsg.ShareAcknowledgeRequest, t *kmsg.ShareAcknowledgeRequestTopic, err *kerr.Error,
) kmsg.ShareAcknowledgeResponseTopic {
	refused := kmsg.NewShareAcknowledgeResponseTopic()
	refused.TopicID = t.TopicID
	for _, p := range t.Partitions {
		r := newAckRun(req.Version, req.IsRenewAck)
		for _, b := range p.AcknowledgementBatches {
			r.take(b.FirstOffset, b.LastOffset, b.AcknowledgeTypes)
		}
		rp := kmsg.NewShareAcknowledgeResponseTopicPartition()
		rp.Partition, rp.ErrorCode = p.Partition, r.refusal(err).Code
		refused.Partitions = append(refused.Partitions, rp)
	}
	return refused
}

// Kinds of acknowledgements (AcknowledgeType).
const (
	ackReject int8 = 3
	ackRenew  int8 = 4 // v2+ (KIP-1222)
)

// ackRun is KafkaApis.validateAcknowledgementBatches for one partition: a broker looks at it before it looks at rights.
type ackRun struct {
	last   int64 // offset of the batch before
	top    int8  // the highest type
	renews bool  // the request says that it has renewals
	bad    bool
}

func newAckRun(version int16, renews bool) ackRun {
	r := ackRun{last: -1, top: ackReject, renews: renews}
	if version >= 2 {
		r.top = ackRenew
	}
	return r
}

func (r *ackRun) take(first, last int64, types []int8) {
	ascends := first <= last && first >= r.last
	fits := len(types) == 1 || len(types) > 1 && last-first == int64(len(types)-1)
	r.bad = r.bad || !ascends || !fits || slices.ContainsFunc(types, func(t int8) bool {
		return t < 0 || t > r.top || t == ackRenew && !r.renews
	})
	r.last = last
}

// refusal is the error of a partition whose topic is refused with err.
func (r *ackRun) refusal(err *kerr.Error) *kerr.Error {
	if r.bad && err != kerr.UnknownTopicID {
		return kerr.InvalidRequest
	}
	return err
}
