package authz

import (
	"testing"

	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/test/message"
)

func TestACursorAtAHiddenTopicIsSealedForTheClientAndOpenedForTheBroker(t *testing.T) {
	c := &Ctx{} // no view: nothing is visible
	v := describeTopicPartitions(c, &kmsg.DescribeTopicPartitionsRequest{ResponsePartitionLimit: 1})
	resp := &kmsg.DescribeTopicPartitionsResponse{
		Topics:     []kmsg.DescribeTopicPartitionsResponseTopic{{Topic: kmsg.StringPtr("hidden.1")}},
		NextCursor: &kmsg.DescribeTopicPartitionsResponseNextCursor{Topic: "hidden.2", Partition: 7},
	}
	v.Edit(c, resp)
	sealed := resp.NextCursor
	if len(resp.Topics) != 0 || sealed == nil || sealed.Topic == "hidden.2" || sealed.Partition != 7 {
		t.Fatalf("the client gets\n%s", message.Show(resp))
	}

	next := &kmsg.DescribeTopicPartitionsRequest{ResponsePartitionLimit: 1,
		Cursor: &kmsg.DescribeTopicPartitionsRequestCursor{Topic: sealed.Topic, Partition: sealed.Partition}}
	v = describeTopicPartitions(c, next)
	forward, ok := v.Forward.(*kmsg.DescribeTopicPartitionsRequest)
	if !ok || forward.Cursor.Topic != "hidden.2" || forward.Cursor.Partition != 7 || forward.ResponsePartitionLimit != 1 {
		t.Errorf("the broker gets\n%s", message.Show(v.Forward))
	}
	if next.Cursor.Topic != sealed.Topic {
		t.Error("the request was changed in place")
	}
}
