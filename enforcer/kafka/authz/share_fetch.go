package authz

import (
	"bytes"
	"cmp"
	"maps"
	"slices"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/policy"
)

// Epochs of a share session that are none of a running one (ShareRequestMetadata).
const (
	shareOpens  = 0
	shareCloses = -1
)

// ShareSession mirrors the share session of a connection (KIP-932). A broker keeps it by group and member, and forgets
// it with the connection that opened it; ours belongs to the connection alone, so that nobody goes on with another's.
// The broker's session holds the partitions we let through; the mirror also holds those we refuse, because Kafka
// repeats their error in every answer until the client forgets them, and takes them up again when they become allowed.
type ShareSession struct {
	group, member string
	parts         map[TopicID]map[int32]struct{}
	refused       map[TopicID]*kerr.Error // topics that the broker's session does not have, and why
	view          *policy.View            // every topic is decided under this view
	epoch         int32                   // of the next request
}

// shareFetch: Group Read, then Topic Read, which covers the acknowledgements that come along. Unlike a Fetch it reaches
// the broker also when no topic is left, for the session's epoch counts on with it.
func shareFetch(c *Ctx, req *kmsg.ShareFetchRequest) Verdict {
	if err := c.judgeShare(req.GroupID, req.MemberID); err != nil {
		return Verdict{Answer: Refuse(req, err, "")}
	}
	a := shareAnswer{acknowledges: acknowledges(req), renews: req.Version >= 2 && req.IsRenewAck}
	if a.renews && (req.MaxBytes != 0 || req.MinBytes != 0 || req.MaxRecords != 0 || req.MaxWaitMillis != 0) {
		return Verdict{Answer: Refuse(req, kerr.InvalidRequest, "")} // who renews asks for no records (KIP-1222)
	}
	mine := c.Share.is(*req.GroupID, *req.MemberID)
	m, closes := c.Share, false
	switch req.ShareSessionEpoch {
	case shareOpens:
		if a.acknowledges {
			return Verdict{Answer: Refuse(req, kerr.InvalidRequest, "")}
		}
		m = &ShareSession{group: *req.GroupID, member: *req.MemberID, parts: map[TopicID]map[int32]struct{}{},
			refused: map[TopicID]*kerr.Error{}, view: c.View}
	case shareCloses: // of whichever connection the session is
		m, closes = &ShareSession{view: c.View}, true
	default:
		if !mine {
			return Verdict{Answer: Refuse(req, kerr.ShareSessionNotFound, "")}
		}
		if m.epoch != req.ShareSessionEpoch {
			return Verdict{Answer: Refuse(req, kerr.InvalidShareSessionEpoch, "")}
		}
	}
	judged, known := m.judge(c, req)
	if !known {
		return Verdict{}
	}
	up := &upstreamShareFetch{ShareFetchRequest: *req}
	up.Topics, up.ForgottenTopicsData = nil, nil
	if closes {
		up.ForgottenTopicsData = req.ForgottenTopicsData
		up.take(req, judged, &a)
	} else {
		m.epoch = nextEpoch(req.ShareSessionEpoch)
		m.apply(req, up, judged, &a)
		c.Share = m
	}
	if closes && mine {
		c.Share = nil
	}
	if !closes && !a.renews { // in which case a broker does not look for records
		m.refuse(&a)
	}
	return a.verdict(up)
}

// judgeShare decides what ShareFetch and ShareAcknowledge have in common.
func (c *Ctx) judgeShare(group, member *string) *kerr.Error {
	if group == nil {
		return kerr.InvalidRequest
	}
	if err := c.judgeGroup(*group, kmsg.ACLOperationRead); err != nil {
		return err
	}
	if !validShareMember(member) {
		return kerr.InvalidRequest
	}
	return nil
}

func acknowledges(req *kmsg.ShareFetchRequest) bool {
	for i := range req.Topics {
		for j := range req.Topics[i].Partitions {
			if len(req.Topics[i].Partitions[j].AcknowledgementBatches) > 0 {
				return true
			}
		}
	}
	return false
}

func (m *ShareSession) is(group, member string) bool {
	return m != nil && m.group == group && m.member == member
}

// judge decides each topic that the request names, and each topic of the session that must be decided anew: all when
// the policy changed, else those whose id nobody knew. It is not known as long as an id has to be looked up.
func (m *ShareSession) judge(c *Ctx, req *kmsg.ShareFetchRequest) (judged map[TopicID]*kerr.Error, known bool) {
	judged = make(map[TopicID]*kerr.Error)
	judge := func(id TopicID) {
		if _, done := judged[id]; !done {
			judged[id] = c.judgeTopic(true, "", id, kmsg.ACLOperationRead)
		}
	}
	for i := range req.Topics {
		judge(req.Topics[i].TopicID)
	}
	for _, id := range sortedIDs(m.parts) {
		if m.view != c.View || m.refused[id] == kerr.UnknownTopicID {
			judge(id)
		}
	}
	if len(c.Missing) > 0 && !c.Resolved {
		return nil, false
	}
	m.view = c.View
	return judged, true
}

