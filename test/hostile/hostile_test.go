// Package hostile sends the whole node what no honest client would, from processes that the kernel really redirects,
// and looks at what the client sees, what reaches the broker, and what the audit and the counters say.
//
// Environment: MUTATE=1 lets everyone do everything, so that the tests must fail.
package hostile

import (
	"bytes"
	"crypto/sha256"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"klamm/test/kafka"
	"klamm/test/stage"
)

func TestMain(m *testing.M) {
	stage.Main()
	os.Exit(m.Run())
}

const mutation = `  - name: mutant
    principals: ["*", anonymous]
    allow: [{topic: "*", operations: [All]}, {cluster: kafka-cluster, operations: [All]}]
`

func start(t *testing.T, broker string, c stage.Config) *stage.Node {
	t.Helper()
	policy := stage.OrdersOnly
	if os.Getenv("MUTATE") == "1" {
		policy += mutation
	}
	return stage.Start(t, broker, policy, c)
}

// wantNothing fails when the workload may do what only orders may: it sees no topic and writes to none.
func wantNothing(t *testing.T, w *stage.Workload, broker *stage.Broker) {
	t.Helper()
	resp, err := stage.Ask(w.Dial(t, broker.Addr()), stage.AllTopics())
	if err != nil {
		t.Fatal(err)
	}
	if m, ok := resp.(*kmsg.MetadataResponse); !ok || len(m.Topics) > 0 {
		t.Errorf("it is shown %+v", resp)
	}
	before := broker.Records("orders")
	err = w.Client(t, broker.Addr()).ProduceSync(t.Context(), &kgo.Record{Topic: "orders"}).FirstErr()
	if !errors.Is(err, kerr.TopicAuthorizationFailed) {
		t.Errorf("a write: %v", err)
	}
	// What a client with an identity would send without asking for metadata first.
	resp, err = stage.Ask(w.Dial(t, broker.Addr()), produce(oneRecord))
	if err != nil {
		t.Fatal(err)
	}
	answer, ok := resp.(*kmsg.ProduceResponse)
	if !ok || answer.Topics[0].Partitions[0].ErrorCode != kerr.TopicAuthorizationFailed.Code {
		t.Errorf("a write without asking is answered %+v", resp)
	}
	if got := broker.Records("orders"); got != before {
		t.Errorf("%d records have reached the topic", got-before)
	}
}

// One record of KIP-98: length, attributes, timestamp delta, offset delta, null key, empty value, no headers.
var oneRecord = []byte{12, 0, 0, 0, 1, 0, 0}

// produce is a request with one batch for the topic orders.
func produce(records []byte) *kmsg.ProduceRequest {
	batch := kmsg.RecordBatch{Magic: 2, PartitionLeaderEpoch: -1, NumRecords: 1, Records: records,
		ProducerID: -1, ProducerEpoch: -1, FirstSequence: -1}
	const lengthAt, crcAt, covered = 8, 17, 21
	raw := batch.AppendTo(nil)
	binary.BigEndian.PutUint32(raw[lengthAt:], uint32(len(raw)-lengthAt-4))
	binary.BigEndian.PutUint32(raw[crcAt:], crc32.Checksum(raw[covered:], crc32.MakeTable(crc32.Castagnoli)))
	req := kmsg.NewPtrProduceRequest()
	req.Version, req.Acks, req.TimeoutMillis = 7, -1, 1000
	req.Topics = []kmsg.ProduceRequestTopic{{Topic: "orders",
		Partitions: []kmsg.ProduceRequestTopicPartition{{Records: raw}}}}
	return req
}

func TestAUserWithoutAnIdentityMayDoNothing(t *testing.T) {
	broker := stage.StartBroker(t)
	n := start(t, broker.Addr(), nil)
	w := n.Workload(stage.StrangerUID)
	wantNothing(t, w, broker)
	denied := func(l stage.Line) bool { return l.API == "Produce" && l.Verdict == "deny" }
	l := n.AwaitAudit(1, "the write is refused", denied)[0]
	if l.UID != stage.StrangerUID || l.PID != uint32(w.PID()) || l.SPIFFE != "" || l.Resources[0].Name != "orders" {
		t.Errorf("the audit says %+v", l)
	}
}

