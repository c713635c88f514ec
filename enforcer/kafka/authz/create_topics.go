package authz

import (
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// clusterMetadata is the controllers' own topic (Topic.CLUSTER_METADATA_TOPIC_NAME).
const clusterMetadata = "__cluster_metadata"

// What a broker refuses before it asks whether the client may.
var (
	errTopicTwice    = &kerr.Error{Code: kerr.InvalidRequest.Code, Description: "Duplicate topic name."}
	errTopicReserved = &kerr.Error{Code: kerr.InvalidRequest.Code,
		Description: "Creation of internal topic " + clusterMetadata + " is prohibited."}
)

// createTopics: Create on the cluster or the topic. A name that comes twice is not asked about, and answered once.
// Without Topic DescribeConfigs the answer (v5+) tells neither the configuration nor the partition count of what was
// created.
func createTopics(c *Ctx, req *kmsg.CreateTopicsRequest) Verdict {
	name := func(t *kmsg.CreateTopicsRequestTopic) string { return t.Topic }
	twice := repeated(req.Topics, name)
	kept, out := sift(req.Topics, func(t *kmsg.CreateTopicsRequestTopic) *kerr.Error {
		switch {
		case twice[t.Topic]:
			return errTopicTwice
		case t.Topic == clusterMetadata:
			return errTopicReserved
		case !c.allowTopicOrCluster(t.Topic, kmsg.ACLOperationCreate):
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
		forward.Topics = kept
		var refused []kmsg.CreateTopicsResponseTopic
		for _, o := range out {
			msg := o.err.Description
			if o.err == kerr.TopicAuthorizationFailed {
				msg = "Authorization failed."
			}
			part.Topics = once(o.entries, name)
			refused = append(refused, as[*kmsg.CreateTopicsResponse](Refuse(&part, o.err, msg)).Topics...)
		}
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
