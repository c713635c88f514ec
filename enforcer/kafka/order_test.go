package kafka

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/kafka/authz"
	"klamm/enforcer/kafka/records"
	"klamm/enforcer/kafka/wire"
)

// question is a request of the order test. Its number is in what it asks, and comes back in the answer.
type question struct {
	number int
	req    kmsg.Request
	check  func(kmsg.Response) error // nil: no answer is due
	sent   bool                      // something of it goes to the broker
	closes bool                      // the connection ends with it
}

func (q *question) correlation() int32 { return int32(q.number * 3) }

// topics to ask for: some may be used, some not, and of one the cluster has never heard.
var (
	allowedTopics = []string{"orders", "orders.b", "orders.c"}
	deniedTopics  = []string{"secret", "secret.b"}
)

const unknownTopic = "unknown"

// someTopics is a random choice, in random order, without repetition.
func someTopics(r *rand.Rand, byID bool) []string {
	all := append(slices.Clone(allowedTopics), deniedTopics...)
	if byID {
		all = append(all, unknownTopic)
	}
	r.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	return all[:1+r.IntN(len(all))]
}

func anyAllowed(topics []string) bool {
	return slices.ContainsFunc(topics, func(name string) bool { return strings.HasPrefix(name, "orders") })
}

// verdict is the error code that a topic is answered with.
func verdict(name string) int16 {
	switch {
	case name == unknownTopic:
		return kerr.UnknownTopicID.Code
	case slices.Contains(deniedTopics, name):
		return kerr.TopicAuthorizationFailed.Code
	}
	return 0
}

// numberOf reads the number out of a record batch of the order test.
func numberOf(recordBatch []byte) int {
	digits, _, _ := strings.Cut(string(recordBatch[min(len(recordBatch), records.HeaderLen):]), " ")
	n, err := strconv.Atoi(digits)
	if err != nil {
		return -1
	}
	return n
}

func numberedBatch(r *rand.Rand, n int) []byte {
	return batch(fmt.Appendf(nil, "%d %s", n, make([]byte, r.IntN(2000))))
}

// answered checks that every topic asked for is answered once, as it should be.
func answered(asked []string, got map[string]error) error {
	var errs []error
	for _, name := range asked {
		err, ok := got[name]
		if !ok {
			err = errors.New("no answer")
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("topic %s: %w", name, err))
		}
		delete(got, name)
	}
	for name := range got {
		errs = append(errs, fmt.Errorf("topic %s: not asked for, or answered twice", name))
	}
	return errors.Join(errs...)
}

// outcome checks one topic of an answer: allowed ones have the number, the others an error and no number.
func outcome(name string, code int16, number, want int) error {
	switch {
	case code != verdict(name):
		return fmt.Errorf("error code %d, not %d", code, verdict(name))
	case code == 0 && number != want:
		return fmt.Errorf("the answer is to question %d, not %d", number, want)
	case code != 0 && number >= 0:
		return fmt.Errorf("refused, and the answer to question %d", number)
	}
	return nil
}

// nameOf tells a topic by what an answer names it.
func nameOf(name string, id authz.TopicID) string {
	if id == (authz.TopicID{}) {
		return name
	}
	for _, n := range append(append(slices.Clone(allowedTopics), deniedTopics...), unknownTopic) {
		if topicID(n) == id {
			return n
		}
	}
	return "of no known id"
}

func askProduce(r *rand.Rand, n int) question {
	version := []int16{3, 8, 9, 12, 13}[r.IntN(5)]
	topics := someTopics(r, version >= 13)
	acks := []int16{-1, 1}[r.IntN(2)]
	if r.IntN(4) == 0 {
		acks, topics = 0, allowedTopics[:1+r.IntN(2)]
	}
	req := produceRequest(version, acks, nil, topics...)
	for i := range req.Topics {
		req.Topics[i].TopicID = topicID(topics[i])
		req.Topics[i].Partitions[0].Records = numberedBatch(r, n)
	}
	q := question{number: n, req: req, sent: anyAllowed(topics)}
	if acks == 0 {
		return q
	}
	q.check = func(resp kmsg.Response) error {
		got := map[string]error{}
		for _, t := range resp.(*kmsg.ProduceResponse).Topics {
			for _, p := range t.Partitions {
				name := nameOf(t.Topic, t.TopicID)
				got[name] = outcome(name, p.ErrorCode, int(p.BaseOffset), n)
			}
		}
		return answered(topics, got)
	}
	return q
}