func TestAnExecutableThatIsNotTheKnownOneMayDoNothing(t *testing.T) {
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	// The same program but for a byte behind its end, which nobody loads.
	copied := filepath.Join(t.TempDir(), "copy")
	if err := os.WriteFile(copied, append(self, 0), 0o755); err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(self)
	broker := stage.StartBroker(t)
	n := start(t, broker.Addr(), stage.Config{"identities": fmt.Sprintf("[{spiffe-id: %q, exe-sha256: %q}]",
		stage.Orders, hex.EncodeToString(sum[:]))})
	known, err := stage.Ask(n.Workload(stage.OrdersUID).Dial(t, broker.Addr()), stage.AllTopics())
	if m, ok := known.(*kmsg.MetadataResponse); err != nil || !ok || len(m.Topics) == 0 {
		t.Errorf("the known program is shown %+v, %v", known, err)
	}
	wantNothing(t, stage.StartWorkload(t, kafka.Place{Cgroup: n.Cgroup}, copied), broker)
	other := func(l stage.Line) bool { return l.API == "Produce" && l.Verdict == "deny" && l.Exe == copied }
	l := n.AwaitAudit(1, "the write is refused", other)[0]
	if l.SPIFFE != "" || l.ExeSHA256 == hex.EncodeToString(sum[:]) {
		t.Errorf("the audit says %+v", l)
	}
}

// clientHello is what a TLS client says first.
func clientHello(t *testing.T) []byte {
	t.Helper()
	ours, theirs := net.Pipe()
	defer func() { _ = ours.Close() }()
	go func() {
		_ = tls.Client(theirs, &tls.Config{ServerName: "broker.example"}).Handshake() // ends with the pipe
		_ = theirs.Close()
	}()
	hello := make([]byte, 4096)
	size, err := ours.Read(hello)
	if err != nil {
		t.Fatal(err)
	}
	return hello[:size]
}

// request is the frame of a request, changed.
func request(req kmsg.Request, change func(frame []byte)) []byte {
	frame := stage.Frame(req)
	change(frame)
	return frame
}

// Where things are in a request's frame.
const (
	sizeAt = 0
	keyAt  = 4
)

