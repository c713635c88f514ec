// Command sarama is a stock IBM/sarama client: produce lines, consume them in a group, list topics.
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/IBM/sarama"
)

func main() {
	operations := map[string]func([]string) error{"produce": produce, "consume": consume, "list": list}
	if err := operations[os.Args[1]](os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// produce BROKERS TOPIC: one record per line of the standard input.
func produce(args []string) (err error) {
	config := sarama.NewConfig()
	config.Producer.Return.Successes = true
	p, err := sarama.NewSyncProducer(strings.Split(args[0], ","), config)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.Close()) }()
	lines := bufio.NewScanner(os.Stdin)
	var failed []error
	for lines.Scan() {
		_, _, err := p.SendMessage(&sarama.ProducerMessage{Topic: args[1], Value: sarama.StringEncoder(lines.Text())})
		failed = append(failed, err)
	}
	return errors.Join(append(failed, lines.Err())...)
}

// consume BROKERS TOPIC GROUP N: prints the values of N records.
func consume(args []string) (err error) {
	n, err := strconv.Atoi(args[3])
	if err != nil {
		return err
	}
	config := sarama.NewConfig()
	config.Consumer.Offsets.Initial = sarama.OffsetOldest
	config.Consumer.Return.Errors = true
	group, err := sarama.NewConsumerGroup(strings.Split(args[0], ","), args[2], config)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, group.Close()) }()
	ctx, cancel := context.WithCancelCause(context.Background())
	go func() {
		for err := range group.Errors() {
			cancel(err)
		}
	}()
	records := make(chan string)
	ended := make(chan error, 1)
	go func() {
		for ctx.Err() == nil {
			if err := group.Consume(ctx, []string{args[1]}, reader(records)); err != nil {
				cancel(err)
			}
		}
		ended <- context.Cause(ctx)
	}()
	for ; n > 0; n-- {
		select {
		case value := <-records:
			fmt.Println(value)
		case err := <-ended:
			return err
		}
	}
	cancel(nil)
	if err := <-ended; !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

type reader chan<- string

func (reader) Setup(sarama.ConsumerGroupSession) error   { return nil }
func (reader) Cleanup(sarama.ConsumerGroupSession) error { return nil }

func (r reader) ConsumeClaim(session sarama.ConsumerGroupSession, claim sarama.ConsumerGroupClaim) error {
	for message := range claim.Messages() {
		select {
		case r <- string(message.Value):
			session.MarkMessage(message, "")
		case <-session.Context().Done():
			return nil
		}
	}
	return nil
}

// list BROKERS: prints the names of all topics.
func list(args []string) error {
	client, err := sarama.NewClient(strings.Split(args[0], ","), sarama.NewConfig())
	if err != nil {
		return err
	}
	topics, err := client.Topics()
	fmt.Println(strings.Join(topics, "\n"))
	return errors.Join(err, client.Close())
}
