package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/kafka/wire"
	"klamm/test/host"
)

// idle opens thousands of connections, uses each, leaves them alone, and uses them again.
func idle(ctx context.Context, w *world) (string, error) {
	const n, most = 5000, 32 << 10 // bytes each
	conns := make([]*conn, 0, n)
	defer func() { closeAll(conns) }()
	use := func(c *conn) error {
		if _, err := c.ask(metadata(orders)); err != nil {
			return err
		}
		_, err := c.write(orders, batch(300))
		return err
	}
	goroutines, err := w.metric("go_goroutines")
	if err != nil {
		return "", err
	}
	before, _, err := w.resident()
	if err != nil {
		return "", err
	}
	for range n {
		c, err := dial(w.modest, w.cluster.Addrs()[0])
		if err != nil {
			return "", fmt.Errorf("connection %d: %w", len(conns), err)
		}
		conns = append(conns, c)
		if err := use(c); err != nil {
			return "", fmt.Errorf("connection %d: %w", len(conns), err)
		}
	}
	if err := w.open(ctx, n); err != nil {
		return "", err
	}
	after, _, err := w.resident()
	if err != nil {
		return "", err
	}
	running, err := w.metric("go_goroutines")
	if err != nil {
		return "", err
	}
	each := (after - before) / n
	found := fmt.Sprintf("%.1f KiB resident and %.2f goroutines each", float64(each)/1024, (running-goroutines)/n)
	for i, c := range conns {
		if err := errors.Join(c.SetDeadline(time.Now().Add(patience)), use(c)); err != nil {
			return found, fmt.Errorf("connection %d, used again: %w", i, err)
		}
	}
	closeAll(conns)
	conns = nil
	if err := w.open(ctx, 0); err != nil {
		return found, err
	}
	if each > most {
		return found, fmt.Errorf("the aim is %d KiB", most>>10)
	}
	return found, nil
}

// readers ask for 10 MiB each, and read 1 KB a second.
type readers struct {
	conns         []*conn
	all           sync.WaitGroup
	answered, ill atomic.Int32 // by the size of an answer: what was asked for, and what cannot be that
}

// open opens so many.
func (r *readers) open(w *world, d *host.Dialer, n int, req kmsg.Request) error {
	for range n {
		c, err := dial(d, w.cluster.Addrs()[0])
		if err != nil {
			return err
		}
		r.conns = append(r.conns, c)
		if err := c.Conn.(*net.TCPConn).SetReadBuffer(4096); err != nil {
			return err
		}
		if _, err := c.send(req); err != nil {
			return err
		}
		r.all.Go(func() { r.sip(c) })
	}
	return nil
}

func (r *readers) close() {
	closeAll(r.conns)
	r.all.Wait()
}

// sip reads until the connection ends.
func (r *readers) sip(c net.Conn) {
	var size [4]byte
	if _, err := io.ReadFull(c, size[:]); err != nil {
		return
	}
	if binary.BigEndian.Uint32(size[:]) < 9*mib {
		r.ill.Add(1)
		return
	}
	r.answered.Add(1)
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for b := make([]byte, 1000); ; <-tick.C {
		if _, err := io.ReadFull(c, b); err != nil {
			return
		}
	}
}

// await waits until so many are being answered.
func (r *readers) await(ctx context.Context, n int) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	return until(ctx, fmt.Sprintf("%d readers are answered", n), func() (bool, error) {
		if ill := r.ill.Load(); ill > 0 {
			return false, fmt.Errorf("%d readers have an answer that is too small", ill)
		}
		return int(r.answered.Load()) >= n, nil
	})
}

// latency is how long a small produce takes, in the middle of many.
func (w *world) latency() (time.Duration, error) {
	const samples = 100
	c, err := dial(w.modest, w.cluster.Addrs()[0])
	if err != nil {
		return 0, err
	}
	defer func() { _ = c.Close() }()
	var all []time.Duration
	for range samples {
		start := time.Now()
		if _, err := c.write(orders, batch(1000)); err != nil {
			return 0, err
		}
		all = append(all, time.Since(start))
	}
	return middle(all), nil
}

// slowReaders are many consumers of answers that are streamed.
func slowReaders(ctx context.Context, w *world) (string, error) {
	const n, size, most = 300, 10 * mib, 160 << 10 // bytes each: a buffer in each direction, and what a goroutine has
	offset, err := w.store(batch(size))
	if err != nil {
		return "", err
	}
	alone, err := w.latency()
	if err != nil {
		return "", err
	}
	if err := w.open(ctx, 0); err != nil {
		return "", err
	}
	var slow readers
	defer slow.close()
	beside := time.Duration(math.MaxInt64)
	by, _, err := w.grown(func() error {
		if err := slow.open(w, w.modest, n, fetch(offset, size, large)); err != nil {
			return err
		}
		if err := slow.await(ctx, n); err != nil {
			return err
		}
		for range 3 { // some seconds' worth
			took, err := w.latency()
			if err != nil {
				return err
			}
			beside = min(beside, took)
			time.Sleep(time.Second)
		}
		return nil
	})
	found := fmt.Sprintf("%d KiB each; a produce beside them takes %v, alone %v", by/n>>10,
		beside.Round(time.Microsecond), alone.Round(time.Microsecond))
	switch {
	case err != nil:
		return found, err
	case by/n > most:
		return found, fmt.Errorf("more than %d KiB each", most>>10)
	case beside > 5*alone+5*time.Millisecond:
		return found, errors.New("others are slowed down")
	}
	return found, w.allOpen(n)
}

