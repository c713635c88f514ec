package kafka

import (
	"fmt"
	"testing"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/audit"
)

// shareFetchRequest names partition 0 of topics; ack acknowledges offsets 0 to 9 there as accepted.
func shareFetchRequest(version int16, epoch int32, ack bool, topics ...string) *kmsg.ShareFetchRequest {
	req := kmsg.NewPtrShareFetchRequest()
	req.Version, req.ShareSessionEpoch, req.MaxWaitMillis, req.MaxRecords = version, epoch, 10, 500
	req.GroupID, req.MemberID = new("orders"), new("member-1")
	for _, name := range topics {
		p := kmsg.NewShareFetchRequestTopicPartition()
		if ack {
			p.AcknowledgementBatches = []kmsg.ShareFetchRequestTopicPartitionAcknowledgementBatch{
				{FirstOffset: 0, LastOffset: 9, AcknowledgeTypes: []int8{1}}}
		}
		t := kmsg.NewShareFetchRequestTopic()
		t.TopicID, t.Partitions = topicID(name), []kmsg.ShareFetchRequestTopicPartition{p}
		req.Topics = append(req.Topics, t)
	}
	return req
}

func shareFetchAnswer(version int16, topic string, recordBatches []byte) *kmsg.ShareFetchResponse {
	resp := kmsg.NewPtrShareFetchResponse()
	resp.Version, resp.AcquisitionLockTimeoutMillis = version, 30_000
	p := kmsg.NewShareFetchResponseTopicPartition()
	p.Records = recordBatches
	p.AcquiredRecords = []kmsg.ShareFetchResponseTopicPartitionAcquiredRecord{
		{FirstOffset: 0, LastOffset: 9, DeliveryCount: 1}, {FirstOffset: 10, LastOffset: 10, DeliveryCount: 2}}
	t := kmsg.NewShareFetchResponseTopic()
	t.TopicID, t.Partitions = topicID(topic), []kmsg.ShareFetchResponseTopicPartition{p}
	resp.Topics = append(resp.Topics, t)
	resp.NodeEndpoints = []kmsg.ShareFetchResponseNodeEndpoint{{NodeID: 1, Host: "broker-1", Port: 9092}}
	return resp
}

func (r *rig) knowTopics(topics ...string) {
	for _, name := range topics {
		r.cluster.names[topicID(name)] = name
	}
}

// shared is what an answer has of each topic: records, or an error.
func shared(resp *kmsg.ShareFetchResponse) string {
	all := map[string]string{}
	for _, topic := range resp.Topics {
		for _, name := range []string{"orders", "secret"} {
			if topicID(name) != topic.TopicID {
				continue
			}
			for _, p := range topic.Partitions {
				all[name] = fmt.Sprintf("%d bytes, %d acquired, error %s, %s", len(p.Records), len(p.AcquiredRecords),
					errorName(p.ErrorCode), errorName(p.AcknowledgeErrorCode))
			}
		}
	}
	return fmt.Sprint(all)
}

const (
	refused     = "0 bytes, 0 acquired, error TOPIC_AUTHORIZATION_FAILED, NONE"
	refusedAcks = "0 bytes, 0 acquired, error TOPIC_AUTHORIZATION_FAILED, TOPIC_AUTHORIZATION_FAILED"
)

