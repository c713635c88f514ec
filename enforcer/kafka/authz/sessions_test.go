package authz

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/policy"
)

// sessionPlay is a connection with a session of fetches while rights and topics come and go, with a broker that keeps
// the session as FetchSession and ShareSession of Apache Kafka do, and with what a broker that has the ACLs would keep.
type sessionPlay struct {
	t     *testing.T
	moves []byte
	log   strings.Builder

	allowed, known int // topics, a bit each
	ctx            Ctx // holds the mirrors
	epoch          int32
	session        int32         // the client's; 0: none
	client         map[part]bool // what a broker with the ACLs would have in it
	broker         map[part]bool // what the broker has in it; nil without one
	brokerSession  int32         // of a fetch session
	brokerEpoch    int32
}

type part struct {
	topic     int
	partition int32
}

const playTopics = 4

func playID(topic int) TopicID { return TopicID{15: byte(topic + 1)} }

func playName(topic int) string { return string("abcd"[topic]) }

// playViews are those of a subject that may read some of the topics, by their bits.
var playViews = func() (views [1 << playTopics]*policy.View) {
	for allowed := range views {
		text := "apiVersion: klamm/v1\nrules:\n  - {name: all, principals: [\"User:a\"], " +
			"allow: [{group: g, operations: [Read]}"
		for topic := range playTopics {
			if allowed>>topic&1 == 1 {
				text += fmt.Sprintf(", {topic: %s, operations: [Read]}", playName(topic))
			}
		}
		set, err := policy.Parse("play", []byte(text+"]}\n"))
		if err != nil {
			panic(err)
		}
		views[allowed] = policy.New(set).For(policy.Subject{Principal: "User:a"})
	}
	return views
}()

func (p *sessionPlay) next() (b byte) {
	if len(p.moves) > 0 {
		b, p.moves = p.moves[0], p.moves[1:]
	}
	return b
}

func (p *sessionPlay) failf(format string, args ...any) {
	p.t.Helper()
	p.t.Fatalf("%s\nafter\n%s", fmt.Sprintf(format, args...), p.log.String())
}

// some are up to three partitions.
func (p *sessionPlay) some() (parts []part) {
	for range p.next() % 4 {
		b := p.next()
		parts = append(parts, part{int(b) % playTopics, int32(b) / playTopics % 2})
	}
	return parts
}

// refusal is how a partition is refused; 0 where it is not.
func (p *sessionPlay) refusal(byID bool, of part) int16 {
	switch {
	case byID && p.known>>of.topic&1 == 0:
		return kerr.UnknownTopicID.Code
	case p.allowed>>of.topic&1 == 0:
		return kerr.TopicAuthorizationFailed.Code
	}
	return 0
}

// decide asks the handler as a session does.
func (p *sessionPlay) decide(req kmsg.Request) Verdict {
	topics := topicMap{}
	for topic := range playTopics {
		if p.known>>topic&1 == 1 {
			topics[playID(topic)] = playName(topic)
		}
	}
	p.ctx = Ctx{View: playViews[p.allowed], Topics: topics, Fetch: p.ctx.Fetch, Share: p.ctx.Share}
	v, _ := decide(&p.ctx, req)
	return v
}

// update does with a session what the broker does: first what the request names comes in, then what it forgets goes.
func update(session map[part]bool, named, forgotten []part) {
	for _, one := range named {
		session[one] = true
	}
	for _, one := range forgotten {
		delete(session, one)
	}
}

// withoutNews leaves some partitions.
func (p *sessionPlay) withoutNews(parts map[part]bool) {
	for _, one := range sortedParts(parts) {
		if p.next()%2 == 0 {
			delete(parts, one)
		}
	}
}

func sortedParts(parts map[part]bool) []part {
	return slices.SortedFunc(maps.Keys(parts), func(a, b part) int {
		return cmp.Or(cmp.Compare(a.topic, b.topic), cmp.Compare(a.partition, b.partition))
	})
}

