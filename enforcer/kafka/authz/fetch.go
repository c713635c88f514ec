package authz

import (
	"maps"
	"slices"
	"sync/atomic"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/kafka/wire"
	"klamm/enforcer/policy"
)

// FetchSession mirrors an incremental fetch session (KIP-227). The broker's session holds the partitions we let
// through; the mirror also holds those we refuse, because Kafka repeats their error in every answer until the client
// forgets them, and takes them up again when they become allowed.
type FetchSession struct {
	id      atomic.Int32 // the broker's; 0 until it has answered
	byID    bool         // topics are named by id (Fetch v13+)
	parts   map[string]map[int32]*fetchPart
	refused int
	view    *policy.View // every partition is decided under this view
}

// fetchPart is what the client last asked of a partition: a later grant asks the broker for just that.
type fetchPart struct {
	leaderEpoch, lastEpoch, maxBytes int32
	offset, logStart                 int64
	refused                          int16 // the error code we answer; 0 where the broker's session has the partition
}

// SetID takes the session id out of the broker's answer; 0 means that there is no session (any more).
func (m *FetchSession) SetID(id int32) { m.id.Store(id) }

// fetch: Topic Read. A follower's fetch (replica id set) also needs Cluster ClusterAction; unlike a broker we do not
// take that for a right to read every topic.
func fetch(c *Ctx, req *kmsg.FetchRequest) Verdict {
	sessions := req.Version >= 7
	incremental := sessions && req.SessionEpoch > 0
	if incremental && (c.Fetch == nil || c.Fetch.id.Load() != req.SessionID || req.SessionID == 0) {
		return fetchError(req, kerr.FetchSessionIDNotFound)
	}
	if incremental && c.Fetch.byID != (req.Version >= 13) {
		return fetchError(req, kerr.FetchSessionTopicIDError)
	}
	follower := req.ReplicaID >= 0 || req.ReplicaState.ID >= 0
	if follower && !c.AllowCluster(kmsg.ACLOperationClusterAction) {
		return fetchRefuseAll(req)
	}
	for i := range req.Topics {
		c.fetchName(req.Version, req.Topics[i].Topic, req.Topics[i].TopicID)
	}
	if incremental && !c.Resolved {
		c.Fetch.lookUp(c)
	}
	if len(c.Missing) > 0 && !c.Resolved {
		return Verdict{} // before the mirror changes: the handler is called again
	}
	if incremental {
		return c.Fetch.increment(c, req)
	}
	return fetchFull(c, req, sessions && req.SessionEpoch == 0)
}

func fetchFull(c *Ctx, req *kmsg.FetchRequest, session bool) Verdict {
	m := &FetchSession{byID: req.Version >= 13, parts: make(map[string]map[int32]*fetchPart), view: c.View}
	allowed := make([]kmsg.FetchRequestTopic, 0, len(req.Topics))
	for i := range req.Topics {
		t := &req.Topics[i]
		refused := c.fetchRefusal(req.Version, t.Topic, t.TopicID)
		for j := range t.Partitions {
			m.put(req.Version, t, &t.Partitions[j], refused)
		}
		if refused == 0 {
			allowed = append(allowed, *t)
		}
	}
	if session {
		c.Fetch = m
	} else {
		c.Fetch = nil
	}
	switch {
	case m.refused == 0:
		return Verdict{}
	case len(allowed) == 0:
		c.Fetch = nil
		resp := req.ResponseKind().(*kmsg.FetchResponse)
		m.appendRefused(resp)
		return Verdict{Answer: resp}
	}
	forward := *req
	forward.Topics = allowed
	return Verdict{Forward: &forward, Edit: m.edit()}
}

// increment applies an incremental request to the mirror and works out what the broker's session has to hear. As in
// FetchSession of Apache Kafka, what the request names is in the session before what it forgets is taken out.
func (m *FetchSession) increment(c *Ctx, req *kmsg.FetchRequest) Verdict {
	up := &upstreamFetch{FetchRequest: *req}
	up.Topics, up.ForgottenTopics = nil, nil

	listed := make(map[*fetchPart]bool)
	for i := range req.Topics {
		t := &req.Topics[i]
		refused := c.fetchRefusal(req.Version, t.Topic, t.TopicID)
		for j := range t.Partitions {
			p := &t.Partitions[j]
			upstream := m.upstreamHas(fetchKey(req.Version, t.Topic, t.TopicID), p.Partition)
			listed[m.put(req.Version, t, p, refused)] = true
			if refused == 0 {
				up.add(t.Topic, t.TopicID, p)
				continue
			}
			up.changed = true
			if upstream {
				up.forget(t.Topic, t.TopicID, p.Partition)
			}
		}
	}
	for i := range req.ForgottenTopics {
		t := &req.ForgottenTopics[i]
		for _, p := range t.Partitions {
			if m.remove(fetchKey(req.Version, t.Topic, t.TopicID), p) {
				up.forget(t.Topic, t.TopicID, p)
			} else {
				up.changed = true
			}
		}
	}
	m.reconsider(c, up, listed)

	v := Verdict{}
	if up.changed {
		v.Forward = &up.FetchRequest
	}
	if m.refused > 0 {
		v.Edit = m.edit()
	}
	return v
}

