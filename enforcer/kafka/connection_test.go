package kafka

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/audit"
	"klamm/enforcer/kafka/authz"
	"klamm/enforcer/kafka/wire"
	"klamm/test/bounds"
)

// line is one end of a connection in memory.
type line struct {
	mu     sync.Mutex
	more   *sync.Cond
	in     []byte
	ended  bool // after in
	closed bool
	out    func([]byte) // takes what is written
}

func newLine(in []byte, ended bool, out func([]byte)) *line {
	l := &line{in: in, ended: ended, out: out}
	l.more = sync.NewCond(&l.mu)
	return l
}

func (l *line) Read(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for len(l.in) == 0 && !l.ended && !l.closed {
		l.more.Wait()
	}
	switch {
	case l.closed:
		return 0, net.ErrClosed
	case len(l.in) == 0:
		return 0, io.EOF
	}
	n := copy(b, l.in)
	l.in = l.in[n:]
	return n, nil
}

func (l *line) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return 0, net.ErrClosed
	}
	l.out(b)
	return len(b), nil
}

// CloseWrite tells the other side of the end, which answers what it still owes and ends as well.
func (l *line) CloseWrite() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ended = true
	l.more.Broadcast()
	return nil
}

func (l *line) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	l.more.Broadcast()
	return nil
}

func (*line) LocalAddr() net.Addr              { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 9092} }
func (*line) RemoteAddr() net.Addr             { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 40000} }
func (*line) SetDeadline(time.Time) error      { return nil }
func (*line) SetReadDeadline(time.Time) error  { return nil }
func (*line) SetWriteDeadline(time.Time) error { return nil }

// pieces parts bytes into what stands behind lengths of 16 bits.
func pieces(b []byte) (all [][]byte) {
	for len(b) >= 2 {
		n := min(int(binary.BigEndian.Uint16(b)), len(b)-2)
		all = append(all, b[2:2+n])
		b = b[2+n:]
	}
	return all
}

func inPieces(all ...[]byte) (b []byte) {
	for _, one := range all {
		b = append(binary.BigEndian.AppendUint16(b, uint16(len(one))), one...)
	}
	return b
}

// fuzzedBroker answers each request with the next of the bodies, and holds that what it gets is what may reach it.
type fuzzedBroker struct {
	t      *testing.T
	conn   *line
	bodies [][]byte
	got    []byte
}

func (b *fuzzedBroker) take(p []byte) {
	b.got = append(b.got, p...)
	for len(b.got) >= wire.SizePrefix {
		size := wire.SizePrefix + int(binary.BigEndian.Uint32(b.got))
		if len(b.got) < size {
			return
		}
		b.request(b.got[wire.SizePrefix:size])
		b.got = b.got[size:]
	}
}

func (b *fuzzedBroker) request(frame []byte) {
	h, err := wire.ParseHeader(frame)
	if err != nil {
		b.t.Errorf("the broker gets %x: %v", frame, err)
		return
	}
	row := authz.Table[h.Key]
	if row.Decide == nil || h.Version < row.Min || h.Version > row.Max {
		b.t.Errorf("the broker gets %s v%d, which is refused", kmsg.NameForKey(h.Key), h.Version)
	}
	if _, err := wire.CheckRequest(h.Key, h.Version, frame[h.Len:]); err != nil {
		b.t.Errorf("the broker gets what was not understood: %v", err)
	}
	req := kmsg.RequestForKey(h.Key)
	req.SetVersion(h.Version)
	if produce, is := req.(*kmsg.ProduceRequest); is && req.ReadFrom(frame[h.Len:]) == nil && produce.Acks == 0 {
		return
	}
	var body []byte
	if len(b.bodies) > 0 {
		body, b.bodies = b.bodies[0], b.bodies[1:]
	}
	head := wire.ResponseHeaderLen(h.Key, h.Version)
	answer := make([]byte, head, head+len(body))
	binary.BigEndian.PutUint32(answer, uint32(head+len(body)-wire.SizePrefix))
	binary.BigEndian.PutUint32(answer[wire.SizePrefix:], uint32(h.Correlation))
	b.conn.in = append(b.conn.in, append(answer, body...)...)
	b.conn.more.Broadcast()
}

