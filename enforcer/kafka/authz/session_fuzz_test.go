package authz

import (
	"fmt"
	"maps"
	"slices"
	"testing"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/policy"
)

// What the sessions of these tests are about: every name of partitions that a byte of the fuzzer selects by its bits.
var (
	sessionTopics = []string{"ok", "secret"}
	sessionIDs    = topicMap{{15: 1}: "ok", {15: 2}: "secret"}
)

type partition struct {
	topic string
	n     int32
}

type partitions map[partition]struct{}

// selected are partitions 0 and 1 of "ok" and of "secret", by four bits.
func selected(bits byte) partitions {
	all := partitions{}
	for i, topic := range sessionTopics {
		for n := range int32(2) {
			if bits&(1<<(2*i+int(n))) != 0 {
				all[partition{topic, n}] = struct{}{}
			}
		}
	}
	return all
}

func (p partitions) add(more partitions) { maps.Copy(p, more) }

func (p partitions) remove(less partitions) {
	for one := range less {
		delete(p, one)
	}
}

func (p partitions) of(topic string) (n []int32) {
	for one := range p {
		if one.topic == topic {
			n = append(n, one.n)
		}
	}
	slices.Sort(n)
	return n
}

// allowed are those of topics that a view lets be read.
func (p partitions) allowed(v *policy.View, is bool) partitions {
	all := partitions{}
	for one := range p {
		if v.Decide(kmsg.ACLResourceTypeTopic, one.topic, kmsg.ACLOperationRead).Allowed == is {
			all[one] = struct{}{}
		}
	}
	return all
}

func (p partitions) String() string {
	var all []string
	for one := range p {
		all = append(all, fmt.Sprint(one.topic, one.n))
	}
	slices.Sort(all)
	return fmt.Sprint(all)
}

func idOf(topic string) TopicID {
	for id, name := range sessionIDs {
		if name == topic {
			return id
		}
	}
	return TopicID{}
}

// sessionViews are policies that come one after the other: by the same one, a view is the same.
func sessionViews(t testing.TB) (views [4]*policy.View) {
	for i, topics := range []string{"ok", "*", "secret", "none"} {
		set, err := policy.Parse("fuzz", fmt.Appendf(nil, `
apiVersion: klamm/v1
rules:
  - name: reads
    principals: ["User:alice"]
    allow: [{topic: %q, operations: [Read]}, {group: "*", operations: [Read]}]
`, topics))
		if err != nil {
			t.Fatal(err)
		}
		views[i] = policy.New(set).For(policy.Subject{Principal: "User:alice"})
	}
	return views
}

// A script is read in steps of three bytes: which policy holds and what is done, what the request names, what it
// forgets.
func script(steps []byte, step func(what, names, forgets byte)) {
	for ; len(steps) >= 3; steps = steps[3:] {
		step(steps[0], steps[1], steps[2])
	}
}

var sessionScripts = [][]byte{
	{1, 15, 0, 5, 0, 0, 4, 0, 0, 5, 0, 0, 5, 2, 0},         // all; idle; a topic revoked; granted again; more positions
	{1, 3, 0, 7, 0, 0, 7, 0, 0, 5, 0, 0, 5, 1, 0, 5, 0, 3}, // all revoked; idle; granted again; moved; all forgotten
	{3, 12, 0, 7, 0, 0, 5, 3, 12, 5, 0, 0},                 // nothing to begin with; granted and replaced
	{1, 15, 15, 5, 0, 15, 5, 1, 0},                         // named and forgotten at once
	{1, 15, 0, 9, 0, 0, 13, 0, 0, 5, 0, 0},                 // a wrong epoch, a foreign session; it goes on
}

// brokerSessions is what a broker without an authorizer has of fetch sessions.
type brokerSessions struct {
	last     int32
	sessions map[int32]*brokerSession
}

type brokerSession struct {
	epoch int32
	parts partitions
}