// apply takes a request into the mirror and works out what the broker's session has to hear of it. As in ShareSession
// of Apache Kafka, what the request names is in the session before what it forgets is taken out.
func (m *ShareSession) apply(
	req *kmsg.ShareFetchRequest, up *upstreamShareFetch, judged map[TopicID]*kerr.Error, a *shareAnswer,
) {
	var regained []TopicID
	for _, id := range sortedIDs(m.parts) {
		was, err := m.refused[id], judged[id]
		if _, decided := judged[id]; !decided {
			continue
		}
		m.note(id, err)
		switch {
		case was == nil && err != nil:
			for _, n := range slices.Sorted(maps.Keys(m.parts[id])) {
				up.forget(id, n)
			}
			up.changed = true
		case was != nil && err == nil:
			regained = append(regained, id)
		}
	}
	listed := up.take(req, judged, a)
	for _, id := range regained {
		for _, n := range slices.Sorted(maps.Keys(m.parts[id])) {
			if _, again := listed[sharePart{id, n}]; !again {
				up.add(id, &kmsg.ShareFetchRequestTopicPartition{Partition: n})
				up.changed = true
			}
		}
	}
	for part := range listed {
		if m.parts[part.id] == nil {
			m.parts[part.id] = make(map[int32]struct{})
		}
		m.parts[part.id][part.partition] = struct{}{}
		m.note(part.id, judged[part.id])
	}
	for i := range req.ForgottenTopicsData {
		t := &req.ForgottenTopicsData[i]
		up.changed = up.changed || m.refused[t.TopicID] != nil
		for _, n := range t.Partitions {
			if m.refused[t.TopicID] == nil {
				up.forget(t.TopicID, n)
			}
			delete(m.parts[t.TopicID], n)
		}
		if len(m.parts[t.TopicID]) == 0 {
			delete(m.parts, t.TopicID)
			delete(m.refused, t.TopicID)
		}
	}
}

func (m *ShareSession) note(id TopicID, err *kerr.Error) {
	if err == nil {
		delete(m.refused, id)
	} else {
		m.refused[id] = err
	}
}

// refuse adds the refusals of the session to an answer.
func (m *ShareSession) refuse(a *shareAnswer) {
	for id, err := range m.refused {
		for n := range m.parts[id] {
			a.at(sharePart{id, n}).fetch = err.Code
		}
	}
}

// steady tells whether nothing stands between the client's session and the broker's: every topic is allowed under this
// very view.
func (m *ShareSession) steady(group, member []byte, epoch int32, view *policy.View) bool {
	return m != nil && m.group == string(group) && m.member == string(member) && m.epoch == epoch &&
		len(m.refused) == 0 && m.view == view
}

// Weight is about how many bytes of memory the mirror takes.
func (m *ShareSession) Weight() (n int64) {
	if m == nil {
		return 0
	}
	n = int64(len(m.group) + len(m.member))
	for _, parts := range m.parts {
		n += mirroredTopic + int64(len(parts))*mirroredPartition
	}
	return n
}

func (m *ShareSession) has(id TopicID, partition int32) bool {
	_, ok := m.parts[id][partition]
	return ok
}

func sortedIDs[V any](of map[TopicID]V) []TopicID {
	return slices.SortedFunc(maps.Keys(of), func(a, b TopicID) int { return bytes.Compare(a[:], b[:]) })
}

type sharePart struct {
	id        TopicID
	partition int32
}

// upstreamShareFetch is the request the broker gets.
type upstreamShareFetch struct {
	kmsg.ShareFetchRequest
	changed bool // it differs from what the client sent
}

// take adds what the request names of allowed topics, and notes how the acknowledgements of others are refused. It
// returns all partitions named.
func (u *upstreamShareFetch) take(
	req *kmsg.ShareFetchRequest, judged map[TopicID]*kerr.Error, a *shareAnswer,
) (listed map[sharePart]struct{}) {
	listed = make(map[sharePart]struct{})
	for i := range req.Topics {
		t := &req.Topics[i]
		err := judged[t.TopicID]
		u.changed = u.changed || err != nil
		for j := range t.Partitions {
			p := &t.Partitions[j]
			listed[sharePart{t.TopicID, p.Partition}] = struct{}{}
			switch {
			case err == nil:
				u.add(t.TopicID, p)
			case a.acknowledges:
				r := newAckRun(req.Version, a.renews)
				for _, b := range p.AcknowledgementBatches {
					r.take(b.FirstOffset, b.LastOffset, b.AcknowledgeTypes)
				}
				a.at(sharePart{t.TopicID, p.Partition}).ack = r.refusal(err).Code
			}
		}
	}
	return listed
}

