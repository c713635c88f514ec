package kafka

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/audit"
	"klamm/enforcer/kafka/wire"
)

func TestAFrameCutAtAnyByteReachesNoBroker(t *testing.T) {
	version := kmsg.NewPtrApiVersionsRequest()
	version.Version, version.ClientSoftwareName, version.ClientSoftwareVersion = 3, "test", "1"
	whole := [][]byte{requestFrame(1, produceRequest(9, 0, []byte("record"), "orders")),
		requestFrame(2, produceRequest(3, -1, []byte("record"), "orders")), requestFrame(3, version)}
	stream := bytes.Join(whole, nil)
	for cut := range stream {
		rig := newRig(t, ordersOnly)
		client, broker, ended := rig.serveScripted(t)
		client.write(stream[:cut])
		client.closeWrite()
		var got int64
		for {
			b, err := broker.frame()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatalf("cut at %d: the broker read a part of a frame: %v", cut, err)
			}
			got += int64(len(b)) + wire.SizePrefix
		}
		if err := broker.Close(); err != nil {
			t.Fatal(err)
		}
		client.drain()
		logEnd(t, ended)
		want := 0
		for _, frame := range whole {
			if want+len(frame) > cut {
				break
			}
			want += len(frame)
		}
		if got != int64(want) {
			t.Errorf("cut at %d: the broker got %d bytes, not the %d of the whole frames", cut, got, want)
		}
		for _, l := range rig.log.lines(t) {
			if l.Reason == string(audit.Internal) {
				t.Errorf("cut at %d: %s", cut, l.Error)
			}
		}
	}
}

func TestWhatIsNoKafkaIsRefusedAndReachesNoBroker(t *testing.T) {
	unknownKey := requestFrame(1, kmsg.NewPtrMetadataRequest())
	binary.BigEndian.PutUint16(unknownKey[4:], 12_345)
	negativeKey := bytes.Clone(unknownKey)
	binary.BigEndian.PutUint16(negativeKey[4:], 0x8000)
	cut := func(n int) []byte { // after n bytes, its size being true
		b := requestFrame(1, kmsg.NewPtrMetadataRequest())[:wire.SizePrefix+n]
		binary.BigEndian.PutUint32(b, uint32(n))
		return b
	}

	heartbeat := kmsg.NewPtrHeartbeatRequest()
	heartbeat.Version = 4
	manyTags := requestFrame(1, heartbeat)
	manyTags = append(manyTags[:len(manyTags)-1], 0xff, 0xff, 0xff, 0xff, 0x0f)
	binary.BigEndian.PutUint32(manyTags, uint32(len(manyTags)-wire.SizePrefix))

	for name, c := range map[string]struct {
		bytes  []byte
		reason audit.Reason
	}{
		"a length of 2 GiB":            {[]byte{0x7f, 0xff, 0xff, 0xff, 0, 3}, audit.BadFrame},
		"a negative length":            {[]byte{0xff, 0xff, 0xff, 0xff, 0, 3}, audit.BadFrame},
		"the most negative length":     {[]byte{0x80, 0, 0, 0}, audit.BadFrame},
		"a length of zero":             {[]byte{0, 0, 0, 0}, audit.BadFrame},
		"a length below any header":    {[]byte{0, 0, 0, 7, 0, 3, 0, 0, 0, 0, 0}, audit.BadFrame},
		"one byte over the limit":      {[]byte{1, 0, 0, 1}, audit.BadFrame},
		"HTTP":                         {[]byte("GET / HTTP/1.1\r\n\r\n"), audit.BadFrame},
		"SSH":                          {[]byte("SSH-2.0-OpenSSH_9.2\r\n"), audit.BadFrame},
		"an API key nobody knows":      {unknownKey, audit.UnknownAPI},
		"a negative API key":           {negativeKey, audit.BadFrame},
		"a header longer than a frame": {cut(12), audit.BadFrame},
		"a body that does not parse":   {cut(16), audit.Undecodable},
		"4 billion tagged fields":      {manyTags, audit.Undecodable},
	} {
		t.Run(name, func(t *testing.T) {
			rig := newRig(t, ordersOnly)
			client, broker, ended := rig.serveScripted(t)
			client.write(c.bytes)
			if n := client.drain(); n != 0 {
				t.Errorf("the client got %d bytes", n)
			}
			if n := broker.drain(); n != 0 {
				t.Errorf("the broker got %d bytes", n)
			}
			rig.wantRefusal(t, ended, c.reason)
		})
	}
}

