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
	"time"

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
	s := &suite{mutate: os.Getenv("MUTATE") == "1", began: time.Now(), coverage: coverage{},
		spoken: map[string]map[int16]versionRange{}}
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
	for version := range strings.SplitSeq(*versions, ",") {
		if err := s.play(ctx, version); err != nil {
			return 0, fmt.Errorf("on Kafka %s: %w", version, err)
		}
	}
	if whole := *pattern == "." && len(s.spoken) > 1 && os.Getenv("SEED") == ""; whole {
		s.finish()
	}
	fmt.Printf("%d passed, %d failed\n", s.passed, s.failed)
	return s.failed, nil
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
