package authz

import (
	"slices"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// describeTopicPartitions: Topic Describe (KIP-966). The answer comes in pages, in the order of names; the cursor is
// where the next one starts. Refused topics from the cursor on are in every page, as in Kafka.
func describeTopicPartitions(c *Ctx, req *kmsg.DescribeTopicPartitionsRequest) Verdict {
	if len(req.Topics) == 0 {
		return c.describeAllTopicPartitions(req)
	}
	if !validCursor(req) {
		return Verdict{Answer: Refuse(req, kerr.InvalidRequest, "")}
	}
	var due []kmsg.DescribeTopicPartitionsRequestTopic
	for _, t := range req.Topics {
		if req.Cursor == nil || t.Topic >= req.Cursor.Topic {
			due = append(due, t)
		}
	}
	due = once(due, func(t *kmsg.DescribeTopicPartitionsRequestTopic) string { return t.Topic })
	kept, out := sift(due, func(t *kmsg.DescribeTopicPartitionsRequestTopic) *kerr.Error {
		return c.judgeTopic(false, t.Topic, TopicID{}, kmsg.ACLOperationDescribe)
	})
	if len(out) == 0 {
		return Verdict{Edit: edit((*Ctx).limitPartitionsOperations)}
	}
	forward, part := *req, *req
	forward.Topics, part.Topics = kept, out[0].entries
	refused := as[*kmsg.DescribeTopicPartitionsResponse](Refuse(&part, out[0].err, "")).Topics
	if req.Cursor != nil && !slices.ContainsFunc(kept, func(t kmsg.DescribeTopicPartitionsRequestTopic) bool {
		return t.Topic == req.Cursor.Topic
	}) {
		forward.Cursor = nil // it named a refused topic; all that is kept comes after it
	}
	return partly(c, &forward, len(kept), func(c *Ctx, resp *kmsg.DescribeTopicPartitionsResponse) {
		c.limitPartitionsOperations(resp)
		resp.Topics = append(resp.Topics, refused...)
	})
}

// validCursor: a broker refuses a cursor that is at none of the named topics, or before the first partition.
func validCursor(req *kmsg.DescribeTopicPartitionsRequest) bool {
	return req.Cursor == nil || req.Cursor.Partition >= 0 &&
		slices.ContainsFunc(req.Topics, func(t kmsg.DescribeTopicPartitionsRequestTopic) bool {
			return t.Topic == req.Cursor.Topic
		})
}

// describeAllTopicPartitions asks about the topics that the subject may Describe by their names: a page of all topics
// would be filled by hidden ones, and end at one.
func (c *Ctx) describeAllTopicPartitions(req *kmsg.DescribeTopicPartitionsRequest) Verdict {
	if req.Cursor != nil && req.Cursor.Partition < 0 {
		return Verdict{Answer: Refuse(req, kerr.InvalidRequest, "")}
	}
	if !c.Renewed {
		c.Stale = true // topics may have come or gone since the list was made
		return Verdict{}
	}
	names, edition := c.topicNames()
	if edition == 0 {
		return Verdict{Close: "it is not known which topics there are, and an answer has no place for an error"}
	}
	forward := *req
	forward.Topics, forward.Cursor = nil, nil
	for _, name := range names {
		if (req.Cursor == nil || name >= req.Cursor.Topic) &&
			c.Visible(kmsg.ACLResourceTypeTopic, name, kmsg.ACLOperationDescribe) {
			forward.Topics = append(forward.Topics, kmsg.DescribeTopicPartitionsRequestTopic{Topic: name})
		}
	}
	if len(forward.Topics) == 0 {
		return Verdict{Answer: Refuse(req, kerr.InvalidRequest, "")} // to a request of no topics, an answer of none
	}
	if req.Cursor != nil && forward.Topics[0].Topic == req.Cursor.Topic {
		forward.Cursor = req.Cursor
	}
	return Verdict{Forward: &forward, Edit: edit(func(c *Ctx, resp *kmsg.DescribeTopicPartitionsResponse) {
		resp.Topics = slices.DeleteFunc(resp.Topics, func(t kmsg.DescribeTopicPartitionsResponseTopic) bool {
			return t.ErrorCode == kerr.UnknownTopicOrPartition.Code // gone since
		})
		c.limitPartitionsOperations(resp)
	})}
}

func (c *Ctx) limitPartitionsOperations(resp *kmsg.DescribeTopicPartitionsResponse) {
	for i := range resp.Topics {
		c.limitTopicOperations(resp.Topics[i].Topic, &resp.Topics[i].AuthorizedOperations)
	}
}