func TestRandomBytesNeverReachTheBrokerAsTheyAre(t *testing.T) {
	for range 50 {
		seed := rand.Uint64()
		t.Run(fmt.Sprintf("seed %#x", seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 0))
			garbage := make([]byte, 1+r.IntN(4096))
			for i := range garbage {
				garbage[i] = byte(r.Uint32())
			}
			garbage[0] |= 0x02 // 32 MiB at least, over the limit
			rig := newRig(t, ordersOnly)
			client, broker, ended := rig.serveScripted(t)
			client.write(garbage)
			client.closeWrite()
			if n := broker.drain(); n != 0 {
				t.Errorf("the broker got %d bytes", n)
			}
			client.drain()
			logEnd(t, ended)
		})
	}
}

func TestATLSClientHearsAnAlert(t *testing.T) {
	rig := newRig(t, ordersOnly)
	client, broker, ended := rig.serveScripted(t)
	err := tls.Client(client.Conn, &tls.Config{ServerName: "broker.example.test"}).Handshake()
	if err == nil || !strings.Contains(err.Error(), "access denied") {
		t.Errorf("the handshake ended with %v, not with the alert access_denied", err)
	}
	if n := broker.drain(); n != 0 {
		t.Errorf("the broker got %d bytes", n)
	}
	rig.wantRefusal(t, ended, audit.TLSRefused)
}

func TestAClientThatEndsItsSideGetsAllAnswers(t *testing.T) {
	rig := newRig(t, ordersOnly)
	client, broker, ended := rig.serveScripted(t)
	const requests = 20
	for i := range int32(requests) {
		client.write(requestFrame(i, produceRequest(9, -1, []byte("record"), "orders")))
	}
	client.closeWrite()
	var held []byte
	for range requests { // all of them before the first answer
		h, req := broker.request()
		held = wire.AppendResponse(held, h.Correlation, produceAnswer(req.(*kmsg.ProduceRequest), 1))
	}
	if b, err := broker.frame(); !errors.Is(err, io.EOF) {
		t.Fatalf("the broker read %d bytes and %v, not the client's end", len(b), err)
	}
	broker.write(held)
	for i := range int32(requests) {
		client.response(i, produceRequest(9, -1, nil))
	}
	if err := broker.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := client.frame(); !errors.Is(err, io.EOF) {
		t.Errorf("the answers end with %v", err)
	}
	if err := end(t, ended); err != nil {
		t.Error(err)
	}
	if n := len(rig.log.find(t, isOperation("Produce"))); n < requests {
		t.Errorf("%d lines for %d produces", n, requests)
	}
}

func TestWhatABrokerNeverAnsweredIsAuditedAsUnknown(t *testing.T) {
	rig := newRig(t, ordersOnly)
	client, broker, ended := rig.serveScripted(t)
	client.write(requestFrame(1, produceRequest(9, -1, []byte("answered"), "orders")))
	client.write(requestFrame(2, produceRequest(9, -1, []byte("not answered"), "orders")))
	client.write(requestFrame(3, kmsg.NewPtrHeartbeatRequest())) // refused: ours, behind an answer that never comes
	heartbeat := kmsg.NewPtrHeartbeatRequest()
	heartbeat.Group = "orders"
	client.write(requestFrame(4, heartbeat))
	h, req := broker.request()
	broker.request()
	broker.request()
	broker.answer(h, produceAnswer(req.(*kmsg.ProduceRequest), 5))
	client.response(1, req)
	if err := broker.Close(); err != nil {
		t.Fatal(err)
	}
	if n := client.drain(); n != 0 {
		t.Errorf("the client got %d bytes after the broker's end", n)
	}
	if err := end(t, ended); err != nil {
		t.Errorf("a broker's end is %v", err)
	}
	unknown := rig.log.find(t, func(l auditLine) bool { return l.Outcome == "unknown" })
	if len(unknown) != 2 || unknown[0].API != "Produce" || unknown[0].Topic != "orders" || unknown[1].API != "Heartbeat" {
		t.Fatalf("the unknown outcomes are %+v, not those of one produce and one heartbeat", unknown)
	}
	sum := sha256.Sum256([]byte("not answered"))
	if len(unknown[0].Batches) != 1 || unknown[0].Batches[0].SHA256 != hex.EncodeToString(sum[:]) {
		t.Errorf("the batches are %+v", unknown[0].Batches)
	}
}

