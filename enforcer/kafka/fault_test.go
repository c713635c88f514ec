package kafka

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"runtime"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/audit"
	"klamm/enforcer/kafka/wire"
)

// A frame that is sent in the middle of others, of each kind of handling that there is.
var handlings = map[string]func() kmsg.Request{
	"relayed": func() kmsg.Request {
		req := kmsg.NewPtrHeartbeatRequest()
		req.Version, req.Group = 4, "orders"
		return req
	},
	"acknowledged": func() kmsg.Request { return produceRequest(9, -1, []byte("record"), "orders") },
	"streamed":     func() kmsg.Request { return fetchRequest(12, 0, -1, "orders") },
	"merged":       func() kmsg.Request { return fetchRequest(12, 0, -1, "orders", "secret") },
	"learned":      func() kmsg.Request { return metadataRequest("orders") },
	"filtered":     func() kmsg.Request { return metadataRequest("orders", "secret") },
}

func metadataRequest(topics ...string) kmsg.Request {
	req := kmsg.NewPtrMetadataRequest()
	req.Version = 12
	for _, name := range topics {
		t := kmsg.NewMetadataRequestTopic()
		t.Topic = kmsg.StringPtr(name)
		req.Topics = append(req.Topics, t)
	}
	return req
}

// reset ends a connection as a process that is killed with bytes unread does, or a firewall.
func reset(t testing.TB, c net.Conn) {
	t.Helper()
	tcp := c.(*net.TCPConn)
	if err := errors.Join(tcp.SetLinger(0), tcp.Close()); err != nil {
		t.Fatal(err)
	}
}

// halfClose ends what is sent, and not what is read.
func halfClose(t testing.TB, c net.Conn) {
	t.Helper()
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
}

// cuts are the ways to end a connection in the middle of something, by the name of a test; large is for frames that are
// held whole.
var cuts = map[string]struct {
	large int
	end   func(testing.TB, net.Conn)
}{
	"reset, small":            {10, reset},
	"reset, held whole":       {3 * wire.BaseBuffer, reset},
	"half-closed, small":      {10, halfClose},
	"half-closed, held whole": {3 * wire.BaseBuffer, halfClose},
}

// mixed is what a client sends, and how many of the requests go to the broker: all but the first. The fourth wants no
// answer.
func mixed(large int) (stream []byte, forwarded int) {
	heartbeat := kmsg.NewPtrHeartbeatRequest()
	heartbeat.Group = "secret" // refused
	requests := []kmsg.Request{heartbeat, produceRequest(9, -1, make([]byte, large), "orders"),
		produceRequest(9, 1, []byte("record"), "orders", "secret"), produceRequest(9, 0, []byte("record"), "orders")}
	for _, name := range []string{"relayed", "streamed", "filtered"} {
		requests = append(requests, handlings[name]())
	}
	for i, req := range requests {
		stream = append(stream, requestFrame(int32(i), req)...)
	}
	return stream, len(requests) - 1
}

// nextCut is the next place to cut a stream of n bytes: all of a short one, some of a long one.
func nextCut(at, n int) int {
	const short, some = 1000, 150
	if n < short {
		return at + 1
	}
	return at + n/some
}

// wantAccountedFor fails unless the audit has one line for each request that reached the broker, and for no more than
// those that were to.
func (r *rig) wantAccountedFor(t *testing.T, reached, most int) {
	t.Helper()
	unknown, known, fetched := 0, 0, false
	for _, l := range r.log.lines(t) {
		switch {
		case l.Reason == string(audit.Internal):
			t.Errorf("a defect: %s", l.Error)
		case l.Event != "operation":
		case l.API == "Fetch": // one; of an answer that is cut there may be lines of partitions as well
			fetched = fetched || l.Outcome == "unknown" || len(l.Batches) > 0
		case l.Outcome == "unknown":
			unknown++
		case l.API == "Produce" && l.Topic != "", l.API == "Metadata",
			l.API == "Heartbeat" && l.Verdict == string(audit.Allow):
			known++
		}
	}
	if fetched {
		known++
	}
	if n := unknown + known; n < reached || n > most {
		t.Errorf("%d of %d requests reached the broker; the audit knows the outcome of %d, and not of %d",
			reached, most, known, unknown)
	}
}

