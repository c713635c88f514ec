package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
	"github.com/twmb/franz-go/pkg/sasl/oauth"

	"klamm/test/host"
	"klamm/test/kafka"
)

// rotating is the life of all SVIDs, X.509 and JWT, in the suite rotation.
const rotating = time.Minute

// rotation keeps up a load by each way in which identity is shown while everything that proves it is replaced again and
// again. No request may fail, and no connection may end that is in use.
func rotation(ctx context.Context, tell tell) {
	lasts, err := rotationLasts()
	if err != nil {
		tell("it starts", "", err)
		return
	}
	p, err := newRotation(ctx)
	if err != nil {
		tell("it starts", "", err)
		return
	}
	tell = p.noting(tell)
	defer func() { tell("it leaves nothing behind", "", p.close()) }()
	loads := []struct {
		name string
		load load
		p    *host.Process
	}{
		{name: "the workload's X509-SVID is shown to the broker",
			load: load{client: client{Broker: p.cluster.TLSAddrs()[0]}}},
		{name: "the node logs in with the workload's JWT-SVID",
			load: load{client: client{Broker: p.cluster.SASLTLSAddrs()[0]}}},
		{name: "the client logs in with its own JWT-SVID", load: load{client: client{Broker: p.cluster.SASLAddrs()[0]},
			WorkloadAPI: p.spire.WorkloadAPI()}},
	}
	for i := range loads {
		l := &loads[i]
		l.load.Topic = "orders"
		l.load.Partition = int32(i)
		if l.p, err = p.startLoad(ordersUID, l.load); err != nil {
			tell("a load starts", "", err)
			return
		}
	}
	select {
	case <-time.After(lasts):
	case <-ctx.Done():
	}
	for _, l := range loads {
		measured, err := l.load.judge(l.p, lasts)
		tell(l.name, measured, err)
	}
	n, err := p.node.metric(`klamm_identity_events_total{event="evidence_changed"}`)
	if want := int(lasts / rotating); err == nil && n < want {
		err = fmt.Errorf("%d changes of evidence in %v, want at least %d: it does not measure", n, lasts, want)
	}
	tell("SVIDs were replaced meanwhile", fmt.Sprintf("%d times as the node counts", n), err)
}

func rotationLasts() (time.Duration, error) {
	if text := os.Getenv("KLAMM_ROTATION"); text != "" {
		return time.ParseDuration(text)
	}
	return 10 * time.Minute, nil
}

func newRotation(ctx context.Context) (p provingWorld, err error) {
	brief := named(ordersUID, ordersID, "orders.shop")
	brief.X509TTL, brief.JWTTTL = rotating, rotating
	p.attested, err = newAttested(ctx, "rotation", kafka.Options{
		TLS:        &kafka.TLS{ClientAuth: "required", Mapping: mapping},
		OAuth:      &kafka.OAuth{Audience: svidAudience},
		MaxReauth:  rotating,
		SuperUsers: []string{"User:klamm", "User:orders.shop", "User:" + ordersID},
	}, brief)
	if err != nil {
		return p, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.close())
		}
	}()
	p.other = p.cluster
	more, err := p.sections()
	if err != nil {
		return p, err
	}
	// The clusters held and open have the same broker as sasl here.
	more["clusters"], _, _ = strings.Cut(more["clusters"], "\n  - name: held")
	more["oidc"] = fmt.Sprintf("[{trust-domain: example.test, audiences: [%s]}]", svidAudience)
	p.node, err = p.newNode(ctx, "rotation", []int{kafka.TLSPort, kafka.SASLTLSPort, kafka.SASLPort}, identified, more)
	if err == nil {
		err = p.node.ready(ctx)
	}
	if err != nil {
		return p, err
	}
	return p, until(ctx, "the agent to know the entry", waitLimit, func() (bool, error) {
		return p.runClient(ordersUID, client{Broker: p.cluster.TLSAddrs()[0], Topic: "orders"}) == nil, nil
	})
}

// load is a client that produces and consumes for as long as its standard input is open, each request once.
type load struct {
	client
	Partition   int32
	WorkloadAPI string // where it gets its own JWT-SVIDs to log in; "": it does not log in
}

// pace is the time between two records.
const pace = 20 * time.Millisecond

// saw is what became of a load.
type saw struct {
	Requests, Failed, Connects, Disconnects int64
	Written, Read                           int64
	Logins                                  int64 // tokens it was asked for
	Errors                                  []string
	key                                     []byte // of its records
}

func (w *world) startLoad(uid uint32, l load) (*host.Process, error) {
	text, err := json.Marshal(l)
	if err != nil {
		return nil, err
	}
	return host.StartSelf(kafka.Place{Cgroup: filepath.Join(w.clients()), UID: uid, GID: uid}, "load", string(text))
}

// judge ends a load and looks at what it saw.
func (l *load) judge(p *host.Process, lasted time.Duration) (string, error) {
	line := make(chan error, 1)
	var s saw
	go func() { line <- json.NewDecoder(p.Stdout).Decode(&s) }()
	if err := errors.Join(p.Stop(), <-line); err != nil {
		return "", err
	}
	measured := fmt.Sprintf("%d requests, %d records, %d lives of SVIDs, %d connections", s.Requests, s.Written,
		int(lasted/rotating), s.Connects)
	if l.WorkloadAPI != "" { // a connection that nothing uses logs in no more, and ends with its token
		measured += fmt.Sprintf(" of which %d ended while nothing used them, %d logins of its own", s.Disconnects, s.Logins)
	}
	switch {
	case s.Failed > 0 || len(s.Errors) > 0:
		return measured, fmt.Errorf("%d requests failed: %s", s.Failed, strings.Join(s.Errors, "; "))
	case s.Disconnects > 0 && l.WorkloadAPI == "":
		return measured, fmt.Errorf("%d connections ended", s.Disconnects)
	case s.Read != s.Written:
		return measured, fmt.Errorf("%d records were written and %d read", s.Written, s.Read)
	case s.Written < int64(lasted/pace)/4:
		return measured, errors.New("there was little load")
	}
	return measured, nil
}

