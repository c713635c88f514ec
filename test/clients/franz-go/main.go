// Command franz-go is a stock franz-go client: produce lines, consume them in a group by name or by regular expression,
// list topics.
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
)

func main() {
	operations := map[string]func([]string) error{"produce": produce, "consume": consume, "match": match, "list": list}
	if err := operations[os.Args[1]](os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func client(brokers string, opts ...kgo.Opt) (*kgo.Client, error) {
	return kgo.NewClient(append(opts, kgo.SeedBrokers(strings.Split(brokers, ",")...))...)
}

// produce BROKERS TOPIC: one record per line of the standard input.
func produce(args []string) error {
	c, err := client(args[0], kgo.DefaultProduceTopic(args[1]))
	if err != nil {
		return err
	}
	defer c.Close()
	var mu sync.Mutex
	var failed []error
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		c.Produce(context.Background(), kgo.StringRecord(lines.Text()), func(_ *kgo.Record, err error) {
			mu.Lock()
			defer mu.Unlock()
			failed = append(failed, err)
		})
	}
	if err := c.Flush(context.Background()); err != nil {
		return err
	}
	mu.Lock()
	defer mu.Unlock()
	return errors.Join(append(failed, lines.Err())...)
}

// consume BROKERS TOPIC GROUP N: prints the values of N records.
func consume(args []string) error { return read(args) }

// match BROKERS REGEX GROUP N: the same of all topics that match, as the broker says.
func match(args []string) error {
	return read(args, kgo.ConsumeRegex(), kgo.ServerSideBalancer(), kgo.Balancers(kgo.RangeBalancer()))
}

func read(args []string, opts ...kgo.Opt) error {
	n, err := strconv.Atoi(args[3])
	if err != nil {
		return err
	}
	c, err := client(args[0], append(opts, kgo.ConsumeTopics(args[1]), kgo.ConsumerGroup(args[2]))...)
	if err != nil {
		return err
	}
	defer c.Close()
	for n > 0 {
		fetches := c.PollFetches(context.Background())
		for _, failure := range fetches.Errors() {
			return failure.Err
		}
		fetches.EachRecord(func(r *kgo.Record) {
			fmt.Println(string(r.Value))
			n--
		})
	}
	return c.CommitUncommittedOffsets(context.Background())
}

// list BROKERS: prints the names of all topics.
func list(args []string) error {
	c, err := client(args[0])
	if err != nil {
		return err
	}
	defer c.Close()
	request := kmsg.NewPtrMetadataRequest()
	answer, err := request.RequestWith(context.Background(), c)
	if err != nil {
		return err
	}
	for _, topic := range answer.Topics {
		if err := kerr.ErrorForCode(topic.ErrorCode); err != nil {
			return err
		}
		fmt.Println(*topic.Topic)
	}
	return nil
}
