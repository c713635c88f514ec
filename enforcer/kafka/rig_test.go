package kafka

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/audit"
	"klamm/enforcer/kafka/authz"
	"klamm/enforcer/kafka/records"
	"klamm/enforcer/kafka/wire"
	"klamm/enforcer/policy"
	"klamm/spiffe"
)

// ordersOnly lets everyone use the topics whose names begin with "orders", and nothing else but to look at the cluster.
const ordersOnly = `apiVersion: klamm/v1
rules:
  - name: orders only
    principals: ["spiffe://example.test/orders"]
    allow:
      - {topic: "orders*", operations: [Read, Write, Describe]}
      - {group: "orders*", operations: [Read]}
      - {transactional-id: "orders*", operations: [Write]}
      - {cluster: kafka-cluster, operations: [IdempotentWrite]}
`

// everything also allows the topics that ordersOnly does not.
const everything = ordersOnly + `  - name: the rest as well
    principals: ["spiffe://example.test/orders"]
    allow:
      - {topic: "*", operations: [Read, Write, Describe]}
`

func parsePolicy(t testing.TB, text string) *policy.Policy {
	t.Helper()
	set, err := policy.Parse("policy.yaml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return policy.New(set)
}

// rig is what sessions need, and what they leave behind.
type rig struct {
	shared  *Shared
	cluster *knownTopics
	log     *auditLines
	audit   *audit.Log
	who     *workload // behind the connections
	login   Login     // of the node; nil: none
	// asWorkload: the broker knows the connection by the workload's certificate.
	asWorkload bool
}

func newRig(t testing.TB, rules string) *rig {
	t.Helper()
	const budget = 64 << 20
	current := new(atomic.Pointer[policy.Policy])
	current.Store(parsePolicy(t, rules))
	r := &rig{
		shared: &Shared{
			Policy:   current,
			Requests: wire.NewBudget(budget),
			Answers:  wire.NewBudget(budget),
			Decoded:  wire.NewBudget(budget),
			Kept:     wire.NewBudget(budget),
			MaxFrame: 16 << 20,
			Metrics:  NewMetrics(prometheus.NewRegistry()),
		},
		cluster: &knownTopics{names: map[authz.TopicID]string{}},
		log:     new(auditLines),
		who:     newWorkload(identified("spiffe://example.test/orders")),
	}
	r.audit = audit.New(r.log, "node-1")
	return r
}

func (r *rig) conn(client, broker net.Conn) *Conn {
	return &Conn{Client: client, Broker: broker, Cluster: r.cluster, Workload: r.who, Login: r.login,
		AsWorkload: r.asWorkload, Policy: policy.Subject{Cluster: "main"}, Audit: r.audit,
		Subject: audit.Subject{Connection: "1", Cluster: "main", Identity: *r.who.Identity()}}
}

// workload is a process whose identity the test changes.
type workload struct {
	now      atomic.Pointer[spiffe.Identity]
	mu       sync.Mutex
	watchers map[*func()]struct{}
}

func newWorkload(id *spiffe.Identity) *workload {
	w := &workload{watchers: map[*func()]struct{}{}}
	w.now.Store(id)
	return w
}

func (w *workload) Identity() *spiffe.Identity { return w.now.Load() }

func (w *workload) Watch(changed func()) func() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.watchers[&changed] = struct{}{}
	return func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		delete(w.watchers, &changed)
	}
}

// become changes the identity, quietly or so that the watchers hear of it.
func (w *workload) become(id *spiffe.Identity, quietly bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.now.Store(id)
	for changed := range w.watchers {
		if !quietly {
			(*changed)()
		}
	}
}

// identified is who SPIRE knows as id; "" is nobody.
func identified(id string) *spiffe.Identity {
	if id == "" {
		return &spiffe.Identity{}
	}
	known := spiffeid.RequireFromString(id)
	return &spiffe.Identity{ID: known, Source: spiffe.SourceSPIRE,
		Evidence: []spiffe.Evidence{{Source: spiffe.SourceSPIRE, ID: known, Expires: time.Now().Add(time.Hour)}}}
}

// serve runs a session from a new client to the broker at addr. Its end is in the channel.
func (r *rig) serve(t testing.TB, addr string) (*peer, <-chan error) {
	t.Helper()
	broker := dialTCP(t, addr)
	client, served := loopback(t)
	conn, ended := r.conn(served, broker), make(chan error, 1)
	go func() { ended <- Serve(context.Background(), r.shared, conn) }()
	return newPeer(t, client), ended
}

// serveScripted is serve with a broker that the test plays itself.
func (r *rig) serveScripted(t testing.TB) (client, broker *peer, ended <-chan error) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	client, ended = r.serve(t, l.Addr().String())
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return client, newPeer(t, conn), ended
}

func dialTCP(t testing.TB, addr string) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// loopback is a TCP connection, both ends of it.
func loopback(t testing.TB) (dialled, accepted net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	dialled = dialTCP(t, l.Addr().String())
	if accepted, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	return dialled, accepted
}

