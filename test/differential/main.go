// Command differential asks two clusters the same: one with an authorizer and ACLs directly, one without through a node
// whose policy is translated from these ACLs. No client may be able to tell which one answered. It needs root:
// make verify-fidelity.
//
// Environment: MUTATE=1 adds a right that no ACL gives, so that the run must fail.
// SEED=n asks that seed's random requests alone.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"

	"klamm/test/host"
	"klamm/test/kafka"
)

func main() {
	host.BeDialer()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	failed, err := run(ctx, os.Args[1:])
	stop()
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "verify-fidelity:", err)
		os.Exit(2)
	}
	if failed > 0 {
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) (failed int, err error) {
	flags := flag.NewFlagSet("differential", flag.ContinueOnError)
	versions := flags.String("kafka", kafka.Newest+","+kafka.Previous, "releases of Kafka")
	keep := flags.Bool("report", false, "keep what a whole run without failures found, and write the document from it")
	doc := flags.Bool("doc", false, "only write the document, from what was kept")
	pattern := flags.String("run", ".", "only scenarios whose path matches")
	if err := flags.Parse(args); err != nil {
		return 0, err
	}
	matches, err := regexp.Compile(*pattern)
	if err != nil {
		return 0, err
	}
	if _, err := os.Stat(worldDir); err != nil { // as make runs it
		if err := os.Chdir("test/differential"); err != nil {
			return 0, err
		}
	}
	if *doc {
		return 0, writeDocument()
	}
	s := newSuite()
	s.mutate = os.Getenv("MUTATE") == "1"
	if err := s.read(matches.MatchString); err != nil {
		return 0, err
	}
	dir, err := os.MkdirTemp("", "klamm-differential-")
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	s.klamm = filepath.Join(dir, "klamm")
	if err := buildKlamm(ctx, s.klamm); err != nil {
		return 0, err
	}
	releases := strings.Split(*versions, ",")
	for _, version := range releases {
		if err := s.play(ctx, version); err != nil {
			return 0, fmt.Errorf("on Kafka %s: %w", version, err)
		}
	}
	if whole := *pattern == "." && len(s.spoken) > 1 && os.Getenv("SEED") == ""; whole {
		s.finish()
		if *keep && s.failed == 0 {
			err = errors.Join(s.report(releases).write(), writeDocument())
		}
	}
	fmt.Printf("%d passed, %d failed\n", s.passed, s.failed)
	return s.failed, err
}

// read reads the suite's files. SEED=n is that seed's random requests alone.
func (s *suite) read(matches func(string) bool) (err error) {
	if s.differences, err = readDifferences("differences.yaml"); err != nil {
		return err
	}
	if err = readStrictly("coverage.yaml", &s.except); err != nil {
		return err
	}
	if seed := os.Getenv("SEED"); seed != "" {
		n, err := strconv.ParseUint(seed, 10, 64)
		s.seeds = []uint64{n}
		return err
	}
	if s.scenarios, err = readScenarios("scenarios", matches); err != nil {
		return err
	}
	if matches("seeds") {
		s.seeds, err = readSeeds("seeds")
	}
	return err
}