// Whatever a client and a broker send, the session ends with them, gives back what it held, and lets through only whole
// requests that the table has. Nothing in it panics.
func FuzzConnection(f *testing.F) {
	for key := range int16(kmsg.MaxKey + 1) {
		row := authz.Table[key]
		for version := row.Min; row.Decide != nil && version <= row.Max; version += 3 {
			req := kmsg.RequestForKey(key)
			req.SetVersion(version)
			resp := req.ResponseKind()
			f.Add(inPieces(requestFrame(1, req)[wire.SizePrefix:]), inPieces(resp.AppendTo(nil)), []byte(nil))
		}
	}
	produce := produceRequest(9, -1, []byte("record"), "orders", "secret")
	fetch := fetchRequest(12, 0, 0, "orders", "secret")
	f.Add(inPieces(requestFrame(1, produce)[wire.SizePrefix:], requestFrame(2, fetch)[wire.SizePrefix:]),
		inPieces(produceAnswer(produce, 5).AppendTo(nil), fetchAnswer(12, "orders", batch([]byte("x"))).AppendTo(nil)),
		[]byte{0, 0})
	f.Add([]byte(nil), []byte(nil), []byte{0x16, 3, 1, 0, 5})
	f.Fuzz(func(t *testing.T, requests, answers, rest []byte) {
		var sent []byte
		for _, one := range pieces(requests) {
			sent = append(binary.BigEndian.AppendUint32(sent, uint32(len(one))), one...)
		}
		sent = append(sent, rest...)
		rig := newRig(t, ordersOnly)
		rig.shared.MaxFrame = 1 << 17 // memory that the budget has taken into account
		rig.cluster.Learn(&kmsg.MetadataResponse{Topics: []kmsg.MetadataResponseTopic{
			{Topic: kmsg.StringPtr("orders"), TopicID: topicID("orders")}}})
		var got bytes.Buffer
		client := newLine(sent, true, func(b []byte) { got.Write(b) })
		broker := &fuzzedBroker{t: t, bodies: pieces(answers)}
		broker.conn = newLine(nil, false, broker.take)
		hung := time.AfterFunc(patience, func() { panic("the session does not end") })
		defer hung.Stop()
		var err error
		bounds.Check(t, len(requests)+len(answers)+len(rest), 1<<13, func() {
			err = Serve(context.Background(), rig.shared, rig.conn(client, broker.conn))
		})
		var refusal *Error
		if errors.As(err, &refusal) && refusal.Reason == audit.Internal {
			t.Error(err)
		}
		for name, budget := range map[string]*wire.Budget{"requests": rig.shared.Requests, "answers": rig.shared.Answers,
			"decoded": rig.shared.Decoded, "kept": rig.shared.Kept} {
			if n := budget.Held(); n != 0 {
				t.Errorf("%d bytes of the budget of %s are not given back", n, name)
			}
		}
		if len(broker.got) > 0 {
			t.Errorf("the broker gets the beginning of a request: %x", broker.got)
		}
		if err == nil { // else an answer may end where it is not what it should be
			wholeFrames(t, got.Bytes())
		}
	})
}

// wholeFrames wants a client to get whole answers, but for a TLS alert.
func wholeFrames(t *testing.T, b []byte) {
	t.Helper()
	if len(b) > 0 && b[0] == tlsAlert {
		return
	}
	for len(b) > 0 {
		if len(b) < wire.SizePrefix || len(b)-wire.SizePrefix < int(binary.BigEndian.Uint32(b)) {
			t.Errorf("the client gets a part of an answer: %x", b)
			return
		}
		b = b[wire.SizePrefix+int(binary.BigEndian.Uint32(b)):]
	}
}