// askInVain is a produce without acks of which something is refused: there is no answer to tell it by.
func askInVain(r *rand.Rand, n int) question {
	topics := [][]string{{"secret"}, {"orders", "secret"}}[r.IntN(2)]
	req := produceRequest(9, 0, nil, topics...)
	req.Topics[0].Partitions[0].Records = numberedBatch(r, n)
	return question{number: n, req: req, sent: anyAllowed(topics), closes: true}
}

func askFetch(r *rand.Rand, n int) question {
	version := []int16{4, 11, 12, 13, 17}[r.IntN(5)]
	topics := someTopics(r, version >= 13)
	req := fetchRequest(version, 0, -1, topics...)
	for i := range req.Topics {
		req.Topics[i].Partitions[0].FetchOffset = int64(n)
	}
	return question{number: n, req: req, sent: anyAllowed(topics), check: func(resp kmsg.Response) error {
		got := map[string]error{}
		for _, t := range resp.(*kmsg.FetchResponse).Topics {
			for _, p := range t.Partitions {
				name, number := nameOf(t.Topic, t.TopicID), -1
				if len(p.RecordBatches) > 0 {
					number = numberOf(p.RecordBatches)
				}
				got[name] = outcome(name, p.ErrorCode, number, n)
			}
		}
		return answered(topics, got)
	}}
}

func askMetadata(r *rand.Rand, n int) question {
	topics := someTopics(r, false)
	req := kmsg.NewPtrMetadataRequest()
	req.Version = 12
	for i := range topics {
		t := kmsg.NewMetadataRequestTopic()
		t.Topic = &topics[i]
		req.Topics = append(req.Topics, t)
	}
	// It is sent in any case: the answer also tells of the brokers.
	return question{number: n, req: req, sent: true, check: func(resp kmsg.Response) error {
		got := map[string]error{}
		for _, t := range resp.(*kmsg.MetadataResponse).Topics {
			got[*t.Topic] = outcome(*t.Topic, t.ErrorCode, len(t.Partitions)-1, 0)
		}
		return answered(topics, got)
	}}
}

func askHeartbeat(r *rand.Rand, n int) question {
	req := kmsg.NewPtrHeartbeatRequest()
	req.Version, req.Group, req.Generation = 4, "orders", int32(n)
	denied := r.IntN(3) == 0
	if denied {
		req.Group = "secret"
	}
	return question{number: n, req: req, sent: !denied, check: func(resp kmsg.Response) error {
		switch h := resp.(*kmsg.HeartbeatResponse); {
		case denied && (h.ErrorCode != kerr.GroupAuthorizationFailed.Code || h.ThrottleMillis != 0):
			return fmt.Errorf("a refused heartbeat is answered with %+v", h)
		case !denied && (h.ErrorCode != 0 || h.ThrottleMillis != int32(n)):
			return fmt.Errorf("heartbeat %d is answered with %+v", n, h)
		}
		return nil
	}}
}

// askVersions is what a client asks that is newer than anybody (KIP-511).
func askVersions(_ *rand.Rand, n int) question {
	req := kmsg.NewPtrApiVersionsRequest()
	req.Version, req.ClientSoftwareName, req.ClientSoftwareVersion = 99, "test", "1"
	return question{number: n, req: req, check: func(resp kmsg.Response) error {
		if v := resp.(*kmsg.ApiVersionsResponse); v.ErrorCode != kerr.UnsupportedVersion.Code || len(v.ApiKeys) != 1 {
			return fmt.Errorf("answered with %+v", v)
		}
		return nil
	}}
}

// questions are what a client asks on one connection.
func questions(r *rand.Rand) (all []question) {
	kinds := []func(*rand.Rand, int) question{askProduce, askProduce, askFetch, askMetadata, askHeartbeat, askVersions}
	for n := range 1 + r.IntN(600) { // more than may be in flight
		all = append(all, kinds[r.IntN(len(kinds))](r, n))
	}
	if r.IntN(3) == 0 {
		all = append(all, askInVain(r, len(all)))
	}
	return all
}

