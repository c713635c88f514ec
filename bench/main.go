// Bench measures what the node costs, head to head in one run on one host:
//
//	direct         the client's connection goes straight to the broker
//	bare relay     the same eBPF redirect, then io.Copy both ways: the floor of any design in user space
//	hashing relay  the same, through buffers of 64 KiB with SHA-256 over every byte: the floor of any design that
//	               proves payloads
//	klamm          the real klamm node: identity, policy, audit to a file, SHA-256 of every batch
//
// Broker, load and each relay are processes of their own, each relay in its own cgroup with its own redirect. Rounds
// are interleaved, and what is compared is compared within a round.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"
)

// roles are what this binary is started as by itself.
var roles = map[string]func(args []string) error{
	"broker":    runBroker,
	"relay":     runRelay,
	"load":      runLoad,
	"node":      runNode,
	"connect":   runConnect,
	"enrol":     runEnrol,
	"hello":     runHello,
	"roundtrip": runRoundTrip,
}

// settings is the command line.
type settings struct {
	klamm   string
	kafka   bool
	spire   bool
	rounds  int
	warm    time.Duration
	measure time.Duration
	output  string
	update  string
	profile string
	only    string
}

func parse(args []string) (settings, error) {
	var s settings
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	quick := flags.Bool("quick", false, "3 short rounds, under three minutes: to see that it works, not to publish")
	flags.StringVar(&s.klamm, "klamm", "bin/klamm", "the klamm binary to measure; \"\" leaves it out")
	flags.BoolVar(&s.kafka, "kafka", false, "use a real Apache Kafka (scripts/setup kafka) instead of kfake")
	flags.BoolVar(&s.spire, "spire", false, "use a real SPIRE (scripts/setup spire) instead of a fake of its agent")
	flags.IntVar(&s.rounds, "rounds", 5, "rounds; every variant runs every load in each")
	flags.DurationVar(&s.warm, "warm", time.Second, "time before measuring, per load")
	flags.DurationVar(&s.measure, "measure", 6*time.Second, "time measured, per load")
	flags.StringVar(&s.output, "o", "table", "output: table or json")
	flags.StringVar(&s.update, "update", "", "write the tables between the markers of this Markdown file, too")
	flags.StringVar(&s.profile, "profile", "", "run the node in this binary and write its profiles into this directory")
	flags.StringVar(&s.only, "only", "", "one of the loads: "+loadNames())
	if err := flags.Parse(args); err != nil {
		return s, err
	}
	if *quick {
		s.rounds, s.warm, s.measure = 3, 500*time.Millisecond, 2*time.Second
	}
	if s.output != "table" && s.output != "json" {
		return s, fmt.Errorf("-o %s: want table or json", s.output)
	}
	return s, nil
}

func main() {
	if err := run(os.Args[1:]); err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) > 0 {
		if role, ok := roles[args[0]]; ok {
			return role(args[1:])
		}
	}
	s, err := parse(args)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	var progress io.Writer = os.Stderr
	r, err := measure(ctx, s, progress)
	if err != nil {
		return err
	}
	if s.update != "" {
		if err := r.update(s.update); err != nil {
			return err
		}
	}
	if s.output == "json" {
		return r.writeJSON(os.Stdout)
	}
	_, err = io.WriteString(os.Stdout, r.markdown())
	return err
}
