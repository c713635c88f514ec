package authz

import (
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// listOffsets: Topic Describe. Refused topics follow the broker's, with the error on each partition.
func listOffsets(c *Ctx, req *kmsg.ListOffsetsRequest) Verdict {
	kept, out := sift(req.Topics, func(t *kmsg.ListOffsetsRequestTopic) *kerr.Error {
		return c.judgeTopic(false, t.Topic, TopicID{}, kmsg.ACLOperationDescribe)
	})
	if len(out) == 0 {
		return Verdict{}
	}
	forward, part := *req, *req
	forward.Topics = kept
	var refused []kmsg.ListOffsetsResponseTopic
	for _, o := range out {
		part.Topics = o.entries
		refused = append(refused, as[*kmsg.ListOffsetsResponse](Refuse(&part, o.err, "")).Topics...)
	}
	return partly(c, &forward, len(kept), func(_ *Ctx, resp *kmsg.ListOffsetsResponse) {
		resp.Topics = append(resp.Topics, refused...)
	})
}