// agree wants the broker's session to be what is allowed of the client's.
func (p *sessionPlay) agree(byID bool) {
	p.t.Helper()
	for one := range p.broker {
		if code := p.refusal(byID, one); code != 0 {
			p.failf("the broker's session has %v, which is refused with %d", one, code)
		}
		if !p.client[one] {
			p.failf("the broker's session has %v, the client's does not", one)
		}
	}
	for one := range p.client {
		if !p.broker[one] && p.refusal(byID, one) == 0 {
			p.failf("the broker's session does not have %v, which is allowed", one)
		}
	}
}

// refused wants the codes of an answer to be those of the partitions of the session that are refused, once each.
func (p *sessionPlay) refused(byID bool, answered map[part][]int16, among map[part]bool) {
	p.t.Helper()
	for one, codes := range answered {
		if len(codes) != 1 || codes[0] != p.refusal(byID, one) || !among[one] {
			p.failf("%v is answered with %v, want %d", one, codes, p.refusal(byID, one))
		}
	}
	for one := range among {
		if code := p.refusal(byID, one); code != 0 && answered[one] == nil {
			p.failf("the answer does not repeat the refusal of %v, %d", one, code)
		}
	}
}

// change grants or revokes, lets a topic id become known, or ends the broker's session. It tells whether it did.
func (p *sessionPlay) change(move byte) bool {
	topic := int(move/8) % playTopics
	switch move % 8 {
	case 0, 1:
		p.allowed ^= 1 << topic
		fmt.Fprintf(&p.log, "allowed: %04b\n", p.allowed)
	case 2:
		p.known |= 1 << topic
		fmt.Fprintf(&p.log, "known: %04b\n", p.known)
	case 3:
		p.broker = nil
		fmt.Fprintln(&p.log, "the broker has evicted the session")
	default:
		return false
	}
	return true
}

func (p *sessionPlay) fetch(version int16, session, epoch int32) {
	req := kmsg.NewPtrFetchRequest()
	req.Version, req.SessionID, req.SessionEpoch = version, session, epoch
	named := p.some()
	for _, one := range named {
		t := kmsg.NewFetchRequestTopic()
		t.Topic, t.TopicID = playName(one.topic), playID(one.topic)
		t.Partitions = append(t.Partitions, kmsg.FetchRequestTopicPartition{Partition: one.partition})
		req.Topics = append(req.Topics, t)
	}
	var forgotten []part
	if epoch > 0 {
		forgotten = p.some()
	}
	for _, one := range forgotten {
		t := kmsg.NewFetchRequestForgottenTopic()
		t.Topic, t.TopicID, t.Partitions = playName(one.topic), playID(one.topic), []int32{one.partition}
		req.ForgottenTopics = append(req.ForgottenTopics, t)
	}
	overWire(p.t, req, version)
	fmt.Fprintf(&p.log, "fetch, session %d, epoch %d: %v, without %v\n", session, epoch, named, forgotten)

	resp, byID := p.passFetch(req), version >= 13
	if wrong := p.wrong(session, epoch); wrong != 0 || resp.ErrorCode != 0 {
		if wrong != 0 && resp.ErrorCode != wrong {
			p.failf("the answer has error %d, not %d", resp.ErrorCode, wrong)
		} else if wrong == 0 {
			p.session = 0
		}
		return
	}
	asked := map[part]bool{}
	update(asked, named, nil)
	if epoch > 0 {
		update(p.client, named, forgotten)
		p.epoch++
	} else {
		p.client, p.epoch = asked, 1
	}
	over := epoch < 0 || epoch > 0 && len(p.client) == 0
	if (resp.SessionID == 0) != over || epoch > 0 && !over && resp.SessionID != p.session {
		p.failf("the answer has session %d", resp.SessionID)
	}
	p.session = resp.SessionID
	answered := map[part][]int16{}
	for _, t := range resp.Topics {
		for _, one := range t.Partitions {
			at := part{playTopic(byID, t.Topic, t.TopicID), one.Partition}
			answered[at] = append(answered[at], one.ErrorCode)
		}
	}
	p.refused(byID, answered, p.client)
	if p.session != 0 {
		p.agree(byID)
	}
}