// fetch is FetchManager.newContext of Apache Kafka.
func (b *brokerSessions) fetch(req *kmsg.FetchRequest, names, forgets partitions) *kmsg.FetchResponse {
	resp := req.ResponseKind().(*kmsg.FetchResponse)
	switch req.SessionEpoch {
	case 0, -1:
		delete(b.sessions, req.SessionID)
		if req.SessionEpoch == 0 {
			b.last += 100
			b.sessions[b.last] = &brokerSession{1, names}
			resp.SessionID = b.last
		}
		return resp
	}
	s := b.sessions[req.SessionID]
	switch {
	case s == nil:
		resp.ErrorCode = kerr.FetchSessionIDNotFound.Code
		return resp
	case s.epoch != req.SessionEpoch:
		resp.ErrorCode = kerr.InvalidFetchSessionEpoch.Code
		return resp
	}
	s.parts.add(names)
	s.parts.remove(forgets)
	if s.epoch++; len(s.parts) == 0 {
		delete(b.sessions, req.SessionID)
		return resp
	}
	resp.SessionID = req.SessionID
	return resp
}

// Whatever a client asks and however the policy changes meanwhile, it sees the session that a broker with an authorizer
// would keep for it, and the broker behind has of it what is allowed.
func FuzzFetchSession(f *testing.F) {
	for _, s := range sessionScripts {
		f.Add(int16(12), s)
		f.Add(int16(17), s)
	}
	views := sessionViews(f)
	f.Fuzz(func(t *testing.T, version int16, steps []byte) {
		if version < 7 || version > Table[kmsg.Fetch].Max || len(steps) > 300 {
			return
		}
		c := &Ctx{Topics: sessionIDs}
		direct, behind := &brokerSessions{sessions: map[int32]*brokerSession{}}, &brokerSessions{last: 7,
			sessions: map[int32]*brokerSession{}}
		var theirs, ours, epoch int32 // the session's id at either, and the epoch of the next request
		script(steps, func(what, names, forgets byte) {
			c.View = views[what&3]
			req := kmsg.NewPtrFetchRequest()
			req.Version, req.SessionEpoch = version, epoch
			switch what >> 2 & 3 {
			case 0: // another one
				req.SessionEpoch = 0
			case 2:
				req.SessionEpoch += 2
			}
			wrong := int32(0)
			if what>>2&3 == 3 {
				wrong = 5
			}
			fillFetch(req, selected(names), selected(forgets))
			req.SessionID = theirs + wrong
			want := direct.fetch(req, selected(names), selected(forgets))
			var refused partitions
			if s := direct.sessions[want.SessionID]; s != nil {
				refused = s.parts.allowed(c.View, false)
			} else if req.SessionEpoch == 0 {
				refused = selected(names).allowed(c.View, false)
			}
			req.SessionID = ours + wrong
			got := passFetch(t, c, req, behind)
			if got.ErrorCode != want.ErrorCode || (got.SessionID == 0) != (want.SessionID == 0) {
				t.Fatalf("error %d and session %d, a broker has error %d and session %d",
					got.ErrorCode, got.SessionID, want.ErrorCode, want.SessionID)
			}
			if got.ErrorCode != 0 {
				return
			}
			if told := refusedIn(got); told.String() != refused.String() {
				t.Fatalf("refuses %v, a broker refuses %v", told, refused)
			}
			if req.SessionEpoch != 0 && got.SessionID != 0 && got.SessionID != ours {
				t.Fatalf("session %d is %d now", ours, got.SessionID)
			}
			theirs, ours, epoch = want.SessionID, got.SessionID, req.SessionEpoch+1
			var has partitions
			if c.Fetch != nil && behind.sessions[c.Fetch.broker.Load()] != nil {
				has = behind.sessions[c.Fetch.broker.Load()].parts
			}
			var allowed partitions
			if s := direct.sessions[theirs]; s != nil {
				allowed = s.parts.allowed(c.View, true)
			}
			if has.String() != allowed.String() {
				t.Fatalf("the broker has %v, allowed are %v", has, allowed)
			}
		})
	})
}

func fillFetch(req *kmsg.FetchRequest, names, forgets partitions) {
	for _, topic := range sessionTopics {
		t := kmsg.NewFetchRequestTopic()
		t.Topic, t.TopicID = topic, idOf(topic)
		for _, n := range names.of(topic) {
			p := kmsg.NewFetchRequestTopicPartition()
			p.Partition, p.FetchOffset = n, int64(100+n)
			t.Partitions = append(t.Partitions, p)
		}
		if len(t.Partitions) > 0 {
			req.Topics = append(req.Topics, t)
		}
		if n := forgets.of(topic); len(n) > 0 {
			req.ForgottenTopics = append(req.ForgottenTopics,
				kmsg.FetchRequestForgottenTopic{Topic: topic, TopicID: idOf(topic), Partitions: n})
		}
	}
}

