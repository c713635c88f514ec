package authz

import (
	"slices"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// What a broker refuses before it asks whether the client may.
var (
	errIDTwice   = &kerr.Error{Code: kerr.InvalidRequest.Code, Description: "Duplicate topic id."}
	errNameAndID = &kerr.Error{Code: kerr.InvalidRequest.Code,
		Description: "You may not specify both topic name and topic id."}
	errNoNameAndID = &kerr.Error{Code: kerr.InvalidRequest.Code, Description: "Neither topic name nor id were specified."}
)

// deleteTopics: Delete on the cluster or the topic. Versions 1 to 5 name topics, from 6 on each entry has a name or an
// id (KIP-516). The answer to an id tells the name only to whom may Describe it; the id itself is no secret. What comes
// twice is not asked about, and answered once.
func deleteTopics(c *Ctx, req *kmsg.DeleteTopicsRequest) Verdict {
	type entry = kmsg.DeleteTopicsRequestTopic
	all := slices.Clone(req.Topics)
	if req.Version < 6 {
		all = nil
		for _, name := range req.TopicNames {
			all = append(all, entry{Topic: &name})
		}
	}
	key := func(t *entry) metadataName {
		if t.Topic != nil && t.TopicID == (TopicID{}) {
			return metadataName{name: *t.Topic}
		}
		return metadataName{id: t.TopicID}
	}
	named := slices.DeleteFunc(slices.Clone(all), func(t entry) bool {
		return (t.Topic == nil) == (t.TopicID == TopicID{}) // it has both, or none
	})
	twice := repeated(named, key)
	forward := *req
	forward.Topics, forward.TopicNames = make([]entry, 0, len(all)), make([]string, 0, len(all))
	var refused []kmsg.DeleteTopicsResponseTopic
	answered := map[metadataName]bool{}
	for i := range all {
		t := &all[i]
		if k := key(t); twice[k] && (t.Topic == nil) != (t.TopicID == TopicID{}) {
			if !answered[k] {
				refused = append(refused, refuseDelete(t, t.Topic, duplicateOf(t)))
			}
			answered[k] = true
			continue
		}
		e := c.deleteTopic(t)
		switch {
		case e != nil:
			refused = append(refused, *e)
		case req.Version < 6:
			forward.TopicNames = append(forward.TopicNames, *t.Topic)
		default:
			forward.Topics = append(forward.Topics, *t)
		}
	}
	if len(refused) == 0 {
		return Verdict{}
	}
	return partly(c, &forward, len(forward.TopicNames)+len(forward.Topics),
		func(_ *Ctx, resp *kmsg.DeleteTopicsResponse) { resp.Topics = append(resp.Topics, refused...) })
}

func duplicateOf(t *kmsg.DeleteTopicsRequestTopic) *kerr.Error {
	if t.Topic != nil {
		return errTopicTwice
	}
	return errIDTwice
}

func refuseDelete(
	t *kmsg.DeleteTopicsRequestTopic, name *string, err *kerr.Error,
) kmsg.DeleteTopicsResponseTopic {
	msg := deleteErrors[err]
	if msg == "" {
		msg = err.Description
	}
	return kmsg.DeleteTopicsResponseTopic{Topic: name, TopicID: t.TopicID, ErrorCode: err.Code, ErrorMessage: &msg}
}

// deleteErrors are the broker's texts (Errors.java).
var deleteErrors = map[*kerr.Error]string{
	kerr.UnknownTopicID:           unknownTopicID,
	kerr.UnknownTopicOrPartition:  "This server does not host this topic-partition.",
	kerr.TopicAuthorizationFailed: topicAuthorizationFailed,
}

// deleteTopic is the refusal of one entry, nil when it may be deleted.
func (c *Ctx) deleteTopic(t *kmsg.DeleteTopicsRequestTopic) *kmsg.DeleteTopicsResponseTopic {
	refuse := func(name *string, err *kerr.Error) *kmsg.DeleteTopicsResponseTopic {
		r := refuseDelete(t, name, err)
		return &r
	}
	switch byID := t.TopicID != (TopicID{}); {
	case t.Topic == nil && !byID:
		return refuse(nil, errNoNameAndID)
	case t.Topic != nil && byID:
		return refuse(t.Topic, errNameAndID)
	case byID:
		name, known := c.Topic(t.TopicID)
		switch {
		case !known:
			return refuse(nil, kerr.UnknownTopicID)
		case c.allowTopicOrCluster(name, kmsg.ACLOperationDelete):
			return nil
		}
		c.doubt(t.TopicID)
		if c.Visible(kmsg.ACLResourceTypeTopic, name, kmsg.ACLOperationDescribe) {
			return refuse(&name, kerr.TopicAuthorizationFailed)
		}
		return refuse(nil, kerr.TopicAuthorizationFailed)
	}
	if err := c.deleteNamed(*t.Topic); err != nil {
		return refuse(t.Topic, err)
	}
	return nil
}

// deleteNamed decides about a topic's name. To whom may Describe it a broker says first whether there is such a topic.
func (c *Ctx) deleteNamed(name string) *kerr.Error {
	allowed := c.allowTopicOrCluster(name, kmsg.ACLOperationDelete)
	if allowed && c.Visible(kmsg.ACLResourceTypeCluster, clusterName, kmsg.ACLOperationDelete) {
		return nil
	}
	describable := c.Visible(kmsg.ACLResourceTypeTopic, name, kmsg.ACLOperationDescribe)
	switch _, edition := c.topicNames(); {
	case allowed && describable:
		return nil
	case allowed:
		return c.judgeTopic(false, name, TopicID{}, kmsg.ACLOperationDescribe)
	case !describable:
		return kerr.TopicAuthorizationFailed
	case !c.Renewed:
		c.Stale = true
		return kerr.TopicAuthorizationFailed
	case edition == 0 || c.listed(name):
		return kerr.TopicAuthorizationFailed
	}
	return kerr.UnknownTopicOrPartition
}
