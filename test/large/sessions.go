package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
	"github.com/twmb/franz-go/pkg/sasl/plain"
)

// fallBack asks in versions of ApiVersions that do not exist yet, and goes on with what it is offered.
func fallBack(_ context.Context, w *world) (string, error) {
	var asked []int16
	for _, version := range []int16{6, 7, 99} {
		if err := w.once(func(c *conn) error { return fallBackFrom(c, version, &asked) }); err != nil {
			return "", err
		}
	}
	return fmt.Sprintf("asked in versions %v", asked), nil
}

func fallBackFrom(c *conn, version int16, asked *[]int16) error {
	for {
		req := kmsg.NewPtrApiVersionsRequest()
		req.Version, req.ClientSoftwareName, req.ClientSoftwareVersion = version, "large", "1"
		answer, err := c.ask(req)
		if err != nil {
			return fmt.Errorf("ApiVersions v%d: %w", version, err)
		}
		resp := answer.(*kmsg.ApiVersionsResponse)
		*asked = append(*asked, version)
		if resp.ErrorCode == 0 {
			if len(resp.ApiKeys) < 20 {
				return fmt.Errorf("only %d keys are offered", len(resp.ApiKeys))
			}
			break
		}
		if resp.ErrorCode != kerr.UnsupportedVersion.Code || len(resp.ApiKeys) != 1 || resp.ApiKeys[0].ApiKey != 18 ||
			resp.ApiKeys[0].MaxVersion >= version {
			return fmt.Errorf("ApiVersions v%d is answered with %+v", version, resp)
		}
		version = resp.ApiKeys[0].MaxVersion
	}
	if _, err := c.ask(metadata(orders)); err != nil {
		return fmt.Errorf("after it: %w", err)
	}
	return nil
}

const renewTopic = "orders.renew"

// renew has clients write and read for some lives of a login, and log in again in the midst of it.
func renew(ctx context.Context, w *world) (string, error) {
	const producers = 4
	var clients []*kgo.Client
	defer func() {
		for _, c := range clients {
			c.Close()
		}
	}()
	open := func(opts ...kgo.Opt) error {
		login := plain.Auth{User: "alice", Pass: "wonder"}.AsMechanism()
		c, err := w.client(w.modest, w.cluster.SASLAddrs()[0], append(opts, kgo.SASL(login))...)
		if err == nil {
			clients = append(clients, c)
		}
		return err
	}
	for range producers {
		if err := open(kgo.DefaultProduceTopic(renewTopic)); err != nil {
			return "", err
		}
	}
	if err := open(kgo.ConsumeTopics(renewTopic), kgo.ConsumerGroup("orders-renew"),
		kgo.ConsumeResetOffset(kgo.NewOffset().AtStart())); err != nil {
		return "", err
	}
	var wrote atomic.Int64
	errs := make([]error, producers)
	var all sync.WaitGroup
	for id, client := range clients[:producers] {
		all.Go(func() { errs[id] = write(ctx, client, id, 4*reauth, &wrote) })
	}
	done := make(chan struct{})
	go func() { all.Wait(); close(done) }()
	err := readAll(ctx, clients[producers], &wrote, done)
	<-done
	if err := errors.Join(err, errors.Join(errs...)); err != nil {
		return fmt.Sprintf("%d records", wrote.Load()), err
	}
	logins, err := w.logins()
	if err != nil {
		return "", err
	}
	found := fmt.Sprintf("%d records; logins by connection that wrote: %v", wrote.Load(), logins)
	if len(logins) != producers {
		return found, fmt.Errorf("%d connections of %d producers", len(logins), producers)
	}
	if least := slices.Min(logins); least < 3 {
		return found, fmt.Errorf("only %d logins in one", least)
	}
	return found, nil
}

