package kafka

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/audit"
	"klamm/enforcer/kafka/wire"
	"klamm/enforcer/policy"
)

// party is a client of its own identity, with its session and broker, where time costs nothing.
type party struct {
	client, broker net.Conn
	ended          chan error
}

func (r *rig) party(t *testing.T, id string) *party {
	t.Helper()
	p := &party{ended: make(chan error, 1)}
	var served, dialled net.Conn
	p.client, served = net.Pipe()
	dialled, p.broker = net.Pipe()
	c := r.conn(served, dialled)
	c.Workload = newWorkload(identified(id))
	c.Subject.Identity = *c.Workload.Identity()
	go func() { p.ended <- Serve(context.Background(), r.shared, c) }()
	t.Cleanup(func() { _ = errors.Join(p.client.Close(), p.broker.Close()) })
	return p
}

// send writes, and does not wait for all of it to be read.
func (p *party) send(b []byte) {
	go func() { _, _ = p.client.Write(b) }()
	synctest.Wait()
}

// leave ends sessions that may end as they like.
func leave(t *testing.T, all ...*party) {
	t.Helper()
	for _, p := range all {
		if err := errors.Join(p.client.Close(), p.broker.Close()); err != nil {
			t.Error(err)
		}
	}
	for _, p := range all {
		if err := <-p.ended; err != nil {
			t.Logf("a session ended: %v", err)
		}
	}
}

const (
	greedyID = "spiffe://example.test/greedy"
	modestID = "spiffe://example.test/orders"
)

// One that announces large frames, and does not send them, is refused where another needs the memory.
func TestAGreedyClientDoesNotStarveOthers(t *testing.T) {
	const large, small = 15 << 20, 200 << 10 // of 64 MiB
	synctest.Test(t, func(t *testing.T) {
		rig := newRig(t, ordersOnly)
		var greedy []*party
		for range 6 { // four of which get their 16 MiB
			p := rig.party(t, greedyID)
			p.send(requestFrame(1, produceRequest(9, -1, make([]byte, large), "orders"))[:1000])
			greedy = append(greedy, p)
			time.Sleep(time.Second)
		}
		if n := rig.shared.Requests.Held(); n != 64<<20 {
			t.Fatalf("%d bytes are held", n)
		}
		modest := rig.party(t, modestID)
		start := time.Now()
		modest.send(requestFrame(7, produceRequest(9, -1, make([]byte, small), "orders")))
		b, err := (&peer{in: bufio.NewReader(modest.broker)}).frame()
		if err != nil {
			t.Fatal(err)
		}
		if took := time.Since(start); took > 3*time.Second {
			t.Errorf("the small request took %v", took)
		}
		h, req := parsed(t, b)
		go func() {
			_, _ = modest.broker.Write(wire.AppendResponse(nil, h.Correlation, produceAnswer(req.(*kmsg.ProduceRequest), 1)))
		}()
		answer := &peer{Conn: modest.client, t: t, in: bufio.NewReader(modest.client)}
		answer.response(7, req)

		rig.wantRefusal(t, greedy[0].ended, audit.OutOfMemory)
		lines := rig.log.find(t, func(l auditLine) bool { return l.Event == "refusal" })
		if len(lines) != 1 || lines[0].SPIFFE != greedyID || lines[0].Hint == "" {
			t.Errorf("the audit has %+v", lines)
		}
		if n := rig.refused(t, audit.OutOfMemory); n != 1 {
			t.Errorf("%v refusals are counted", n)
		}
		leave(t, append(greedy[1:], modest)...)
		rig.wantNothingHeld(t)
	})
}

// Nor does one that takes its answers slowly, where these must be held.
func TestASlowReaderOfHeldAnswersDoesNotStarveOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rig := newRig(t, ordersOnly)
		fetch := func(p *party, size int) (answer net.Conn) {
			req := fetchRequest(12, 0, -1, "orders", "secret") // merged, so held
			p.send(requestFrame(1, req))
			b, err := (&peer{in: bufio.NewReader(p.broker)}).frame()
			if err != nil {
				t.Fatal(err)
			}
			h, _ := parsed(t, b)
			whole := wire.AppendResponse(nil, h.Correlation, fetchAnswer(12, "orders", batch(make([]byte, size))))
			go func() { _, _ = p.broker.Write(whole) }()
			synctest.Wait()
			return p.client
		}
		var slow []*party
		var readers sync.WaitGroup
		for range 2 { // 32 MiB each
			p := rig.party(t, modestID)
			c := fetch(p, 20<<20)
			readers.Go(func() { // 1 KB a second
				for b := make([]byte, 1000); ; time.Sleep(time.Second) {
					if _, err := io.ReadFull(c, b); err != nil {
						return
					}
				}
			})
			slow = append(slow, p)
			time.Sleep(time.Second)
		}
		time.Sleep(time.Minute)
		if n := rig.shared.Answers.Held(); n != 64<<20 {
			t.Fatalf("%d bytes are held", n)
		}
		rig.shared.Policy.Store(parsePolicy(t, ordersOnly+`  - name: another
    principals: ["`+greedyID+`"]
    allow:
      - {topic: orders, operations: [Read]}
`))
		other, start := rig.party(t, greedyID), time.Now()
		in := &peer{Conn: other.client, t: t, in: bufio.NewReader(fetch(other, 1<<20))}
		if b := in.mustFrame(); len(b) < 1<<20 {
			t.Errorf("%d bytes came", len(b))
		}
		if took := time.Since(start); took > 3*time.Second {
			t.Errorf("it took %v", took)
		}
		rig.wantRefusal(t, slow[0].ended, audit.OutOfMemory)
		leave(t, append(slow[1:], other)...)
		readers.Wait()
		rig.wantNothingHeld(t)
	})
}