func (w *world) allOpen(n int) error {
	open, err := w.metric("klamm_connections")
	if err == nil && int(open) < n {
		err = fmt.Errorf("of %d connections %v are open", n, open)
	}
	return err
}

// pausedReader stops for longer than the rest of a frame may take to come: that is not the broker's fault.
func pausedReader(ctx context.Context, w *world) (string, error) {
	const size, pause = 50 * mib, 40 * time.Second // more than sockets hold
	offset, err := w.store(batch(size))
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("after %v", pause), w.once(func(c *conn) error {
		req := fetch(offset, size, large)
		id, err := c.send(req)
		if err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(pause):
		}
		if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
			return err
		}
		resp, err := c.receive(id, req)
		if err != nil {
			return err
		}
		topics := resp.(*kmsg.FetchResponse).Topics
		if len(topics) != 1 || len(topics[0].Partitions[0].RecordBatches) < size*9/10 {
			return fmt.Errorf("%d topics came, not all records", len(topics))
		}
		return nil
	})
}

// slowHeld are consumers of answers that are held, because a refusal is merged into them: more than there is memory
// for.
func slowHeld(ctx context.Context, w *world) (string, error) {
	const n, size, within = 20, 10 * mib, 5 * time.Second
	fit := memory * 5 / 16 / int(wire.HeldSize(size)) // what is for answers
	offset, err := w.store(batch(size))
	if err != nil {
		return "", err
	}
	refused, err := w.refusedMemory()
	if err != nil {
		return "", err
	}
	var slow readers
	defer slow.close()
	if err := slow.open(w, w.greedy, n, fetch(offset, size, large, secret)); err != nil {
		return "", err
	}
	if err := slow.await(ctx, fit); err != nil {
		return "", err
	}
	took, err := w.fetchMerged(offset, size)
	if err != nil {
		return "", err
	}
	gone, err := w.gaveWay(ctx, refused)
	found := fmt.Sprintf("a reader beside %d of them has its 10 MiB in %v; %v were refused", n,
		took.Round(time.Millisecond), gone)
	switch {
	case err != nil:
		return found, err
	case took > within:
		return found, fmt.Errorf("more than %v", within)
	}
	return found, nil
}

func (w *world) fetchMerged(offset int64, size int32) (time.Duration, error) {
	c, err := dial(w.modest, w.cluster.Addrs()[0])
	if err != nil {
		return 0, err
	}
	defer func() { _ = c.Close() }()
	start := time.Now()
	resp, err := c.ask(fetch(offset, size, large, secret))
	if err != nil {
		return 0, err
	}
	return time.Since(start), merged(resp, int(size))
}

// merged fails unless an answer has the batch of the large topic, of about a size, and the refusal of the secret one.
func merged(resp kmsg.Response, size int) error {
	bytes, denied := 0, false
	for _, t := range resp.(*kmsg.FetchResponse).Topics {
		for _, p := range t.Partitions {
			bytes += len(p.RecordBatches)
			denied = denied || t.Topic == secret && p.ErrorCode == topicDenied
		}
	}
	if bytes < size*9/10 || !denied {
		return fmt.Errorf("%d bytes of records came; refused: %v", bytes, denied)
	}
	return nil
}

// greedy announces more than there is memory for, and sends little of it.
func greedy(ctx context.Context, w *world) (string, error) {
	const n, announced, sent, requests, within = 8, 60 * mib, mib, 20, 5 * time.Second
	refused, err := w.refusedMemory()
	if err != nil {
		return "", err
	}
	var conns []*conn
	defer func() { closeAll(conns) }()
	frame := formatter.AppendRequest(nil, produce(part{large, batch(announced)}), 1)[:sent]
	for range n {
		c, err := dial(w.greedy, w.cluster.Addrs()[0])
		if err != nil {
			return "", err
		}
		conns = append(conns, c)
		if _, err := c.Write(frame); err != nil {
			return "", err
		}
	}
	c, err := dial(w.modest, w.cluster.Addrs()[0])
	if err != nil {
		return "", err
	}
	defer func() { _ = c.Close() }()
	var slowest time.Duration
	records := batch(900_000)
	for i := range requests {
		start := time.Now()
		if _, err := c.write(orders, records); err != nil {
			return "", fmt.Errorf("request %d of the other client: %w", i, err)
		}
		slowest = max(slowest, time.Since(start))
	}
	// Another frame as large as theirs does not fit beside them.
	start := time.Now()
	if _, err := c.write(large, batch(announced)); err != nil {
		return "", fmt.Errorf("a large request of the other client: %w", err)
	}
	big := time.Since(start)
	gone, err := w.gaveWay(ctx, refused)
	found := fmt.Sprintf("beside %d of 60 MiB, 900 KB take %v at most, and 60 MiB %v; %v were refused", n,
		slowest.Round(time.Millisecond), big.Round(time.Millisecond), gone)
	switch {
	case err != nil:
		return found, err
	case slowest > within || big > 2*within:
		return found, errors.New("it takes too long")
	}
	return found, nil
}

// onlyGreedy tells how many are on record as refused for want of memory, and fails where somebody else is.
func (w *world) onlyGreedy() (lines int, err error) {
	text, err := os.ReadFile(w.audit)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if !strings.Contains(line, `"reason":"memory"`) {
			continue
		}
		lines++
		if !named(line, "spiffe://example.test/greedy") {
			return lines, fmt.Errorf("refused for want of memory: %s", line)
		}
	}
	return lines, nil
}