// wrong is the error that a broker has for a session and an epoch; 0 where they are right.
func (p *sessionPlay) wrong(session, epoch int32) int16 {
	switch {
	case epoch <= 0:
		return 0
	case session != p.session:
		return kerr.FetchSessionIDNotFound.Code
	case epoch != p.epoch:
		return kerr.InvalidFetchSessionEpoch.Code
	}
	return 0
}

// passFetch sends a request through the mirror, in place where that can be, and the broker's answer back.
func (p *sessionPlay) passFetch(req *kmsg.FetchRequest) *kmsg.FetchResponse {
	body, v, byID := req.AppendTo(nil), Verdict{}, req.Version >= 13
	p.ctx.View = playViews[p.allowed]
	mayRead := func(name []byte, id TopicID) bool {
		return p.refusal(byID, part{topic: playTopic(byID, string(name), id)}) == 0
	}
	if FetchInPlace(&p.ctx, req.Version, body, mayRead) {
		again := kmsg.NewPtrFetchRequest()
		if again.Version = req.Version; again.ReadFrom(body) != nil {
			p.failf("decided in place, but it does not decode")
		}
		req = again
	} else if v = p.decide(req); v.Forward != nil {
		req = v.Forward.(*kmsg.FetchRequest)
	}
	mirror := p.ctx.Fetch
	if v.Answer != nil {
		return v.Answer.(*kmsg.FetchResponse)
	}
	resp := p.fetchAtBroker(req)
	switch {
	case v.Edit != nil:
		v.Edit(&p.ctx, resp)
	case mirror != nil && resp.ErrorCode == 0:
		resp.SessionID = mirror.Answered(resp.SessionID)
	}
	return resp
}

func playTopic(byID bool, name string, id TopicID) int {
	if byID {
		return int(id[15]) - 1
	}
	return strings.Index("abcd", name)
}

// fetchAtBroker answers as FetchManager does: what has no news is not in an incremental answer, and a session without a
// partition ends.
func (p *sessionPlay) fetchAtBroker(req *kmsg.FetchRequest) *kmsg.FetchResponse {
	version := req.Version
	overWire(p.t, req, version)
	byID := version >= 13
	resp := req.ResponseKind().(*kmsg.FetchResponse)
	var named, forgotten []part
	for _, t := range req.Topics {
		for _, one := range t.Partitions {
			named = append(named, part{playTopic(byID, t.Topic, t.TopicID), one.Partition})
		}
	}
	for _, t := range req.ForgottenTopics {
		for _, one := range t.Partitions {
			forgotten = append(forgotten, part{playTopic(byID, t.Topic, t.TopicID), one})
		}
	}
	news := map[part]bool{}
	update(news, named, nil)
	if req.SessionEpoch <= 0 && req.SessionID == p.brokerSession {
		p.broker = nil
	}
	switch {
	case req.SessionEpoch == 0:
		p.brokerSession += 10
		p.broker, p.brokerEpoch, resp.SessionID = maps.Clone(news), 1, p.brokerSession
	case req.SessionEpoch > 0 && (p.broker == nil || req.SessionID != p.brokerSession):
		resp.ErrorCode = kerr.FetchSessionIDNotFound.Code
		return resp
	case req.SessionEpoch > 0 && req.SessionEpoch != p.brokerEpoch:
		p.failf("the broker gets epoch %d, not %d", req.SessionEpoch, p.brokerEpoch)
	case req.SessionEpoch > 0:
		p.brokerEpoch++
		update(p.broker, named, forgotten)
		if len(p.broker) == 0 {
			p.broker = nil
			return resp
		}
		resp.SessionID = p.brokerSession
		news = maps.Clone(p.broker)
		p.withoutNews(news)
	}
	for _, one := range sortedParts(news) {
		t := kmsg.NewFetchResponseTopic()
		t.Topic, t.TopicID = playName(one.topic), playID(one.topic)
		data := kmsg.NewFetchResponseTopicPartition()
		data.Partition, data.RecordBatches = one.partition, []byte{}
		t.Partitions = append(t.Partitions, data)
		resp.Topics = append(resp.Topics, t)
	}
	overWire(p.t, resp, version)
	return resp
}

