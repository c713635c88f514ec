package authz

import (
	"slices"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// createPartitions: Topic Alter.
func createPartitions(c *Ctx, req *kmsg.CreatePartitionsRequest) Verdict {
	kept, out := sift(req.Topics, func(t *kmsg.CreatePartitionsRequestTopic) *kerr.Error {
		return c.judgeTopic(false, t.Topic, TopicID{}, kmsg.ACLOperationAlter)
	})
	if len(out) == 0 {
		return Verdict{}
	}
	forward, part := *req, *req
	forward.Topics, part.Topics = kept, out[0].entries
	refused := as[*kmsg.CreatePartitionsResponse](Refuse(&part, out[0].err, "")).Topics
	return partly(c, &forward, len(kept), func(_ *Ctx, resp *kmsg.CreatePartitionsResponse) {
		resp.Topics = slices.Concat(refused, resp.Topics)
	})
}
