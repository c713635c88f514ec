// Verify runs the cases of package cases on a real SPIRE, by both of its APIs, with SPIRE's own intervals where time is
// what counts, and closes with "N passed, N failed".
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"regexp"
	"syscall"
	"time"

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

// intervals are how often a rig looks for changes.
var intervals = []struct {
	name  string
	every time.Duration
	cases []cases.Case
}{
	{"quick", time.Second, cases.All},
	{"SPIRE's defaults", 5 * time.Second, cases.Bounded},
}

func verify(ctx context.Context, only *regexp.Regexp) (passed, failed int, err error) {
	for _, i := range intervals {
		p, f, err := on(ctx, i.name, i.cases, spire.Options{SyncInterval: i.every, CacheInterval: i.every}, only)
		passed, failed = passed+p, failed+f
		if err != nil {
			return passed, failed, err
		}
	}
	return passed, failed, nil
}

func on(ctx context.Context, name string, all []cases.Case, o spire.Options, only *regexp.Regexp) (
	passed, failed int, err error) {
	rig, err := spire.New(ctx, o)
	if err != nil {
		return 0, 0, err
	}
	defer func() {
		if serr := rig.Stop(); serr != nil && err == nil {
			err = serr
		}
	}()
	for _, api := range spiffe.APIs {
		for _, c := range all {
			full := fmt.Sprintf("%s/%s/%s", name, api, c.Name)
			if !only.MatchString(full) {
				continue
			}
			begin := time.Now()
			if cerr := c.On(ctx, rig, api); cerr != nil {
				failed++
				fmt.Printf("FAIL %5.1fs  %s\n      %v\n", time.Since(begin).Seconds(), full, cerr)
			} else {
				passed++
				fmt.Printf("ok   %5.1fs  %s\n", time.Since(begin).Seconds(), full)
			}
			if ctx.Err() != nil {
				return passed, failed, ctx.Err()
			}
		}
	}
	if failed > 0 {
		fmt.Fprintln(os.Stderr, rig.Logs())
	}
	return passed, failed, nil
}