// lookUp asks for the topic ids that reconsider will want to know.
func (m *FetchSession) lookUp(c *Ctx) {
	if !m.byID || m.view == c.View && m.refused == 0 {
		return
	}
	for _, key := range slices.Sorted(maps.Keys(m.parts)) {
		if m.view != c.View || unknown(m.parts[key]) {
			_, id := m.unkey(key)
			c.Topic(id)
		}
	}
}

func unknown(parts map[int32]*fetchPart) bool {
	for _, p := range parts {
		if p.refused == kerr.UnknownTopicID.Code {
			return true
		}
	}
	return false
}

// reconsider decides again what the request did not list: every partition when the policy changed, and those whose
// topic id nobody knew.
func (m *FetchSession) reconsider(c *Ctx, up *upstreamFetch, listed map[*fetchPart]bool) {
	changed := m.view != c.View
	if !changed && m.refused == 0 {
		return
	}
	m.view = c.View
	for _, key := range slices.Sorted(maps.Keys(m.parts)) {
		parts := m.parts[key]
		name, id := m.unkey(key)
		refused, decided := int16(0), false
		for _, n := range slices.Sorted(maps.Keys(parts)) {
			p := parts[n]
			if listed[p] || (!changed && p.refused != kerr.UnknownTopicID.Code) {
				continue
			}
			if !decided {
				refused, decided = c.fetchRefusal(up.Version, name, id), true
			}
			if refused == p.refused {
				continue
			}
			up.changed = true
			switch {
			case p.refused == 0:
				up.forget(name, id, n)
				m.refused++
			case refused == 0:
				up.add(name, id, p.request(n))
				m.refused--
			}
			p.refused = refused
		}
	}
}

// Steady tells whether nothing stands between the client's session and the broker's: same id, every partition allowed
// under this very view.
func (m *FetchSession) Steady(id int32, view *policy.View) bool {
	return m != nil && id != 0 && m.id.Load() == id && m.refused == 0 && m.view == view
}

func (m *FetchSession) upstreamHas(key string, partition int32) bool {
	p := m.parts[key][partition]
	return p != nil && p.refused == 0
}

func (m *FetchSession) put(version int16, t *kmsg.FetchRequestTopic, r *kmsg.FetchRequestTopicPartition,
	refused int16) *fetchPart {
	key := fetchKey(version, t.Topic, t.TopicID)
	parts := m.parts[key]
	if parts == nil {
		parts = make(map[int32]*fetchPart)
		m.parts[key] = parts
	}
	p := parts[r.Partition]
	if p == nil {
		p = new(fetchPart)
		parts[r.Partition] = p
	} else if p.refused != 0 {
		m.refused--
	}
	*p = fetchPart{r.CurrentLeaderEpoch, r.LastFetchedEpoch, r.PartitionMaxBytes, r.FetchOffset, r.LogStartOffset, refused}
	if refused != 0 {
		m.refused++
	}
	return p
}