// Whatever comes in whatever order, the client has the session that a broker with the ACLs would keep for it, the
// broker's has what is allowed of it and nothing else, and each answer repeats what is refused.
func FuzzFetchSession(f *testing.F) {
	for seed := range byte(8) {
		moves := make([]byte, 200)
		for i := range moves {
			moves[i] = seed*31 + byte(i*i)*17
		}
		f.Add(seed%2 == 0, moves)
	}
	f.Add(true, []byte{5, 3, 0, 1, 2, 8, 7, 0, 1, 7, 1, 1, 3, 7, 0, 0}) // revoked while another's id is looked up
	f.Add(false, []byte{5, 1, 1, 0, 7, 1, 1, 1, 1, 7, 0, 0})            // named and forgotten at once
	f.Fuzz(func(t *testing.T, byID bool, moves []byte) {
		p := &sessionPlay{t: t, moves: moves[:min(len(moves), 600)], allowed: 7, known: 3}
		version := map[bool]int16{true: 17, false: 12}[byID]
		for len(p.moves) > 0 {
			switch move := p.next(); {
			case p.change(move):
			case p.session != 0 && move%32 == 13:
				p.fetch(version, p.session, p.epoch+1)
			case p.session != 0 && move%32 == 29:
				p.fetch(version, p.session+1, p.epoch)
			case p.session != 0 && move%8 > 4:
				p.fetch(version, p.session, p.epoch)
			case move%16 == 4:
				p.fetch(version, p.session, -1)
			default:
				p.fetch(version, p.session, 0)
			}
		}
	})
}

func (p *sessionPlay) shareFetch(epoch int32) {
	group, member := "g", "0000000000000000000000"
	acks := epoch != 0 && p.next()%2 == 0
	req := kmsg.NewPtrShareFetchRequest()
	req.Version, req.GroupID, req.MemberID, req.ShareSessionEpoch = 1, &group, &member, epoch
	named, forgotten := p.some(), p.some()
	if epoch <= 0 {
		forgotten = nil
	}
	for _, one := range named {
		t := kmsg.NewShareFetchRequestTopic()
		t.TopicID = playID(one.topic)
		t.Partitions = append(t.Partitions, kmsg.ShareFetchRequestTopicPartition{Partition: one.partition})
		if acks {
			t.Partitions[0].AcknowledgementBatches = []kmsg.ShareFetchRequestTopicPartitionAcknowledgementBatch{
				{FirstOffset: 0, LastOffset: 3, AcknowledgeTypes: []int8{1}}}
		}
		req.Topics = append(req.Topics, t)
	}
	for _, one := range forgotten {
		t := kmsg.NewShareFetchRequestForgottenTopicsData()
		t.TopicID, t.Partitions = playID(one.topic), []int32{one.partition}
		req.ForgottenTopicsData = append(req.ForgottenTopicsData, t)
	}
	overWire(p.t, req, 1)
	fmt.Fprintf(&p.log, "share fetch, epoch %d: %v, without %v\n", epoch, named, forgotten)

	resp := p.passShareFetch(req)
	if resp.ErrorCode != 0 {
		p.session, p.ctx.Share = 0, nil
		return
	}
	if epoch == 0 {
		p.client, p.epoch, p.session = map[part]bool{}, 0, 1
	}
	answered, acknowledged := map[part][]int16{}, map[part][]int16{}
	for _, t := range resp.Topics {
		for _, one := range t.Partitions {
			at := part{playTopic(true, "", t.TopicID), one.Partition}
			if epoch >= 0 {
				answered[at] = append(answered[at], one.ErrorCode)
			}
			if one.AcknowledgeErrorCode != 0 {
				acknowledged[at] = append(acknowledged[at], one.AcknowledgeErrorCode)
			}
		}
	}
	asked := map[part]bool{}
	if acks {
		update(asked, named, nil)
	}
	if epoch > 0 && acks { // whose partition may have left the session
		for _, one := range forgotten {
			if asked[one] && len(answered[one]) == 1 && answered[one][0] == 0 {
				delete(answered, one)
			}
		}
	}
	p.refused(true, acknowledged, asked)
	if epoch < 0 {
		p.session, p.broker = 0, nil
		return
	}
	update(p.client, named, forgotten)
	p.epoch++
	p.refused(true, answered, p.client)
	p.agree(true)
}

