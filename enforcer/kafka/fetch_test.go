package kafka

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"testing"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/audit"
	"klamm/enforcer/kafka/records"
)

func crc(b []byte) uint32 { return crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)) }

// fetchRequest asks for partition 0 of topics from offset 0, by name or, from version 13, by an id as in topicID.
func fetchRequest(version int16, session, epoch int32, topics ...string) *kmsg.FetchRequest {
	req := kmsg.NewPtrFetchRequest()
	req.Version, req.SessionID, req.SessionEpoch, req.MaxBytes, req.MaxWaitMillis = version, session, epoch, 64<<20, 10
	for _, name := range topics {
		t := kmsg.NewFetchRequestTopic()
		t.Topic, t.TopicID = name, topicID(name)
		p := kmsg.NewFetchRequestTopicPartition()
		p.PartitionMaxBytes = 64 << 20
		t.Partitions = append(t.Partitions, p)
		req.Topics = append(req.Topics, t)
	}
	return req
}

// topicID is an id that tests give a topic.
func topicID(name string) (id [16]byte) {
	sum := sha256.Sum256([]byte(name))
	copy(id[:], sum[:])
	return id
}

func fetchAnswer(version int16, topic string, recordBatches []byte) *kmsg.FetchResponse {
	resp := kmsg.NewPtrFetchResponse()
	resp.Version = version
	t := kmsg.NewFetchResponseTopic()
	t.Topic, t.TopicID = topic, topicID(topic)
	p := kmsg.NewFetchResponseTopicPartition()
	p.RecordBatches = recordBatches
	t.Partitions = append(t.Partitions, p)
	resp.Topics = append(resp.Topics, t)
	return resp
}