// answerOf is what a broker answers, and the number of the question; nil where no answer is due.
func answerOf(r *rand.Rand, req kmsg.Request) (kmsg.Response, int) {
	number := -1
	switch req := req.(type) {
	case *kmsg.ProduceRequest:
		number = numberOf(req.Topics[0].Partitions[0].Records)
		if req.Acks == 0 {
			return nil, number
		}
		return produceAnswer(req, int64(number)), number
	case *kmsg.FetchRequest:
		number = int(req.Topics[0].Partitions[0].FetchOffset)
		all := fetchAnswer(req.Version, "", nil)
		all.Topics = nil
		for _, t := range req.Topics {
			one := fetchAnswer(req.Version, t.Topic, numberedBatch(r, number)).Topics[0]
			one.TopicID = t.TopicID
			all.Topics = append(all.Topics, one)
		}
		return all, number
	case *kmsg.MetadataRequest:
		resp := req.ResponseKind().(*kmsg.MetadataResponse)
		for _, t := range req.Topics {
			rt := kmsg.NewMetadataResponseTopic()
			rt.Topic, rt.TopicID = t.Topic, topicID(*t.Topic)
			rt.Partitions = append(rt.Partitions, kmsg.NewMetadataResponseTopicPartition())
			resp.Topics = append(resp.Topics, rt)
		}
		return resp, number
	case *kmsg.HeartbeatRequest:
		resp := req.ResponseKind().(*kmsg.HeartbeatResponse)
		resp.ThrottleMillis = req.Generation
		return resp, int(req.Generation)
	}
	return req.ResponseKind(), number
}

// playBroker answers in order, in pieces, with pauses, until the requests end. It tells how many came, and fails where
// one came out of order.
func playBroker(conn net.Conn, r *rand.Rand, pause func()) (got int, err error) {
	answers := make(chan []byte, 1<<10)
	wrote := make(chan error, 1)
	go func(r *rand.Rand) {
		var err error
		for b := range answers {
			for len(b) > 0 && err == nil {
				pause()
				n := 1 + r.IntN(len(b))
				_, err = conn.Write(b[:n])
				b = b[n:]
			}
		}
		wrote <- err
	}(rand.New(rand.NewPCG(r.Uint64(), 0)))
	defer func() {
		close(answers)
		err = errors.Join(err, <-wrote)
	}()
	last := -1
	for in := bufio.NewReader(conn); ; got++ {
		b, err := (&peer{in: in}).frame()
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
		req := kmsg.RequestForKey(h.Key)
		req.SetVersion(h.Version)
		if err := req.ReadFrom(b[h.Len:]); err != nil {
			return got, err
		}
		resp, number := answerOf(r, req)
		if number >= 0 && number <= last {
			return got, fmt.Errorf("question %d came after %d", number, last)
		}
		last = max(last, number)
		if resp != nil {
			answers <- wire.AppendResponse(nil, h.Correlation, resp)
		}
	}
}

// playClient asks everything, with at most so many answers outstanding, and checks the answers.
func playClient(conn net.Conn, r *rand.Rand, all []question, depth int, pause func()) error {
	open := make(chan struct{}, depth)
	sent := make(chan error, 1)
	var writer sync.WaitGroup
	writer.Go(func() {
		var stream []byte
		for i := range all {
			if all[i].check != nil {
				select {
				case open <- struct{}{}:
				default: // ask for what is outstanding
					if _, err := conn.Write(stream); err != nil {
						sent <- err
						return
					}
					stream = nil
					open <- struct{}{}
				}
			}
			stream = append(stream, requestFrame(all[i].correlation(), all[i].req)...)
			if n := r.IntN(len(stream) + 1); r.IntN(3) == 0 {
				pause()
				if _, err := conn.Write(stream[:n]); err != nil {
					sent <- err
					return
				}
				stream = stream[n:]
			}
		}
		_, err := conn.Write(stream)
		sent <- err
	})
	in := &peer{in: bufio.NewReader(conn)}
	for i := range all {
		q := &all[i]
		if q.check == nil {
			continue
		}
		b, err := in.frame()
		if err != nil {
			return fmt.Errorf("where the answer to question %d was due: %w", q.number, err)
		}
		<-open
		if got := int32(binary.BigEndian.Uint32(b)); got != q.correlation() {
			return fmt.Errorf("correlation id %d came where %d was due", got, q.correlation())
		}
		resp := q.req.ResponseKind()
		if q.req.Key() == int16(kmsg.ApiVersions) {
			resp.SetVersion(0)
		}
		if err := resp.ReadFrom(b[wire.ResponseHeaderLen(resp.Key(), resp.GetVersion())-wire.SizePrefix:]); err != nil {
			return fmt.Errorf("the answer to question %d: %w", q.number, err)
		}
		if err := q.check(resp); err != nil {
			return fmt.Errorf("question %d, %T v%d: %w", q.number, q.req, q.req.GetVersion(), err)
		}
	}
	if err := <-sent; err != nil {
		return err
	}
	if all[len(all)-1].closes {
		if b, err := in.frame(); err == nil {
			return fmt.Errorf("%d bytes came after the end", len(b))
		}
		return nil
	}
	if half, ok := conn.(interface{ CloseWrite() error }); ok {
		if err := half.CloseWrite(); err != nil {
			return err
		}
		if b, err := in.frame(); !errors.Is(err, io.EOF) {
			return fmt.Errorf("after the last answer came %d bytes, not the end: %w", len(b), err)
		}
	}
	return nil
}

