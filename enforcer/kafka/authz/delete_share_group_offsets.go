package authz

import (
	"slices"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// deleteShareGroupOffsets (KIP-932): Group Delete, then Topic Read. Refused topics come before the broker's, and are
// left out where the broker reports an error of the whole group, which it is asked for also when no topic is left.
func deleteShareGroupOffsets(c *Ctx, req *kmsg.DeleteShareGroupOffsetsRequest) Verdict {
	if err := c.judgeGroup(req.GroupID, kmsg.ACLOperationDelete); err != nil {
		return Verdict{Answer: Refuse(req, err, groupAuthorizationFailed)}
	}
	kept, out := sift(req.Topics, func(t *kmsg.DeleteShareGroupOffsetsRequestTopic) *kerr.Error {
		return c.judgeTopic(false, t.Topic, TopicID{}, kmsg.ACLOperationRead)
	})
	if len(out) == 0 {
		return Verdict{}
	}
	forward := *req
	forward.Topics = kept
	var refused []kmsg.DeleteShareGroupOffsetsResponseTopic
	for _, t := range out[0].entries {
		r := kmsg.NewDeleteShareGroupOffsetsResponseTopic()
		r.Topic, r.ErrorCode, r.ErrorMessage = t.Topic, out[0].err.Code, new(topicAuthorizationFailed)
		refused = append(refused, r)
	}
	return Verdict{Forward: &forward, Edit: edit(func(_ *Ctx, resp *kmsg.DeleteShareGroupOffsetsResponse) {
		if resp.ErrorCode == 0 {
			resp.Topics = slices.Concat(refused, resp.Topics)
		}
	})}
}
