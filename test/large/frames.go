package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/twmb/franz-go/pkg/kmsg"
)

// largest is a batch with which a request is just below the limit.
var largest = sync.OnceValue(func() []byte { return batch(maxFrame - 1000) })

// besides is what a node may take that limits.memory does not count: itself, and what the collector has not taken yet.
const besides = 320 * mib

// measured runs something on a connection of its own, and says how long it took and what it cost.
func (w *world) measured(most int64, do func(*conn) error) (string, error) {
	start := time.Now()
	by, to, err := w.grown(func() error { return w.once(do) })
	found := fmt.Sprintf("%v; the node grew by %d MiB at most, to %d", time.Since(start).Round(time.Millisecond),
		by>>20, to>>20)
	switch {
	case err != nil:
		return found, err
	case by > most:
		return found, fmt.Errorf("more than %d MiB", most>>20)
	case to > memory+besides:
		return found, fmt.Errorf("more than limits.memory and %d MiB", besides>>20)
	}
	return found, nil
}

func (w *world) once(do func(*conn) error) error {
	c, err := dial(w.modest, w.cluster.Addrs()[0])
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	return do(c)
}

func largeProduce(_ context.Context, w *world) (string, error) {
	return w.measured(memory, askProduce)
}

func askProduce(c *conn) error {
	_, err := c.write(large, largest())
	return err
}

func largeFetch(_ context.Context, w *world) (string, error) {
	const streamed = 32 * mib // nothing of it is held
	return w.measured(streamed, w.askFetch)
}

func (w *world) askFetch(c *conn) error {
	resp, err := c.ask(fetch(w.largest, 2*maxFrame, large))
	if err != nil {
		return err
	}
	f := resp.(*kmsg.FetchResponse)
	if len(f.Topics) != 1 || len(f.Topics[0].Partitions) != 1 {
		return fmt.Errorf("%d topics came", len(f.Topics))
	}
	// The broker sets base offset and leader epoch, which come before the magic; no checksum covers them.
	p := &f.Topics[0].Partitions[0]
	if got := p.RecordBatches; len(got) < len(largest()) || !bytes.Equal(got[16:len(largest())], largest()[16:]) {
		return fmt.Errorf("error code %d, %d bytes of records", p.ErrorCode, len(got))
	}
	return nil
}

func largeSplit(_ context.Context, w *world) (string, error) {
	return w.measured(memory, askSplit)
}

func askSplit(c *conn) error {
	resp, err := c.ask(produce(part{secret, batch(200)}, part{large, largest()}))
	if err != nil {
		return err
	}
	_, err = produced(resp, secret)
	return err
}

func largeMerge(_ context.Context, w *world) (string, error) {
	return w.measured(memory, w.askMerge)
}

func (w *world) askMerge(c *conn) error {
	resp, err := c.ask(fetch(w.largest, maxFrame, large, secret))
	if err != nil {
		return err
	}
	return merged(resp, maxFrame)
}

// largeTogether asks for more than there is memory for at a time: each is answered in its turn, or refused.
func largeTogether(_ context.Context, w *world) (string, error) {
	const each = 2
	refused, err := w.refusedMemory()
	if err != nil {
		return "", err
	}
	errs := make(chan error, 100)
	start := time.Now()
	by, to, err := w.grown(func() error {
		var all sync.WaitGroup
		for range each {
			for _, ask := range []func(*conn) error{w.askFetch, askSplit, w.askMerge} {
				all.Go(func() { errs <- w.once(ask) })
			}
		}
		all.Wait()
		close(errs)
		return nil
	})
	if err != nil {
		return "", err
	}
	answered, ended := 0, 0
	var wrong error
	for err := range errs {
		var op *net.OpError
		switch {
		case err == nil:
			answered++
		case errors.As(err, &op) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF):
			ended++
		default:
			wrong = errors.Join(wrong, err)
		}
	}
	after, err := w.refusedMemory()
	found := fmt.Sprintf("%d answered, %v refused, in %v; the node grew by %d MiB at most, to %d", answered,
		after-refused, time.Since(start).Round(time.Millisecond), by>>20, to>>20)
	switch {
	case err != nil || wrong != nil:
		return found, errors.Join(err, wrong)
	case ended != int(after-refused):
		return found, fmt.Errorf("%d connections ended", ended)
	case answered < ended:
		return found, errors.New("most are refused")
	case to > memory+besides:
		return found, fmt.Errorf("more than limits.memory and %d MiB", besides>>20)
	}
	return found, nil
}