// passFetch sends a request through the mirror, in place where that can be, and the broker's answer back.
func passFetch(t *testing.T, c *Ctx, req *kmsg.FetchRequest, broker *brokerSessions) *kmsg.FetchResponse {
	body := req.AppendTo(nil)
	var v Verdict
	allowed := func(name []byte, id TopicID) bool {
		if req.Version >= 13 {
			name = []byte(sessionIDs[id])
		}
		return c.Visible(kmsg.ACLResourceTypeTopic, string(name), kmsg.ACLOperationRead)
	}
	up := kmsg.NewPtrFetchRequest()
	up.Version = req.Version
	if !FetchInPlace(c, req.Version, body, allowed) {
		if v = fetch(c, req); v.Answer != nil {
			return v.Answer.(*kmsg.FetchResponse)
		}
		if v.Forward != nil {
			body = v.Forward.AppendTo(nil)
		}
	}
	if err := up.ReadFrom(body); err != nil {
		t.Fatal(err)
	}
	names, forgets := partitions{}, partitions{}
	for _, topic := range up.Topics {
		for _, p := range topic.Partitions {
			if p.FetchOffset != int64(100+p.Partition) {
				t.Errorf("asks for offset %d of partition %d", p.FetchOffset, p.Partition)
			}
			names[partition{sessionName(topic.Topic, topic.TopicID), p.Partition}] = struct{}{}
		}
	}
	for _, topic := range up.ForgottenTopics {
		for _, n := range topic.Partitions {
			forgets[partition{sessionName(topic.Topic, topic.TopicID), n}] = struct{}{}
		}
	}
	resp := broker.fetch(up, names, forgets)
	if resp.ErrorCode != 0 && req.SessionEpoch != 0 {
		t.Fatalf("the broker answers error %d to epoch %d of session %d", resp.ErrorCode, up.SessionEpoch, up.SessionID)
	}
	switch {
	case v.Edit != nil:
		v.Edit(c, resp)
	case c.Fetch != nil:
		resp.SessionID = c.Fetch.Answered(resp.SessionID)
	}
	return resp
}

func sessionName(name string, id TopicID) string {
	if name == "" {
		return sessionIDs[id]
	}
	return name
}

func refusedIn(resp *kmsg.FetchResponse) partitions {
	all := partitions{}
	for _, topic := range resp.Topics {
		for _, p := range topic.Partitions {
			if p.ErrorCode != 0 {
				all[partition{sessionName(topic.Topic, topic.TopicID), p.Partition}] = struct{}{}
			}
		}
	}
	return all
}

// The same for share sessions, which have no id and go on without a partition.
func FuzzShareSession(f *testing.F) {
	for _, s := range sessionScripts {
		f.Add(s)
	}
	views := sessionViews(f)
	f.Fuzz(func(t *testing.T, steps []byte) {
		if len(steps) > 300 {
			return
		}
		c := &Ctx{Topics: sessionIDs}
		var client, broker partitions // nil without a session
		script(steps, func(what, names, forgets byte) {
			c.View = views[what&3]
			req := kmsg.NewPtrShareFetchRequest()
			req.Version, req.GroupID, req.MemberID, req.ShareSessionEpoch = 2, new("g"), new("m"), 1
			switch what >> 2 & 3 {
			case 0:
				req.ShareSessionEpoch = shareOpens
			case 3:
				req.ShareSessionEpoch = shareCloses
			}
			acks := what>>4&1 != 0 && req.ShareSessionEpoch != shareOpens
			fillShareFetch(req, selected(names), selected(forgets), acks)
			up, resp := passShareFetch(t, c, req)
			if up == nil {
				if client != nil || resp.ErrorCode != kerr.ShareSessionNotFound.Code {
					t.Fatalf("answers error %d in a session of %v", resp.ErrorCode, client)
				}
				return
			}
			named, forgotten := sharedIn(t, up, acks)
			want := partitions{} // with an error
			switch req.ShareSessionEpoch {
			case shareCloses:
				client, broker = nil, nil
			case shareOpens:
				client, broker = partitions{}, partitions{}
				fallthrough
			default:
				client.add(selected(names))
				client.remove(selected(forgets))
				broker.add(named)
				broker.remove(forgotten)
				want = client.allowed(c.View, false)
				if kept := client.allowed(c.View, true); kept.String() != broker.String() {
					t.Fatalf("the broker has %v, allowed are %v", broker, kept)
				}
			}
			wantAcks := partitions{}
			if acks && names&15 != 0 {
				wantAcks = selected(names).allowed(c.View, false)
			}
			errors, refusedAcks := partitions{}, partitions{}
			for _, topic := range resp.Topics {
				for _, p := range topic.Partitions {
					if p.ErrorCode != 0 {
						errors[partition{sessionIDs[topic.TopicID], p.Partition}] = struct{}{}
					}
					if p.AcknowledgeErrorCode != 0 {
						refusedAcks[partition{sessionIDs[topic.TopicID], p.Partition}] = struct{}{}
					}
				}
			}
			if errors.String() != want.String() || refusedAcks.String() != wantAcks.String() {
				t.Fatalf("refuses %v and acknowledgements of %v, not %v and %v", errors, refusedAcks, want, wantAcks)
			}
		})
	})
}

