package authz

import (
	"slices"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// metadata: Topic Describe. Topics the client did not name are left out of the answer; named ones are refused each with
// the identifier the client used, once. Whatever is refused, brokers, cluster id and controller still come from the
// broker.
//
// Auto-creation takes Create on the cluster or the topic. Whether a topic exists, only the broker knows: when one of
// those named may not be created, the request goes out with auto-creation off for all. A topic that then proves
// missing is TOPIC_AUTHORIZATION_FAILED where it may not be created and the cluster creates topics, else it stays
// unknown. Those that may be created are, by the first request that names them alone.
func metadata(c *Ctx, req *kmsg.MetadataRequest) Verdict {
	if allTopics(req) {
		return Verdict{Edit: edit(func(c *Ctx, resp *kmsg.MetadataResponse) {
			c.keepVisible(resp)
			c.limitMetadataOperations(resp)
		})}
	}
	entries, same, invalid := metadataTopics(req)
	if invalid != nil {
		return Verdict{Answer: refuseMetadata(req, invalid)}
	}
	kept, out := sift(entries, func(t *kmsg.MetadataRequestTopic) *kerr.Error {
		if t.Topic == nil {
			return c.judgeTopic(true, "", t.TopicID, kmsg.ACLOperationDescribe)
		}
		return c.judgeTopic(false, *t.Topic, t.TopicID, kmsg.ACLOperationDescribe)
	})
	forward, part := *req, *req
	forward.Topics = kept
	var refused []kmsg.MetadataResponseTopic
	for _, o := range out {
		part.Topics = once(o.entries, nameOf)
		refused = append(refused, as[*kmsg.MetadataResponse](Refuse(&part, o.err, "")).Topics...)
	}

	noCreate := c.noCreate(req, kept)
	// What cannot be said in an old version, namely "no topic" (v0) and "create none" (below v4), is asked as "all
	// topics", and the answer cut down to what the client named.
	all := req.Version == 0 && len(kept) == 0 && len(out) > 0 || req.Version < 4 && len(noCreate) > 0
	if all {
		forward.Topics = nil
	}
	forward.AllowAutoTopicCreation = req.AllowAutoTopicCreation && len(noCreate) == 0

	v := Verdict{}
	if all || !same || len(out) > 0 || forward.AllowAutoTopicCreation != req.AllowAutoTopicCreation {
		v.Forward = &forward
	}
	if v.Forward != nil || req.IncludeTopicAuthorizedOperations || req.IncludeClusterAuthorizedOperations {
		v.Edit = edit(func(c *Ctx, resp *kmsg.MetadataResponse) {
			if all {
				keepNamed(resp, kept)
			}
			if c.AutoCreate {
				c.refuseMissing(resp, noCreate)
			}
			c.limitMetadataOperations(resp)
			resp.Topics = append(resp.Topics, refused...)
		})
	}
	return v
}

func allTopics(req *kmsg.MetadataRequest) bool {
	return req.Topics == nil || req.Version == 0 && len(req.Topics) == 0
}

// metadataName tells the topics of a request apart.
type metadataName struct {
	name string
	id   TopicID
}

func nameOf(t *kmsg.MetadataRequestTopic) metadataName {
	if t.Topic != nil {
		return metadataName{name: *t.Topic}
	}
	return metadataName{id: t.TopicID}
}

// metadataTopics are the entries a broker looks at, and whether those are the request's: from version 12 on, when one
// has an id, only ids count, and names beside them go out to nobody. Below, an entry without a name or with an id is
// not valid, and from there on one without both is what a broker trips over (UNKNOWN_SERVER_ERROR).
func metadataTopics(req *kmsg.MetadataRequest) (entries []kmsg.MetadataRequestTopic, same bool, invalid *kerr.Error) {
	byID, nameless := false, false
	for _, t := range req.Topics {
		hasID := t.TopicID != TopicID{}
		if req.Version < 12 && (hasID || t.Topic == nil) {
			return nil, false, kerr.InvalidRequest
		}
		byID, nameless = byID || hasID, nameless || t.Topic == nil && !hasID
	}
	switch {
	case byID:
	case nameless:
		return nil, false, kerr.UnknownServerError
	default:
		return req.Topics, true, nil
	}
	same = true
	for _, t := range req.Topics {
		same = same && t.Topic == nil
		if (t.TopicID != TopicID{}) {
			t.Topic = nil
			entries = append(entries, t)
		}
	}
	return entries, same, nil
}

// refuseMetadata refuses a whole request. It has no null for a name.
func refuseMetadata(req *kmsg.MetadataRequest, err *kerr.Error) kmsg.Response {
	resp := as[*kmsg.MetadataResponse](Refuse(req, err, ""))
	for i := range resp.Topics {
		if resp.Topics[i].Topic == nil {
			resp.Topics[i].Topic = new(string)
		}
	}
	return resp
}

// noCreate are those of the named topics that the request would create, were they missing, without the right to.
func (c *Ctx) noCreate(req *kmsg.MetadataRequest, topics []kmsg.MetadataRequestTopic) (names map[string]bool) {
	if req.Version >= 4 && !req.AllowAutoTopicCreation ||
		c.Visible(kmsg.ACLResourceTypeCluster, clusterName, kmsg.ACLOperationCreate) {
		return nil
	}
	names = map[string]bool{}
	for _, t := range topics {
		if t.Topic != nil && !c.Visible(kmsg.ACLResourceTypeTopic, *t.Topic, kmsg.ACLOperationCreate) {
			names[*t.Topic] = true
		}
	}
	return names
}

// refuseMissing answers for the topics that would have had to be created. Only now is it known that a right was
// missing.
func (c *Ctx) refuseMissing(resp *kmsg.MetadataResponse, noCreate map[string]bool) {
	for i := range resp.Topics {
		t := &resp.Topics[i]
		missing := t.ErrorCode == kerr.UnknownTopicOrPartition.Code || t.ErrorCode == kerr.InvalidTopicException.Code
		if missing && t.Topic != nil && noCreate[*t.Topic] &&
			!c.allowTopicOrCluster(*t.Topic, kmsg.ACLOperationCreate) {
			t.ErrorCode, t.TopicID, t.AuthorizedOperations = kerr.TopicAuthorizationFailed.Code, TopicID{}, noOperations
		}
	}
}

// keepNamed cuts an answer about all topics down to the named ones. Those not in it do not exist.
func keepNamed(resp *kmsg.MetadataResponse, named []kmsg.MetadataRequestTopic) {
	var topics []kmsg.MetadataResponseTopic
	there := map[string]kmsg.MetadataResponseTopic{}
	for _, t := range resp.Topics {
		if t.Topic != nil {
			there[*t.Topic] = t
		}
	}
	for _, n := range once(named, nameOf) {
		if t, is := there[*n.Topic]; is {
			topics = append(topics, t)
			continue
		}
		t := kmsg.NewMetadataResponseTopic()
		t.Topic, t.ErrorCode = n.Topic, kerr.UnknownTopicOrPartition.Code
		topics = append(topics, t)
	}
	resp.Topics = topics
}

// keepVisible leaves out the topics the subject may not Describe.
func (c *Ctx) keepVisible(resp *kmsg.MetadataResponse) {
	resp.Topics = slices.DeleteFunc(resp.Topics, func(t kmsg.MetadataResponseTopic) bool {
		return t.Topic == nil || !c.Visible(kmsg.ACLResourceTypeTopic, *t.Topic, kmsg.ACLOperationDescribe)
	})
}

func (c *Ctx) limitMetadataOperations(resp *kmsg.MetadataResponse) {
	for i := range resp.Topics {
		c.limitTopicOperations(resp.Topics[i].Topic, &resp.Topics[i].AuthorizedOperations)
	}
	c.limitClusterOperations(&resp.AuthorizedOperations)
}