func TestWhatIsNoKafkaIsRefusedAndReachesNoBroker(t *testing.T) {
	broker := stage.StartBroker(t)
	n := start(t, broker.Addr(), nil)
	w := n.Workload(stage.OrdersUID)
	noise := make([]byte, 4096)
	for i := range noise {
		noise[i] = byte(i*i>>3 + 131)
	}
	put16 := func(at int, v uint16) func([]byte) {
		return func(frame []byte) { binary.BigEndian.PutUint16(frame[at:], v) }
	}
	put32 := func(at int, v uint32) func([]byte) {
		return func(frame []byte) { binary.BigEndian.PutUint32(frame[at:], v) }
	}
	refused := map[string]int{}
	for _, c := range []struct {
		name   string
		bytes  []byte
		reason string
		answer []byte // what the client is told before the end
	}{
		{"garbage", noise, "bad_frame", nil},
		{"a request of HTTP", []byte("GET / HTTP/1.1\r\nHost: broker\r\n\r\n"), "bad_frame", nil},
		{"zeros", make([]byte, 64), "bad_frame", nil},
		{"a length just below 2 GiB", request(stage.Hello(), put32(sizeAt, 1<<31-1)), "bad_frame", nil},
		{"a length of 2 GiB, which is negative", request(stage.Hello(), put32(sizeAt, 1<<31)), "bad_frame", nil},
		{"a length of -1", request(stage.Hello(), put32(sizeAt, 1<<32-1)), "bad_frame", nil},
		{"a length above the limit by one", request(stage.Hello(), put32(sizeAt, 100<<20+1)), "bad_frame", nil},
		{"a length that holds no header", request(stage.Hello(), put32(sizeAt, 7)), "bad_frame", nil},
		{"a TLS ClientHello", clientHello(t), "tls", []byte{21, 3, 3, 0, 2, 2, 49}}, // fatal, access_denied
		{"an API key nobody knows", request(stage.Hello(), put16(keyAt, 9999)), "unknown_api", nil},
		{"a negative API key", request(stage.Hello(), put16(keyAt, 1<<16-1)), "bad_frame", nil},
		{"a body that does not parse", request(stage.AllTopics(), func(frame []byte) {
			binary.BigEndian.PutUint32(frame[len(frame)-4:], 1<<30)
		}), "undecodable", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := n.In(t)
			conns, before := broker.Arrived()
			conn := w.Dial(t, broker.Addr())
			if _, err := conn.Write(c.bytes); err != nil {
				t.Fatal(err)
			}
			answer, err := stage.End(conn)
			if err != nil && !errors.Is(err, unix.ECONNRESET) || !bytes.Equal(answer, c.answer) {
				t.Errorf("the client reads % x, %v", answer, err)
			}
			refused[c.reason]++
			n.AwaitRefusals(refused[c.reason], c.reason)
			if more, after := broker.Arrived(); more > conns+1 || after != before {
				t.Errorf("%d bytes have reached the broker", after-before)
			}
		})
	}
	if _, err := stage.Ask(w.Dial(t, broker.Addr()), stage.Hello()); err != nil {
		t.Errorf("an honest connection afterwards: %v", err)
	}
}

func TestAnAPIThatIsHiddenIsRefusedInItsOwnFormat(t *testing.T) {
	broker := stage.StartBroker(t)
	n := start(t, broker.Addr(), nil)
	conn := n.Workload(stage.OrdersUID).Dial(t, broker.Addr())
	hidden := kmsg.NewPtrBeginQuorumEpochRequest()
	resp, err := stage.Ask(conn, hidden)
	answer, ok := resp.(*kmsg.BeginQuorumEpochResponse)
	if err != nil || !ok || answer.ErrorCode != kerr.UnsupportedVersion.Code {
		t.Errorf("the answer is %+v, %v", resp, err)
	}
	if _, err := stage.Ask(conn, stage.Hello()); err != nil {
		t.Errorf("the same connection afterwards: %v", err)
	}
	if got := n.Refused("unsupported_version"); got != 1 {
		t.Errorf("%d requests are counted as refused, not 1", got)
	}
	n.AwaitAudit(1, "it was refused", func(l stage.Line) bool {
		return l.API == "BeginQuorumEpoch" && l.Verdict == "deny"
	})
}

func TestAFrameCutAtAnyByteReachesNoBroker(t *testing.T) {
	broker := stage.StartBroker(t)
	n := start(t, broker.Addr(), nil)
	w := n.Workload(stage.OrdersUID)
	frame := stage.Frame(produce(oneRecord))
	for cut := range frame {
		conn := w.Dial(t, broker.Addr())
		if _, err := conn.Write(frame[:cut]); err != nil {
			t.Fatal(err)
		}
		end := conn.Close
		if cut%2 == 0 {
			end = conn.(*net.TCPConn).CloseWrite
		}
		if err := end(); err != nil {
			t.Fatal(err)
		}
		if answer, _ := stage.End(conn); len(answer) > 0 {
			t.Errorf("cut at %d of %d bytes, the client is told % x", cut, len(frame), answer)
		}
	}
	closed := func(l stage.Line) bool { return l.Event == "connection" && l.State == "closed" }
	n.AwaitAudit(len(frame), "connections have ended", closed)
	n.AwaitRefusals(len(frame)-1, "bad_frame")
	if _, bytes := broker.Arrived(); bytes > 0 || broker.Records("orders") > 0 {
		t.Errorf("%d bytes and %d records have reached the broker", bytes, broker.Records("orders"))
	}
	_, err := stage.Ask(w.Dial(t, broker.Addr()), produce(oneRecord))
	if got := broker.Records("orders"); err != nil || got != 1 {
		t.Errorf("the whole frame: %v, and %d records have reached the broker", err, got)
	}
}