func TestAShareSessionFollowsThePolicy(t *testing.T) {
	for _, version := range []int16{1, 2} {
		rig := newRig(t, ordersOnly)
		rig.knowTopics("orders", "secret")
		client, broker, ended := rig.serveScripted(t)
		records := batch([]byte("records"))
		ask := func(req *kmsg.ShareFetchRequest, from string) (up *kmsg.ShareFetchRequest, told string) {
			t.Helper()
			client.write(requestFrame(1, req))
			h, got := broker.request()
			resp := shareFetchAnswer(version, from, records)
			if from == "" {
				resp.Topics = nil
			}
			broker.answer(h, resp)
			return got.(*kmsg.ShareFetchRequest), shared(client.response(1, req).(*kmsg.ShareFetchResponse))
		}
		want := func(when string, told string, topics map[string]string) {
			t.Helper()
			if told != fmt.Sprint(topics) {
				t.Errorf("v%d, %s: %s, not %v", version, when, told, topics)
			}
		}
		some := fmt.Sprintf("%d bytes, 2 acquired, error NONE, NONE", len(records))

		up, told := ask(shareFetchRequest(version, 0, false, "orders", "secret"), "orders")
		if len(up.Topics) != 1 || up.Topics[0].TopicID != topicID("orders") {
			t.Errorf("v%d: the broker is asked for %v", version, up.Topics)
		}
		want("opened", told, map[string]string{"orders": some, "secret": refused})
		_, told = ask(shareFetchRequest(version, 1, true, "orders", "secret"), "")
		want("acknowledged", told, map[string]string{"secret": refusedAcks})

		rig.shared.Policy.Store(parsePolicy(t, everything))
		up, told = ask(shareFetchRequest(version, 2, false), "secret")
		if len(up.Topics) != 1 || up.Topics[0].TopicID != topicID("secret") {
			t.Errorf("v%d: what was granted is not asked for: %v", version, up.Topics)
		}
		want("granted", told, map[string]string{"secret": some})
		_, told = ask(shareFetchRequest(version, 3, true, "secret"), "orders")
		want("in place", told, map[string]string{"orders": some})

		rig.shared.Policy.Store(parsePolicy(t, ordersOnly))
		up, told = ask(shareFetchRequest(version, 4, true, "secret"), "")
		if len(up.Topics) != 0 || len(up.ForgottenTopicsData) != 1 {
			t.Errorf("v%d: what was revoked is not forgotten: %+v", version, up)
		}
		want("revoked", told, map[string]string{"secret": refusedAcks})
		_, told = ask(shareFetchRequest(version, 5, false), "")
		want("revoked, idle", told, map[string]string{"secret": refused})

		other := shareFetchRequest(version, 6, false)
		other.MemberID = new("member-2")
		if resp := client.ask(1, other).(*kmsg.ShareFetchResponse); resp.ErrorCode != kerr.ShareSessionNotFound.Code {
			t.Errorf("v%d: another member's session is answered with %d", version, resp.ErrorCode)
		}
		broker.closeWrite()
		if err := end(t, ended); err != nil {
			t.Error(err)
		}
		wantShareLines(t, rig, hashes(t, records)[0])
	}
}

// wantShareLines looks for what the test above leaves behind.
func wantShareLines(t *testing.T, rig *rig, hash string) {
	t.Helper()
	lines := rig.log.find(t, func(l auditLine) bool { return l.API == "ShareFetch" && len(l.Batches) > 0 })
	if len(lines) != 3 {
		t.Errorf("%d lines of records, not 3", len(lines))
	}
	for _, l := range lines {
		if got := fmt.Sprint(l.Batches[0].BaseOffset, " ", l.Batches[0].SHA256); got != hash {
			t.Errorf("the audit has %s, the answer had %s", got, hash)
		}
		if got := fmt.Sprint(l.Acquired); got != "[{0 9 1} {10 10 2}]" {
			t.Errorf("acquired: %s", got)
		}
	}
	acks := rig.log.find(t, func(l auditLine) bool { return l.Accepted > 0 })
	if len(acks) != 2 || acks[0].Topic != "orders" || acks[1].Topic != "secret" || acks[0].Accepted != 10 {
		t.Errorf("lines of acknowledgements: %+v", acks)
	}
}