// logins are how often there was a login on each connection that wrote to the topic of renew.
func (w *world) logins() ([]int, error) {
	text, err := os.ReadFile(w.audit)
	if err != nil {
		return nil, err
	}
	wrote, logins := map[string]bool{}, map[string]int{}
	for line := range bytes.Lines(text) {
		var l struct{ Conn, API, Topic string }
		if err := json.Unmarshal(line, &l); err != nil {
			return nil, err
		}
		switch {
		case l.API == "Produce" && l.Topic == renewTopic:
			wrote[l.Conn] = true
		case l.API == "SASLAuthenticate":
			logins[l.Conn]++
		}
	}
	var all []int
	for conn := range wrote {
		all = append(all, logins[conn])
	}
	return all, nil
}

// write writes numbered records for a while, without waiting for one before the next.
func write(ctx context.Context, client *kgo.Client, id int, lasts time.Duration, wrote *atomic.Int64) error {
	const burst, pause = 20, 10 * time.Millisecond
	var failed kgo.FirstErrPromise
	tick := time.NewTicker(pause)
	defer tick.Stop()
	for n, until := 0, time.Now().Add(lasts); time.Now().Before(until); <-tick.C {
		for range burst {
			record := &kgo.Record{Key: fmt.Append(nil, n%7), Value: fmt.Appendf(nil, "%d %d", id, n)}
			client.Produce(ctx, record, failed.Promise())
			n++
		}
		wrote.Add(burst)
	}
	return failed.Err()
}

// readAll reads until all is there that is written by the end, and fails for what is lost, doubled or out of order.
func readAll(ctx context.Context, client *kgo.Client, wrote *atomic.Int64, done <-chan struct{}) error {
	last := map[string]int{} // by producer and key, whose records are in one partition
	for total := int64(0); ; {
		polled, cancel := context.WithTimeout(ctx, time.Second)
		f := client.PollFetches(polled)
		cancel()
		if err := f.Err(); err != nil && (ctx.Err() != nil || !errors.Is(err, context.DeadlineExceeded)) {
			return fmt.Errorf("after %d of %d records: %w", total, wrote.Load(), err)
		}
		var wrong error
		f.EachRecord(func(r *kgo.Record) {
			var id, n int
			if _, err := fmt.Sscan(string(r.Value), &id, &n); err != nil {
				wrong = err
				return
			}
			line := fmt.Sprintf("%d %s", id, r.Key)
			if before, follows := last[line]; follows && n != before+7 || !follows && n >= 7 {
				wrong = fmt.Errorf("of producer %d, record %d comes after %d", id, n, before)
			}
			last[line] = n
			total++
		})
		if wrong != nil {
			return wrong
		}
		select {
		case <-done:
			if total == wrote.Load() {
				return nil
			}
		default:
		}
	}
}

// throttle gives the clients of this package's raw connections a quota, in bytes a second, until the end of do.
func (w *world) throttle(ctx context.Context, key string, rate float64, do func() error) error {
	set := func(remove bool) error {
		admin, err := w.cluster.Admin()
		if err != nil {
			return err
		}
		defer admin.Close()
		entry := kmsg.NewAlterClientQuotasRequestEntry()
		id := kmsg.NewAlterClientQuotasRequestEntryEntity()
		id.Type, id.Name = "client-id", kmsg.StringPtr("large")
		op := kmsg.NewAlterClientQuotasRequestEntryOp()
		op.Key, op.Value, op.Remove = key, rate, remove
		entry.Entity, entry.Ops = append(entry.Entity, id), append(entry.Ops, op)
		req := kmsg.NewPtrAlterClientQuotasRequest()
		req.Entries = append(req.Entries, entry)
		resp, err := req.RequestWith(context.WithoutCancel(ctx), admin)
		if err != nil {
			return err
		}
		return kerr.ErrorForCode(resp.Entries[0].ErrorCode)
	}
	if err := set(false); err != nil {
		return err
	}
	return errors.Join(do(), set(true))
}

const throttledTopic = "orders.throttled"