// Whenever the client ends: nothing of the session is left, and every request that went out is accounted for.
func TestTheEndOfTheClientAtAnyByteLeavesNothingBehind(t *testing.T) {
	for name, c := range cuts {
		t.Run(name, func(t *testing.T) {
			before := runtime.NumGoroutine()
			stream, forwarded := mixed(c.large)
			for cut := 0; cut <= len(stream); cut = nextCut(cut, len(stream)) {
				rig := newRig(t, ordersOnly)
				client, broker, ended := rig.serveScripted(t)
				reached := make(chan int, 1)
				go func() {
					n, _ := playBroker(broker, rand.New(rand.NewPCG(uint64(cut), 0)), func() {}) // ends with an error
					_ = broker.Close()
					reached <- n
				}()
				client.write(stream[:cut])
				c.end(t, client.Conn)
				_, _ = io.Copy(io.Discard, client.Conn) // of one that is closed, nothing
				if err := end(t, ended); err != nil {
					var refusal *Error
					if !errors.As(err, &refusal) || refusal.Reason != audit.BadFrame {
						t.Errorf("cut at %d: the session ended with %v", cut, err)
					}
				}
				rig.wantAccountedFor(t, <-reached, forwarded)
				rig.wantNothingHeld(t)
				if t.Failed() {
					t.Fatalf("cut at %d of %d", cut, len(stream))
				}
			}
			await(t, "the goroutines to end", func() bool { return runtime.NumGoroutine() <= before })
		})
	}
}

// The same of the broker, in the midst of its answers; what the client gets is a beginning of them, in order.
func TestTheEndOfTheBrokerAtAnyByteLeavesNothingBehind(t *testing.T) {
	for name, c := range cuts {
		t.Run(name, func(t *testing.T) {
			before := runtime.NumGoroutine()
			stream, forwarded := mixed(10)
			var size int
			for cut := 0; cut <= size; cut = nextCut(cut, size) {
				rig := newRig(t, ordersOnly)
				client, broker, ended := rig.serveScripted(t)
				client.write(stream)
				var answers []byte
				for range forwarded {
					h, req := broker.request()
					resp, _ := answerOf(rand.New(rand.NewPCG(1, 1)), req)
					if resp == nil { // without acks
						continue
					}
					if f, ok := resp.(*kmsg.FetchResponse); ok {
						f.Topics[0].Partitions[0].RecordBatches = batch([]byte("record"))
					}
					if p, ok := resp.(*kmsg.ProduceResponse); ok && c.large > 1000 {
						p.Topics[0].Partitions[0].ErrorMessage = kmsg.StringPtr(string(make([]byte, 30_000)))
						p.Topics[0].Partitions = slices.Repeat(p.Topics[0].Partitions, 5)
					}
					answers = wire.AppendResponse(answers, h.Correlation, resp)
				}
				size = len(answers)
				broker.write(answers[:min(cut, size)])
				c.end(t, broker.Conn)
				for i := int32(0); ; i++ {
					b, err := client.frame()
					if err != nil {
						break
					}
					if i == 3 {
						i++ // without acks
					}
					if got := int32(binary.BigEndian.Uint32(b)); got != i {
						t.Errorf("cut at %d: the answer to request %d came where that to %d was due", cut, got, i)
					}
				}
				if err := client.Close(); err != nil {
					t.Fatal(err)
				}
				logEnd(t, ended)
				rig.wantAccountedFor(t, forwarded, forwarded)
				rig.wantNothingHeld(t)
				if t.Failed() {
					t.Fatalf("cut at %d of %d", cut, size)
				}
			}
			await(t, "the goroutines to end", func() bool { return runtime.NumGoroutine() <= before })
		})
	}
}

