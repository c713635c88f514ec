package kafka

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/kafka/wire"
)

// await waits for a condition.
func await(t testing.TB, what string, condition func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(patience); !condition(); <-tick.C {
		if time.Now().After(end) {
			t.Fatalf("waited %v in vain for %s", patience, what)
		}
	}
}

// drain begins to drain, and returns when the open sessions know. How many were cut is in the channel.
func (r *rig) drain(ctx context.Context, t testing.TB) <-chan int {
	t.Helper()
	cut := make(chan int, 1)
	open := r.shared.sessions.all()
	go func() { cut <- r.shared.Drain(ctx, 0) }()
	for _, s := range open {
		await(t, "the session to be stopped", s.up.Stopped)
	}
	return cut
}

// wantDrained fails unless the session was drained, and Drain says so.
func wantDrained(t testing.TB, ended <-chan error, cut <-chan int) {
	t.Helper()
	if err := end(t, ended); !errors.Is(err, ErrDrained) {
		t.Errorf("the session ended with %v", err)
	}
	select {
	case n := <-cut:
		if n != 0 {
			t.Errorf("%d sessions were cut", n)
		}
	case <-time.After(patience):
		t.Error("the drain does not end")
	}
}

// wantEnd fails unless the next thing read is the orderly end, then closes.
func (p *peer) wantEnd() {
	p.t.Helper()
	if b, err := p.frame(); !errors.Is(err, io.EOF) {
		p.t.Errorf("%d bytes and %v came, not the end", len(b), err)
	}
	if err := p.Close(); err != nil {
		p.t.Error(err)
	}
}

func TestADrainEndsIdleSessions(t *testing.T) {
	for name, leaves := range map[string]bool{"whose client closes": true, "whose client stays": false} {
		t.Run(name, func(t *testing.T) {
			rig := newRig(t, ordersOnly)
			client, broker, ended := rig.serveScripted(t)
			client.write(requestFrame(1, produceRequest(9, -1, nil, "orders")))
			h, req := broker.request()
			broker.answer(h, produceAnswer(req.(*kmsg.ProduceRequest), 1))
			client.response(1, req)
			cut := rig.drain(t.Context(), t)
			if leaves {
				client.wantEnd()
			}
			broker.wantEnd()
			wantDrained(t, ended, cut)
		})
	}
}

func TestADrainEndsSessionsThatBeginLater(t *testing.T) {
	rig := newRig(t, ordersOnly)
	if cut := rig.shared.Drain(t.Context(), time.Hour); cut != 0 {
		t.Fatalf("%d sessions of none were cut", cut)
	}
	client, broker, ended := rig.serveScripted(t)
	client.wantEnd()
	broker.wantEnd()
	if err := end(t, ended); !errors.Is(err, ErrDrained) {
		t.Errorf("the session ended with %v", err)
	}
}

func TestADrainIsSpread(t *testing.T) {
	const n, spread = 20, 200 * time.Millisecond
	rig := newRig(t, ordersOnly)
	for range n {
		client, broker, _ := rig.serveScripted(t)
		go client.drain()
		go func() {
			broker.drain()
			_ = broker.Close()
		}()
	}
	await(t, "all sessions", func() bool { return len(rig.shared.sessions.all()) == n })
	start := time.Now()
	if cut := rig.shared.Drain(t.Context(), spread); cut != 0 {
		t.Errorf("%d sessions were cut", cut)
	}
	if took := time.Since(start); took < spread*(n-1)/n {
		t.Errorf("%d sessions were drained within %v", n, took)
	}
}

// The bytes before the cut are read with the frame before: they come in one segment.
func TestADrainFinishesTheFrameThatIsBegunAndTakesNoOther(t *testing.T) {
	for name, payload := range map[string]int{"small": 10, "held whole": 4 * wire.BaseBuffer} {
		frame := func(i int32) []byte { return requestFrame(i, produceRequest(9, -1, make([]byte, payload), "orders")) }
		last := len(frame(2)) - 1
		for _, cut := range []int{1, 2, 3, 4, 5, 12, 40, 100, last - 1, last} {
			if cut > last {
				continue
			}
			t.Run(fmt.Sprintf("%s, cut at %d", name, cut), func(t *testing.T) {
				rig := newRig(t, ordersOnly)
				client, broker, ended := rig.serveScripted(t)
				first := requestFrame(1, produceRequest(9, -1, nil, "orders"))
				client.write(append(first, frame(2)[:min(cut, 1000)]...))
				h, req := broker.request()
				client.write(frame(2)[min(cut, 1000):cut])
				drained := rig.drain(t.Context(), t)
				client.write(append(frame(2)[cut:], frame(3)...))
				broker.answer(h, produceAnswer(req.(*kmsg.ProduceRequest), 1))
				h, req = broker.request()
				broker.answer(h, produceAnswer(req.(*kmsg.ProduceRequest), 2))
				client.response(1, req)
				client.response(2, req)
				client.wantEnd()
				broker.wantEnd()
				wantDrained(t, ended, drained)
			})
		}
	}
}