// passShareFetch sends a request through the mirror, in place where that can be, and the broker's answer back.
func (p *sessionPlay) passShareFetch(req *kmsg.ShareFetchRequest) *kmsg.ShareFetchResponse {
	body, v := req.AppendTo(nil), Verdict{}
	p.ctx.View = playViews[p.allowed]
	mayRead := func(_ []byte, id TopicID) bool { return p.refusal(true, part{topic: playTopic(true, "", id)}) == 0 }
	if !ShareFetchInPlace(&p.ctx, req.Version, body, func([]byte) bool { return true }, mayRead) {
		v = p.decide(req)
	}
	if v.Answer != nil {
		p.failf("it is not forwarded: %+v", v.Answer)
	}
	if v.Forward != nil {
		req = v.Forward.(*kmsg.ShareFetchRequest)
	}
	resp := p.shareFetchAtBroker(req)
	if v.Edit != nil {
		v.Edit(&p.ctx, resp)
	}
	return resp
}

// shareFetchAtBroker answers as SharePartitionManager does.
func (p *sessionPlay) shareFetchAtBroker(req *kmsg.ShareFetchRequest) *kmsg.ShareFetchResponse {
	overWire(p.t, req, 1)
	resp := req.ResponseKind().(*kmsg.ShareFetchResponse)
	switch {
	case req.ShareSessionEpoch == 0:
		p.broker = map[part]bool{}
	case p.broker == nil:
		resp.ErrorCode = kerr.ShareSessionNotFound.Code
		return resp
	case req.ShareSessionEpoch < 0:
		p.broker = nil
		return resp
	}
	var named, forgotten []part
	for _, t := range req.Topics {
		for _, one := range t.Partitions {
			named = append(named, part{playTopic(true, "", t.TopicID), one.Partition})
		}
	}
	for _, t := range req.ForgottenTopicsData {
		for _, one := range t.Partitions {
			forgotten = append(forgotten, part{playTopic(true, "", t.TopicID), one})
		}
	}
	update(p.broker, named, forgotten)
	news := maps.Clone(p.broker)
	p.withoutNews(news)
	for _, one := range sortedParts(news) {
		t := kmsg.NewShareFetchResponseTopic()
		t.TopicID = playID(one.topic)
		data := kmsg.NewShareFetchResponseTopicPartition()
		data.Partition, data.Records = one.partition, []byte{}
		t.Partitions = append(t.Partitions, data)
		resp.Topics = append(resp.Topics, t)
	}
	overWire(p.t, resp, 1)
	return resp
}

// So it is for share sessions.
func FuzzShareSession(f *testing.F) {
	for seed := range byte(8) {
		moves := make([]byte, 200)
		for i := range moves {
			moves[i] = seed*37 + byte(i*i)*13
		}
		f.Add(moves)
	}
	f.Fuzz(func(t *testing.T, moves []byte) {
		p := &sessionPlay{t: t, moves: moves[:min(len(moves), 600)], allowed: 7, known: 3}
		for len(p.moves) > 0 {
			switch move := p.next(); {
			case p.change(move):
			case p.session != 0 && move%8 > 4:
				p.shareFetch(p.epoch)
			case p.session != 0 && move%16 == 4:
				p.shareFetch(-1)
			default:
				p.shareFetch(0)
			}
		}
	})
}