func TestABrokersEndIsTheClientsEndBehindAllAnswers(t *testing.T) {
	rig := newRig(t, ordersOnly)
	client, broker, ended := rig.serveScripted(t)
	produce := produceRequest(9, -1, []byte("record"), "orders")
	for i := range int32(3) {
		client.write(requestFrame(i, produce))
	}
	for i := range 3 {
		h, _ := broker.request()
		broker.answer(h, produceAnswer(produce, int64(i)))
	}
	broker.closeWrite()
	for i := range int32(3) {
		client.response(i, produce)
	}
	if b, err := client.frame(); !errors.Is(err, io.EOF) {
		t.Errorf("%d bytes and %v came, not the end", len(b), err)
	}
	late := requestFrame(9, produceRequest(9, -1, make([]byte, 1000), "orders"))
	for range 50 { // a reset is an error of the write after the one it meets
		if _, err := client.Write(late); err != nil {
			t.Fatalf("a client that sends meanwhile is reset: %v", err)
		}
	}
	if err := client.Close(); err != nil {
		t.Error(err)
	}
	if err := end(t, ended); err != nil {
		t.Error(err)
	}
	rig.wantNothingHeld(t)
}

// A broker answers in turn, so what comes before a request that ends the connection is answered.
func TestWhatComesBeforeARequestThatEndsTheConnectionIsAnswered(t *testing.T) {
	unknown := requestFrame(2, kmsg.NewPtrMetadataRequest())
	binary.BigEndian.PutUint16(unknown[4:], 12_345)
	for name, c := range map[string]struct {
		last   []byte
		reason audit.Reason
	}{
		"an API key nobody knows":        {unknown, audit.UnknownAPI},
		"no Kafka":                       {[]byte("GET / HTTP/1.1\r\n\r\n"), audit.BadFrame},
		"a refused produce, no acks":     {requestFrame(2, produceRequest(9, 0, nil, "secret")), audit.Denied},
		"a frame that is not sent whole": {[]byte{0, 0, 1, 0, 0, 3}, audit.BadFrame},
	} {
		t.Run(name, func(t *testing.T) {
			rig := newRig(t, ordersOnly)
			client, broker, ended := rig.serveScripted(t)
			produce := produceRequest(9, -1, []byte("record"), "orders")
			client.write(append(requestFrame(1, produce), c.last...))
			if len(c.last) < 8 {
				client.closeWrite()
			}
			h, _ := broker.request()
			await(t, "the end of the requests", func() bool { return rig.hurries() })
			broker.answer(h, produceAnswer(produce, 7))
			client.response(1, produce)
			if b, err := client.frame(); err == nil {
				t.Errorf("%d bytes came, not the end", len(b))
			}
			rig.wantRefusal(t, ended, c.reason)
			rig.wantNothingHeld(t)
		})
	}
}

// hurries tells whether the session waits for the answers that are owed, and no longer for requests.
func (r *rig) hurries() bool {
	all := r.shared.sessions.all()
	return len(all) == 1 && all[0].down.Hurries()
}

