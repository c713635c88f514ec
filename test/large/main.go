// Large checks what lasts long, is large, or is slow, through a real node and a real Kafka: logins renewed and answers
// throttled under load, versions nobody knows, frames of 100 MiB, thousands of idle connections, slow readers, and
// clients that want all of the node's memory. It needs root: make verify-fidelity.
//
// Environment: MUTATE=1 gives the node a tenth of its memory and a policy without groups, so that the run must fail.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"regexp"
	"syscall"
	"text/tabwriter"
	"time"

	"klamm/test/host"
)

// check is one row of the result; found is what was measured.
type check struct {
	name string
	run  func(context.Context, *world) (found string, err error)
}

// The order counts: memory is measured from the least to the most, and nothing before these goes through the node that
// is large.
var checks = []check{
	{"a client newer than node and broker falls back (KIP-511)", fallBack},
	{"logins are renewed under load, no record lost or doubled (KIP-368)", renew},
	{"throttled produces are answered in order, in one connection", throttledProduce},
	{"throttled fetches keep their session", throttledFetch},
	{"a fetch answer of 100 MiB", largeFetch},
	{"300 readers at 1 KB/s hold no answers", slowReaders},
	{"5,000 idle connections", idle},
	{"a reader that pauses within an answer gets all of it", pausedReader},
	{"slow readers of answers that are held give way", slowHeld},
	{"who announces large frames gives way to others", greedy},
	{"a produce of 100 MiB", largeProduce},
	{"a produce of 100 MiB of which a part is denied", largeSplit},
	{"a fetch answer of 100 MiB into which a refusal is merged", largeMerge},
	{"two each of fetched, split and merged at a time", largeTogether},
}

func main() {
	host.BeDialer()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	failed, err := run(ctx, os.Args[1:])
	stop()
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "large:", err)
		os.Exit(2)
	}
	if failed > 0 {
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) (failed int, err error) {
	flags := flag.NewFlagSet("large", flag.ContinueOnError)
	klamm := flags.String("klamm", "bin/klamm", "the klamm binary")
	pattern := flags.String("run", ".", "only checks whose name matches")
	if err := flags.Parse(args); err != nil {
		return 0, err
	}
	matches, err := regexp.Compile(*pattern)
	if err != nil {
		return 0, err
	}
	w, err := newWorld(ctx, *klamm, os.Getenv("MUTATE") == "1")
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	table := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	passed := 0
	for _, c := range checks {
		if !matches.MatchString(c.name) {
			continue
		}
		if err := ctx.Err(); err != nil {
			return failed, err
		}
		limited, cancel := context.WithTimeout(ctx, 3*time.Minute)
		found, err := c.run(limited, w)
		cancel()
		verdict := "PASS"
		if err != nil {
			verdict, found = "FAIL", fmt.Sprintf("%s: %v", found, err)
			failed++
		} else {
			passed++
		}
		if _, err := fmt.Fprintf(table, "%s\t%s\t%s\n", verdict, c.name, found); err != nil {
			return failed, err
		}
		if err := table.Flush(); err != nil {
			return failed, err
		}
	}
	fmt.Printf("%d passed, %d failed\n", passed, failed)
	return failed, nil
}
