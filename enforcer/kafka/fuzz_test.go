package kafka

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"iter"
	"reflect"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/kafka/authz"
	"klamm/enforcer/kafka/wire"
	"klamm/test/bounds"
)

// idle is a session whose functions are called one by one.
func idle(t testing.TB) *session {
	s := newSteady(t, ordersOnly, nil, nil).session
	s.ctx.View, s.ctx.Topics = s.view(), s.conn.Cluster
	return s
}

// Where a produce is decided in place, the decoded request is one that the handler lets pass whole, and the evidence is
// of its very batches.
func FuzzProduceInPlace(f *testing.F) {
	for _, version := range []int16{3, 8, 9, 12, 13} {
		for _, topics := range [][]string{{"orders"}, {"orders", "orders.b"}, {"orders", "secret"}, {}} {
			req := produceRequest(version, -1, []byte("record"), topics...)
			for i := range req.Topics {
				req.Topics[i].TopicID = topicID(req.Topics[i].Topic)
			}
			f.Add(version, req.AppendTo(nil))
			req.TransactionID = kmsg.StringPtr("orders-1")
			for i := range req.Topics {
				req.Topics[i].Partitions[0].Records[22] |= 0x10 // transactional
			}
			f.Add(version, req.AppendTo(nil))
		}
	}
	s := idle(f)
	f.Fuzz(func(t *testing.T, version int16, body []byte) {
		if version < authz.Table[kmsg.Produce].Min || version > authz.Table[kmsg.Produce].Max {
			return
		}
		frame, h := framed(t, kmsg.Produce, version, body)
		e := s.queue.New()
		defer s.queue.Free(e)
		e.V.reset(h, "test", time.Now())
		yes := false
		bounds.Check(t, len(body), 1<<10, func() { yes = s.produceInPlace(e, frame, s.view()) })
		if !yes {
			return
		}
		req := kmsg.NewPtrProduceRequest()
		req.Version = version
		if err := req.ReadFrom(body); err != nil {
			t.Fatalf("decided in place, but it does not decode: %v", err)
		}
		ctx := &authz.Ctx{View: s.view(), Topics: s.conn.Cluster}
		v := authz.Table[kmsg.Produce].Decide(ctx, req)
		if v.Answer != nil || v.Forward != nil || v.Edit != nil || v.Close != "" || len(ctx.Missing) > 0 {
			t.Fatalf("decided in place, but the handler says %+v", v)
		}
		if e.V.produce.acks != req.Acks {
			t.Errorf("acks %d, not %d", e.V.produce.acks, req.Acks)
		}
		var want []int
		for _, topic := range req.Topics {
			for _, p := range topic.Partitions {
				want = append(want, len(p.Records))
			}
		}
		var got []int
		for _, part := range e.V.produce.parts {
			bytes := 0
			for _, b := range e.V.produce.batches[part.first:part.end] {
				bytes += b.Bytes
			}
			got = append(got, bytes)
		}
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("evidence of %v bytes by partition, %v are sent", got, want)
		}
	})
}

// framed puts a header before a body.
func framed(t testing.TB, key kmsg.Key, version int16, body []byte) ([]byte, wire.Header) {
	t.Helper()
	req := kmsg.RequestForKey(int16(key))
	req.SetVersion(version)
	empty := requestFrame(1, req)
	frame := append(empty[:len(empty)-len(req.AppendTo(nil))], body...)
	binary.BigEndian.PutUint32(frame, uint32(len(frame)-wire.SizePrefix))
	h, err := wire.ParseHeader(frame[wire.SizePrefix:])
	if err != nil {
		t.Fatal(err)
	}
	return frame, h
}