// playOrder plays one connection by its seed, over connections that are given as both their ends.
func playOrder(t *testing.T, seed uint64, client, served, dialled, broker net.Conn, pause func(*rand.Rand)) {
	t.Helper()
	random := func(stream uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, stream)) }
	r := random(0)
	rig := newRig(t, ordersOnly)
	var turn sync.Mutex // either loop may look up
	lookups := random(5)
	rig.cluster.resolve = func(ids []authz.TopicID) {
		turn.Lock()
		defer turn.Unlock()
		pause(lookups)
		for _, name := range append(slices.Clone(allowedTopics), deniedTopics...) {
			if slices.Contains(ids, topicID(name)) {
				rig.cluster.learn(name)
			}
		}
	}
	all, depth := questions(r), 1+r.IntN(1<<r.IntN(10))
	ended, played := make(chan error, 1), make(chan error, 1)
	conn := rig.conn(served, dialled)
	go func() { ended <- Serve(context.Background(), rig.shared, conn) }()
	var got int
	go func() {
		r := random(1)
		var err error
		got, err = playBroker(broker, random(2), func() { pause(r) })
		played <- errors.Join(err, broker.Close())
	}()
	clients := random(3)
	if err := playClient(client, random(4), all, depth, func() { pause(clients) }); err != nil {
		t.Errorf("%d questions, %d at a time: %v", len(all), depth, err)
	}
	if err := client.Close(); err != nil {
		t.Error(err)
	}
	err := end(t, ended)
	var refusal *Error
	if closes := all[len(all)-1].closes; closes != errors.As(err, &refusal) {
		t.Errorf("the session ended with %v", err)
	}
	if err := <-played; err != nil {
		t.Errorf("the broker: %v", err)
	}
	want := 0
	for _, q := range all {
		if q.sent {
			want++
		}
	}
	if got != want {
		t.Errorf("%d requests reached the broker, not %d", got, want)
	}
	if lines := rig.log.find(t, func(l auditLine) bool { return l.Outcome == "unknown" }); len(lines) > 0 {
		t.Errorf("the audit does not know the outcome of %d requests", len(lines))
	}
	rig.wantNothingHeld(t)
}

// wantNothingHeld fails unless a rig whose sessions have ended is as it was before them.
func (r *rig) wantNothingHeld(t testing.TB) {
	t.Helper()
	for name, b := range map[string]*wire.Budget{"requests": r.shared.Requests, "answers": r.shared.Answers,
		"decoded": r.shared.Decoded, "kept": r.shared.Kept} {
		if n := b.Held(); n != 0 {
			t.Errorf("%d bytes are held for %s", n, name)
		}
	}
	if n := testutil.ToFloat64(r.shared.Metrics.open); n != 0 {
		t.Errorf("%v sessions are counted as open", n)
	}
	if n := len(r.shared.sessions.all()); n != 0 {
		t.Errorf("%d sessions are open", n)
	}
}

func TestAnswersComeInTheOrderOfTheRequests(t *testing.T) {
	for range 30 {
		seed := rand.Uint64()
		t.Run(fmt.Sprintf("seed %#x", seed), func(t *testing.T) {
			client, served := loopback(t)
			dialled, broker := loopback(t)
			playOrder(t, seed, client, served, dialled, broker, func(*rand.Rand) {})
		})
	}
}

// The same with a broker and look-ups that take their time, up to some seconds each, which here pass at once.
func TestAnswersComeInOrderHoweverLongTheyTake(t *testing.T) {
	for range 30 {
		seed := rand.Uint64()
		t.Run(fmt.Sprintf("seed %#x", seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				client, served := net.Pipe()
				dialled, broker := net.Pipe()
				playOrder(t, seed, client, served, dialled, broker, func(r *rand.Rand) {
					if r.IntN(4) == 0 {
						time.Sleep(time.Duration(r.Int64N(int64(4 * time.Second))))
					}
				})
			})
		})
	}
}