// knownTopics is a cluster whose topic ids are those it was told of.
type knownTopics struct {
	knownGroups
	mu      sync.Mutex
	names   map[authz.TopicID]string
	resolve func([]authz.TopicID) // looks ids up; nil: finds none
}

func (k *knownTopics) ID(string) (authz.TopicID, bool) { return authz.TopicID{}, false }

func (k *knownTopics) Name(id authz.TopicID) (string, bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	name, ok := k.names[id]
	return name, ok
}

func (k *knownTopics) Resolve(_ context.Context, ids []authz.TopicID) error {
	if k.resolve != nil {
		k.resolve(ids)
	}
	return nil
}

func (k *knownTopics) learn(name string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.names[topicID(name)] = name
}

func (k *knownTopics) Learn(m *kmsg.MetadataResponse) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, t := range m.Topics {
		if t.Topic != nil {
			k.names[t.TopicID] = *t.Topic
		}
	}
}

// peer is one end of a connection that speaks Kafka.
type peer struct {
	net.Conn
	t  testing.TB
	in *bufio.Reader
}

func newPeer(t testing.TB, c net.Conn) *peer {
	t.Helper()
	t.Cleanup(func() { _ = c.Close() })
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return &peer{c, t, bufio.NewReader(c)}
}

// write fails the test from the test's own goroutine only; others look at the error.
func (p *peer) write(b []byte) {
	p.t.Helper()
	if _, err := p.Write(b); err != nil {
		p.t.Fatal(err)
	}
}

func (p *peer) closeWrite() {
	p.t.Helper()
	if err := p.Conn.(*net.TCPConn).CloseWrite(); err != nil {
		p.t.Fatal(err)
	}
}

// frame reads one frame, without its size. io.EOF is the end between two frames.
func (p *peer) frame() ([]byte, error) {
	var size [4]byte
	if _, err := io.ReadFull(p.in, size[:]); err != nil {
		return nil, err
	}
	b := make([]byte, binary.BigEndian.Uint32(size[:]))
	_, err := io.ReadFull(p.in, b)
	return b, err
}

func (p *peer) mustFrame() []byte {
	p.t.Helper()
	b, err := p.frame()
	if err != nil {
		p.t.Fatalf("reading a frame: %v", err)
	}
	return b
}

// request reads a request on the broker's side.
func (p *peer) request() (wire.Header, kmsg.Request) {
	p.t.Helper()
	b := p.mustFrame()
	h, err := wire.ParseHeader(b)
	if err != nil {
		p.t.Fatal(err)
	}
	req := kmsg.RequestForKey(h.Key)
	req.SetVersion(h.Version)
	if err := req.ReadFrom(b[h.Len:]); err != nil {
		p.t.Fatal(err)
	}
	return h, req
}

// answer sends what a broker would answer.
func (p *peer) answer(h wire.Header, resp kmsg.Response) {
	p.t.Helper()
	p.write(wire.AppendResponse(nil, h.Correlation, resp))
}

// ask sends a request and reads its answer, on the client's side.
func (p *peer) ask(correlation int32, req kmsg.Request) kmsg.Response {
	p.t.Helper()
	p.write(requestFrame(correlation, req))
	return p.response(correlation, req)
}

func (p *peer) response(correlation int32, req kmsg.Request) kmsg.Response {
	p.t.Helper()
	b := p.mustFrame()
	if got := int32(binary.BigEndian.Uint32(b)); got != correlation {
		p.t.Fatalf("the answer is to request %d, not to %d", got, correlation)
	}
	resp := req.ResponseKind()
	if err := resp.ReadFrom(b[wire.ResponseHeaderLen(req.Key(), req.GetVersion())-wire.SizePrefix:]); err != nil {
		p.t.Fatal(err)
	}
	return resp
}

// drain reads until the end and tells how many bytes came.
func (p *peer) drain() int64 {
	n, _ := io.Copy(io.Discard, p.in) // a reset is an end as well
	return n
}

var formatter = kmsg.NewRequestFormatter(kmsg.FormatterClientID("test"))

func requestFrame(correlation int32, req kmsg.Request) []byte {
	return formatter.AppendRequest(nil, req, correlation)
}

// auditLines keeps audit lines.
type auditLines struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (a *auditLines) Write(b []byte) (int, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.text.Write(b)
}

func newTrail(lines *auditLines) *audit.Trail {
	return audit.New(lines, "node-1").Trail(audit.Subject{})
}

type auditLine struct {
	Event, Verdict, Reason, Error, API, Topic, Outcome, Rule string
	Change, From, To, Source, Why, Hint, Principal           string
	SPIFFE                                                   string `json:"spiffe_id"`
	Mechanism                                                string `json:"sasl_mechanism"`
	Partition, Count                                         int32
	Batches                                                  []struct {
		BaseOffset int64 `json:"base_offset"`
		LastOffset int64 `json:"last_offset"`
		Bytes      int
		SHA256     string
	}
	Resources []struct{ Type, Name, Operation, Verdict string }
	Acquired  []struct {
		First      int64 `json:"first_offset"`
		Last       int64 `json:"last_offset"`
		Deliveries int16
	}
	AcksFrom                     int64 `json:"acknowledges_from"`
	AcksTo                       int64 `json:"acknowledges_to"`
	Accepted, Released, Rejected int64
}

