// Command kafka-go is a stock segmentio/kafka-go client: produce lines, consume them in a group, list topics.
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"strconv"
	"strings"

	"github.com/segmentio/kafka-go"
)

func main() {
	operations := map[string]func([]string) error{"produce": produce, "write": write, "consume": consume, "list": list}
	if err := operations[os.Args[1]](os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// produce BROKERS TOPIC: one record per line of the standard input.
func produce(args []string) error {
	w := &kafka.Writer{
		Addr: kafka.TCP(strings.Split(args[0], ",")...), Topic: args[1], RequiredAcks: kafka.RequireAll, BatchSize: 1,
	}
	lines := bufio.NewScanner(os.Stdin)
	var failed []error
	for lines.Scan() {
		failed = append(failed, w.WriteMessages(context.Background(), kafka.Message{Value: lines.Bytes()}))
	}
	return errors.Join(append(failed, lines.Err(), w.Close())...)
}

// write BROKERS TOPIC: one record by the connection to the leader of partition 0, for which this topic is looked up.
// The Writer of produce looks in a list of all topics instead, where it misses one that it may not see: behind a
// broker's own ACLs, too, it says "Unknown Topic Or Partition" and never learns why.
func write(args []string) error {
	broker, _, _ := strings.Cut(args[0], ",")
	conn, err := kafka.DialLeader(context.Background(), "tcp", broker, args[1], 0)
	if err != nil {
		return err
	}
	_, err = conn.WriteMessages(kafka.Message{Value: []byte("record 0 of kafka-go")})
	return errors.Join(err, conn.Close())
}

// consume BROKERS TOPIC GROUP N: prints the values of N records.
func consume(args []string) error {
	n, err := strconv.Atoi(args[3])
	if err != nil {
		return err
	}
	r := kafka.NewReader(kafka.ReaderConfig{
		Brokers: strings.Split(args[0], ","), Topic: args[1], GroupID: args[2], StartOffset: kafka.FirstOffset,
		ErrorLogger: log.New(os.Stderr, "", 0),
	})
	for ; n > 0; n-- {
		message, err := r.ReadMessage(context.Background())
		if err != nil {
			return errors.Join(err, r.Close())
		}
		fmt.Println(string(message.Value))
	}
	return r.Close()
}

// list BROKERS: prints the names of all topics.
func list(args []string) error {
	client := &kafka.Client{Addr: kafka.TCP(strings.Split(args[0], ",")...)}
	answer, err := client.Metadata(context.Background(), &kafka.MetadataRequest{})
	if err != nil {
		return err
	}
	for _, topic := range answer.Topics {
		if topic.Error != nil {
			return topic.Error
		}
		fmt.Println(topic.Name)
	}
	return nil
}