// What a broker must not send is refused, counted and on record, however the answer would be handled; and the client
// gets none of it that could be taken for an answer.
func TestABrokerThatMisbehavesIsRefused(t *testing.T) {
	noise := make([]byte, 4096)
	for i := range noise {
		noise[i] = byte(i*7 + i>>8)
	}
	head := func(h wire.Header, size uint32) []byte {
		return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(nil, size), uint32(h.Correlation))
	}
	faults := map[string]struct {
		send   func(h wire.Header, whole []byte) []byte
		reason audit.Reason
		only   []string // handlings; nil: all
	}{
		"noise": {func(wire.Header, []byte) []byte { return noise }, audit.BadAnswer, nil},
		"the correlation id of the client": {func(_ wire.Header, whole []byte) []byte {
			binary.BigEndian.PutUint32(whole[4:], 4711)
			return whole
		}, audit.BadAnswer, nil},
		"the correlation id of a later request": {func(h wire.Header, whole []byte) []byte {
			binary.BigEndian.PutUint32(whole[4:], uint32(h.Correlation+1))
			return whole
		}, audit.BadAnswer, nil},
		"the same answer twice": {func(_ wire.Header, whole []byte) []byte { return slices.Repeat(whole, 2) },
			audit.BadAnswer, nil},
		"no room for a header": {func(h wire.Header, _ []byte) []byte { return head(h, 3) }, audit.BadAnswer, nil},
		"a negative length":    {func(h wire.Header, _ []byte) []byte { return head(h, 1<<31) }, audit.BadAnswer, nil},
		"more than the memory for answers": {func(h wire.Header, _ []byte) []byte { return head(h, 65<<20) },
			audit.OutOfMemory, []string{"acknowledged", "merged", "learned", "filtered"}},
		"a body of noise": {func(h wire.Header, _ []byte) []byte { return append(head(h, 4+4096), noise...) },
			audit.BadAnswer, []string{"streamed", "merged", "learned", "filtered"}},
		"an end within the answer": {func(_ wire.Header, whole []byte) []byte { return whole[:len(whole)-1] },
			audit.BadAnswer, nil},
		"an end within the length": {func(_ wire.Header, whole []byte) []byte { return whole[:3] }, audit.BadAnswer, nil},
	}
	for handling, request := range handlings {
		for name, fault := range faults {
			if fault.only != nil && !slices.Contains(fault.only, handling) {
				continue
			}
			t.Run(handling+", "+name, func(t *testing.T) {
				rig := newRig(t, ordersOnly)
				client, broker, ended := rig.serveScripted(t)
				client.write(requestFrame(4711, request()))
				h, req := broker.request()
				resp, _ := answerOf(rand.New(rand.NewPCG(1, 1)), req)
				whole := wire.AppendResponse(nil, h.Correlation, resp)
				broker.write(fault.send(h, whole))
				broker.closeWrite()
				answers := 0
				for b, err := client.frame(); err == nil; b, err = client.frame() {
					if got := binary.BigEndian.Uint32(b); got != 4711 {
						t.Errorf("the client got an answer to request %d", got)
					}
					answers++
				}
				if want := name == "the same answer twice"; want != (answers == 1) {
					t.Errorf("the client got %d answers", answers)
				}
				rig.wantRefusal(t, ended, fault.reason)
				if n := rig.refused(t, fault.reason); n != 1 {
					t.Errorf("%v refusals are counted", n)
				}
				rig.wantNothingHeld(t)
			})
		}
	}
}

func TestAnAnswerThatNobodyAskedForIsRefused(t *testing.T) {
	rig := newRig(t, ordersOnly)
	client, broker, ended := rig.serveScripted(t)
	broker.write(wire.AppendResponse(nil, 0, kmsg.NewPtrHeartbeatResponse()))
	if n := client.drain(); n != 0 {
		t.Errorf("the client got %d bytes", n)
	}
	rig.wantRefusal(t, ended, audit.BadAnswer)
	rig.wantNothingHeld(t)
}

