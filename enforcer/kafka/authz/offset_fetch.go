package authz

import (
	"slices"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// offsetFetch: Group Describe, then Topic Describe. Refused topics follow the broker's, with the error on each
// partition; they are left out where the broker reports an error of the whole group. A request for all topics (null)
// is answered with those the subject may describe. One group per request until v7, several from v8 (KIP-709), topics
// by id from v10.
func offsetFetch(c *Ctx, req *kmsg.OffsetFetchRequest) Verdict {
	if req.Version >= 8 {
		return offsetFetchGroups(c, req)
	}
	if err := c.judgeGroup(req.Group, kmsg.ACLOperationDescribe); err != nil {
		resp := req.ResponseKind().(*kmsg.OffsetFetchResponse)
		resp.ErrorCode = err.Code
		if req.Version < 2 { // has no error of the whole group
			resp.Topics = refusedOffsets(req.Topics, err)
		}
		return Verdict{Answer: resp}
	}
	if req.Topics == nil {
		return Verdict{Edit: edit(func(c *Ctx, resp *kmsg.OffsetFetchResponse) {
			resp.Topics = slices.DeleteFunc(resp.Topics, func(t kmsg.OffsetFetchResponseTopic) bool {
				return !c.Visible(kmsg.ACLResourceTypeTopic, t.Topic, kmsg.ACLOperationDescribe)
			})
		})}
	}
	kept, out := sift(req.Topics, func(t *kmsg.OffsetFetchRequestTopic) *kerr.Error {
		return c.judgeTopic(false, t.Topic, TopicID{}, kmsg.ACLOperationDescribe)
	})
	if len(out) == 0 {
		return Verdict{}
	}
	forward := *req
	forward.Topics = kept
	return partly(c, &forward, len(kept), func(_ *Ctx, resp *kmsg.OffsetFetchResponse) {
		for _, o := range out {
			if resp.ErrorCode == 0 {
				resp.Topics = append(resp.Topics, refusedOffsets(o.entries, o.err)...)
			}
		}
	})
}

func offsetFetchGroups(c *Ctx, req *kmsg.OffsetFetchRequest) Verdict {
	byID := req.Version >= 10
	forward := *req
	forward.Groups = make([]kmsg.OffsetFetchRequestGroup, 0, len(req.Groups))
	ours := make([]*kmsg.OffsetFetchResponseGroup, len(req.Groups)) // answered without the broker
	refusedOf := make(map[string][]kmsg.OffsetFetchResponseGroupTopic)
	anyAll := false
	for i, group := range req.Groups {
		if err := c.judgeGroup(group.Group, kmsg.ACLOperationDescribe); err != nil {
			ours[i] = &kmsg.OffsetFetchResponseGroup{Group: group.Group, ErrorCode: err.Code}
			continue
		}
		if group.Topics == nil {
			anyAll = true
			forward.Groups = append(forward.Groups, group)
			continue
		}
		kept, out := sift(group.Topics, func(t *kmsg.OffsetFetchRequestGroupTopic) *kerr.Error {
			return c.judgeTopic(byID, t.Topic, t.TopicID, kmsg.ACLOperationDescribe)
		})
		var refused []kmsg.OffsetFetchResponseGroupTopic
		for _, o := range out {
			refused = append(refused, refusedGroupOffsets(o.entries, o.err)...)
		}
		if len(kept) == 0 && len(refused) > 0 {
			ours[i] = &kmsg.OffsetFetchResponseGroup{Group: group.Group, Topics: refused}
			continue
		}
		if len(refused) > 0 {
			refusedOf[group.Group] = refused
		}
		group.Topics = kept
		forward.Groups = append(forward.Groups, group)
	}
	merge := func(c *Ctx, resp *kmsg.OffsetFetchResponse) {
		for i := range resp.Groups {
			group := &resp.Groups[i]
			group.Topics = slices.DeleteFunc(group.Topics, func(t kmsg.OffsetFetchResponseGroupTopic) bool {
				return !c.describes(byID, t.Topic, t.TopicID)
			})
			if group.ErrorCode == 0 {
				group.Topics = append(group.Topics, refusedOf[group.Group]...)
			}
		}
		resp.Groups = weave(resp.Groups, ours)
	}
	switch {
	case len(forward.Groups) < len(req.Groups) || len(refusedOf) > 0:
		return partly(c, &forward, len(forward.Groups), merge)
	case anyAll:
		return Verdict{Edit: edit(merge)}
	default:
		return Verdict{}
	}
}

// describes tells whether a topic the client did not name may be shown to it. An id nobody knows may not.
func (c *Ctx) describes(byID bool, name string, id TopicID) bool {
	if byID {
		var known bool
		if name, known = c.Topic(id); !known {
			return false
		}
	}
	return c.Visible(kmsg.ACLResourceTypeTopic, name, kmsg.ACLOperationDescribe)
}

func refusedOffsets(topics []kmsg.OffsetFetchRequestTopic, err *kerr.Error) (refused []kmsg.OffsetFetchResponseTopic) {
	for _, t := range topics {
		r := kmsg.OffsetFetchResponseTopic{Topic: t.Topic}
		for _, p := range t.Partitions {
			rp := kmsg.NewOffsetFetchResponseTopicPartition()
			rp.Partition, rp.Offset, rp.Metadata, rp.ErrorCode = p, -1, new(string), err.Code
			r.Partitions = append(r.Partitions, rp)
		}
		refused = append(refused, r)
	}
	return refused
}

func refusedGroupOffsets(
	topics []kmsg.OffsetFetchRequestGroupTopic, err *kerr.Error,
) (refused []kmsg.OffsetFetchResponseGroupTopic) {
	for _, t := range topics {
		r := kmsg.OffsetFetchResponseGroupTopic{Topic: t.Topic, TopicID: t.TopicID}
		for _, p := range t.Partitions {
			rp := kmsg.NewOffsetFetchResponseGroupTopicPartition()
			rp.Partition, rp.Offset, rp.Metadata, rp.ErrorCode = p, -1, new(string), err.Code
			r.Partitions = append(r.Partitions, rp)
		}
		refused = append(refused, r)
	}
	return refused
}
