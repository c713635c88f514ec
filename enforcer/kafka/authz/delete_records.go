package authz

import (
	"slices"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// deleteRecords: Topic Delete. Refused topics follow the broker's; like those, each is there once, with each partition
// once, and without partitions not at all.
func deleteRecords(c *Ctx, req *kmsg.DeleteRecordsRequest) Verdict {
	kept, out := sift(req.Topics, func(t *kmsg.DeleteRecordsRequestTopic) *kerr.Error {
		return c.judgeTopic(false, t.Topic, TopicID{}, kmsg.ACLOperationDelete)
	})
	if len(out) == 0 {
		return Verdict{}
	}
	type (
		topic     = kmsg.DeleteRecordsResponseTopic
		partition = kmsg.DeleteRecordsResponseTopicPartition
	)
	forward, part := *req, *req
	forward.Topics, part.Topics = kept, out[0].entries
	refused := fold(as[*kmsg.DeleteRecordsResponse](Refuse(&part, out[0].err, "")).Topics,
		func(t *topic) string { return t.Topic },
		func(first, other *topic) { first.Partitions = append(first.Partitions, other.Partitions...) })
	refused = slices.DeleteFunc(refused, func(t topic) bool { return len(t.Partitions) == 0 })
	for i := range refused {
		refused[i].Partitions = once(refused[i].Partitions, func(p *partition) int32 { return p.Partition })
	}
	return partly(c, &forward, len(kept), func(_ *Ctx, resp *kmsg.DeleteRecordsResponse) {
		resp.Topics = append(resp.Topics, refused...)
	})
}
