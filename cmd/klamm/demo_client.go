package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"slices"

	"github.com/spf13/cobra"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// demoClient is the command line of a stock client: kcat where it is installed.
func demoClient(verb, broker, topic string) []string {
	if _, err := exec.LookPath("kcat"); err == nil {
		return map[string][]string{
			"produce": {"kcat", "-b", broker, "-P", "-t", topic},
			"consume": {"kcat", "-b", broker, "-C", "-t", topic, "-o", "beginning", "-e", "-q"},
			"list":    {"kcat", "-b", broker, "-L"},
		}[verb]
	}
	// By this link a user who may not enter this binary's directory can still run it.
	argv := []string{"/proc/self/exe", "demo", "client", verb, broker}
	if topic != "" {
		argv = append(argv, topic)
	}
	return argv
}

func demoClientName() string {
	if _, err := exec.LookPath("kcat"); err == nil {
		return "kcat, which knows only the broker's address"
	}
	return "franz-go in a process of its own, which knows only the broker's address (install kcat to see that instead)"
}

func newDemoClientCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:       "client produce|consume|list BROKER [TOPIC]",
		Short:     "A plain Kafka client, where kcat is not installed",
		Hidden:    true,
		Args:      cobra.RangeArgs(2, 3),
		ValidArgs: []string{"produce", "consume", "list"},
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		act, ok := map[string]func(context.Context, *kgo.Client, string, io.Reader, io.Writer) error{
			"produce": clientProduce, "consume": clientConsume, "list": clientList}[args[0]]
		if !ok {
			return fmt.Errorf("want produce, consume or list, not %s", args[0])
		}
		topic := ""
		if len(args) == 3 {
			topic = args[2]
		}
		// A refused topic is an error at once, as with other clients, and not a reason to try on.
		// An idempotent write would first need a producer id, which who may write nothing is refused.
		opts := []kgo.Opt{kgo.SeedBrokers(args[1]), kgo.KeepRetryableFetchErrors(), kgo.UnknownTopicRetries(0),
			kgo.DisableIdempotentWrite()}
		if args[0] == "consume" {
			opts = append(opts, kgo.ConsumeTopics(topic), kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()))
		}
		client, err := kgo.NewClient(opts...)
		if err != nil {
			return err
		}
		defer client.Close()
		return act(cmd.Context(), client, topic, cmd.InOrStdin(), cmd.OutOrStdout())
	}
	return cmd
}

func clientProduce(ctx context.Context, client *kgo.Client, topic string, in io.Reader, _ io.Writer) error {
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		r := &kgo.Record{Topic: topic, Value: slices.Clone(lines.Bytes())}
		if err := client.ProduceSync(ctx, r).FirstErr(); err != nil {
			return clientError(err)
		}
	}
	return lines.Err()
}

// clientConsume reads to the end of the topic, which has one partition.
func clientConsume(ctx context.Context, client *kgo.Client, _ string, _ io.Reader, out io.Writer) error {
	for {
		fetches := client.PollFetches(ctx)
		if err := fetches.Err(); err != nil {
			return clientError(err)
		}
		atEnd := false
		fetches.EachPartition(func(p kgo.FetchTopicPartition) {
			for _, r := range p.Records {
				_, _ = fmt.Fprintf(out, "%s\n", r.Value)
				atEnd = r.Offset+1 >= p.HighWatermark
			}
		})
		if atEnd {
			return nil
		}
	}
}

func clientList(ctx context.Context, client *kgo.Client, _ string, _ io.Reader, out io.Writer) error {
	resp, err := kmsg.NewPtrMetadataRequest().RequestWith(ctx, client)
	if err != nil {
		return clientError(err)
	}
	_, err = fmt.Fprintf(out, "%d topics:\n", len(resp.Topics))
	for _, t := range resp.Topics {
		_, perr := fmt.Fprintf(out, "  topic %q with %d partitions\n", *t.Topic, len(t.Partitions))
		err = errors.Join(err, perr)
	}
	return err
}

// clientError is what Kafka itself says.
func clientError(err error) error {
	if kafka := new(kerr.Error); errors.As(err, &kafka) {
		return fmt.Errorf("%s: %s", kafka.Message, kafka.Description)
	}
	return err
}