// listenerOf is where a connection really goes to, which getpeername(2) does not tell but sock_diag(7) does.
func listenerOf(t *testing.T, conn net.Conn) string {
	t.Helper()
	all, err := netlink.SocketDiagTCP(netlink.FAMILY_V4)
	if err != nil {
		t.Fatal(err)
	}
	from := netip.MustParseAddrPort(conn.LocalAddr().String())
	for _, s := range all {
		if s.ID.Source.String() == from.Addr().String() && s.ID.SourcePort == from.Port() &&
			s.State == netlink.TCP_ESTABLISHED {
			return fmt.Sprintf("%s:%d", s.ID.Destination, s.ID.DestinationPort)
		}
	}
	t.Fatalf("no socket at %s", from)
	return ""
}

func TestTheListenerIsOutOfReach(t *testing.T) {
	broker := stage.StartBroker(t)
	n := start(t, broker.Addr(), nil)
	w := n.Workload(stage.OrdersUID)
	listener := listenerOf(t, w.Dial(t, broker.Addr()))
	if direct, err := w.DialContext(t.Context(), "tcp", listener); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("a connect to %s: %v, %v", listener, direct, err)
	}
	if got := n.Kernel("refused_direct"); got != 1 {
		t.Errorf("%d connects to the listener are counted as refused, not 1", got)
	}
	// From outside the cgroup no program sees the connect, and the listener finds no record.
	outside, err := net.Dial("tcp", listener)
	var got []byte
	if err == nil { // else the reset came first
		got, err = stage.End(outside)
		_ = outside.Close()
	}
	if !errors.Is(err, unix.ECONNRESET) || len(got) > 0 {
		t.Errorf("a connection from outside reads % x, %v", got, err)
	}
	if got := n.Kernel("accept_refused"); got != 1 {
		t.Errorf("%d connections without a record are counted, not 1", got)
	}
}

// storm is more than a second of a thousand connects each.
const (
	storm      = 3000
	stormWidth = 50 // at a time
)

func TestThousandsOfConnectsAreServedOrRefusedAndNoneIsLost(t *testing.T) {
	broker := stage.StartBroker(t)
	own := fmt.Sprintf("127.0.0.2:%d", broker.Port())
	n := start(t, broker.Addr(), nil)
	n.AwaitReady()
	honest, stranger := n.Workload(stage.OrdersUID), n.Workload(stage.StrangerUID)
	if _, err := stage.Ask(honest.Dial(t, broker.Addr()), stage.Hello()); err != nil {
		t.Fatal(err)
	}
	stage.Await(t, "the first connection", func() bool { return n.Open() == 1 })
	goroutines, heap := runtime.NumGoroutine(), heapInUse()

	// By turns: who may, who may not, who sends garbage, and who goes to a broker of its own.
	var outcomes [4]struct{ served, refused atomic.Int32 }
	attempts := make(chan int)
	var running sync.WaitGroup
	for range stormWidth {
		running.Go(func() {
			for i := range attempts {
				kind, w, to := i%4, honest, broker.Addr()
				switch kind {
				case 1:
					w = stranger
				case 3:
					to = own
				}
				if err := attempt(t, w, to, kind == 2); err == nil {
					outcomes[kind].served.Add(1)
				} else if errors.Is(err, unix.ECONNRESET) || errors.Is(err, io.EOF) {
					outcomes[kind].refused.Add(1)
				} else {
					t.Errorf("attempt %d: %v", i, err)
				}
			}
		})
	}
	for i := range storm {
		attempts <- i
	}
	close(attempts)
	running.Wait()

	for kind, want := range [4][2]int32{{storm / 4, 0}, {storm / 4, 0}, {0, storm / 4}, {0, storm / 4}} {
		if got := [2]int32{outcomes[kind].served.Load(), outcomes[kind].refused.Load()}; got != want {
			t.Errorf("of kind %d as many were served and refused: %v, want %v", kind, got, want)
		}
	}
	n.AwaitRefusals(storm/4, "bad_frame")
	n.AwaitRefusals(storm/4, "no_cluster")
	if redirected, handed := n.Kernel("redirected"), n.Kernel("handed_over"); redirected != storm+1 || handed != storm+1 {
		t.Errorf("the kernel has redirected %d and handed over %d, not %d", redirected, handed, storm+1)
	}
	opened := func(l stage.Line) bool { return l.Event == "connection" && l.State == "open" }
	n.AwaitAudit(storm*3/4+1, "connections were opened", opened)
	stage.Await(t, "the end of all connections but the first", func() bool { return n.Open() == 1 })
	const spare = 20 // of HTTP, and of the broker's
	stage.Await(t, "the end of their goroutines", func() bool { return runtime.NumGoroutine() <= goroutines+spare })
	if grown := heapInUse() - heap; grown > 64<<20 {
		t.Errorf("the heap has grown by %d MiB", grown>>20)
	}
}