// remove tells whether the broker's session had the partition.
func (m *FetchSession) remove(key string, partition int32) bool {
	p := m.parts[key][partition]
	if p == nil {
		return true // unknown to us, so the broker may say what it thinks of it
	}
	delete(m.parts[key], partition)
	if len(m.parts[key]) == 0 {
		delete(m.parts, key)
	}
	if p.refused != 0 {
		m.refused--
	}
	return p.refused == 0
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

// edit merges the refusals, as they stand now, into the broker's answer.
func (m *FetchSession) edit() func(*Ctx, kmsg.Response) {
	var refused kmsg.FetchResponse
	m.appendRefused(&refused)
	return func(_ *Ctx, broker kmsg.Response) {
		resp := broker.(*kmsg.FetchResponse)
		m.SetID(resp.SessionID)
		if resp.ErrorCode == 0 {
			resp.Topics = append(resp.Topics, refused.Topics...)
		}
	}
}

func (m *FetchSession) appendRefused(resp *kmsg.FetchResponse) {
	for _, key := range slices.Sorted(maps.Keys(m.parts)) {
		parts := m.parts[key]
		t := kmsg.NewFetchResponseTopic()
		t.Topic, t.TopicID = m.unkey(key)
		for _, n := range slices.Sorted(maps.Keys(parts)) {
			if p := parts[n]; p.refused != 0 {
				t.Partitions = append(t.Partitions, refusedPartition(n, p.refused))
			}
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
	p.RecordBatches = []byte{}
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

// FilterFetched takes out of the answer to a Fetch or ShareFetch what the view does not let the client read: the policy
// changed while the broker was waiting for records.
func FilterFetched(c *Ctx, resp kmsg.Response) {
	switch resp := resp.(type) {
	case *kmsg.FetchResponse:
		filterFetch(c, resp)
	case *kmsg.ShareFetchResponse:
		filterShareFetch(c, resp)
	}
}

func filterFetch(c *Ctx, resp *kmsg.FetchResponse) {
	for i := range resp.Topics {
		t := &resp.Topics[i]
		refused := c.fetchRefusal(resp.Version, t.Topic, t.TopicID)
		if refused == 0 {
			continue
		}
		for j := range t.Partitions {
			t.Partitions[j] = refusedPartition(t.Partitions[j].Partition, refused)
		}
	}
}

// FetchInPlace decides a fetch of version 4 and up without decoding it, where the answer is a plain yes: a consumer
// that lists only what it may read, in a session that is steady or in none. It tells whether that was so; otherwise
// nothing has changed and the decoded request must be decided. allowed decides one topic, named by name or, from
// version 13, by id.
func FetchInPlace(c *Ctx, version int16, body []byte, allowed func(name []byte, id TopicID) bool) bool {
	w := fetchWalk{version: version, Cursor: wire.Cursor{B: body, Flex: version >= 12}}
	if version <= 14 && w.I32() >= 0 {
		return false // a follower
	}
	w.Take(4 + 4 + 4 + 1) // max_wait, min_bytes, max_bytes, isolation_level
	var id, epoch int32 = 0, -1
	if version >= 7 {
		id, epoch = w.I32(), w.I32()
	}
	incremental := epoch > 0
	if epoch == 0 || (incremental && !c.Fetch.Steady(id, c.View)) {
		return false
	}
	update := w // the request is walked twice: to decide, then to note the positions
	for w.nextTopic() {
		if !allowed(w.name, w.id) {
			return false
		}
		for w.nextPartition() {
			if incremental && c.Fetch.parts[string(w.name)][w.partition] == nil {
				return false
			}
		}
	}
	if version >= 7 && w.Array(4) > 0 {
		return false // forgotten topics
	}
	if version >= 11 && w.String() == nil { // rack_id may not be null
		return false
	}
	if w.SkipTags() > 0 || w.tagged || w.Bad || w.Off != len(body) {
		return false
	}
	if !incremental {
		c.Fetch = nil
		return true
	}
	for update.nextTopic() {
		parts := c.Fetch.parts[string(update.name)]
		for update.nextPartition() {
			*parts[update.partition] = update.part
		}
	}
	return true
}

// fetchWalk steps through the topics and partitions of an encoded fetch.
type fetchWalk struct {
	wire.Cursor
	version           int16
	started, tagged   bool
	topics, partsLeft int
	name              []byte // the topic's name, or the bytes of its id
	id                TopicID
	partition         int32
	part              fetchPart
}

func (w *fetchWalk) nextTopic() bool {
	if !w.started {
		w.started, w.topics = true, w.Array(5)
	}
	if w.topics == 0 || w.Bad {
		return false
	}
	w.topics--
	if w.version >= 13 {
		w.name = w.Take(len(w.id))
		copy(w.id[:], w.name)
	} else {
		w.name = w.String()
	}
	w.partsLeft = w.Array(16)
	return !w.Bad
}

func (w *fetchWalk) nextPartition() bool {
	if w.partsLeft == 0 {
		w.tagged = w.SkipTags() > 0 || w.tagged // of the topic
		return false
	}
	w.partsLeft--
	w.partition = w.I32()
	w.part = fetchPart{leaderEpoch: -1, lastEpoch: -1, logStart: -1}
	if w.version >= 9 {
		w.part.leaderEpoch = w.I32()
	}
	w.part.offset = w.I64()
	if w.version >= 12 {
		w.part.lastEpoch = w.I32()
	}
	if w.version >= 5 {
		w.part.logStart = w.I64()
	}
	w.part.maxBytes = w.I32()
	w.tagged = w.SkipTags() > 0 || w.tagged
	return !w.Bad
}

// fetchRefusal decides one topic; 0 lets it be read.
func (c *Ctx) fetchRefusal(version int16, name string, id TopicID) int16 {
	name, known := c.fetchName(version, name, id)
	switch {
	case !known:
		return kerr.UnknownTopicID.Code
	case !c.AllowTopic(name, kmsg.ACLOperationRead):
		return kerr.TopicAuthorizationFailed.Code
	}
	return 0
}

func (c *Ctx) fetchName(version int16, name string, id TopicID) (string, bool) {
	if version < 13 {
		return name, true
	}
	return c.Topic(id)
}

func fetchKey(version int16, name string, id TopicID) string {
	if version < 13 {
		return name
	}
	return string(id[:])
}

func fetchError(req *kmsg.FetchRequest, err *kerr.Error) Verdict {
	resp := req.ResponseKind().(*kmsg.FetchResponse)
	resp.ErrorCode = err.Code
	return Verdict{Answer: resp}
}

// fetchRefuseAll answers every partition as one the client may not read.
func fetchRefuseAll(req *kmsg.FetchRequest) Verdict {
	resp := req.ResponseKind().(*kmsg.FetchResponse)
	for i := range req.Topics {
		t := kmsg.NewFetchResponseTopic()
		t.Topic, t.TopicID = req.Topics[i].Topic, req.Topics[i].TopicID
		for _, p := range req.Topics[i].Partitions {
			t.Partitions = append(t.Partitions, refusedPartition(p.Partition, kerr.TopicAuthorizationFailed.Code))
		}
		resp.Topics = append(resp.Topics, t)
	}
	return Verdict{Answer: resp}
}