// What is kept for the client while the broker takes its time is counted, whatever it is.
func TestWhatWaitsBehindAnAnswerIsBounded(t *testing.T) {
	var topics []string
	for i := range 20_000 {
		topics = append(topics, fmt.Sprintf("secret-%d", i))
	}
	wide := make([]string, 8000)
	for i := range wide {
		wide[i] = fmt.Sprintf("orders-%d", i)
	}
	for name, req := range map[string]kmsg.Request{
		"our own answers":          produceRequest(9, -1, nil, topics...),
		"evidence of produces":     produceRequest(9, -1, nil, wide...),
		"what is merged":           produceRequest(9, -1, nil, append([]string{"orders"}, topics...)...),
		"what is decided, decoded": metadataRequest(append([]string{"orders"}, topics...)...),
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				const budget = 8 << 20
				rig := newRig(t, ordersOnly)
				rig.shared.Kept = wire.NewBudget(budget)
				p := rig.party(t, modestID)
				go func() { _, _ = io.Copy(io.Discard, p.broker) }() // it never answers
				heartbeat := handlings["relayed"]()
				stream := requestFrame(0, heartbeat)
				sent := make(chan int, 1)
				go func() {
					_, err := p.client.Write(stream)
					n := 0
					for ; err == nil; n++ {
						_, err = p.client.Write(requestFrame(int32(n), req))
					}
					sent <- n
				}()
				synctest.Wait()
				if n := rig.shared.Kept.Held(); n < budget/2 || n > budget {
					t.Errorf("%d bytes are held, of %d", n, budget)
				}
				rig.wantRefusal(t, waited(p.ended), audit.OutOfMemory)
				if n := <-sent; n < 2 || n > 30 {
					t.Errorf("%d requests were taken", n)
				}
				rig.wantNothingHeld(t)
			})
		})
	}
}

// Small ones do not count one by one; there is a bound to them as well.
func TestManySmallAnswersBehindOneAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rig := newRig(t, ordersOnly)
		p := rig.party(t, modestID)
		go func() { _, _ = io.Copy(io.Discard, p.broker) }()
		req := produceRequest(9, -1, nil)
		for i := range 600 {
			req.Topics = append(req.Topics, produceRequest(9, -1, nil, fmt.Sprintf("secret-%d", i)).Topics...)
		}
		taken := make(chan struct{}, 1<<10)
		go func() {
			_, err := p.client.Write(requestFrame(0, handlings["relayed"]()))
			for err == nil {
				if _, err = p.client.Write(requestFrame(1, req)); err == nil {
					taken <- struct{}{}
				}
			}
		}()
		synctest.Wait()
		if n := len(taken); n < 3 || n > 30 {
			t.Errorf("%d requests of some 20 KB of answer each were taken", n)
		}
		leave(t, p)
	})
}

func TestNamesThatNoTopicHasAreNotRemembered(t *testing.T) {
	var c topicCache
	view := newRig(t, ordersOnly).shared.Policy.Load().For(policy.Subject{SPIFFE: "spiffe://example.test/orders"})
	const prefix = "orders"
	for i := range 100 {
		c.get(fmt.Appendf(nil, "%s%0*d", prefix, maxTopicName-len(prefix), i), view)
		c.get(fmt.Appendf(nil, "%s%0*d", prefix, maxTopicName, i), view)
		c.get(fmt.Appendf(nil, "refused%d", i), view)
	}
	if len(c.topics) != 100 {
		t.Errorf("%d topics are remembered", len(c.topics))
	}
}