// beLoad is the process of a load.
func beLoad(args []string) int {
	var l load
	err := json.Unmarshal([]byte(args[0]), &l)
	var s *saw
	if err == nil {
		s, err = l.run()
	}
	if err == nil {
		err = json.NewEncoder(os.Stdout).Encode(s)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// counter counts what a client does. It is a set of franz-go's hooks.
type counter struct {
	requests, failed, connects, disconnects, logins atomic.Int64

	mu  sync.Mutex
	why []string // of the first failures
}

// OnBrokerE2E implements kgo.HookBrokerE2E.
func (c *counter) OnBrokerE2E(_ kgo.BrokerMetadata, key int16, e2e kgo.BrokerE2E) {
	c.requests.Add(1)
	if kmsg.Key(key) == kmsg.SASLHandshake && e2e.Err() != nil {
		return // it begins a login, again, on a connection that has ended while nothing used it
	}
	if err := e2e.Err(); err != nil && c.failed.Add(1) <= 10 {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.why = append(c.why, fmt.Sprintf("%s at %s: %v", kmsg.NameForKey(key), time.Now().Format(time.TimeOnly), err))
	}
}

// OnBrokerConnect implements kgo.HookBrokerConnect.
func (c *counter) OnBrokerConnect(kgo.BrokerMetadata, time.Duration, net.Conn, error) {
	c.connects.Add(1)
}

// OnBrokerDisconnect implements kgo.HookBrokerDisconnect.
func (c *counter) OnBrokerDisconnect(kgo.BrokerMetadata, net.Conn) { c.disconnects.Add(1) }

func (l *load) run() (*saw, error) {
	opts, err := l.options()
	if err != nil {
		return nil, err
	}
	count := &counter{}
	opts = append(opts, kgo.WithHooks(count), kgo.RecordRetries(0), kgo.RequestRetries(0), kgo.ProducerLinger(0),
		kgo.ConnIdleTimeout(15*time.Minute), // franz-go's most
		kgo.RecordPartitioner(kgo.ManualPartitioner()), kgo.ConsumePartitions(map[string]map[int32]kgo.Offset{
			l.Topic: {l.Partition: kgo.NewOffset().AtStart()}}))
	if l.WorkloadAPI != "" {
		opts = append(opts, kgo.SASL(oauth.Oauth(func(ctx context.Context) (oauth.Auth, error) {
			count.logins.Add(1)
			svid, err := workloadapi.FetchJWTSVID(ctx, jwtsvid.Params{Audience: svidAudience},
				workloadapi.WithAddr("unix://"+l.WorkloadAPI))
			if err != nil {
				return oauth.Auth{}, err
			}
			return oauth.Auth{Token: svid.Marshal()}, nil
		})))
	}
	client, err := kgo.NewClient(opts...)
	if err != nil {
		return nil, err
	}
	ended := make(chan struct{})
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		close(ended)
	}()
	s := &saw{key: fmt.Appendf(nil, "%d at %v", os.Getpid(), time.Now())}
	s.produce(client, l, ended)
	s.consume(client)
	// What ends now is not on the node.
	s.Requests, s.Failed, s.Connects, s.Disconnects, s.Logins = count.requests.Load(), count.failed.Load(),
		count.connects.Load(), count.disconnects.Load(), count.logins.Load()
	count.mu.Lock()
	s.Errors = append(s.Errors, count.why...)
	count.mu.Unlock()
	client.Close()
	return s, nil
}

func (s *saw) produce(client *kgo.Client, l *load, ended <-chan struct{}) {
	for {
		select {
		case <-ended:
			return
		case <-time.After(pace):
		}
		record := &kgo.Record{Topic: l.Topic, Partition: l.Partition, Key: s.key,
			Value: strconv.AppendInt(nil, s.Written, 10)}
		if err := client.ProduceSync(context.Background(), record).FirstErr(); err != nil {
			s.fail(err)
			return
		}
		s.Written++
		s.poll(client, time.Millisecond)
	}
}

// poll takes up what was fetched meanwhile.
func (s *saw) poll(client *kgo.Client, wait time.Duration) {
	ctx, cancel := context.WithTimeout(context.Background(), wait)
	defer cancel()
	fetches := client.PollFetches(ctx)
	fetches.EachError(func(_ string, _ int32, err error) {
		if !errors.Is(err, context.DeadlineExceeded) {
			s.fail(err)
		}
	})
	fetches.EachRecord(func(r *kgo.Record) {
		if bytes.Equal(r.Key, s.key) { // the topic has others'
			s.Read++
		}
	})
}

func (s *saw) consume(client *kgo.Client) {
	deadline := time.Now().Add(clientTimeout)
	for s.Read < s.Written && len(s.Errors) == 0 && time.Now().Before(deadline) {
		s.poll(client, time.Second)
	}
}

func (s *saw) fail(err error) { s.Errors = append(s.Errors, err.Error()) }

// metric is the value of a series of the node's.
func (n *node) metric(series string) (int, error) {
	resp, err := http.Get("http://" + n.metrics + "/metrics")
	if err != nil {
		return 0, err
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if value, is := strings.CutPrefix(line, series+" "); is {
			v, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
			return int(v), err
		}
	}
	return 0, nil
}
