package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/twmb/franz-go/pkg/kmsg"

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
		resp, err := c.ask(produce(part{orders, batch(300)}))
		if err != nil {
			return err
		}
		_, _, err = produced(resp)
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

// store writes a batch of a size into the large topic and tells its offset.
func (w *world) store(size int) (int64, error) {
	c, err := dial(w.modest, w.cluster.Addrs()[0])
	if err != nil {
		return 0, err
	}
	defer func() { _ = c.Close() }()
	resp, err := c.ask(produce(part{large, batch(size)}))
	if err != nil {
		return 0, err
	}
	offset, _, err := produced(resp)
	return offset, err
}

// sip reads 1 KB a second until the connection ends.
func sip(c net.Conn) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for b := make([]byte, 1000); ; <-tick.C {
		if _, err := io.ReadFull(c, b); err != nil {
			return
		}
	}
}

// slowly opens readers that ask for 10 MiB each, and read 1 KB a second.
func (w *world) slowly(d *host.Dialer, n int, readers *sync.WaitGroup, req kmsg.Request) ([]*conn, error) {
	var conns []*conn
	for range n {
		c, err := dial(d, w.cluster.Addrs()[0])
		if err != nil {
			return conns, err
		}
		conns = append(conns, c)
		if err := c.Conn.(*net.TCPConn).SetReadBuffer(4096); err != nil {
			return conns, err
		}
		if _, err := c.send(req); err != nil {
			return conns, err
		}
		readers.Go(func() { sip(c.Conn) })
	}
	return conns, nil
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
		if _, err := c.ask(produce(part{orders, batch(1000)})); err != nil {
			return 0, err
		}
		all = append(all, time.Since(start))
	}
	return middle(all), nil
}

// slowReaders are many consumers of answers that are streamed.
func slowReaders(ctx context.Context, w *world) (string, error) {
	const n, size, most = 300, 10 * mib, 160 << 10 // bytes each: a buffer in each direction, and what a goroutine has
	offset, err := w.store(size)
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
	var readers sync.WaitGroup
	var conns []*conn
	defer func() {
		closeAll(conns)
		readers.Wait()
	}()
	var beside time.Duration
	by, _, err := w.grown(func() (err error) {
		if conns, err = w.slowly(w.modest, n, &readers, fetch(offset, size, large)); err != nil {
			return err
		}
		if err := w.open(ctx, n); err != nil {
			return err
		}
		for range 3 { // some seconds' worth
			if beside, err = w.latency(); err != nil {
				return err
			}
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

// slowHeld are consumers of answers that are held, because a refusal is merged into them: more than there is memory
// for.
func slowHeld(_ context.Context, w *world) (string, error) {
	const n, size, within = 20, 10 * mib, 5 * time.Second
	offset, err := w.store(size)
	if err != nil {
		return "", err
	}
	refused, err := w.refusedMemory()
	if err != nil {
		return "", err
	}
	var readers sync.WaitGroup
	var conns []*conn
	defer func() {
		closeAll(conns)
		readers.Wait()
	}()
	if conns, err = w.slowly(w.greedy, n, &readers, fetch(offset, size, large, secret)); err != nil {
		return "", err
	}
	time.Sleep(4 * time.Second) // they have what they can get, for some time
	took, err := w.fetchMerged(offset, size)
	if err != nil {
		return "", err
	}
	after, err := w.refusedMemory()
	found := fmt.Sprintf("a reader beside %d of them has its 10 MiB in %v; %v were refused", n,
		took.Round(time.Millisecond), after-refused)
	switch {
	case err != nil:
		return found, err
	case took > within:
		return found, fmt.Errorf("more than %v", within)
	case after == refused:
		return found, errors.New("nobody gave way")
	}
	return found, w.onlyGreedy()
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
func greedy(_ context.Context, w *world) (string, error) {
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
	request := produce(part{orders, batch(900_000)})
	for i := range requests {
		start := time.Now()
		resp, err := c.ask(request)
		if err == nil {
			_, _, err = produced(resp)
		}
		if err != nil {
			return "", fmt.Errorf("request %d of the other client: %w", i, err)
		}
		slowest = max(slowest, time.Since(start))
	}
	// Another frame as large as theirs does not fit beside them.
	start := time.Now()
	if _, err := w.store(announced); err != nil {
		return "", fmt.Errorf("a large request of the other client: %w", err)
	}
	big := time.Since(start)
	after, err := w.refusedMemory()
	found := fmt.Sprintf("beside %d of 60 MiB, 900 KB take %v at most, and 60 MiB %v; %v were refused", n,
		slowest.Round(time.Millisecond), big.Round(time.Millisecond), after-refused)
	switch {
	case err != nil:
		return found, err
	case slowest > within || big > 2*within:
		return found, errors.New("it takes too long")
	case after == refused:
		return found, errors.New("nobody gave way")
	}
	return found, w.onlyGreedy()
}

// onlyGreedy fails where somebody else was refused for want of memory, or nobody is on record.
func (w *world) onlyGreedy() error {
	text, err := os.ReadFile(w.audit)
	if err != nil {
		return err
	}
	lines := 0
	for line := range strings.Lines(string(text)) {
		if !strings.Contains(line, `"reason":"memory"`) {
			continue
		}
		lines++
		if !named(line, "spiffe://example.test/greedy") {
			return fmt.Errorf("refused for want of memory: %s", line)
		}
	}
	if lines == 0 {
		return errors.New("nobody is on record as refused")
	}
	return nil
}
