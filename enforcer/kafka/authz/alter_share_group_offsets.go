package authz

import (
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// alterShareGroupOffsets (KIP-932): Group Read, then Topic Read. Refused topics come before the broker's, between those
// that do not exist in the order asked, and are left out where the broker reports an error of the whole group, which it
// is asked for also when no topic is left. A refused topic has its id beside its name, as it has at a broker.
func alterShareGroupOffsets(c *Ctx, req *kmsg.AlterShareGroupOffsetsRequest) Verdict {
	if err := c.judgeGroup(req.GroupID, kmsg.ACLOperationRead); err != nil {
		return Verdict{Answer: Refuse(req, err, groupAuthorizationFailed)}
	}
	kept, out := sift(req.Topics, func(t *kmsg.AlterShareGroupOffsetsRequestTopic) *kerr.Error {
		return c.judgeTopic(false, t.Topic, TopicID{}, kmsg.ACLOperationRead)
	})
	if len(out) == 0 {
		return Verdict{}
	}
	if !c.Renewed {
		c.Stale = true
		return Verdict{}
	}
	forward := *req
	forward.Topics = kept
	var refused []kmsg.AlterShareGroupOffsetsResponseTopic
	for _, t := range out[0].entries {
		if len(t.Partitions) == 0 {
			continue // a broker answers by partition
		}
		r := kmsg.NewAlterShareGroupOffsetsResponseTopic()
		r.Topic = t.Topic
		if c.listed(t.Topic) {
			r.TopicID, _ = c.Topics.ID(t.Topic)
		}
		for _, p := range t.Partitions {
			rp := kmsg.NewAlterShareGroupOffsetsResponseTopicPartition()
			rp.Partition, rp.ErrorCode, rp.ErrorMessage = p.Partition, out[0].err.Code, new(topicAuthorizationFailed)
			r.Partitions = append(r.Partitions, rp)
		}
		refused = append(refused, r)
	}
	return Verdict{Forward: &forward, Edit: edit(func(_ *Ctx, resp *kmsg.AlterShareGroupOffsetsResponse) {
		if resp.ErrorCode == 0 {
			resp.Topics = refusedAmongMissing(req, refused, resp.Topics)
		}
	})}
}

// refusedAmongMissing puts the topics that the broker was not asked for in their place between those that it does not
// have, which have no id.
func refusedAmongMissing(
	req *kmsg.AlterShareGroupOffsetsRequest, refused, answered []kmsg.AlterShareGroupOffsetsResponseTopic,
) (all []kmsg.AlterShareGroupOffsetsResponseTopic) {
	first := make(map[string]kmsg.AlterShareGroupOffsetsResponseTopic)
	var others []kmsg.AlterShareGroupOffsetsResponseTopic
	for _, r := range answered {
		if r.TopicID == (TopicID{}) {
			first[r.Topic] = r
		} else {
			others = append(others, r)
		}
	}
	for _, r := range refused {
		first[r.Topic] = r
	}
	for _, t := range req.Topics {
		if r, is := first[t.Topic]; is {
			all = append(all, r)
			delete(first, t.Topic)
		}
	}
	return append(all, others...)
}
