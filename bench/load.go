package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"
)

// load is one way of using the broker. All send values of 1 KiB to 10 topics of one partition with acks=all and
// linger 1 ms, as the OpenMessaging benchmark does, without compression.
type load struct {
	name    string
	title   string
	rate    int // records per second, sent when they are due; 0: as fast as they are acknowledged
	consume bool
}

var loads = []load{
	{name: "5k", title: "produce at 5,000 msg/s", rate: 5_000},
	{name: "20k", title: "produce at 20,000 msg/s", rate: 20_000},
	{name: "produce", title: "closed loop: produce"},
	{name: "both", title: "closed loop: produce and consume", consume: true},
}

func loadNames() string {
	var names []string
	for _, l := range loads {
		names = append(names, l.name)
	}
	return strings.Join(names, ", ")
}

// cell is what one load measured once. Latencies are in ms, from when a record was due to when it was acknowledged.
type cell struct {
	P50      float64 `json:"p50_ms,omitempty"`
	P99      float64 `json:"p99_ms,omitempty"`
	MBs      float64 `json:"mb_per_s"`      // 10^6 bytes of record values, produced and consumed
	CPUPerMB float64 `json:"cpu_ms_per_mb"` // of the relay
	Records  int64   `json:"records"`       // acknowledged and consumed
	Errors   int64   `json:"errors"`        // records that failed
}

// runLoad is a client: a process in the cgroup of a variant, configured for the broker's address. It prints a cell.
func runLoad(args []string) error {
	g := generator{value: make([]byte, valueBytes)}
	flags := flag.NewFlagSet("load", flag.ContinueOnError)
	name := flags.String("load", "", "one of "+loadNames())
	flags.StringVar(&g.broker, "broker", "", "host:port")
	flags.StringVar(&g.relay, "relay", "", "cgroup of the relay, whose CPU time is taken; \"\" for none")
	flags.DurationVar(&g.warm, "warm", 0, "time before measuring")
	flags.DurationVar(&g.measure, "measure", 0, "time measured")
	if err := flags.Parse(args); err != nil {
		return err
	}
	i := slices.IndexFunc(loads, func(l load) bool { return l.name == *name })
	if i < 0 {
		return fmt.Errorf("no load %q", *name)
	}
	g.load = loads[i]
	for i := range g.value {
		g.value[i] = byte(i * 131)
	}
	c, err := g.run()
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(c)
}

type generator struct {
	load
	broker, relay string
	warm, measure time.Duration
	value         []byte

	produced, consumed, failed atomic.Int64 // records

	mu        sync.Mutex
	latencies []time.Duration // of records that were due in the measured time
}

func (g *generator) run() (cell, error) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	producer, err := kgo.NewClient(kgo.SeedBrokers(g.broker), kgo.ProducerLinger(time.Millisecond),
		kgo.ProducerBatchCompression(kgo.NoCompression()), kgo.MaxBufferedRecords(20_000), kgo.DisableClientMetrics())
	if err != nil {
		return cell{}, err
	}
	defer producer.Close()
	if err := producer.Ping(ctx); err != nil {
		return cell{}, err
	}
	var workers sync.WaitGroup
	defer workers.Wait()
	defer cancel()
	if g.consume {
		consumer, err := kgo.NewClient(kgo.SeedBrokers(g.broker), kgo.ConsumeTopics(topicNames()...),
			kgo.ConsumeResetOffset(kgo.NewOffset().AtEnd()), kgo.DisableClientMetrics())
		if err != nil {
			return cell{}, err
		}
		workers.Go(func() { g.poll(ctx, consumer) })
	}
	begin := time.Now()
	if g.rate > 0 {
		workers.Go(func() { g.open(ctx, producer, begin) })
	} else {
		workers.Go(func() { g.closed(ctx, producer) })
	}
	from, err := g.snapshotAt(begin.Add(g.warm))
	if err != nil {
		return cell{}, err
	}
	to, err := g.snapshotAt(begin.Add(g.warm + g.measure))
	if err != nil {
		return cell{}, err
	}
	c := from.until(to)
	if g.rate > 0 {
		flush, stop := context.WithTimeout(ctx, 10*time.Second)
		defer stop()
		if err := producer.Flush(flush); err != nil {
			return cell{}, fmt.Errorf("wait for the last acknowledgements: %w", err)
		}
		g.mu.Lock()
		slices.Sort(g.latencies)
		c.P50, c.P99 = quantile(g.latencies, 0.5), quantile(g.latencies, 0.99)
		g.mu.Unlock()
	}
	return c, nil
}

func quantile(sorted []time.Duration, q float64) float64 {
	if len(sorted) == 0 {
		return 0
	}
	return float64(sorted[int(q*float64(len(sorted)-1))]) / 1e6
}

// closed produces without a pause; Produce waits while 20,000 records are not acknowledged.
func (g *generator) closed(ctx context.Context, client *kgo.Client) {
	done := func(_ *kgo.Record, err error) { g.count(ctx, err) }
	for i := 0; ctx.Err() == nil; i++ {
		client.Produce(ctx, &kgo.Record{Topic: topicName(i % topicCount), Value: g.value}, done)
	}
}

func (g *generator) count(ctx context.Context, err error) {
	switch {
	case err == nil:
		g.produced.Add(1)
	case ctx.Err() == nil && !errors.Is(err, kgo.ErrClientClosed):
		g.failed.Add(1)
	}
}

// open produces each record when it is due, and all that are due after a late wake-up.
func (g *generator) open(ctx context.Context, client *kgo.Client, begin time.Time) {
	interval := time.Second / time.Duration(g.rate)
	first, last := int(g.warm/interval), int((g.warm+g.measure)/interval)
	for i := range last {
		due := begin.Add(time.Duration(i) * interval)
		time.Sleep(time.Until(due))
		client.Produce(ctx, &kgo.Record{Topic: topicName(i % topicCount), Value: g.value}, func(_ *kgo.Record, err error) {
			g.count(ctx, err)
			if i >= first && err == nil {
				g.mu.Lock()
				g.latencies = append(g.latencies, time.Since(due))
				g.mu.Unlock()
			}
		})
	}
}

func (g *generator) poll(ctx context.Context, client *kgo.Client) {
	defer client.Close()
	for ctx.Err() == nil {
		fetches := client.PollFetches(ctx)
		g.consumed.Add(int64(fetches.NumRecords()))
		for _, e := range fetches.Errors() {
			if ctx.Err() == nil {
				fmt.Fprintln(os.Stderr, "consume:", e.Err)
				g.failed.Add(1)
			}
		}
	}
}

// snapshot is where the counters stood.
type snapshot struct {
	at              time.Time
	cpu             time.Duration
	records, errors int64
}

func (g *generator) snapshotAt(t time.Time) (s snapshot, err error) {
	time.Sleep(time.Until(t))
	if g.relay != "" {
		if s.cpu, err = cpuTime(g.relay); err != nil {
			return s, err
		}
	}
	s.at, s.records, s.errors = time.Now(), g.produced.Load()+g.consumed.Load(), g.failed.Load()
	return s, nil
}

func (s snapshot) until(t snapshot) cell {
	c := cell{Records: t.records - s.records, Errors: t.errors - s.errors}
	mb := float64(c.Records) * valueBytes / 1e6
	c.MBs = mb / t.at.Sub(s.at).Seconds()
	c.CPUPerMB = (t.cpu - s.cpu).Seconds() * 1e3 / mb
	return c
}