func TestRecordsThatMayNotBeSharedAreNotPassedOn(t *testing.T) {
	for name, change := range map[string]func([]byte) []byte{
		"of another topic": func([]byte) []byte { return shareFetchAnswer(2, "secret", batch([]byte("s"))).AppendTo(nil) },
		"bytes too many":   func(b []byte) []byte { return append(b, 0) },
		"bytes missing":    func(b []byte) []byte { return b[:len(b)-20] },
	} {
		t.Run(name, func(t *testing.T) {
			rig := newRig(t, ordersOnly)
			rig.knowTopics("orders", "secret")
			client, broker, ended := rig.serveScripted(t)
			client.write(requestFrame(1, shareFetchRequest(2, 0, false, "orders")))
			h, _ := broker.request()
			broker.write(responseFrame(h.Correlation, change(shareFetchAnswer(2, "orders", batch([]byte("o"))).AppendTo(nil))))
			client.drain()
			rig.wantRefusal(t, ended, audit.BadAnswer)
		})
	}
}

func TestARevocationMeetsTheSharedRecordsThatAreUnderWay(t *testing.T) {
	rig := newRig(t, everything)
	rig.knowTopics("orders", "secret")
	client, broker, ended := rig.serveScripted(t)
	req := shareFetchRequest(2, 0, false, "secret")
	client.write(requestFrame(1, req))
	h, _ := broker.request()
	rig.shared.Policy.Store(parsePolicy(t, ordersOnly))
	broker.answer(h, shareFetchAnswer(2, "secret", batch([]byte("a secret"))))
	if told := shared(client.response(1, req).(*kmsg.ShareFetchResponse)); told != fmt.Sprint(map[string]string{
		"secret": refused}) {
		t.Errorf("the client gets %s", told)
	}
	broker.closeWrite()
	if err := end(t, ended); err != nil {
		t.Error(err)
	}
	if lines := rig.log.find(t, func(l auditLine) bool { return len(l.Batches) > 0 }); len(lines) > 0 {
		t.Errorf("the audit tells of records: %+v", lines)
	}
}

func TestAcknowledgementsHaveTheirLines(t *testing.T) {
	rig := newRig(t, ordersOnly)
	rig.knowTopics("orders", "secret")
	client, broker, _ := rig.serveScripted(t)
	req := kmsg.NewPtrShareAcknowledgeRequest()
	req.Version, req.GroupID, req.MemberID, req.ShareSessionEpoch = 2, new("orders"), new("member-1"), 3
	for _, name := range []string{"orders", "secret"} {
		req.Topics = append(req.Topics, kmsg.ShareAcknowledgeRequestTopic{TopicID: topicID(name),
			Partitions: []kmsg.ShareAcknowledgeRequestTopicPartition{{Partition: 1,
				AcknowledgementBatches: []kmsg.ShareAcknowledgeRequestTopicPartitionAcknowledgementBatch{
					{FirstOffset: 5, LastOffset: 9, AcknowledgeTypes: []int8{1, 1, 2, 3, 0}}}}}})
	}
	client.write(requestFrame(1, req))
	h, up := broker.request()
	if got := up.(*kmsg.ShareAcknowledgeRequest); len(got.Topics) != 1 || got.ShareSessionEpoch != 3 {
		t.Errorf("the broker gets %+v", got)
	}
	broker.answer(h, up.ResponseKind())
	resp := client.response(1, req).(*kmsg.ShareAcknowledgeResponse)
	if len(resp.Topics) != 1 || resp.Topics[0].Partitions[0].ErrorCode != kerr.TopicAuthorizationFailed.Code {
		t.Errorf("the client gets %+v", resp)
	}
	acks := rig.log.find(t, func(l auditLine) bool { return l.Accepted > 0 })
	if len(acks) != 1 || acks[0].Topic != "orders" || acks[0].Partition != 1 || acks[0].Accepted != 2 ||
		acks[0].Released != 1 || acks[0].Rejected != 1 || acks[0].AcksFrom != 5 || acks[0].AcksTo != 9 {
		t.Errorf("lines of acknowledgements: %+v", acks)
	}
}
