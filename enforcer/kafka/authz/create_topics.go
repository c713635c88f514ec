package authz

import (
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// createTopics: Create on the cluster or the topic. Without Topic DescribeConfigs the answer (v5+) tells neither the
// configuration nor the partition count of what was created.
func createTopics(c *Ctx, req *kmsg.CreateTopicsRequest) Verdict {
	kept, out := sift(req.Topics, func(t *kmsg.CreateTopicsRequestTopic) *kerr.Error {
		if !c.allowTopicOrCluster(t.Topic, kmsg.ACLOperationCreate) {
			return kerr.TopicAuthorizationFailed
		}
		return nil
	})
	hide := func(c *Ctx, resp *kmsg.CreateTopicsResponse) {
		for i := range resp.Topics {
			c.hideConfigs(&resp.Topics[i])
		}
	}
	switch {
	case len(out) > 0:
		forward, part := *req, *req
		forward.Topics, part.Topics = kept, out[0].entries
		refused := as[*kmsg.CreateTopicsResponse](Refuse(&part, out[0].err, "Authorization failed.")).Topics
		return partly(c, &forward, len(kept), func(c *Ctx, resp *kmsg.CreateTopicsResponse) {
			hide(c, resp)
			resp.Topics = append(resp.Topics, refused...)
		})
	case req.Version >= 5:
		return Verdict{Edit: edit(hide)}
	default:
		return Verdict{}
	}
}

// hideConfigs is what ReplicationControlManager answers without DescribeConfigs.
func (c *Ctx) hideConfigs(t *kmsg.CreateTopicsResponseTopic) {
	if t.ErrorCode != 0 || c.Visible(kmsg.ACLResourceTypeTopic, t.Topic, kmsg.ACLOperationDescribeConfigs) {
		return
	}
	t.NumPartitions, t.ReplicationFactor = -1, -1
	t.Configs = []kmsg.CreateTopicsResponseTopicConfig{}
	t.ConfigErrorCode = kerr.TopicAuthorizationFailed.Code
}
