package authz

import (
	"slices"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// createPartitions: Topic Alter. A name that comes twice is not asked about, and answered once.
func createPartitions(c *Ctx, req *kmsg.CreatePartitionsRequest) Verdict {
	name := func(t *kmsg.CreatePartitionsRequestTopic) string { return t.Topic }
	twice := repeated(req.Topics, name)
	kept, out := sift(req.Topics, func(t *kmsg.CreatePartitionsRequestTopic) *kerr.Error {
		if twice[t.Topic] {
			return errTopicTwice
		}
		return c.judgeTopic(false, t.Topic, TopicID{}, kmsg.ACLOperationAlter)
	})
	if len(out) == 0 {
		return Verdict{}
	}
	forward, part := *req, *req
	forward.Topics = kept
	var refused []kmsg.CreatePartitionsResponseTopic
	for _, o := range out {
		msg := ""
		if o.err == errTopicTwice {
			msg = o.err.Description
		}
		part.Topics = once(o.entries, name)
		refused = append(refused, as[*kmsg.CreatePartitionsResponse](Refuse(&part, o.err, msg)).Topics...)
	}
	return partly(c, &forward, len(kept), func(_ *Ctx, resp *kmsg.CreatePartitionsResponse) {
		resp.Topics = slices.Concat(refused, resp.Topics)
	})
}