// A broker may take as long as it likes to answer, but not in the midst of an answer.
func TestAnAnswerOfWhichTheRestDoesNotComeIsRefused(t *testing.T) {
	const longest = time.Minute
	for handling, request := range handlings {
		t.Run(handling, func(t *testing.T) {
			answer := func(h wire.Header, req kmsg.Request) []byte {
				resp, _ := answerOf(rand.New(rand.NewPCG(1, 1)), req)
				return wire.AppendResponse(nil, h.Correlation, resp)
			}
			var size int
			for cut := 1; size == 0 || cut < size; cut += 1 + size/20 {
				synctest.Test(t, func(t *testing.T) {
					rig := newRig(t, ordersOnly)
					client, broker, ended := rig.servePipes()
					go func() { _, _ = client.Write(requestFrame(1, request())) }()
					go func() { _, _ = io.Copy(io.Discard, client) }()
					b, err := (&peer{in: bufio.NewReader(broker)}).frame()
					if err != nil {
						t.Fatal(err)
					}
					h, req := parsed(t, b)
					whole := answer(h, req)
					size = len(whole)
					time.Sleep(time.Hour) // it may
					if _, err := broker.Write(whole[:cut]); err != nil {
						t.Fatal(err)
					}
					start := time.Now()
					rig.wantRefusal(t, waited(ended), audit.BadAnswer)
					if took := time.Since(start); took > longest {
						t.Errorf("cut at %d: ended after %v", cut, took)
					}
					rig.wantNothingHeld(t)
					if err := errors.Join(client.Close(), broker.Close()); err != nil {
						t.Error(err)
					}
				})
			}
		})
	}
}

// servePipes serves a connection in a bubble, where time costs nothing.
func (r *rig) servePipes() (client, broker net.Conn, ended <-chan error) {
	client, served := net.Pipe()
	dialled, broker := net.Pipe()
	end := make(chan error, 1)
	conn := r.conn(served, dialled)
	go func() { end <- Serve(context.Background(), r.shared, conn) }()
	return client, broker, end
}

// waited waits where time costs nothing.
func waited(ended <-chan error) <-chan error {
	again := make(chan error, 1)
	again <- <-ended
	return again
}

func parsed(t testing.TB, b []byte) (wire.Header, kmsg.Request) {
	t.Helper()
	h, err := wire.ParseHeader(b)
	if err != nil {
		t.Fatal(err)
	}
	req := kmsg.RequestForKey(h.Key)
	req.SetVersion(h.Version)
	if err := req.ReadFrom(bytes.Clone(b[h.Len:])); err != nil {
		t.Fatal(err)
	}
	return h, req
}

// What a refused client is owed it gets as long as it takes it.
func TestARefusedClientThatTakesNothingIsGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rig := newRig(t, ordersOnly)
		client, broker, ended := rig.servePipes()
		heartbeat := handlings["relayed"]()
		go func() {
			_, _ = client.Write(append(requestFrame(1, heartbeat), requestFrame(2, produceRequest(9, 0, nil, "secret"))...))
		}()
		b, err := (&peer{in: bufio.NewReader(broker)}).frame()
		if err != nil {
			t.Fatal(err)
		}
		h, _ := parsed(t, b)
		if _, err := broker.Write(wire.AppendResponse(nil, h.Correlation, heartbeat.ResponseKind())); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		rig.wantRefusal(t, waited(ended), audit.Denied)
		if took := time.Since(start); took > time.Minute {
			t.Errorf("ended after %v", took)
		}
		rig.wantNothingHeld(t)
		if err := errors.Join(client.Close(), broker.Close()); err != nil {
			t.Error(err)
		}
	})
}

// A client that begins a frame and does not go on is refused as well: it holds a buffer.
func TestARequestOfWhichTheRestDoesNotComeIsRefused(t *testing.T) {
	frame := requestFrame(1, produceRequest(9, -1, []byte("record"), "orders"))
	for cut := 1; cut < len(frame); cut += 7 {
		synctest.Test(t, func(t *testing.T) {
			rig := newRig(t, ordersOnly)
			client, broker, ended := rig.servePipes()
			time.Sleep(time.Hour) // idle it may be
			if _, err := client.Write(frame[:cut]); err != nil {
				t.Fatal(err)
			}
			rig.wantRefusal(t, waited(ended), audit.BadFrame)
			rig.wantNothingHeld(t)
			if err := errors.Join(client.Close(), broker.Close()); err != nil {
				t.Error(fmt.Errorf("cut at %d: %w", cut, err))
			}
		})
	}
}