func (a *auditLines) lines(t testing.TB) []auditLine {
	t.Helper()
	a.mu.Lock()
	defer a.mu.Unlock()
	var all []auditLine
	for text := range bytes.Lines(a.text.Bytes()) {
		var l auditLine
		if err := json.Unmarshal(text, &l); err != nil {
			t.Fatalf("an audit line is no JSON: %v\n%s", err, text)
		}
		all = append(all, l)
	}
	return all
}

// find returns the lines that match.
func (a *auditLines) find(t testing.TB, match func(auditLine) bool) []auditLine {
	t.Helper()
	return slices.DeleteFunc(a.lines(t), func(l auditLine) bool { return !match(l) })
}

// wantRefusal fails unless the session was refused for one reason, and that is on record.
func (r *rig) wantRefusal(t testing.TB, ended <-chan error, reason audit.Reason) {
	t.Helper()
	var refusal *Error
	if err := end(t, ended); !errors.As(err, &refusal) || refusal.Reason != reason {
		t.Errorf("the session ended with %v, not refused as %q", err, reason)
	}
	lines := r.log.find(t, func(l auditLine) bool { return l.Event == "refusal" })
	if len(lines) != 1 || lines[0].Reason != string(reason) || lines[0].Verdict != "deny" {
		t.Errorf("the audit has the refusals %+v, not one as %q", lines, reason)
	}
}

// refused is how often a reason was counted.
func (r *rig) refused(t testing.TB, reason audit.Reason) float64 {
	t.Helper()
	return testutil.ToFloat64(r.shared.Metrics.refused[reason])
}

// patience bounds every wait, so that a failure ends in a message.
const patience = 30 * time.Second

// end waits for the end of a session.
func end(t testing.TB, ended <-chan error) error {
	t.Helper()
	select {
	case err := <-ended:
		return err
	case <-time.After(patience):
		t.Fatal("the session does not end")
		return nil
	}
}

// logEnd is end for a session that may end in more than one way.
func logEnd(t testing.TB, ended <-chan error) {
	t.Helper()
	if err := end(t, ended); err != nil {
		t.Logf("the session ended: %v", err)
	}
}

// batch is a record batch of magic 2 whose records are any bytes: nobody on the way reads them.
func batch(payload []byte) []byte {
	b := make([]byte, records.HeaderLen, records.HeaderLen+len(payload))
	b = append(b, payload...)
	binary.BigEndian.PutUint32(b[8:], uint32(len(b)-12))
	b[records.MagicAt] = 2
	binary.BigEndian.PutUint64(b[43:], ^uint64(0)) // producer id -1
	binary.BigEndian.PutUint32(b[57:], 1)
	return b
}

func produceRequest(version, acks int16, payload []byte, topics ...string) *kmsg.ProduceRequest {
	req := kmsg.NewPtrProduceRequest()
	req.Version, req.Acks, req.TimeoutMillis = version, acks, 1000
	for _, name := range topics {
		t := kmsg.NewProduceRequestTopic()
		t.Topic = name
		p := kmsg.NewProduceRequestTopicPartition()
		p.Records = batch(payload)
		t.Partitions = append(t.Partitions, p)
		req.Topics = append(req.Topics, t)
	}
	return req
}

// produceAnswer acknowledges everything at offset.
func produceAnswer(req *kmsg.ProduceRequest, offset int64) *kmsg.ProduceResponse {
	resp := req.ResponseKind().(*kmsg.ProduceResponse)
	for _, t := range req.Topics {
		rt := kmsg.NewProduceResponseTopic()
		rt.Topic, rt.TopicID = t.Topic, t.TopicID
		for _, p := range t.Partitions {
			rp := kmsg.NewProduceResponseTopicPartition()
			rp.Partition, rp.BaseOffset = p.Partition, offset
			rt.Partitions = append(rt.Partitions, rp)
		}
		resp.Topics = append(resp.Topics, rt)
	}
	return resp
}

// responseFrame is an answer with header v1 and any body.
func responseFrame(correlation int32, body []byte) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(4+1+len(body)))
	b = append(binary.BigEndian.AppendUint32(b, uint32(correlation)), 0)
	return append(b, body...)
}

func newCluster(t testing.TB, topics ...string) *kfake.Cluster {
	t.Helper()
	c, err := kfake.NewCluster(kfake.NumBrokers(1), kfake.SeedTopics(1, topics...))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func isOperation(api string) func(auditLine) bool {
	return func(l auditLine) bool { return l.Event == "operation" && strings.EqualFold(l.API, api) }
}
