package kafka

import (
	"bytes"
	"encoding/binary"
	"io"
	"testing"

	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/audit"
	"klamm/enforcer/kafka/authz"
	"klamm/enforcer/kafka/wire"
)

// again gives the same bytes for ever.
type again struct {
	bytes []byte
	at    int
}

func (a *again) Read(b []byte) (int, error) {
	if a.at == len(a.bytes) {
		a.at = 0
	}
	n := copy(b, a.bytes[a.at:])
	a.at += n
	return n, nil
}

// steady is a session without sockets in which one request and its answer come again and again.
type steady struct {
	*session
	answer []byte
	opened authz.ShareSession // as each request finds it
}

func newSteady(t testing.TB, rules string, request, answer []byte) *steady {
	t.Helper()
	rig := newRig(t, rules)
	rig.audit = audit.New(io.Discard, "node-1")
	c := rig.conn(nil, nil)
	s := newSession(t.Context(), rig.shared, c)
	s.queue = wire.NewQueue[pending](io.Discard, maxInFlight, s.memory.kept)
	s.up = wire.NewPipe(&again{bytes: request}, io.Discard, s.memory.requested, s.upTrail.Flush, nil)
	s.down = wire.NewPipe(&again{bytes: answer}, io.Discard, s.memory.answered, s.downTrail.Flush, s.queue.Written)
	rig.cluster.Learn(&kmsg.MetadataResponse{Topics: []kmsg.MetadataResponseTopic{
		{Topic: kmsg.StringPtr("orders"), TopicID: topicID("orders")}}})
	opened := &authz.Ctx{View: s.view(), Topics: s.conn.Cluster}
	authz.Table[kmsg.ShareFetch].Decide(opened, shareFetchRequest(2, 0, false, "orders"))
	s.shareSes = opened.Share
	return &steady{s, answer, *opened.Share}
}

// once carries the request to the broker and the answer back.
func (s *steady) once(t testing.TB) {
	*s.shareSes = s.opened
	b, err := s.up.Need(wire.SizePrefix)
	if err != nil {
		t.Fatal(err)
	}
	frame, err := s.up.Need(wire.SizePrefix + int(binary.BigEndian.Uint32(b)))
	if err != nil {
		t.Fatal(err)
	}
	h, err := wire.ParseHeader(frame[wire.SizePrefix:])
	if err != nil {
		t.Fatal(err)
	}
	if err := s.request(frame, h); err != nil {
		t.Fatal(err)
	}
	if err := s.up.Flush(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.down.Need(wire.SizePrefix + 4); err != nil {
		t.Fatal(err)
	}
	if err := s.broker(&s.queue.Next().V, len(s.answer)); err != nil {
		t.Fatal(err)
	}
	s.queue.Done()
	if err := s.down.Flush(); err != nil {
		t.Fatal(err)
	}
}

// steadyCases are the requests of which a busy client sends thousands a second.
func steadyCases() map[string][2][]byte {
	cases := map[string][2][]byte{}
	payload := bytes.Repeat([]byte{7}, 10_000)
	produce := produceRequest(12, -1, payload, "orders")
	cases["produce by name"] = [2][]byte{requestFrame(1, produce), wire.AppendResponse(nil, 1, produceAnswer(produce, 5))}
	byID := produceRequest(13, -1, payload, "orders")
	byID.Topics[0].TopicID = topicID("orders")
	cases["produce by id"] = [2][]byte{requestFrame(1, byID), wire.AppendResponse(nil, 1, produceAnswer(byID, 5))}
	for name, version := range map[string]int16{"fetch by name": 12, "fetch by id": 17} {
		cases[name] = [2][]byte{requestFrame(1, fetchRequest(version, 0, -1, "orders")),
			wire.AppendResponse(nil, 1, fetchAnswer(version, "orders", bytes.Repeat(batch(payload), 3)))}
		empty := fetchAnswer(version, "orders", nil)
		cases[name+", nothing new"] = [2][]byte{requestFrame(1, fetchRequest(version, 0, -1, "orders")),
			wire.AppendResponse(nil, 1, empty)}
	}
	records := shareFetchAnswer(2, "orders", bytes.Repeat(batch(payload), 3))
	cases["share fetch"] = [2][]byte{requestFrame(1, shareFetchRequest(2, 1, true, "orders")),
		wire.AppendResponse(nil, 1, records)}
	records.Topics = nil
	cases["share fetch, nothing new"] = [2][]byte{requestFrame(1, shareFetchRequest(2, 1, false)),
		wire.AppendResponse(nil, 1, records)}
	return cases
}

func BenchmarkSession(b *testing.B) {
	for name, c := range steadyCases() {
		b.Run(name, func(b *testing.B) {
			s := newSteady(b, ordersOnly, c[0], c[1])
			b.SetBytes(int64(len(c[0]) + len(c[1])))
			b.ReportAllocs()
			for b.Loop() {
				s.once(b)
			}
		})
	}
}