// Where a fetch is decided in place, the handler lets the decoded request pass whole, and both leave the same session
// behind: what the next request means is the same.
func FuzzFetchInPlace(f *testing.F) {
	for _, version := range []int16{4, 7, 11, 12, 13, 15, 18} {
		for _, topics := range [][]string{{"orders"}, {"orders", "secret"}, {}} {
			for _, epoch := range []int32{-1, 0, 1} {
				f.Add(version, fetchRequest(version, sessionID, epoch, topics...).AppendTo(nil))
			}
		}
	}
	s := idle(f)
	f.Fuzz(func(t *testing.T, version int16, body []byte) {
		if version < authz.Table[kmsg.Fetch].Min || version > authz.Table[kmsg.Fetch].Max {
			return
		}
		open := func() *authz.Ctx {
			ctx := &authz.Ctx{View: s.view(), Topics: s.conn.Cluster}
			authz.Table[kmsg.Fetch].Decide(ctx, fetchRequest(version, 0, 0, "orders"))
			if ctx.Fetch != nil {
				ctx.Fetch.Answered(sessionID)
			}
			return ctx
		}
		inPlace, decoded := open(), open()
		yes := false
		bounds.Check(t, len(body), 64, func() { yes = authz.FetchInPlace(inPlace, version, body, s.allowed.fetch) })
		if !yes {
			return
		}
		req := kmsg.NewPtrFetchRequest()
		req.Version = version
		if err := req.ReadFrom(body); err != nil {
			t.Fatalf("decided in place, but it does not decode: %v", err)
		}
		v := authz.Table[kmsg.Fetch].Decide(decoded, req)
		if v.Answer != nil || v.Forward != nil || v.Edit != nil || v.Close != "" || len(decoded.Missing) > 0 {
			t.Fatalf("decided in place, but the handler says %+v", v)
		}
		if (inPlace.Fetch == nil) != (decoded.Fetch == nil) {
			t.Fatalf("a session in place: %v, decoded: %v", inPlace.Fetch != nil, decoded.Fetch != nil)
		}
		if a, b := afterRevocation(t, inPlace, version), afterRevocation(t, decoded, version); !bytes.Equal(a, b) {
			t.Errorf("the next fetch differs: %x, %x", a, b)
		}
	})
}

const sessionID = 77

// afterRevocation shows what a session holds: when all is revoked and granted again, the broker is asked for it anew.
func afterRevocation(t *testing.T, ctx *authz.Ctx, version int16) []byte {
	t.Helper()
	if ctx.Fetch == nil {
		return nil
	}
	granted := ctx.View
	ctx.View, ctx.Resolved = nil, true // for what is refused is looked up
	authz.Table[kmsg.Fetch].Decide(ctx, fetchRequest(version, sessionID, 2))
	ctx.View = granted
	v := authz.Table[kmsg.Fetch].Decide(ctx, fetchRequest(version, sessionID, 3))
	if v.Forward == nil {
		t.Fatalf("what was granted again is not asked for: %+v", v)
	}
	return v.Forward.AppendTo(nil)
}

// Whatever the broker answers to a Fetch or ShareFetch, the reader neither panics nor reads past the end, and where it
// is content it has seen the batches that a client sees, all of topics that may be read.
func FuzzFetchAnswer(f *testing.F) {
	records := append(batch([]byte("one")), batch([]byte("two"))...)
	for _, topic := range []string{"orders", "secret"} {
		for _, b := range [][]byte{nil, records, records[:len(records)-3]} {
			for _, version := range []int16{4, 5, 7, 11, 12, 13, 18} {
				f.Add(int16(kmsg.Fetch), version, fetchAnswer(version, topic, b).AppendTo(nil))
			}
			for _, version := range []int16{1, 2} {
				f.Add(int16(kmsg.ShareFetch), version, shareFetchAnswer(version, topic, b).AppendTo(nil))
			}
		}
	}
	s := idle(f)
	f.Fuzz(func(t *testing.T, key, version int16, body []byte) {
		p := &pending{Header: wire.Header{Key: key, Version: version}, kind: fetched, view: s.view()}
		if !p.fetches() || version < authz.Table[key].Min || version > authz.Table[key].Max {
			return
		}
		lines := new(auditLines)
		s.downTrail = newTrail(lines)
		var held error
		bounds.Check(t, len(body), 1<<10, func() { held = s.auditFetch(p, body) })
		if err := s.downTrail.Flush(); err != nil {
			t.Fatal(err)
		}
		s.downTrail = newTrail(new(auditLines))

		frame := wire.AppendResponse(nil, 1, kmsg.NewPtrHeartbeatResponse())[:wire.SizePrefix+4]
		if wire.Flexible(p.Key, p.Version) {
			frame = append(frame, 0)
		}
		frame = append(frame, body...)
		var out bytes.Buffer
		s.down = wire.NewPipe(bytes.NewReader(frame), &out, s.Answers.Open("", nil, nil), nil, nil)
		if err := s.streamFetch(p, len(frame)); (err == nil) != (held == nil) {
			t.Fatalf("held: %v, streamed: %v", held, err)
		}
		if held != nil {
			return
		}
		if err := s.down.Flush(); err != nil || !bytes.Equal(out.Bytes(), frame) {
			t.Errorf("streamed: %v, %d bytes of %d", err, out.Len(), len(frame))
		}
		resp := kmsg.ResponseForKey(key)
		resp.SetVersion(version)
		if resp.ReadFrom(body) != nil {
			return // a client does not take it either
		}
		got := 0
		for _, l := range lines.lines(t) {
			got += len(l.Batches)
		}
		want := 0
		for topic, records := range recordsIn(resp) {
			if topic != "orders" && topic != string(readable[:]) {
				t.Errorf("%d bytes of records of %q are passed on", len(records), topic)
			}
			want += countBatches(records)
		}
		if got != want {
			t.Errorf("evidence of %d batches, a client sees %d", got, want)
		}
	})
}

