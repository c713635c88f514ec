package authz

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/base64"
	"slices"
	"strings"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// describeTopicPartitions: Topic Describe (KIP-966). The answer comes in pages, in the order of names; the cursor is
// where the next one starts. Refused topics from the cursor on are in every page, as in Kafka.
func describeTopicPartitions(c *Ctx, req *kmsg.DescribeTopicPartitionsRequest) Verdict {
	if len(req.Topics) == 0 {
		return describeAllTopicPartitions(req)
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

// describeAllTopicPartitions leaves out what the subject may not Describe. Where the broker's next page starts at such
// a topic, the client gets its name sealed, and brings it back so: pages of one partition would list all names else.
func describeAllTopicPartitions(req *kmsg.DescribeTopicPartitionsRequest) Verdict {
	v := Verdict{Edit: edit(func(c *Ctx, resp *kmsg.DescribeTopicPartitionsResponse) {
		visible := func(topic string) bool {
			return c.Visible(kmsg.ACLResourceTypeTopic, topic, kmsg.ACLOperationDescribe)
		}
		resp.Topics = slices.DeleteFunc(resp.Topics, func(t kmsg.DescribeTopicPartitionsResponseTopic) bool {
			return t.Topic == nil || !visible(*t.Topic)
		})
		c.limitPartitionsOperations(resp)
		if next := resp.NextCursor; next != nil && !visible(next.Topic) {
			next.Topic = sealTopic(next.Topic)
		}
	})}
	if req.Cursor != nil && strings.HasPrefix(req.Cursor.Topic, sealPrefix) {
		topic, ok := unsealTopic(req.Cursor.Topic)
		if !ok {
			return Verdict{Answer: Refuse(req, kerr.InvalidRequest, "")}
		}
		forward, cursor := *req, *req.Cursor
		cursor.Topic = topic
		forward.Cursor = &cursor
		v.Forward = &forward
	}
	return v
}

func (c *Ctx) limitPartitionsOperations(resp *kmsg.DescribeTopicPartitionsResponse) {
	for i := range resp.Topics {
		c.limitTopicOperations(resp.Topics[i].Topic, &resp.Topics[i].AuthorizedOperations)
	}
}

// sealPrefix cannot start a topic's name.
const sealPrefix = "sealed:"

// topicSeal has a key of this process: a cursor from before a restart is refused, and the client starts over.
var topicSeal = newTopicSeal()

func newTopicSeal() cipher.AEAD {
	key := make([]byte, 32)
	_, _ = rand.Read(key) // never fails: Go 1.24
	block, err := aes.NewCipher(key)
	if err != nil {
		panic(err) // only for a wrong size of key
	}
	seal, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		panic(err) // only for a wrong block size
	}
	return seal
}

func sealTopic(topic string) string {
	sealed := topicSeal.Seal(nil, nil, []byte(topic), nil) //nolint:gosec // G407: it takes a random nonce by itself
	return sealPrefix + base64.RawURLEncoding.EncodeToString(sealed)
}

func unsealTopic(sealed string) (topic string, ok bool) {
	raw, err := base64.RawURLEncoding.DecodeString(strings.TrimPrefix(sealed, sealPrefix))
	if err != nil {
		return "", false
	}
	plain, err := topicSeal.Open(nil, nil, raw, nil)
	return string(plain), err == nil
}
