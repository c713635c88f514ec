package authz

import (
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"sync/atomic"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/policy"
)

// FetchSession mirrors an incremental fetch session (KIP-227). The broker's session holds the partitions we let
// through; the mirror also holds those we refuse, because Kafka repeats their error in every answer until the client
// forgets them, and takes them up again when they become allowed.
//
// A broker ends a session that has no partition left. The client's goes on while all that it has is refused: it is then
// ours alone, and when something becomes allowed again, the broker opens another, whose id and epochs are not those the
// client knows.
type FetchSession struct {
	id     atomic.Int32 // as the client knows it; 0 until there is an answer
	broker atomic.Int32 // the id of the broker's session; 0 where it has none
	byID   bool         // topics are named by id (Fetch v13+)

	epoch, brokerEpoch int32 // of the next request, the client's and ours
	parts              map[string]map[int32]*fetchPart
	refused            map[string]int16 // error codes of topics that the broker's session does not have
	total, kept        int              // partitions, and those of them that the broker's session has
	view               *policy.View     // every topic is decided under this view
	follows            bool             // and as a follower's
}

// Epochs of a full fetch: one that opens a session, and one without (FetchMetadata).
const (
	fetchOpens   = 0
	fetchWithout = -1
)

func isIncremental(epoch int32) bool { return epoch != fetchOpens && epoch != fetchWithout }

// fetchPart is what the client last asked of a partition: a later grant asks the broker for just that.
type fetchPart struct {
	leaderEpoch, lastEpoch, maxBytes int32
	offset, logStart                 int64
}

func newFetchSession(c *Ctx, req *kmsg.FetchRequest) *FetchSession {
	return &FetchSession{byID: req.Version >= 13, parts: make(map[string]map[int32]*fetchPart),
		refused: make(map[string]int16), view: c.View, follows: c.Follows != nil}
}

// Answered takes the session id out of the broker's answer, and returns the one that the client has to get; 0 means
// that there is no session (any more).
func (m *FetchSession) Answered(id int32) int32 {
	if known := m.id.Load(); known != 0 && id != 0 && id == m.broker.Load() {
		return known
	}
	m.broker.Store(id)
	m.id.Store(id)
	return id
}

// admits is what a broker finds wrong with an incremental request, in the order of FetchManager.newContext; nil is
// nothing.
func (m *FetchSession) admits(req *kmsg.FetchRequest) *kerr.Error {
	switch {
	case m == nil || req.SessionID == 0 || m.id.Load() != req.SessionID:
		return kerr.FetchSessionIDNotFound
	case m.epoch != req.SessionEpoch:
		return kerr.InvalidFetchSessionEpoch
	case m.byID != (req.Version >= 13):
		return kerr.FetchSessionTopicIDError
	}
	return nil
}

// judge decides each topic that the request names, and each topic of the session that must be decided anew: all when
// the policy changed, else those whose id nobody knew. It is not known as long as an id has to be looked up.
func (m *FetchSession) judge(c *Ctx, req *kmsg.FetchRequest) (judged map[string]int16, known bool) {
	judged = make(map[string]int16)
	judge := func(key, name string, id TopicID) {
		if _, done := judged[key]; !done {
			judged[key] = c.fetchRefusal(req.Version, name, id)
		}
	}
	for i := range req.Topics {
		t := &req.Topics[i]
		judge(fetchKey(req.Version, t.Topic, t.TopicID), t.Topic, t.TopicID)
	}
	anew := m.view != c.View || m.follows != (c.Follows != nil)
	again := maps.Keys(m.refused)
	if anew {
		again = maps.Keys(m.parts)
	}
	for _, key := range slices.Sorted(again) {
		if anew || m.refused[key] == kerr.UnknownTopicID.Code {
			name, id := m.unkey(key)
			judge(key, name, id)
		}
	}
	if len(c.Missing) > 0 && !c.Resolved {
		return nil, false
	}
	m.view, m.follows = c.View, c.Follows != nil
	return judged, true
}

