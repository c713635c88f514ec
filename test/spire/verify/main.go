// Verify runs the cases of package cases on a real SPIRE, by both of its APIs, with SPIRE's own intervals where time is
// what counts, and closes with "N passed, N failed".
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"regexp"
	"slices"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"klamm/spiffe"
	"klamm/test/spire"
	"klamm/test/spire/cases"
)

func main() {
	cases.Probe()
	only := flag.String("run", "", "only cases whose name, as printed, matches this expression")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	passed, failed, err := verify(ctx, regexp.MustCompile(*only))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		failed++
	}
	fmt.Printf("%d passed, %d failed\n", passed, failed)
	if failed > 0 || passed == 0 {
		os.Exit(1) //nolint:gocritic // nothing is left to be stopped
	}
}

// rigs are what the cases are run on.
var rigs = []struct {
	name    string
	options spire.Options
	cases   []cases.Case
}{
	{"quick", spire.Options{}, cases.All},
	{"SPIRE's intervals", spire.Options{SyncInterval: 5 * time.Second, CacheInterval: 5 * time.Second}, cases.Bounded},
	{"short-lived root", spire.Options{CATTL: cases.RootTTL}, []cases.Case{cases.Roots}},
}

// tally counts what all rigs together have passed and failed.
type tally struct{ passed, failed atomic.Int32 }

// verify runs each rig once for each API, all at a time: they mostly wait.
func verify(ctx context.Context, only *regexp.Regexp) (passed, failed int, err error) {
	var all tally
	var running errgroup.Group
	for _, r := range rigs {
		for _, api := range spiffe.APIs {
			running.Go(func() error {
				return all.on(ctx, r.name, api, r.cases, r.options, only)
			})
		}
	}
	err = running.Wait()
	return int(all.passed.Load()), int(all.failed.Load()), err
}

func (t *tally) on(ctx context.Context, name, api string, all []cases.Case, o spire.Options, only *regexp.Regexp) (
	err error) {
	full := func(c cases.Case) string { return fmt.Sprintf("%s/%s/%s", name, api, c.Name) }
	all = slices.DeleteFunc(slices.Clone(all), func(c cases.Case) bool { return !only.MatchString(full(c)) })
	if len(all) == 0 {
		return nil
	}
	rig, err := spire.New(ctx, o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, rig.Stop()) }()
	for _, c := range all {
		begin := time.Now()
		if cerr := c.On(ctx, rig, api); cerr != nil {
			t.failed.Add(1)
			fmt.Printf("FAIL %5.1fs  %s\n      %v\n%s\n", time.Since(begin).Seconds(), full(c), cerr, rig.Logs())
		} else {
			t.passed.Add(1)
			fmt.Printf("ok   %5.1fs  %s\n", time.Since(begin).Seconds(), full(c))
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	return nil
}