var readable = topicID("orders")

// recordsIn gives what an answer has of records, by topic name or id, for each partition that has some.
func recordsIn(resp kmsg.Response) iter.Seq2[string, []byte] {
	return func(yield func(string, []byte) bool) {
		give := func(topic string, b []byte) bool { return len(b) == 0 || yield(topic, b) }
		switch resp := resp.(type) {
		case *kmsg.FetchResponse:
			for _, t := range resp.Topics {
				name := t.Topic
				if resp.Version >= 13 {
					name = string(t.TopicID[:])
				}
				for _, p := range t.Partitions {
					if !give(name, p.RecordBatches) {
						return
					}
				}
			}
		case *kmsg.ShareFetchResponse:
			for _, t := range resp.Topics {
				for _, p := range t.Partitions {
					if !give(string(t.TopicID[:]), p.Records) {
						return
					}
				}
			}
		}
	}
}

func countBatches(b []byte) (n int) {
	for len(b) >= 17 {
		size := 12 + int(int32(binary.BigEndian.Uint32(b[8:])))
		if size > len(b) {
			break
		}
		b = b[size:]
		n++
	}
	return n
}

// Where a share fetch is decided in place, the handler lets the decoded request pass whole, and all its partitions and
// their acknowledgements are seen.
func FuzzShareFetchInPlace(f *testing.F) {
	for _, version := range []int16{1, 2} {
		for _, topics := range [][]string{{"orders"}, {"orders", "secret"}, {}} {
			for _, epoch := range []int32{-1, 0, 1} {
				f.Add(version, shareFetchRequest(version, epoch, true, topics...).AppendTo(nil))
				f.Add(version, shareFetchRequest(version, epoch, false, topics...).AppendTo(nil))
			}
		}
	}
	s := idle(f)
	f.Fuzz(func(t *testing.T, version int16, body []byte) {
		if version < authz.Table[kmsg.ShareFetch].Min || version > authz.Table[kmsg.ShareFetch].Max {
			return
		}
		inPlace, decoded := *s.shareSes, *s.shareSes
		s.ctx.Share = &inPlace
		yes := false
		bounds.Check(t, len(body), 64, func() {
			yes = authz.ShareFetchInPlace(s.ctx, version, body, s.allowed.shareGroup, s.allowed.shareFetch)
		})
		if !yes {
			return
		}
		req := kmsg.NewPtrShareFetchRequest()
		req.Version = version
		if err := req.ReadFrom(body); err != nil {
			t.Fatalf("decided in place, but it does not decode: %v", err)
		}
		ctx := &authz.Ctx{View: s.view(), Topics: s.conn.Cluster, Share: &decoded}
		v := authz.Table[kmsg.ShareFetch].Decide(ctx, req)
		if !reflect.DeepEqual(inPlace, decoded) {
			t.Errorf("the session is %+v, decoded %+v", inPlace, decoded)
		}
		if v.Answer != nil || v.Forward != nil || v.Edit != nil || v.Close != "" || len(ctx.Missing) > 0 {
			t.Fatalf("decided in place, but the handler says %+v", v)
		}
		var want, got []int
		for _, topic := range req.Topics {
			for _, p := range topic.Partitions {
				want = append(want, int(p.Partition), len(p.AcknowledgementBatches))
			}
		}
		w := authz.WalkShare(kmsg.ShareFetch, version, body)
		for w.NextTopic() {
			for w.NextPartition() {
				got = append(got, int(w.Partition), w.Acks.Batches)
			}
		}
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("partitions and batches of acknowledgements: %v, not %v", got, want)
		}
	})
}