// The mirror of a session is as large as the client makes it.
func TestTheMirrorOfALargeFetchSessionIsCounted(t *testing.T) {
	rig := newRig(t, ordersOnly)
	rig.shared.Kept = wire.NewBudget(8 << 20)
	client, broker, ended := rig.serveScripted(t)
	req := fetchRequest(12, 0, 0, "orders")
	part := req.Topics[0].Partitions[0]
	widen := func(n int32) {
		for i := range n {
			part.Partition = i + 1
			req.Topics[0].Partitions = append(req.Topics[0].Partitions, part)
		}
	}
	ask := func() {
		go func() { _, _ = client.Write(requestFrame(1, req)) }()
		h, _ := broker.request()
		broker.answer(h, req.ResponseKind())
		client.response(1, req)
	}
	for _, c := range []struct {
		partitions int32
		counted    bool
	}{{500, false}, {50_000, true}, {1, false}} {
		req = fetchRequest(12, 0, 0, "orders")
		widen(c.partitions)
		ask()
		if n := rig.shared.Kept.Held(); (n > 0) != c.counted || n > 0 && n < 50_000*64 {
			t.Errorf("with %d partitions %d bytes are held", c.partitions, n)
		}
	}
	req = fetchRequest(12, 0, 0, "orders")
	widen(200_000)
	go func() { _, _ = client.Write(requestFrame(1, req)) }()
	if n := client.drain() + broker.drain(); n != 0 {
		t.Errorf("client and broker got %d bytes", n)
	}
	rig.wantRefusal(t, ended, audit.OutOfMemory)
	rig.wantNothingHeld(t)
}

func TestAProduceOfTooManyPartitionsIsRefused(t *testing.T) {
	rig := newRig(t, ordersOnly)
	client, broker, ended := rig.serveScripted(t)
	req := produceRequest(9, -1, nil, "orders")
	part := req.Topics[0].Partitions[0]
	for range maxProduced {
		req.Topics[0].Partitions = append(req.Topics[0].Partitions, part)
	}
	go func() { _, _ = client.Write(requestFrame(1, req)) }()
	if n := client.drain() + broker.drain(); n != 0 {
		t.Errorf("client and broker got %d bytes", n)
	}
	rig.wantRefusal(t, ended, audit.OutOfMemory)
	rig.wantNothingHeld(t)
}

// A large frame that is split, and a large answer that is merged, are what the same small ones would be.
func TestLargeFramesAreSplitAndMergedInPlace(t *testing.T) {
	for _, size := range []int{1000, 1 << 20, 3 << 20} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			rig := newRig(t, ordersOnly)
			client, broker, ended := rig.serveScripted(t)
			payload := make([]byte, size)
			for i := range payload {
				payload[i] = byte(rand.Uint32())
			}
			produce := produceRequest(9, -1, payload, "secret", "orders", "secret.b", "orders.b")
			go func() { _, _ = client.Write(requestFrame(1, produce)) }()
			h, req := broker.request()
			got := req.(*kmsg.ProduceRequest)
			if len(got.Topics) != 2 || string(got.Topics[1].Partitions[0].Records) != string(batch(payload)) {
				t.Fatalf("the broker got %d topics", len(got.Topics))
			}
			broker.answer(h, produceAnswer(got, 7))
			if resp := client.response(1, produce).(*kmsg.ProduceResponse); len(resp.Topics) != 4 {
				t.Errorf("%d topics are answered", len(resp.Topics))
			}

			fetch := fetchRequest(12, 0, -1, "orders", "secret")
			client.write(requestFrame(2, fetch))
			h, _ = broker.request()
			go func() {
				_, _ = broker.Write(wire.AppendResponse(nil, h.Correlation, fetchAnswer(12, "orders", batch(payload))))
			}()
			resp := client.response(2, fetch).(*kmsg.FetchResponse)
			if len(resp.Topics) != 2 || string(resp.Topics[0].Partitions[0].RecordBatches) != string(batch(payload)) ||
				resp.Topics[1].Topic != "secret" || resp.Topics[1].Partitions[0].ErrorCode == 0 {
				t.Errorf("%d topics came, or other records than were sent", len(resp.Topics))
			}
			if err := errors.Join(client.Close(), broker.Close(), end(t, ended)); err != nil {
				t.Error(err)
			}
			rig.wantNothingHeld(t)
		})
	}
}

// The identity counts, not the connection; and where there is none, the process.
func TestWhoOwnsTheMemoryOfAConnection(t *testing.T) {
	owner := func(id string, uid uint32, destination string) string {
		w := newWorkload(identified(id))
		w.Identity().Process.UID = uid
		c := Conn{Workload: w, Subject: audit.Subject{Destination: destination}}
		return c.owner()
	}
	first := owner("", 1, "a:9092")
	for name, c := range map[string]struct {
		other string
		same  bool
	}{
		"another connection": {owner("", 1, "a:9092"), true},
		"another user":       {owner("", 2, "a:9092"), false},
		"another broker":     {owner("", 1, "b:9092"), false},
		"an identity":        {owner(modestID, 1, "a:9092"), false},
	} {
		if (c.other == first) != c.same {
			t.Errorf("%s: %q and %q", name, first, c.other)
		}
	}
}