func TestADrainAnswersAllThatIsOwedInOrder(t *testing.T) {
	rig := newRig(t, ordersOnly)
	client, broker, ended := rig.serveScripted(t)
	topics := []string{"orders", "secret", "orders", "secret", "orders"} // "secret" gets an answer of ours
	var req kmsg.Request
	for i, topic := range topics {
		client.write(requestFrame(int32(i), produceRequest(9, -1, []byte("record"), topic)))
	}
	fetch := fetchRequest(11, 0, -1, "orders") // held by the broker: a long poll
	client.write(requestFrame(int32(len(topics)), fetch))
	var headers []wire.Header
	for range 3 {
		var h wire.Header
		h, req = broker.request()
		headers = append(headers, h)
	}
	poll, _ := broker.request()
	cut := rig.drain(t.Context(), t)
	client.write(requestFrame(99, produceRequest(9, -1, []byte("too late"), "orders")))
	for i, h := range headers {
		broker.answer(h, produceAnswer(req.(*kmsg.ProduceRequest), int64(i)))
	}
	for i := range topics {
		client.response(int32(i), req)
	}
	broker.answer(poll, fetchAnswer(11, "orders", nil))
	client.response(int32(len(topics)), fetch)
	client.wantEnd()
	broker.wantEnd()
	wantDrained(t, ended, cut)
	if lines := rig.log.find(t, func(l auditLine) bool { return l.Outcome == "unknown" }); len(lines) > 0 {
		t.Errorf("the audit does not know the outcome of %+v", lines)
	}
}

func TestADrainDeliversWhatIsOwedNoAnswer(t *testing.T) {
	const requests = 50
	rig := newRig(t, ordersOnly)
	client, broker, ended := rig.serveScripted(t)
	for i := range int32(requests) {
		client.write(requestFrame(i, produceRequest(9, 0, make([]byte, 1000), "orders")))
	}
	await(t, "the requests to be forwarded", func() bool {
		return len(rig.log.find(t, func(l auditLine) bool { return l.Outcome == "unacknowledged" })) == requests
	})
	cut := rig.drain(t.Context(), t)
	client.wantEnd()
	for range requests { // the broker begins to read after the client's end
		broker.request()
	}
	broker.wantEnd()
	wantDrained(t, ended, cut)
}

// A reset is an error of the write it meets, and of each after it; a write to a socket that was closed in order is not.
func TestAClientThatSendsDuringADrainIsNotReset(t *testing.T) {
	rig := newRig(t, ordersOnly)
	client, broker, ended := rig.serveScripted(t)
	client.write(requestFrame(1, produceRequest(9, -1, []byte("record"), "orders")))
	h, req := broker.request()
	cut := rig.drain(t.Context(), t)
	late := requestFrame(2, produceRequest(9, -1, make([]byte, 8<<20), "orders")) // more than the sockets hold
	sent := make(chan error, 1)
	go func() {
		_, err := client.Write(late)
		sent <- err
	}()
	broker.answer(h, produceAnswer(req.(*kmsg.ProduceRequest), 1))
	client.response(1, req)
	if b, err := client.frame(); !errors.Is(err, io.EOF) {
		t.Errorf("%d bytes and %v came, not the end", len(b), err)
	}
	broker.wantEnd()
	if err := <-sent; err != nil {
		t.Error(err)
	}
	wantDrained(t, ended, cut)
	if _, err := client.Write(late[:100]); err != nil {
		t.Error(err)
	}
}

func TestADrainThatTakesTooLongIsCut(t *testing.T) {
	rig := newRig(t, ordersOnly)
	client, broker, ended := rig.serveScripted(t)
	client.write(requestFrame(1, produceRequest(9, -1, []byte("record"), "orders")))
	broker.request()
	ctx, stop := context.WithCancel(t.Context())
	cut := rig.drain(ctx, t)
	stop()
	if n := client.drain() + broker.drain(); n != 0 {
		t.Errorf("%d bytes came", n)
	}
	if err := end(t, ended); err != nil {
		t.Errorf("the session ended with %v", err)
	}
	if n := <-cut; n != 1 {
		t.Errorf("%d sessions were cut, not 1", n)
	}
	if lines := rig.log.find(t, func(l auditLine) bool { return l.Outcome == "unknown" }); len(lines) != 1 {
		t.Errorf("the unknown outcomes are %+v", lines)
	}
}

// pump writes a stream, cut at random, until it is told to stop, and tells how much is written.
func pump(c net.Conn, r *rand.Rand, stream []byte, written func(int), stop <-chan struct{}) error {
	for at := 0; at < len(stream); written(at) {
		select {
		case <-stop:
			return nil
		default:
		}
		n, err := c.Write(stream[at:min(len(stream), at+1+r.IntN(5000))])
		if err != nil {
			return fmt.Errorf("the client was cut off while it wrote: %w", err)
		}
		at += n
	}
	return nil
}

