package authz

import (
	"slices"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// offsetCommit: Group Read, then Topic Read. A refused group has its error on each partition; refused topics come
// before the broker's. From v10 topics are named by id (KIP-848).
func offsetCommit(c *Ctx, req *kmsg.OffsetCommitRequest) Verdict {
	if err := c.judgeGroup(req.Group, kmsg.ACLOperationRead); err != nil {
		return Verdict{Answer: Refuse(req, err, "")}
	}
	kept, out := sift(req.Topics, func(t *kmsg.OffsetCommitRequestTopic) *kerr.Error {
		return c.judgeTopic(req.Version >= 10, t.Topic, t.TopicID, kmsg.ACLOperationRead)
	})
	if len(out) == 0 {
		return Verdict{}
	}
	forward, part := *req, *req
	forward.Topics = kept
	var refused []kmsg.OffsetCommitResponseTopic
	for _, o := range out {
		part.Topics = o.entries
		refused = append(refused, as[*kmsg.OffsetCommitResponse](Refuse(&part, o.err, "")).Topics...)
	}
	return partly(c, &forward, len(kept), func(_ *Ctx, resp *kmsg.OffsetCommitResponse) {
		resp.Topics = slices.Concat(refused, resp.Topics)
	})
}