func (u *upstreamShareFetch) add(id TopicID, p *kmsg.ShareFetchRequestTopicPartition) {
	if k := len(u.Topics); k == 0 || u.Topics[k-1].TopicID != id {
		t := kmsg.NewShareFetchRequestTopic()
		t.TopicID = id
		u.Topics = append(u.Topics, t)
	}
	t := &u.Topics[len(u.Topics)-1]
	t.Partitions = append(t.Partitions, *p)
}

func (u *upstreamShareFetch) forget(id TopicID, partition int32) {
	if k := len(u.ForgottenTopicsData); k == 0 || u.ForgottenTopicsData[k-1].TopicID != id {
		t := kmsg.NewShareFetchRequestForgottenTopicsData()
		t.TopicID = id
		u.ForgottenTopicsData = append(u.ForgottenTopicsData, t)
	}
	t := &u.ForgottenTopicsData[len(u.ForgottenTopicsData)-1]
	t.Partitions = append(t.Partitions, partition)
}

// shareAnswer is what we add to the broker's answer.
type shareAnswer struct {
	acknowledges, renews bool // of the request
	refused              map[sharePart]*shareRefusal
}

// shareRefusal has the error codes of one partition, 0 for none.
type shareRefusal struct{ fetch, ack int16 }

func (a *shareAnswer) at(p sharePart) *shareRefusal {
	if a.refused == nil {
		a.refused = make(map[sharePart]*shareRefusal)
	}
	r := a.refused[p]
	if r == nil {
		r = new(shareRefusal)
		a.refused[p] = r
	}
	return r
}

func (a *shareAnswer) verdict(up *upstreamShareFetch) Verdict {
	v := Verdict{}
	if up.changed {
		v.Forward = &up.ShareFetchRequest
	}
	if up.changed || len(a.refused) > 0 {
		v.Edit = edit(a.merge)
	}
	return v
}

// merge adds the refusals. A throttled answer tells of acknowledgements alone (ShareFetchContext.throttleResponse).
func (a *shareAnswer) merge(_ *Ctx, resp *kmsg.ShareFetchResponse) {
	if resp.ErrorCode != 0 {
		return
	}
	parts := slices.SortedFunc(maps.Keys(a.refused), func(a, b sharePart) int {
		return cmp.Or(bytes.Compare(a.id[:], b.id[:]), cmp.Compare(a.partition, b.partition))
	})
	first := len(resp.Topics)
	for _, part := range parts {
		p := kmsg.NewShareFetchResponseTopicPartition()
		p.Partition, p.AcknowledgeErrorCode, p.Records = part.partition, a.refused[part].ack, []byte{}
		if resp.ThrottleMillis == 0 {
			p.ErrorCode = a.refused[part].fetch
		}
		if p.ErrorCode == 0 && p.AcknowledgeErrorCode == 0 {
			continue
		}
		if k := len(resp.Topics); k == first || resp.Topics[k-1].TopicID != part.id {
			t := kmsg.NewShareFetchResponseTopic()
			t.TopicID = part.id
			resp.Topics = append(resp.Topics, t)
		}
		t := &resp.Topics[len(resp.Topics)-1]
		t.Partitions = append(t.Partitions, p)
	}
}

// filterShareFetch takes out of an answer what the view does not let the client read. Records that are taken out stay
// acquired at the broker until their lock times out; then it gives them to another member. What the answer says of
// acknowledgements stays: they were carried out.
func filterShareFetch(c *Ctx, resp *kmsg.ShareFetchResponse) {
	for i := range resp.Topics {
		t := &resp.Topics[i]
		err := c.judgeTopic(true, "", t.TopicID, kmsg.ACLOperationRead)
		if err == nil {
			continue
		}
		for j := range t.Partitions {
			p := kmsg.NewShareFetchResponseTopicPartition()
			p.Partition, p.ErrorCode, p.Records = t.Partitions[j].Partition, err.Code, []byte{}
			p.AcknowledgeErrorCode = t.Partitions[j].AcknowledgeErrorCode
			p.AcknowledgeErrorMessage = t.Partitions[j].AcknowledgeErrorMessage
			t.Partitions[j] = p
		}
	}
}
