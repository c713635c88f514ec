package authz

import (
	"slices"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// offsetDelete: Group Delete, then Topic Read. The broker hears of the group even when no topic is left, because what
// is wrong with the group is then all it answers.
func offsetDelete(c *Ctx, req *kmsg.OffsetDeleteRequest) Verdict {
	if err := c.judgeGroup(req.Group, kmsg.ACLOperationDelete); err != nil {
		return Verdict{Answer: Refuse(req, err, "")}
	}
	kept, out := sift(req.Topics, func(t *kmsg.OffsetDeleteRequestTopic) *kerr.Error {
		return c.judgeTopic(false, t.Topic, TopicID{}, kmsg.ACLOperationRead)
	})
	if len(out) == 0 {
		return Verdict{}
	}
	forward := *req
	forward.Topics = kept
	return Verdict{Forward: &forward, Edit: edit(func(_ *Ctx, resp *kmsg.OffsetDeleteResponse) {
		if resp.ErrorCode == 0 {
			resp.Topics = mergeDeleted(req.Topics, out[0], resp.Topics)
		}
	})}
}

// mergeDeleted is what OffsetDeleteResponse.Builder makes of refused topics and the coordinator's answer: first those
// the broker found fault with before it asked the coordinator, in the order of the request, then the others.
func mergeDeleted(asked []kmsg.OffsetDeleteRequestTopic, out refused[kmsg.OffsetDeleteRequestTopic],
	broker []kmsg.OffsetDeleteResponseTopic) []kmsg.OffsetDeleteResponseTopic {
	var all, rest []kmsg.OffsetDeleteResponseTopic
	for i := range out.entries {
		t := kmsg.OffsetDeleteResponseTopic{Topic: out.entries[i].Topic}
		for _, p := range out.entries[i].Partitions {
			t.Partitions = append(t.Partitions,
				kmsg.OffsetDeleteResponseTopicPartition{Partition: p.Partition, ErrorCode: out.err.Code})
		}
		all = append(all, t)
	}
	for i := range broker {
		if slices.ContainsFunc(broker[i].Partitions, func(p kmsg.OffsetDeleteResponseTopicPartition) bool {
			return p.ErrorCode == kerr.UnknownTopicOrPartition.Code
		}) {
			all = append(all, broker[i])
		} else {
			rest = append(rest, broker[i])
		}
	}
	place := make(map[string]int, len(asked))
	for i := range asked {
		place[asked[i].Topic] = i
	}
	slices.SortStableFunc(all, func(a, b kmsg.OffsetDeleteResponseTopic) int { return place[a.Topic] - place[b.Topic] })
	return append(all, rest...)
}