func TestAnAnswerOutOfTurnEndsTheConnection(t *testing.T) {
	for name, answer := range map[string]func(wire.Header) []byte{
		"another correlation id": func(h wire.Header) []byte {
			return wire.AppendResponse(nil, h.Correlation+1, kmsg.NewPtrHeartbeatResponse())
		},
		"a length below the header": func(wire.Header) []byte { return []byte{0, 0, 0, 3, 0, 0, 0, 0} },
		"a negative length":         func(wire.Header) []byte { return []byte{0xff, 0, 0, 0, 0, 0, 0, 0} },
		"an answer too many": func(h wire.Header) []byte {
			one := wire.AppendResponse(nil, h.Correlation, kmsg.NewPtrHeartbeatResponse())
			return append(one, one...)
		},
	} {
		t.Run(name, func(t *testing.T) {
			rig := newRig(t, ordersOnly)
			client, broker, ended := rig.serveScripted(t)
			heartbeat := kmsg.NewPtrHeartbeatRequest()
			heartbeat.Group = "orders"
			client.write(requestFrame(9, heartbeat))
			h, _ := broker.request()
			broker.write(answer(h))
			client.drain()
			rig.wantRefusal(t, ended, audit.BadAnswer)
		})
	}
}

func TestARefusedProduceWithoutAcksEndsTheConnection(t *testing.T) {
	rig := newRig(t, ordersOnly)
	client, broker, ended := rig.serveScripted(t)
	client.write(requestFrame(1, produceRequest(9, 0, []byte("record"), "secret")))
	if n := client.drain() + broker.drain(); n != 0 {
		t.Errorf("client and broker got %d bytes", n)
	}
	rig.wantRefusal(t, ended, audit.Denied)
}

// What is allowed of such a request is written before the connection ends, as a broker does.
func TestAPartlyRefusedProduceWithoutAcksEndsTheConnectionBehindTheRest(t *testing.T) {
	rig := newRig(t, ordersOnly)
	client, broker, ended := rig.serveScripted(t)
	client.write(requestFrame(1, produceRequest(9, 0, []byte("record"), "orders", "secret")))
	_, got := broker.request()
	if topics := got.(*kmsg.ProduceRequest).Topics; len(topics) != 1 || topics[0].Topic != "orders" {
		t.Errorf("the broker got %+v", topics)
	}
	if n := client.drain() + broker.drain(); n != 0 {
		t.Errorf("client and broker got %d more bytes", n)
	}
	rig.wantRefusal(t, ended, audit.Denied)
	lines := rig.log.find(t, func(l auditLine) bool { return l.API == "Produce" && l.Verdict == "deny" })
	if len(lines) != 1 {
		t.Errorf("the denials on record are %+v", lines)
	}
}

func TestAProduceIsAuditedWithTheHashOfWhatWasSent(t *testing.T) {
	cluster := newCluster(t, "orders")
	for _, version := range []int16{3, 8, 9, 12} {
		rig := newRig(t, ordersOnly)
		client, ended := rig.serve(t, cluster.ListenAddrs()[0])
		payload := kmsg.Record{Value: []byte("value")}
		payload.Length = int32(len(payload.AppendTo(nil)) - 1)
		record := payload.AppendTo(nil)
		req := produceRequest(version, -1, record, "orders")
		seal(req.Topics[0].Partitions[0].Records)
		resp := client.ask(1, req).(*kmsg.ProduceResponse)
		if err := kerr.ErrorForCode(resp.Topics[0].Partitions[0].ErrorCode); err != nil {
			t.Fatalf("v%d: %v", version, err)
		}
		client.closeWrite()
		client.drain()
		if err := end(t, ended); err != nil {
			t.Fatal(err)
		}
		lines := rig.log.find(t, func(l auditLine) bool { return l.API == "Produce" && l.Topic == "orders" })
		sum := sha256.Sum256(record)
		if len(lines) != 1 || lines[0].Outcome != "NONE" || len(lines[0].Batches) != 1 ||
			lines[0].Batches[0].SHA256 != hex.EncodeToString(sum[:]) ||
			lines[0].Batches[0].BaseOffset != resp.Topics[0].Partitions[0].BaseOffset {
			t.Errorf("v%d: the lines are %+v", version, lines)
		}
	}
}

// A frame that never fits the budget is refused at once; nothing of it is read.
func TestAFrameOverTheMemoryBudgetIsRefused(t *testing.T) {
	rig := newRig(t, ordersOnly)
	rig.shared.Requests = wire.NewBudget(1 << 20)
	client, broker, ended := rig.serveScripted(t)
	frame := requestFrame(1, produceRequest(9, -1, make([]byte, 2<<20), "orders"))
	if _, err := client.Write(frame[:1000]); err != nil {
		t.Fatal(err)
	}
	client.drain()
	if n := broker.drain(); n != 0 {
		t.Errorf("the broker got %d bytes", n)
	}
	rig.wantRefusal(t, ended, audit.OutOfMemory)
}