func fillShareFetch(req *kmsg.ShareFetchRequest, names, forgets partitions, acks bool) {
	for _, topic := range sessionTopics {
		t := kmsg.NewShareFetchRequestTopic()
		t.TopicID = idOf(topic)
		for _, n := range names.of(topic) {
			p := kmsg.NewShareFetchRequestTopicPartition()
			p.Partition = n
			if acks {
				p.AcknowledgementBatches = []kmsg.ShareFetchRequestTopicPartitionAcknowledgementBatch{
					{FirstOffset: 0, LastOffset: 3, AcknowledgeTypes: []int8{1}}}
			}
			t.Partitions = append(t.Partitions, p)
		}
		if len(t.Partitions) > 0 {
			req.Topics = append(req.Topics, t)
		}
		if n := forgets.of(topic); len(n) > 0 {
			req.ForgottenTopicsData = append(req.ForgottenTopicsData,
				kmsg.ShareFetchRequestForgottenTopicsData{TopicID: idOf(topic), Partitions: n})
		}
	}
}

// passShareFetch sends a request through the mirror, and an answer without records back. up is nil where the broker
// heard nothing.
func passShareFetch(
	t *testing.T, c *Ctx, req *kmsg.ShareFetchRequest,
) (up *kmsg.ShareFetchRequest, resp *kmsg.ShareFetchResponse) {
	body := req.AppendTo(nil)
	group := func([]byte) bool { return true }
	topic := func(_ []byte, id TopicID) bool {
		return c.Visible(kmsg.ACLResourceTypeTopic, sessionIDs[id], kmsg.ACLOperationRead)
	}
	var v Verdict
	if !ShareFetchInPlace(c, req.Version, body, group, topic) {
		if v = shareFetch(c, req); v.Answer != nil {
			return nil, v.Answer.(*kmsg.ShareFetchResponse)
		}
		if v.Forward != nil {
			body = v.Forward.AppendTo(nil)
		}
	}
	up = kmsg.NewPtrShareFetchRequest()
	up.Version = req.Version
	if err := up.ReadFrom(body); err != nil {
		t.Fatal(err)
	}
	if up.ShareSessionEpoch != req.ShareSessionEpoch {
		t.Errorf("epoch %d goes out as %d", req.ShareSessionEpoch, up.ShareSessionEpoch)
	}
	resp = up.ResponseKind().(*kmsg.ShareFetchResponse)
	if v.Edit != nil {
		v.Edit(c, resp)
	}
	return up, resp
}

func sharedIn(t *testing.T, up *kmsg.ShareFetchRequest, acks bool) (names, forgets partitions) {
	names, forgets = partitions{}, partitions{}
	for _, topic := range up.Topics {
		for _, p := range topic.Partitions {
			names[partition{sessionIDs[topic.TopicID], p.Partition}] = struct{}{}
			if !acks && len(p.AcknowledgementBatches) > 0 {
				t.Error("acknowledges what the client did not")
			}
		}
	}
	for _, topic := range up.ForgottenTopicsData {
		for _, n := range topic.Partitions {
			forgets[partition{sessionIDs[topic.TopicID], n}] = struct{}{}
		}
	}
	return names, forgets
}
