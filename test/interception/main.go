// Command interception checks what "cannot be gone around, and never gets in the way" means: it runs the suites of ways
// around, of older connections, of restarts and crashes, of fail modes and of pods against real brokers, and prints a
// table. It needs root, bin/klamm, and the root of the repository as working directory: make verify-interception.
//
// Environment: MUTATE=1 switches one line of defence and one rule off, so that the run must fail. SUITES=a,b runs only
// some.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"
)

// result is one check.
type result struct {
	suite, name string
	err         error
}

// suites are run in this order. Each tells its results as it has them.
var suites = []struct {
	name string
	run  func(ctx context.Context, mutate bool, tell func(name string, err error))
}{
	{"lifecycle", lifecycle},
	{"two hosts", twoHosts},
	{"bypass", goTest("./test/bypass", "")},
	{"older connections", goTest("./node", "Older|TakeOver|TakenOver|Taken")},
	{"pods", program("./test/k8s")},
}

func main() {
	if len(os.Args) > 1 {
		os.Exit(beClient(os.Args[1:]))
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	results := verify(ctx)
	stop()
	passed, failed := report(results)
	fmt.Printf("%d passed, %d failed\n", passed, failed)
	if failed > 0 || passed == 0 {
		os.Exit(1)
	}
}

func verify(ctx context.Context) (results []result) {
	began := time.Now()
	var only []string
	if names := os.Getenv("SUITES"); names != "" {
		only = strings.Split(names, ",")
	}
	for _, s := range suites {
		if only != nil && !slices.Contains(only, s.name) {
			continue
		}
		n := len(results)
		s.run(ctx, os.Getenv("MUTATE") == "1", func(name string, err error) {
			verdict := "pass"
			if err != nil {
				verdict = "FAIL"
			}
			fmt.Printf("%6s  %s  %s: %s\n", time.Since(began).Round(time.Second), verdict, s.name, name)
			if err != nil {
				fmt.Println(err)
			}
			results = append(results, result{s.name, name, err})
		})
		if len(results) == n {
			results = append(results, result{s.name, "it runs", errors.New("the suite told nothing")})
		}
		if ctx.Err() != nil {
			return append(results, result{s.name, "it runs to its end", ctx.Err()})
		}
	}
	return results
}

// report prints a table of suites.
func report(results []result) (passed, failed int) {
	counts := map[string][2]int{}
	for _, r := range results {
		c := counts[r.suite]
		if r.err != nil {
			c[1]++
			failed++
		} else {
			c[0]++
			passed++
		}
		counts[r.suite] = c
	}
	table := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprint(table, "\nsuite\tpassed\tfailed\n")
	for _, s := range suites {
		if c, ran := counts[s.name]; ran {
			fmt.Fprintf(table, "%s\t%d\t%d\n", s.name, c[0], c[1])
		}
	}
	_ = table.Flush() // standard output: nobody is left to tell
	fmt.Println()
	return passed, failed
}