// fill produces random values directly to the broker.
func fill(t *testing.T, addr, topic string, r *rand.Rand, n int) {
	t.Helper()
	client, err := kgo.NewClient(kgo.SeedBrokers(addr), kgo.ProducerBatchCompression(kgo.SnappyCompression()))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	for range n {
		value := make([]byte, r.IntN(200_000))
		for i := range value {
			value[i] = byte(r.Uint32())
		}
		if err := client.ProduceSync(context.Background(), &kgo.Record{Topic: topic, Value: value}).FirstErr(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestAFetchIsAuditedWithTheHashesOfItsBatches(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %#x", seed)
	cluster := newCluster(t, "orders")
	addr := cluster.ListenAddrs()[0]
	fill(t, addr, "orders", rand.New(rand.NewPCG(seed, 0)), 40)
	for _, version := range []int16{4, 5, 7, 11, 12, 13, 17} {
		for _, changed := range []bool{false, true} { // streamed, and held because the policy changed meanwhile
			t.Run(fmt.Sprintf("v%d, policy changed: %v", version, changed), func(t *testing.T) {
				rig := newRig(t, ordersOnly)
				client, ended := rig.serve(t, addr)
				req := fetchRequest(version, 0, -1, "orders")
				req.Topics[0].TopicID = learnID(t, client, "orders")
				if changed {
					req.MinBytes, req.MaxWaitMillis = 1<<30, 100
				}
				client.write(requestFrame(1, req))
				if changed {
					rig.shared.Policy.Store(parsePolicy(t, ordersOnly))
				}
				resp := client.response(1, req).(*kmsg.FetchResponse)
				want := hashes(t, resp.Topics[0].Partitions[0].RecordBatches)
				if len(want) != 40 {
					t.Fatalf("%d batches came, not 40", len(want))
				}
				client.closeWrite()
				client.drain()
				if err := end(t, ended); err != nil {
					t.Fatal(err)
				}
				var got []string
				for _, l := range rig.log.find(t, func(l auditLine) bool { return l.API == "Fetch" && len(l.Batches) > 0 }) {
					for _, b := range l.Batches {
						got = append(got, fmt.Sprint(b.BaseOffset, " ", b.SHA256))
					}
				}
				if fmt.Sprint(got) != fmt.Sprint(want) {
					t.Errorf("the audit has\n%v, the answer had\n%v", got, want)
				}
			})
		}
	}
}

// learnID asks for a topic's metadata through the session, which takes up the id.
func learnID(t *testing.T, client *peer, topic string) [16]byte {
	t.Helper()
	req := kmsg.NewPtrMetadataRequest()
	req.Version = 12
	rt := kmsg.NewMetadataRequestTopic()
	rt.Topic = &topic
	req.Topics = append(req.Topics, rt)
	resp := client.ask(1000, req).(*kmsg.MetadataResponse)
	if err := kerr.ErrorForCode(resp.Topics[0].ErrorCode); err != nil {
		t.Fatal(err)
	}
	return resp.Topics[0].TopicID
}

// hashes are base offset and SHA-256 of the record bytes of each batch.
func hashes(t *testing.T, b []byte) (all []string) {
	t.Helper()
	for len(b) > 0 {
		h := records.Header(b)
		sum := sha256.Sum256(b[records.HeaderLen:h.Len()])
		all = append(all, fmt.Sprint(h.BaseOffset(), " ", hex.EncodeToString(sum[:])))
		b = b[h.Len():]
	}
	return all
}

// codes are the error codes of an answer by topic, with how many bytes of records came.
func codes(resp *kmsg.FetchResponse, names map[[16]byte]string) map[string]string {
	all := map[string]string{}
	for _, t := range resp.Topics {
		name := t.Topic
		if resp.Version >= 13 {
			name = names[t.TopicID]
		}
		for _, p := range t.Partitions {
			all[name] = "records"
			if len(p.RecordBatches) == 0 {
				all[name] = "nothing"
			}
			if p.ErrorCode != 0 {
				all[name] = kerr.TypedErrorForCode(p.ErrorCode).Message
			}
		}
	}
	return all
}

func TestAFetchSessionFollowsThePolicy(t *testing.T) {
	for _, version := range []int16{7, 12, 13, 17} {
		t.Run(fmt.Sprintf("v%d", version), func(t *testing.T) {
			cluster := newCluster(t, "orders", "secret")
			addr := cluster.ListenAddrs()[0]
			r := rand.New(rand.NewPCG(1, 1))
			fill(t, addr, "orders", r, 1)
			fill(t, addr, "secret", r, 1)
			rig := newRig(t, everything)
			client, _ := rig.serve(t, addr)
			names := map[[16]byte]string{}
			ask := func(session, epoch int32, offset int64, topics ...string) *kmsg.FetchResponse {
				req := fetchRequest(version, session, epoch, topics...)
				for i := range req.Topics {
					id := learnID(t, client, req.Topics[i].Topic)
					names[id], req.Topics[i].TopicID = req.Topics[i].Topic, id
					req.Topics[i].Partitions[0].FetchOffset = offset
				}
				return client.ask(1, req).(*kmsg.FetchResponse)
			}
			want := func(when string, resp *kmsg.FetchResponse, want map[string]string) {
				t.Helper()
				if got := codes(resp, names); resp.ErrorCode != 0 || fmt.Sprint(got) != fmt.Sprint(want) {
					t.Fatalf("%s: error %d and %v, not %v", when, resp.ErrorCode, got, want)
				}
			}
			const denied = "TOPIC_AUTHORIZATION_FAILED"
			resp := ask(0, 0, 0, "orders", "secret")
			id := resp.SessionID
			want("full fetch", resp, map[string]string{"orders": "records", "secret": "records"})
			if id == 0 {
				t.Fatal("no session")
			}
			want("positions moved", ask(id, 1, 1, "orders", "secret"), map[string]string{})
			want("idle", ask(id, 2, 0), map[string]string{})

			rig.shared.Policy.Store(parsePolicy(t, ordersOnly))
			fill(t, addr, "orders", r, 1)
			fill(t, addr, "secret", r, 1)
			want("revoked", ask(id, 3, 0), map[string]string{"orders": "records", "secret": denied})
			want("revoked, moved", ask(id, 4, 2, "orders"), map[string]string{"secret": denied})
			want("revoked, idle", ask(id, 5, 0), map[string]string{"secret": denied})

			rig.shared.Policy.Store(parsePolicy(t, everything))
			want("granted again", ask(id, 6, 0), map[string]string{"secret": "records"})
			want("granted, moved", ask(id, 7, 2, "secret"), map[string]string{})

			if resp := ask(id+1, 8, 0); resp.ErrorCode != kerr.FetchSessionIDNotFound.Code {
				t.Errorf("a foreign session id is answered with %d", resp.ErrorCode)
			}
			if resp := ask(id, 8, 0); resp.ErrorCode != 0 {
				t.Errorf("after it the session itself is answered with %d", resp.ErrorCode)
			}
		})
	}
}

// A session all of whose topics are refused goes on for the client, as it does at a broker with an authorizer; the
// broker behind ends it, and opens another when something is allowed again.
func TestAFetchSessionOutlivesTheLossOfAllItsTopics(t *testing.T) {
	for _, version := range []int16{7, 12, 13, 17} {
		t.Run(fmt.Sprintf("v%d", version), func(t *testing.T) {
			addr := newCluster(t, "orders", "secret").ListenAddrs()[0]
			r := rand.New(rand.NewPCG(1, 1))
			fill(t, addr, "secret", r, 1)
			rig := newRig(t, ordersOnly)
			client, _ := rig.serve(t, addr)
			rig.shared.Policy.Store(parsePolicy(t, everything))
			names := map[[16]byte]string{learnID(t, client, "secret"): "secret"}
			rig.shared.Policy.Store(parsePolicy(t, ordersOnly))
			session, epoch := int32(0), int32(0)
			ask := func(when, want string, offset int64) {
				t.Helper()
				var topics []string
				if offset >= 0 {
					topics = []string{"secret"}
				}
				req := fetchRequest(version, session, epoch, topics...)
				for i := range req.Topics {
					for id := range names {
						req.Topics[i].TopicID = id
					}
					req.Topics[i].Partitions[0].FetchOffset = offset
				}
				resp := client.ask(1, req).(*kmsg.FetchResponse)
				if got := codes(resp, names)["secret"]; resp.ErrorCode != 0 || got != want {
					t.Fatalf("%s: error %d and %q, not %q", when, resp.ErrorCode, got, want)
				}
				if session != 0 && resp.SessionID != session || resp.SessionID == 0 {
					t.Fatalf("%s: session %d was %d", when, resp.SessionID, session)
				}
				session, epoch = resp.SessionID, epoch+1
			}
			const denied = "TOPIC_AUTHORIZATION_FAILED"
			ask("opened without a right", denied, 0)
			ask("idle", denied, -1)
			for range 2 {
				rig.shared.Policy.Store(parsePolicy(t, everything))
				ask("granted", "records", -1)
				ask("granted, moved", "", 1)
				ask("granted, idle", "", -1)
				rig.shared.Policy.Store(parsePolicy(t, ordersOnly))
				ask("revoked", denied, -1)
				ask("revoked, moved back", denied, 0)
			}
			stale := fetchRequest(version, session, epoch+1)
			if resp := client.ask(1, stale).(*kmsg.FetchResponse); resp.ErrorCode != kerr.InvalidFetchSessionEpoch.Code {
				t.Errorf("an epoch too far is answered with %d", resp.ErrorCode)
			}
			ask("after it", denied, -1)
		})
	}
}

func TestASessionOfAnotherConnectionIsNotFound(t *testing.T) {
	cluster := newCluster(t, "orders", "secret")
	addr := cluster.ListenAddrs()[0]
	fill(t, addr, "secret", rand.New(rand.NewPCG(1, 1)), 1)
	privileged, _ := newRig(t, everything).serve(t, addr)
	opened := privileged.ask(1, fetchRequest(12, 0, 0, "secret")).(*kmsg.FetchResponse)
	if opened.SessionID == 0 {
		t.Fatal("no session")
	}
	thief, _ := newRig(t, ordersOnly).serve(t, addr)
	if own := thief.ask(1, fetchRequest(12, 0, 0, "orders")).(*kmsg.FetchResponse); own.SessionID == 0 {
		t.Fatal("no session of its own")
	}
	for _, topics := range [][]string{nil, {"orders"}, {"secret"}} {
		resp := thief.ask(2, fetchRequest(12, opened.SessionID, 1, topics...)).(*kmsg.FetchResponse)
		if resp.ErrorCode != kerr.FetchSessionIDNotFound.Code || len(resp.Topics) > 0 {
			t.Errorf("with %v: error %d and %d topics", topics, resp.ErrorCode, len(resp.Topics))
		}
	}
}

func TestRecordsThatWereNotAskedForAreNotPassedOn(t *testing.T) {
	rig := newRig(t, ordersOnly)
	client, broker, ended := rig.serveScripted(t)
	client.write(requestFrame(1, fetchRequest(12, 0, -1, "orders")))
	h, _ := broker.request()
	broker.answer(h, fetchAnswer(12, "secret", batch([]byte("a secret"))))
	client.drain()
	rig.wantRefusal(t, ended, audit.BadAnswer)
}

func TestARevocationMeetsTheAnswerThatIsUnderWay(t *testing.T) {
	for _, version := range []int16{4, 12, 17} {
		rig := newRig(t, everything)
		rig.cluster.names[topicID("secret")] = "secret"
		client, broker, ended := rig.serveScripted(t)
		req := fetchRequest(version, 0, -1, "secret")
		client.write(requestFrame(1, req))
		h, _ := broker.request()
		rig.shared.Policy.Store(parsePolicy(t, ordersOnly))
		broker.answer(h, fetchAnswer(version, "secret", batch([]byte("a secret"))))
		got := client.response(1, req).(*kmsg.FetchResponse).Topics[0].Partitions[0]
		if got.ErrorCode != kerr.TopicAuthorizationFailed.Code || len(got.RecordBatches) > 0 {
			t.Errorf("v%d: error %d and %d bytes of records", version, got.ErrorCode, len(got.RecordBatches))
		}
		broker.closeWrite()
		if err := end(t, ended); err != nil {
			t.Error(err)
		}
		if lines := rig.log.find(t, func(l auditLine) bool { return len(l.Batches) > 0 }); len(lines) > 0 {
			t.Errorf("v%d: the audit tells of records: %+v", version, lines)
		}
	}
}

func TestAFetchAnswerThatLiesEndsTheConnection(t *testing.T) {
	short := batch([]byte("record"))
	short[11] = 3 // shorter than its own header
	for name, answer := range map[string][]byte{
		"bytes too many": append(fetchAnswer(12, "orders", batch(nil)).AppendTo(nil), 0),
		"bytes missing":  fetchAnswer(12, "orders", batch(nil)).AppendTo(nil)[:40],
		"a short batch":  fetchAnswer(12, "orders", short).AppendTo(nil),
	} {
		t.Run(name, func(t *testing.T) {
			rig := newRig(t, ordersOnly)
			client, broker, ended := rig.serveScripted(t)
			client.write(requestFrame(1, fetchRequest(12, 0, -1, "orders")))
			h, _ := broker.request()
			broker.write(responseFrame(h.Correlation, answer))
			client.drain()
			rig.wantRefusal(t, ended, audit.BadAnswer)
		})
	}
}

// The last batch of a partition may be cut off by the fetch's size limit (KIP-74); a client drops it.
func TestACutBatchIsPassedOnAndIsNoEvidence(t *testing.T) {
	whole, cut := batch([]byte("whole")), batch([]byte("cut off"))
	for n := range cut {
		rig := newRig(t, ordersOnly)
		client, broker, ended := rig.serveScripted(t)
		req := fetchRequest(12, 0, -1, "orders")
		client.write(requestFrame(1, req))
		h, _ := broker.request()
		sent := append(append([]byte(nil), whole...), cut[:n]...)
		broker.answer(h, fetchAnswer(12, "orders", sent))
		resp := client.response(1, req).(*kmsg.FetchResponse)
		if got := resp.Topics[0].Partitions[0].RecordBatches; string(got) != string(sent) {
			t.Errorf("cut at %d: %d bytes of records arrived, %d were sent", n, len(got), len(sent))
		}
		if err := errors.Join(client.Close(), broker.Close()); err != nil {
			t.Fatal(err)
		}
		if err := end(t, ended); err != nil {
			t.Errorf("cut at %d: %v", n, err)
		}
		lines := rig.log.find(t, func(l auditLine) bool { return l.API == "Fetch" && l.Batches != nil })
		if len(lines) != 1 || len(lines[0].Batches) != 1 {
			t.Errorf("cut at %d: the lines are %+v", n, lines)
		}
	}
}

// A follower may read what it has no Topic Read for; the consumer that goes on with its session may not.
func TestAFollowerReadsByARightOnTheCluster(t *testing.T) {
	rig := newRig(t, ordersOnly+`  - name: replicas
    principals: ["spiffe://example.test/orders"]
    allow: [{cluster: kafka-cluster, operations: [ClusterAction]}]
`)
	client, broker, ended := rig.serveScripted(t)
	follow := fetchRequest(12, 0, 0, "secret")
	follow.ReplicaID = 7
	client.write(requestFrame(1, follow))
	h, _ := broker.request()
	answer := fetchAnswer(12, "secret", batch([]byte("record")))
	answer.SessionID = sessionID
	broker.answer(h, answer)
	if got := client.response(1, follow).(*kmsg.FetchResponse); len(got.Topics[0].Partitions[0].RecordBatches) == 0 {
		t.Errorf("the follower got %+v", got)
	}
	consume := fetchRequest(12, sessionID, 1)
	client.write(requestFrame(2, consume))
	h, _ = broker.request() // to forget the topic
	broker.answer(h, consume.ResponseKind())
	got := client.response(2, consume).(*kmsg.FetchResponse)
	if p := got.Topics[0].Partitions[0]; p.ErrorCode != kerr.TopicAuthorizationFailed.Code {
		t.Errorf("the consumer got %+v", got)
	}
	if err := client.Close(); err != nil {
		t.Fatal(err)
	}
	if err := end(t, ended); err != nil {
		t.Error(err)
	}
	for _, l := range rig.log.lines(t) {
		if l.Topic == "secret" && len(l.Batches) > 0 && (l.Verdict != "allow" || l.Rule != "replicas") {
			t.Errorf("on record as %+v", l)
		}
	}
}