// numbered is a produce whose number the broker can read.
func numbered(i int, acks int16, topic string) []byte {
	return requestFrame(int32(i), produceRequest(9, acks, fmt.Appendf(nil, "%d ", i), topic))
}

// answerNumbered plays a broker that from some request on holds its answers back until the drain has begun. It returns
// the numbers of what reached it.
func answerNumbered(p *peer, hold int, drained <-chan struct{}) (got []int, err error) {
	answers := make(chan []byte, 1<<12)
	wrote := make(chan error, 1)
	go func() {
		var err error
		for i := 0; ; i++ {
			b, ok := <-answers
			if !ok {
				wrote <- err
				return
			}
			if i == hold {
				<-drained
			}
			if err == nil {
				_, err = p.Write(b)
			}
		}
	}()
	defer func() {
		close(answers)
		err = errors.Join(err, <-wrote, p.Close())
	}()
	for {
		b, err := p.frame()
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = nil
			}
			return got, err
		}
		h, err := wire.ParseHeader(b)
		if err != nil {
			return got, err
		}
		req := kmsg.NewPtrProduceRequest()
		req.Version = h.Version
		if err := req.ReadFrom(b[h.Len:]); err != nil {
			return got, err
		}
		digits, _, _ := bytes.Cut(req.Topics[0].Partitions[0].Records[len(batch(nil)):], []byte(" "))
		i, err := strconv.Atoi(string(digits))
		if err != nil {
			return got, err
		}
		got = append(got, i)
		if req.Acks != 0 {
			answers <- wire.AppendResponse(nil, h.Correlation, produceAnswer(req, int64(i)))
		}
	}
}

// Whenever a drain comes: what reached the broker is what was answered, in order and without a gap, the client reads
// its end behind that, and no write of it fails before.
func TestADrainAtAnyMomentLosesAndDoublesNothing(t *testing.T) {
	for range 60 {
		seed := rand.Uint64()
		t.Run(fmt.Sprintf("seed %#x", seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 0))
			rig := newRig(t, ordersOnly)
			client, broker, ended := rig.serveScripted(t)
			const asked, silent, refused = 0, 1, 2 // what becomes of a request
			var stream []byte
			var fate, forwarded, answered []int // the latter two were there no drain
			for i := range 1 + r.IntN(1500) {
				fate = append(fate, max(0, r.IntN(6)-3))
				acks, topic := int16(-1), "orders"
				switch fate[i] {
				case silent:
					acks = 0
				case refused:
					topic = "secret"
				}
				stream = append(stream, numbered(i, acks, topic)...)
				if fate[i] != refused {
					forwarded = append(forwarded, i)
				}
				if fate[i] != silent {
					answered = append(answered, i)
				}
			}
			onlyAsked := func(all []int) []int {
				return slices.DeleteFunc(slices.Clone(all), func(i int) bool { return fate[i] != asked })
			}

			moment, hold, cuts := r.IntN(len(stream)+1), r.IntN(len(forwarded)+1), rand.New(rand.NewPCG(seed, 1))
			reached, drained, over := make(chan struct{}), make(chan struct{}), make(chan struct{})
			var got []int
			played, sent, cut := make(chan error, 1), make(chan error, 1), make(chan int, 1)
			go func() {
				var err error
				got, err = answerNumbered(broker, hold, drained)
				played <- err
			}()
			go func() {
				begin := sync.OnceFunc(func() { close(reached) })
				sent <- pump(client, cuts, stream, func(n int) {
					if n >= moment {
						begin()
					}
				}, over)
			}()
			go func() {
				select {
				case <-reached:
				case <-time.After(20 * time.Millisecond): // held answers may stop the client before
				}
				close(drained)
				cut <- rig.shared.Drain(context.Background(), 0)
			}()

			var answers []int
			b, err := client.frame()
			for ; err == nil; b, err = client.frame() {
				answers = append(answers, int(binary.BigEndian.Uint32(b)))
			}
			close(over)
			if !errors.Is(err, io.EOF) {
				t.Errorf("after %d answers came %v, not the end", len(answers), err)
			}
			if err := errors.Join(<-sent, client.Close(), <-played); err != nil {
				t.Error(err)
			}
			wantDrained(t, ended, cut)
			if !slices.Equal(answers, answered[:min(len(answers), len(answered))]) {
				t.Errorf("the answers are to %v", answers)
			}
			if !slices.Equal(got, forwarded[:min(len(got), len(forwarded))]) {
				t.Errorf("the broker got %v", got)
			}
			if in, out := onlyAsked(got), onlyAsked(answers); !slices.Equal(in, out) {
				t.Errorf("%d requests that want an answer reached the broker, %d were answered", len(in), len(out))
			}
			lines := rig.log.find(t, func(l auditLine) bool { return l.API == "Produce" && l.Topic != "" })
			if len(lines) != len(got) || slices.ContainsFunc(lines, func(l auditLine) bool { return l.Outcome == "unknown" }) {
				t.Errorf("the audit tells of %d writes, the broker got %d", len(lines), len(got))
			}
		})
	}
}