// attempt connects once and tells how the other side took it.
func attempt(t *testing.T, w *stage.Workload, to string, garbage bool) error {
	conn, err := w.DialContext(t.Context(), "tcp", to)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	if !garbage {
		_, err = stage.Ask(conn, stage.Hello())
		return err
	}
	if _, err := conn.Write([]byte("\x7fnot Kafka at all")); err != nil {
		return err
	}
	if got, err := stage.End(conn); err != nil || len(got) > 0 {
		return err
	}
	return io.EOF
}

func heapInUse() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapInuse)
}

func TestManyLargeFramesStayWithinTheMemoryLimit(t *testing.T) {
	const (
		attackers = 200
		limit     = 64 << 20 // half of it for requests
		each      = 8 << 20
		slack     = 64 << 20
	)
	broker := stage.StartBroker(t)
	n := start(t, broker.Addr(), stage.Config{"limits": fmt.Sprintf("{max-frame: %d, memory: %d}", 15<<20, limit)})
	w := n.Workload(stage.OrdersUID)
	before := heapInUse()
	announce := request(produce(oneRecord), func(frame []byte) {
		binary.BigEndian.PutUint32(frame[sizeAt:], each)
	})
	conns := make([]net.Conn, attackers)
	for i := range conns {
		conns[i] = w.Dial(t, broker.Addr())
		if _, err := conns[i].Write(announce); err != nil {
			t.Fatal(err)
		}
	}
	stage.Await(t, "all attackers", func() bool { return n.Open() == attackers })

	// One byte at a time, while an honest client goes on.
	honest := n.Workload(stage.OrdersUID).Dial(t, broker.Addr())
	for i := range conns {
		_, _ = conns[i].Write([]byte{0}) // it may have been refused by now
		if _, err := stage.Ask(honest, produce(oneRecord)); err != nil {
			t.Fatalf("the honest client: %v", err)
		}
		if grown := heapInUse() - before; grown > limit+slack {
			t.Fatalf("the heap has grown by %d MiB, the limit is %d", grown>>20, limit>>20)
		}
	}
	if got := broker.Records("orders"); got != attackers {
		t.Errorf("%d records of the honest client have arrived, not %d", got, attackers)
	}
	for _, conn := range conns {
		_ = conn.Close()
	}
	stage.Await(t, "the end of the attackers", func() bool { return n.Open() == 1 })

	// Their memory is free again: a frame as large as theirs, that does come, reaches the broker and is answered.
	_, arrived := broker.Arrived()
	if _, err := stage.Ask(w.Dial(t, broker.Addr()), produce(make([]byte, each))); err != nil {
		t.Errorf("a large frame afterwards: %v", err)
	}
	if _, now := broker.Arrived(); now < arrived+each {
		t.Errorf("only %d bytes of it have reached the broker", now-arrived)
	}
}
