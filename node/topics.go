package node

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
)

const (
	// maxTopics bounds the ids kept in memory. Beyond it all are dropped and those in use looked up again: a cluster
	// that big has mostly deleted ones.
	maxTopics = 200_000
	// maxUnknown bounds the ids remembered as looked up.
	maxUnknown = 10_000
	// maxLookup is how many ids one request to the broker asks for. Clients that invent ids cannot make it ask for
	// more; an id left out stays unknown for the client that asked, whose next try comes again.
	maxLookup = 500
	// lookupTimeout bounds one request to the broker.
	lookupTimeout = 10 * time.Second
)

// topics knows the topic ids of one cluster (KIP-516).
type topics struct {
	names atomic.Pointer[topicIDs]
	pace  pace
	log   zerolog.Logger

	mu    sync.Mutex             // of what follows, and of replacing names
	asked map[[16]byte]time.Time // ids that were looked up, until when what came of it is believed
	next  *lookup                // collects ids while another look-up runs
	turn  chan struct{}          // held by the look-up that runs
	last  time.Time              // when one last began
}

// topicIDs is not written to once others see it.
type topicIDs struct {
	names map[[16]byte]string
	ids   map[string][16]byte // the youngest of each name
}

// lookup is one Metadata request for the ids that several connections miss.
type lookup struct {
	ids  map[[16]byte]struct{}
	done chan struct{}
	err  error // valid once done is closed
}

func newTopics(p pace, log zerolog.Logger) *topics {
	t := &topics{pace: p, log: log, asked: map[[16]byte]time.Time{}, turn: make(chan struct{}, 1)}
	t.names.Store(&topicIDs{})
	return t
}

// Name is the name of a topic id, from memory. It neither blocks nor allocates.
func (t *topics) Name(id [16]byte) (name string, known bool) {
	name, known = t.names.Load().names[id]
	return name, known
}

// ID is the id of a topic, from memory. Of one that was deleted and made anew it may be the former id.
func (t *topics) ID(name string) (id [16]byte, known bool) {
	id, known = t.names.Load().ids[name]
	return id, known
}

// learn takes up the ids of an answer. An id keeps the name it has: Kafka never gives it to another topic. A name with
// a new id is another topic, and the former id is no topic's any more.
func (t *topics) learn(m *kmsg.MetadataResponse) {
	fresh := map[[16]byte]string{}
	for i := range m.Topics {
		topic := &m.Topics[i]
		if topic.ErrorCode != 0 || topic.Topic == nil || topic.TopicID == [16]byte{} {
			continue
		}
		switch name, known := t.Name(topic.TopicID); {
		case !known:
			fresh[topic.TopicID] = *topic.Topic
		case name != *topic.Topic:
			t.log.Warn().Hex("topic-id", topic.TopicID[:]).Str("known-as", name).Str("named", *topic.Topic).
				Msg("a broker gave a topic id another name; the first one stays")
		}
	}
	if len(fresh) == 0 {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for id := range fresh {
		delete(t.asked, id)
	}
	t.names.Store(t.names.Load().with(fresh))
}

// with is what is known besides fresh ids. What another learner has put in since stays.
func (known *topicIDs) with(fresh map[[16]byte]string) *topicIDs {
	next := &topicIDs{names: make(map[[16]byte]string), ids: make(map[string][16]byte)}
	for id, name := range fresh {
		next.names[id], next.ids[name] = name, id
	}
	if len(known.names)+len(fresh) > maxTopics {
		return next
	}
	for id, name := range known.names {
		if _, again := next.ids[name]; !again || next.names[id] != "" {
			next.names[id] = name
		}
	}
	for name, id := range known.ids {
		if _, again := next.ids[name]; !again {
			next.ids[name] = id
		}
	}
	return next
}

// without is what is known but for ids that are no topic's any more.
func (known *topicIDs) without(gone [][16]byte) *topicIDs {
	next := &topicIDs{names: maps.Clone(known.names), ids: maps.Clone(known.ids)}
	for _, id := range gone {
		if name := next.names[id]; next.ids[name] == id {
			delete(next.ids, name)
		}
		delete(next.names, id)
	}
	return next
}

// resolve looks ids up in the cluster, also such as are known: those it does not have become unknown. None is asked for
// again for a while. All connections share one request at a time, and a pause between two.
func (t *topics) resolve(ctx, clusterCtx context.Context, client *kgo.Client, ids [][16]byte) error {
	l := t.join(ids, func(l *lookup) { go t.run(clusterCtx, client, l) })
	if l == nil {
		return nil
	}
	select {
	case <-l.done:
		return l.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// join adds the ids that are worth asking for to the next look-up; nil when there are none.
func (t *topics) join(ids [][16]byte, start func(*lookup)) *lookup {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	var joined *lookup
	for _, id := range ids {
		if id == [16]byte{} || now.Before(t.asked[id]) {
			continue
		}
		if t.next == nil {
			t.next = &lookup{ids: map[[16]byte]struct{}{}, done: make(chan struct{})}
			start(t.next)
		}
		joined = t.next
		if len(joined.ids) < maxLookup {
			joined.ids[id] = struct{}{}
		}
	}
	return joined
}

func (t *topics) run(ctx context.Context, client *kgo.Client, l *lookup) {
	defer close(l.done)
	t.turn <- struct{}{}
	defer func() { <-t.turn }()
	t.mu.Lock()
	pause := time.Until(t.last.Add(t.pace.lookups))
	t.mu.Unlock()
	select {
	case <-time.After(pause):
	case <-ctx.Done():
	}
	t.mu.Lock()
	t.next = nil // l is complete; what comes now is for the next
	t.last = time.Now()
	t.mu.Unlock()
	l.err = t.ask(ctx, client, l.ids)
}

func (t *topics) ask(ctx context.Context, client *kgo.Client, ids map[[16]byte]struct{}) error {
	ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
	defer cancel()
	req := kmsg.NewPtrMetadataRequest()
	for id := range ids {
		topic := kmsg.NewMetadataRequestTopic()
		topic.TopicID = id
		req.Topics = append(req.Topics, topic)
	}
	m, err := req.RequestWith(ctx, client)
	if err != nil {
		return fmt.Errorf("look up %d topic ids: %w", len(ids), err)
	}
	if m.Version < 12 { // KIP-516: brokers before 3.1 do not answer by id
		return fmt.Errorf("look up topic ids: the broker speaks Metadata up to version %d, by id needs 12", m.Version)
	}
	t.learn(m)
	for i := range m.Topics {
		if m.Topics[i].ErrorCode == kerr.TopicAuthorizationFailed.Code {
			return errors.New("look up topic ids: the node's own client may not see the topic: " +
				"allow its principal to Describe all topics")
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.asked)+len(ids) > maxUnknown {
		clear(t.asked)
	}
	var gone [][16]byte
	for i := range m.Topics {
		if _, known := t.Name(m.Topics[i].TopicID); known && m.Topics[i].ErrorCode == kerr.UnknownTopicID.Code {
			gone = append(gone, m.Topics[i].TopicID)
		}
	}
	if gone != nil {
		t.names.Store(t.names.Load().without(gone))
	}
	for id := range ids {
		believed := t.pace.unknown
		if _, known := t.Name(id); known {
			believed = t.pace.demand
		}
		t.asked[id] = time.Now().Add(believed)
	}
	return nil
}
