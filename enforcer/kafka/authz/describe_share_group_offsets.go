package authz

import (
	"slices"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// describeShareGroupOffsets (KIP-932): Group Describe, then Topic Describe. Groups are answered in the order asked; a
// group's refused topics follow the broker's, and are left out where the broker reports an error of the whole group.
// For a group without topics (null: all), those the subject may describe are shown.
func describeShareGroupOffsets(c *Ctx, req *kmsg.DescribeShareGroupOffsetsRequest) Verdict {
	forward := *req
	forward.Groups = make([]kmsg.DescribeShareGroupOffsetsRequestGroup, 0, len(req.Groups))
	ours := make([]*kmsg.DescribeShareGroupOffsetsResponseGroup, len(req.Groups)) // answered without the broker
	var refused [][]kmsg.DescribeShareGroupOffsetsResponseGroupTopic              // by group of forward
	same, filter := true, false
	for i, group := range req.Groups {
		if err := c.judgeGroup(group.GroupID, kmsg.ACLOperationDescribe); err != nil {
			ours[i] = &kmsg.DescribeShareGroupOffsetsResponseGroup{GroupID: group.GroupID, ErrorCode: err.Code}
			same = false
			continue
		}
		var hidden []kmsg.DescribeShareGroupOffsetsResponseGroupTopic
		if group.Topics == nil {
			filter = true
		} else {
			kept, out := sift(group.Topics, func(t *kmsg.DescribeShareGroupOffsetsRequestGroupTopic) *kerr.Error {
				return c.judgeTopic(false, t.Topic, TopicID{}, kmsg.ACLOperationDescribe)
			})
			if len(out) > 0 {
				hidden, same = hiddenShareOffsets(out[0].entries), false
			}
			group.Topics = kept
		}
		forward.Groups, refused = append(forward.Groups, group), append(refused, hidden)
	}
	merge := func(c *Ctx, resp *kmsg.DescribeShareGroupOffsetsResponse) {
		for i := range resp.Groups {
			group := &resp.Groups[i]
			group.Topics = slices.DeleteFunc(group.Topics, func(t kmsg.DescribeShareGroupOffsetsResponseGroupTopic) bool {
				return !c.describes(false, t.Topic, TopicID{})
			})
			if i < len(refused) && group.ErrorCode == 0 {
				group.Topics = append(group.Topics, refused[i]...)
			}
		}
		resp.Groups = weave(resp.Groups, ours)
	}
	switch {
	case !same:
		return partly(c, &forward, len(forward.Groups), merge)
	case filter:
		return Verdict{Edit: edit(merge)}
	default:
		return Verdict{}
	}
}

func hiddenShareOffsets(
	topics []kmsg.DescribeShareGroupOffsetsRequestGroupTopic,
) (hidden []kmsg.DescribeShareGroupOffsetsResponseGroupTopic) {
	for _, t := range topics {
		r := kmsg.NewDescribeShareGroupOffsetsResponseGroupTopic()
		r.Topic = t.Topic
		for _, p := range t.Partitions {
			rp := kmsg.NewDescribeShareGroupOffsetsResponseGroupTopicPartition()
			rp.Partition, rp.StartOffset = p, -1
			rp.ErrorCode, rp.ErrorMessage = kerr.TopicAuthorizationFailed.Code, new(topicAuthorizationFailed)
			r.Partitions = append(r.Partitions, rp)
		}
		hidden = append(hidden, r)
	}
	return hidden
}