// open answers for a full fetch, which may begin a session. A session that the request names ends with it.
func (m *FetchSession) open(c *Ctx, req *kmsg.FetchRequest, judged map[string]int16, session bool) Verdict {
	allowed := make([]kmsg.FetchRequestTopic, 0, len(req.Topics))
	for i := range req.Topics {
		t := &req.Topics[i]
		key := fetchKey(req.Version, t.Topic, t.TopicID)
		m.decide(key, judged[key])
		for j := range t.Partitions {
			m.put(key, &t.Partitions[j])
		}
		if judged[key] == 0 {
			allowed = append(allowed, *t)
		}
	}
	m.tidy(judged)
	forward, renamed, ends := *req, c.Fetch.renames(req.SessionID), int32(0)
	if c.Fetch != nil && c.Fetch.id.Load() == req.SessionID {
		ends = c.Fetch.broker.Load()
		forward.SessionID = ends
	}
	forward.Topics = allowed
	c.Fetch, m.epoch, m.brokerEpoch = nil, 1, 1
	if session {
		c.Fetch = m
	}
	switch {
	case len(allowed) == len(req.Topics) && !renamed:
		return Verdict{}
	case len(allowed) > 0 || m.total == 0:
		return Verdict{Forward: &forward, Edit: m.edit(m.Answered)}
	}
	if session {
		m.id.Store(1 + rand.Int32N(math.MaxInt32)) //nolint:gosec // G404: to be told from others, as a broker's
	}
	if ends == 0 {
		return m.answer(req)
	}
	forward.SessionEpoch = fetchWithout
	return Verdict{Forward: &forward, Edit: m.edit(func(int32) int32 { return m.id.Load() })}
}

// increment applies an incremental request to the mirror and works out what the broker's session has to hear.
func (m *FetchSession) increment(c *Ctx, req *kmsg.FetchRequest, judged map[string]int16) Verdict {
	up := &upstreamFetch{FetchRequest: *req}
	up.Topics, up.ForgottenTopics = nil, nil
	m.apply(req, up, judged)
	known := m.broker.Load()
	if known != req.SessionID || m.brokerEpoch != m.epoch {
		up.SessionID, up.SessionEpoch, up.changed = known, m.brokerEpoch, true
	}
	m.epoch, m.brokerEpoch = nextEpoch(m.epoch), nextEpoch(m.brokerEpoch)
	if m.total == 0 { // then a broker ends the session
		c.Fetch = nil
		m.id.Store(0)
	}
	switch {
	case m.kept == 0 && known == 0:
		return m.answer(req)
	case m.kept == 0:
		m.broker.Store(0)
		return Verdict{Forward: &up.FetchRequest, Edit: m.edit(func(int32) int32 { return m.id.Load() })}
	case known == 0:
		m.brokerEpoch = 1
		return Verdict{Forward: m.reopen(req), Edit: m.edit(func(id int32) int32 {
			m.broker.Store(id)
			return m.id.Load()
		})}
	}
	v := Verdict{}
	if up.changed {
		v.Forward = &up.FetchRequest
	}
	if up.changed || len(m.refused) > 0 {
		v.Edit = m.edit(m.Answered)
	}
	return v
}

// nextEpoch is FetchMetadata.nextEpoch and ShareRequestMetadata.nextEpoch of Apache Kafka.
func nextEpoch(epoch int32) int32 { return max(1, epoch+1) }

// apply takes a request into the mirror. As in FetchSession of Apache Kafka, what the request names is in the session
// before what it forgets is taken out.
func (m *FetchSession) apply(req *kmsg.FetchRequest, up *upstreamFetch, judged map[string]int16) {
	var regained []string
	for _, key := range slices.Sorted(maps.Keys(judged)) {
		was := m.refused[key]
		m.decide(key, judged[key])
		switch name, id := m.unkey(key); {
		case was == 0 && judged[key] != 0:
			for _, n := range slices.Sorted(maps.Keys(m.parts[key])) {
				up.forget(name, id, n)
				up.changed = true
			}
		case was != 0 && judged[key] == 0:
			regained = append(regained, key)
		}
	}
	listed := make(map[*fetchPart]struct{})
	for i := range req.Topics {
		t := &req.Topics[i]
		key := fetchKey(req.Version, t.Topic, t.TopicID)
		for j := range t.Partitions {
			listed[m.put(key, &t.Partitions[j])] = struct{}{}
			if judged[key] == 0 {
				up.add(t.Topic, t.TopicID, &t.Partitions[j])
			} else {
				up.changed = true
			}
		}
	}
	for _, key := range regained {
		name, id := m.unkey(key)
		for _, n := range slices.Sorted(maps.Keys(m.parts[key])) {
			if _, again := listed[m.parts[key][n]]; !again {
				up.add(name, id, m.parts[key][n].request(n))
				up.changed = true
			}
		}
	}
	for i := range req.ForgottenTopics {
		t := &req.ForgottenTopics[i]
		key := fetchKey(req.Version, t.Topic, t.TopicID)
		for _, n := range t.Partitions {
			if m.refused[key] == 0 {
				up.forget(t.Topic, t.TopicID, n)
			} else {
				up.changed = true
			}
			m.remove(key, n)
		}
	}
	m.tidy(judged)
}