// throttledProduce pipelines more than the quota allows.
func throttledProduce(ctx context.Context, w *world) (found string, err error) {
	const requests, size, rate = 10, 300_000, 200_000
	c, err := dial(w.modest, w.cluster.Addrs()[0])
	if err != nil {
		return "", err
	}
	defer func() { _ = c.Close() }()
	err = w.throttle(ctx, "producer_byte_rate", rate, func() error {
		req := produce(part{throttledTopic, batch(size)})
		var ids []int32
		var stream []byte
		for range requests {
			c.next++
			ids = append(ids, c.next)
			stream = append(stream, formatter.AppendRequest(nil, req, c.next)...)
		}
		go func() { _, _ = c.Write(stream) }() // an error shows where an answer is missing
		var throttled int32
		var waited time.Duration
		last, before := int64(-1), time.Now()
		for i, id := range ids {
			resp, err := c.receive(id, req)
			if err != nil {
				return fmt.Errorf("answer %d: %w", i, err)
			}
			offset, err := produced(resp)
			if err != nil || offset <= last {
				return fmt.Errorf("answer %d: offset %d after %d, %w", i, offset, last, err)
			}
			waited += time.Since(before)
			last, before = offset, time.Now()
			if i < requests-1 { // the last one is followed by nothing that could wait
				throttled += resp.(*kmsg.ProduceResponse).ThrottleMillis
			}
		}
		found = fmt.Sprintf("throttle_time_ms %d in all; took %v", throttled, waited.Round(time.Millisecond))
		if throttled == 0 || int32(waited.Milliseconds()) < throttled*8/10 {
			return errors.New("nothing was throttled, or the broker's word of it does not come through")
		}
		return nil
	})
	return found, err
}

// throttledFetch reads in a fetch session (KIP-227), whose id a throttled answer has as well (KAFKA-6946).
func throttledFetch(ctx context.Context, w *world) (found string, err error) {
	const rate = 700_000
	c, err := dial(w.modest, w.cluster.Addrs()[0])
	if err != nil {
		return "", err
	}
	defer func() { _ = c.Close() }()
	err = w.throttle(ctx, "consumer_byte_rate", rate, func() error {
		offset, throttled, answers := int64(0), 0, 0
		var session, epoch int32
		for until := time.Now().Add(patience / 2); throttled < 3; answers++ {
			if time.Now().After(until) {
				return fmt.Errorf("only %d answers of %d were throttled", throttled, answers)
			}
			req := fetch(offset, 400_000, throttledTopic)
			req.SessionID, req.SessionEpoch = session, epoch
			resp, err := c.ask(req)
			if err != nil {
				return err
			}
			f := resp.(*kmsg.FetchResponse)
			if f.ErrorCode != 0 || f.SessionID == 0 || session != 0 && f.SessionID != session {
				return fmt.Errorf("answer %d, throttled for %d ms: error code %d, session %d instead of %d",
					answers, f.ThrottleMillis, f.ErrorCode, f.SessionID, session)
			}
			session, epoch = f.SessionID, epoch+1
			if f.ThrottleMillis > 0 {
				throttled++
			}
			for _, t := range f.Topics {
				for _, p := range t.Partitions {
					if p.ErrorCode != 0 {
						return fmt.Errorf("error code %d", p.ErrorCode)
					}
					offset = max(offset, nextOffset(p.RecordBatches))
					if offset >= p.HighWatermark {
						offset = 0 // once more from the start
					}
				}
			}
		}
		found = fmt.Sprintf("%d of %d answers throttled, all of session %d", throttled, answers, session)
		return nil
	})
	return found, err
}

// nextOffset is behind the last whole batch; 0 where there is none.
func nextOffset(b []byte) (next int64) {
	for len(b) >= 61 {
		n := 12 + int(binary.BigEndian.Uint32(b[8:]))
		if n > len(b) {
			break
		}
		next = int64(binary.BigEndian.Uint64(b)) + int64(binary.BigEndian.Uint32(b[23:])) + 1
		b = b[n:]
	}
	return next
}

// middle is the median.
func middle(all []time.Duration) time.Duration {
	slices.Sort(all)
	return all[len(all)/2]
}

// named tells whether an audit line is about an identity.
func named(line, id string) bool { return strings.Contains(line, `"spiffe_id":"`+id+`"`) }
