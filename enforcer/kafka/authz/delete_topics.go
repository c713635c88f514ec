package authz

import (
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// deleteTopics: Delete on the cluster or the topic. Versions 1 to 5 name topics, from 6 on each entry has a name or an
// id (KIP-516). The answer to an id tells the name only to whom may Describe it; the id itself is no secret.
func deleteTopics(c *Ctx, req *kmsg.DeleteTopicsRequest) Verdict {
	var refused []kmsg.DeleteTopicsResponseTopic
	forward := *req
	forward.TopicNames = make([]string, 0, len(req.TopicNames))
	for _, name := range req.TopicNames {
		if e := c.deleteTopic(&kmsg.DeleteTopicsRequestTopic{Topic: &name}); e != nil {
			refused = append(refused, *e)
		} else {
			forward.TopicNames = append(forward.TopicNames, name)
		}
	}
	forward.Topics = make([]kmsg.DeleteTopicsRequestTopic, 0, len(req.Topics))
	for i := range req.Topics {
		if e := c.deleteTopic(&req.Topics[i]); e != nil {
			refused = append(refused, *e)
		} else {
			forward.Topics = append(forward.Topics, req.Topics[i])
		}
	}
	if len(refused) == 0 {
		return Verdict{}
	}
	return partly(c, &forward, len(forward.TopicNames)+len(forward.Topics),
		func(_ *Ctx, resp *kmsg.DeleteTopicsResponse) { resp.Topics = append(resp.Topics, refused...) })
}

// deleteTopic is the refusal of one entry, nil when it may be deleted.
func (c *Ctx) deleteTopic(t *kmsg.DeleteTopicsRequestTopic) *kmsg.DeleteTopicsResponseTopic {
	refusal := func(name *string, err *kerr.Error, msg string) *kmsg.DeleteTopicsResponseTopic {
		return &kmsg.DeleteTopicsResponseTopic{Topic: name, TopicID: t.TopicID, ErrorCode: err.Code, ErrorMessage: &msg}
	}
	name, byID := "", t.TopicID != TopicID{}
	switch {
	case t.Topic == nil && !byID:
		return refusal(nil, kerr.InvalidRequest, "Neither topic name nor id were specified.")
	case t.Topic != nil && byID:
		return refusal(t.Topic, kerr.InvalidRequest, "You may not specify both topic name and topic id.")
	case byID:
		var known bool
		if name, known = c.Topic(t.TopicID); !known {
			return refusal(nil, kerr.UnknownTopicID, unknownTopicID)
		}
	default:
		name = *t.Topic
	}
	if c.allowTopicOrCluster(name, kmsg.ACLOperationDelete) {
		return nil
	}
	if byID && !c.Visible(kmsg.ACLResourceTypeTopic, name, kmsg.ACLOperationDescribe) {
		return refusal(nil, kerr.TopicAuthorizationFailed, topicAuthorizationFailed)
	}
	return refusal(&name, kerr.TopicAuthorizationFailed, topicAuthorizationFailed)
}