// tidy forgets how topics are refused of which the session has no partition.
func (m *FetchSession) tidy(judged map[string]int16) {
	for key := range judged {
		if len(m.parts[key]) == 0 {
			delete(m.refused, key)
		}
	}
}

// decide notes how a topic is refused, 0 for allowed.
func (m *FetchSession) decide(key string, refused int16) {
	if was := m.refused[key]; (was == 0) != (refused == 0) {
		if refused == 0 {
			m.kept += len(m.parts[key])
		} else {
			m.kept -= len(m.parts[key])
		}
	}
	if refused == 0 {
		delete(m.refused, key)
	} else {
		m.refused[key] = refused
	}
}

// What a mirror of a session takes for each topic and partition, in bytes of memory, about.
const (
	mirroredTopic     = 256
	mirroredPartition = 96
)

// Weight is about how many bytes of memory the mirror takes.
func (m *FetchSession) Weight() (n int64) {
	if m == nil {
		return 0
	}
	for key := range m.parts {
		n += mirroredTopic + int64(len(key))
	}
	return n + int64(m.total)*mirroredPartition
}

func (m *FetchSession) put(key string, r *kmsg.FetchRequestTopicPartition) *fetchPart {
	parts := m.parts[key]
	if parts == nil {
		parts = make(map[int32]*fetchPart)
		m.parts[key] = parts
	}
	p := parts[r.Partition]
	if p == nil {
		p = new(fetchPart)
		parts[r.Partition] = p
		m.count(key, 1)
	}
	*p = fetchPart{r.CurrentLeaderEpoch, r.LastFetchedEpoch, r.PartitionMaxBytes, r.FetchOffset, r.LogStartOffset}
	return p
}

func (m *FetchSession) remove(key string, partition int32) {
	if m.parts[key][partition] != nil {
		delete(m.parts[key], partition)
		m.count(key, -1)
	}
	if len(m.parts[key]) == 0 {
		delete(m.parts, key)
		delete(m.refused, key)
	}
}

func (m *FetchSession) count(key string, n int) {
	m.total += n
	if m.refused[key] == 0 {
		m.kept += n
	}
}

// steady tells whether nothing stands between the client's session and the broker's: the client is right about it, and
// every topic is allowed under this very view.
func (m *FetchSession) steady(id, epoch int32, view *policy.View) bool {
	return m != nil && id != 0 && m.id.Load() == id && m.epoch == epoch && m.broker.Load() != 0 && len(m.refused) == 0 &&
		m.view == view && !m.follows
}

// renames tells whether the client has another id for the session than the broker.
func (m *FetchSession) renames(id int32) bool {
	return m != nil && id != 0 && m.id.Load() == id && m.broker.Load() != id
}

func (m *FetchSession) unkey(key string) (string, TopicID) {
	if m.byID {
		return "", TopicID([]byte(key))
	}
	return key, TopicID{}
}

func (p *fetchPart) request(n int32) *kmsg.FetchRequestTopicPartition {
	r := kmsg.NewFetchRequestTopicPartition()
	r.Partition, r.CurrentLeaderEpoch, r.LastFetchedEpoch = n, p.leaderEpoch, p.lastEpoch
	r.FetchOffset, r.LogStartOffset, r.PartitionMaxBytes = p.offset, p.logStart, p.maxBytes
	return &r
}

