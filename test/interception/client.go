package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
	"golang.org/x/sys/unix"

	"klamm/test/stage"
)

// beClient is one of the processes that are redirected. Each works until its standard input ends, then prints what it
// saw as JSON.
func beClient(args []string) int {
	ended := make(chan struct{})
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		close(ended)
	}()
	var saw any
	var err error
	switch args[0] {
	case "produce":
		saw, err = produce(ended, args[1], args[2])
	case "connect":
		if len(args) > 2 {
			err = enter(args[2])
		}
		if err == nil {
			saw = connects(ended, args[1])
		}
	case "hosts":
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
		defer stop()
		if err = hosts(ctx); errors.Is(err, errFailed) {
			return 1
		} else if err == nil {
			return 0
		}
	default:
		err = fmt.Errorf("unknown client %s", args[0])
	}
	if err == nil {
		err = json.NewEncoder(os.Stdout).Encode(saw)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	return 0
}

// enter moves the calling thread, from which all connects are made, into a network namespace, and the process to the
// clients' user.
func enter(namespace string) error {
	runtime.LockOSThread()
	file, err := os.Open(namespace)
	if err != nil {
		return err
	}
	return errors.Join(unix.Setns(int(file.Fd()), unix.CLONE_NEWNET), file.Close(),
		syscall.Setresgid(clientUID, clientUID, clientUID), syscall.Setresuid(clientUID, clientUID, clientUID))
}

// produced is what a producer saw.
type produced struct {
	Acknowledged int      // records 0 to this, less one
	Errors       []string // of records that were given up
}

// produce writes numbers in their order, each once, as fast as they are acknowledged.
func produce(ended <-chan struct{}, broker, topic string) (produced, error) {
	client, err := kgo.NewClient(kgo.SeedBrokers(broker), kgo.DefaultProduceTopic(topic), kgo.DisableClientMetrics(),
		kgo.RecordPartitioner(kgo.ManualPartitioner()), kgo.MaxBufferedRecords(100), kgo.ProducerLinger(0),
		kgo.RetryBackoffFn(func(int) time.Duration { return 20 * time.Millisecond }), kgo.RecordDeliveryTimeout(time.Minute))
	if err != nil {
		return produced{}, err
	}
	defer client.Close()
	var p produced
	for n := 0; ; n++ {
		select {
		case <-ended:
			return p, nil
		default:
		}
		res := client.ProduceSync(context.Background(), kgo.StringRecord(strconv.Itoa(n)))
		if err := res.FirstErr(); err != nil {
			p.Errors = append(p.Errors, fmt.Sprintf("record %d: %v", n, err))
			return p, nil
		}
		p.Acknowledged = n + 1
	}
}

// connected is what became of connects.
type connected struct {
	Enforced   int64          // went through the node: only the permitted topics are seen
	Unenforced int64          // went past it
	Ended      map[string]int // by how
}

// connects connects again and again and looks at which topics it sees.
func connects(ended <-chan struct{}, broker string) connected {
	c := connected{Ended: map[string]int{}}
	for {
		select {
		case <-ended:
			return c
		default:
		}
		unseen, err := lookAt(broker)
		switch {
		case err != nil:
			c.Ended[kindOf(err)]++
		case unseen:
			c.Unenforced++
		default:
			c.Enforced++
		}
		time.Sleep(connectPause)
	}
}

// lookAt tells whether the broker shows the topic that the policy hides.
func lookAt(broker string) (unenforced bool, err error) {
	conn, err := net.DialTimeout("tcp", broker, lookTimeout)
	if err != nil {
		return false, err
	}
	defer func() { _ = conn.Close() }()
	resp, err := stage.Ask(hurried{conn}, stage.AllTopics())
	if err != nil {
		return false, err
	}
	m, ok := resp.(*kmsg.MetadataResponse)
	if !ok {
		return false, fmt.Errorf("the answer is a %T", resp)
	}
	for _, t := range m.Topics {
		if t.Topic != nil && *t.Topic == hidden {
			return true, nil
		}
	}
	return false, nil
}

// connectPause leaves ports for others: each connection keeps one for a minute.
const connectPause = 2 * time.Millisecond

// lookTimeout is longer than a node takes to restart.
const lookTimeout = 2 * time.Second

// hurried is a connection that nobody waits long for.
type hurried struct{ net.Conn }

// SetDeadline sets no later one than lookTimeout.
func (h hurried) SetDeadline(time.Time) error { return h.Conn.SetDeadline(time.Now().Add(lookTimeout)) }

func kindOf(err error) string {
	for _, kind := range []error{syscall.ECONNREFUSED, syscall.ECONNRESET, syscall.EPIPE, io.EOF, io.ErrUnexpectedEOF,
		os.ErrDeadlineExceeded} {
		if errors.Is(err, kind) {
			return kind.Error()
		}
	}
	return strings.TrimSpace(err.Error())
}
