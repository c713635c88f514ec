package authz

import (
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// describeProducers: Topic Read. A name no topic can have is left to the broker, which says so before it asks for
// rights. Topics are answered in the order asked.
func describeProducers(c *Ctx, req *kmsg.DescribeProducersRequest) Verdict {
	forward := *req
	forward.Topics = make([]kmsg.DescribeProducersRequestTopic, 0, len(req.Topics))
	ours := make([]*kmsg.DescribeProducersResponseTopic, len(req.Topics))
	for i := range req.Topics {
		t := &req.Topics[i]
		if !legalTopic(t.Topic) || c.AllowTopic(t.Topic, kmsg.ACLOperationRead) {
			forward.Topics = append(forward.Topics, *t)
			continue
		}
		part := &kmsg.DescribeProducersRequest{Topics: req.Topics[i : i+1]}
		answer := Refuse(part, kerr.TopicAuthorizationFailed, topicAuthorizationFailed)
		ours[i] = &as[*kmsg.DescribeProducersResponse](answer).Topics[0]
	}
	if len(forward.Topics) == len(req.Topics) {
		return Verdict{}
	}
	return partly(c, &forward, len(forward.Topics), func(_ *Ctx, resp *kmsg.DescribeProducersResponse) {
		resp.Topics = weave(resp.Topics, ours)
	})
}