// reopen is the request that opens another session at the broker, in place of an incremental one.
func (m *FetchSession) reopen(req *kmsg.FetchRequest) *kmsg.FetchRequest {
	up := &upstreamFetch{FetchRequest: *req}
	up.Topics, up.ForgottenTopics, up.SessionID, up.SessionEpoch = nil, nil, 0, 0
	for _, key := range slices.Sorted(maps.Keys(m.parts)) {
		if m.refused[key] != 0 {
			continue
		}
		name, id := m.unkey(key)
		for _, n := range slices.Sorted(maps.Keys(m.parts[key])) {
			up.add(name, id, m.parts[key][n].request(n))
		}
	}
	return &up.FetchRequest
}

// answer is our own: there is nothing to ask the broker for.
func (m *FetchSession) answer(req *kmsg.FetchRequest) Verdict {
	resp := req.ResponseKind().(*kmsg.FetchResponse)
	resp.SessionID = m.id.Load()
	m.appendRefused(resp)
	return Verdict{Answer: resp}
}

// edit puts the session id that the client knows in place of the broker's, and adds the refusals as they stand now. A
// throttled answer tells of no partition, but of the session (FetchContext.getThrottledResponse, KAFKA-6946).
func (m *FetchSession) edit(id func(broker int32) int32) func(*Ctx, kmsg.Response) {
	var refused kmsg.FetchResponse
	m.appendRefused(&refused)
	return edit(func(_ *Ctx, resp *kmsg.FetchResponse) {
		if resp.ErrorCode != 0 {
			return
		}
		resp.SessionID = id(resp.SessionID)
		if resp.ThrottleMillis == 0 || len(resp.Topics) > 0 {
			resp.Topics = append(resp.Topics, refused.Topics...)
		}
	})
}

func (m *FetchSession) appendRefused(resp *kmsg.FetchResponse) {
	for _, key := range slices.Sorted(maps.Keys(m.refused)) {
		t := kmsg.NewFetchResponseTopic()
		t.Topic, t.TopicID = m.unkey(key)
		for _, n := range slices.Sorted(maps.Keys(m.parts[key])) {
			t.Partitions = append(t.Partitions, refusedPartition(n, m.refused[key]))
		}
		if len(t.Partitions) > 0 {
			resp.Topics = append(resp.Topics, t)
		}
	}
}

// refusedPartition is FetchResponse.partitionResponse of Apache Kafka.
func refusedPartition(n int32, code int16) kmsg.FetchResponseTopicPartition {
	p := kmsg.NewFetchResponseTopicPartition()
	p.Partition, p.ErrorCode = n, code
	p.HighWatermark, p.LastStableOffset, p.LogStartOffset = -1, -1, -1
	p.RecordBatches, p.AbortedTransactions = []byte{}, []kmsg.FetchResponseTopicPartitionAbortedTransaction{}
	return p
}

// upstreamFetch is the incremental request the broker gets.
type upstreamFetch struct {
	kmsg.FetchRequest
	changed bool // it differs from what the client sent
}

func (u *upstreamFetch) add(name string, id TopicID, p *kmsg.FetchRequestTopicPartition) {
	if k := len(u.Topics); k == 0 || u.Topics[k-1].Topic != name || u.Topics[k-1].TopicID != id {
		t := kmsg.NewFetchRequestTopic()
		t.Topic, t.TopicID = name, id
		u.Topics = append(u.Topics, t)
	}
	t := &u.Topics[len(u.Topics)-1]
	t.Partitions = append(t.Partitions, *p)
}

func (u *upstreamFetch) forget(name string, id TopicID, partition int32) {
	k := len(u.ForgottenTopics)
	if k == 0 || u.ForgottenTopics[k-1].Topic != name || u.ForgottenTopics[k-1].TopicID != id {
		t := kmsg.NewFetchRequestForgottenTopic()
		t.Topic, t.TopicID = name, id
		u.ForgottenTopics = append(u.ForgottenTopics, t)
	}
	t := &u.ForgottenTopics[len(u.ForgottenTopics)-1]
	t.Partitions = append(t.Partitions, partition)
}