func TestALargeFrameGivesItsMemoryBack(t *testing.T) {
	rig := newRig(t, ordersOnly)
	const budget = 4 << 20
	rig.shared.Requests = wire.NewBudget(budget)
	client, broker, ended := rig.serveScripted(t)
	for i := range int32(5) { // each takes more than half of it
		frame := requestFrame(i, produceRequest(9, -1, make([]byte, 3<<20), "orders"))
		sent := make(chan error, 1)
		go func() {
			_, err := client.Write(frame)
			sent <- err
		}()
		h, req := broker.request()
		broker.answer(h, produceAnswer(req.(*kmsg.ProduceRequest), 1))
		client.response(i, req)
		if err := <-sent; err != nil {
			t.Fatal(err)
		}
	}
	client.closeWrite()
	broker.closeWrite()
	if err := end(t, ended); err != nil {
		t.Error(err)
	}
	if n := rig.shared.Requests.Held(); n != 0 {
		t.Errorf("%d bytes are still held", n)
	}
}

// A client that does not read must stop the broker, and a broker that does not read must stop the client: what fits in
// between is the sockets' buffers and ours.
func TestASlowReaderStopsTheWriter(t *testing.T) {
	const much, little = 1 << 30, 128 << 20
	write := func(p *peer, b []byte) (n int64) {
		if err := p.SetWriteDeadline(time.Now().Add(time.Second)); err != nil {
			t.Fatal(err)
		}
		for n < much {
			k, err := p.Write(b)
			n += int64(k)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		return n
	}
	t.Run("the client", func(t *testing.T) {
		rig := newRig(t, ordersOnly)
		client, broker, ended := rig.serveScripted(t)
		client.write(requestFrame(1, fetchRequest(11, 0, -1, "orders")))
		h, _ := broker.request()
		head := binary.BigEndian.AppendUint32(nil, much) // a batch in an answer that is streamed
		head = binary.BigEndian.AppendUint32(head, uint32(h.Correlation))
		answer := fetchAnswer(11, "orders", nil)
		body := answer.AppendTo(nil)
		binary.BigEndian.PutUint32(body[len(body)-4:], much-200)
		b := batch(nil)
		binary.BigEndian.PutUint32(b[8:], much-1000)
		broker.write(append(append(head, body...), b...))
		if n := write(broker, make([]byte, 1<<20)); n > little {
			t.Errorf("%d bytes left the broker while the client read none", n)
		}
		if err := client.Close(); err != nil {
			t.Fatal(err)
		}
		logEnd(t, ended)
	})
	t.Run("the broker", func(t *testing.T) {
		rig := newRig(t, ordersOnly)
		client, broker, ended := rig.serveScripted(t)
		frame := requestFrame(1, produceRequest(9, -1, make([]byte, 1<<20), "orders"))
		if n := write(client, frame); n > little {
			t.Errorf("%d bytes left the client while the broker read none", n)
		}
		if err := broker.Close(); err != nil {
			t.Fatal(err)
		}
		logEnd(t, ended)
	})
}

// An answer the broker never gives must not keep what stands behind it in memory without bound: past 256 requests in
// flight the client is not read.
func TestRequestsInFlightAreBounded(t *testing.T) {
	const maxInFlight = 256
	rig := newRig(t, ordersOnly)
	client, broker, ended := rig.serveScripted(t)
	go func() {
		for i := range int32(4 * maxInFlight) {
			if _, err := client.Write(requestFrame(i, produceRequest(9, -1, []byte("record"), "orders"))); err != nil {
				return
			}
		}
	}()
	var headers []wire.Header
	var req kmsg.Request
	for range maxInFlight {
		var h wire.Header
		h, req = broker.request()
		headers = append(headers, h)
	}
	if err := broker.SetReadDeadline(time.Now().Add(200 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if b, err := broker.in.Peek(1); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("beyond %d requests in flight came %x, %v", maxInFlight, b, err)
	}
	if err := broker.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	for i := range 4 * maxInFlight {
		broker.answer(headers[0], produceAnswer(req.(*kmsg.ProduceRequest), int64(i)))
		headers = headers[1:]
		client.response(int32(i), req)
		if i < 3*maxInFlight {
			var h wire.Header
			h, req = broker.request()
			headers = append(headers, h)
		}
	}
	broker.closeWrite()
	logEnd(t, ended)
}

func TestTheEndOfTheNodeEndsTheSession(t *testing.T) {
	rig := newRig(t, ordersOnly)
	client, served := loopback(t)
	broker, dialled := loopback(t)
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- Serve(ctx, rig.shared, rig.conn(served, dialled)) }()
	stop()
	if err := end(t, ended); err != nil {
		t.Error(err)
	}
	if n := newPeer(t, client).drain() + newPeer(t, broker).drain(); n != 0 {
		t.Errorf("%d bytes came", n)
	}
}

// seal sets the CRC of a batch.
func seal(b []byte) {
	binary.BigEndian.PutUint32(b[17:], crc(b[21:]))
}
