// Command identity checks who is really on the other end: with a real SPIRE server and agent, a real OIDC issuer, a
// real Kubernetes node and a real Kafka. Workloads are unmodified clients; it judges at the broker's authorizer, at the
// issuer, in the audit, and by what the clients get. It needs root, bin/klamm, and the root of the repository as
// working directory: make verify-identity.
//
// Arguments name the suites to run; without any all are. Environment: KLAMM_ROTATION is how long the suite rotation
// keeps its load up (default 10m), beside which the others run. MUTATE=1 breaks one rule for each suite that has one,
// so that the run must fail.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"sync"
	"syscall"
	"text/tabwriter"
	"time"
)

// suite is a set of checks that stands alone.
type suite struct {
	name string
	run  func(ctx context.Context, tell tell)
	// mutation is the rule that MUTATE=1 breaks, one that scripts/mutated-klamm knows; "": none.
	mutation string
	beside   bool // it runs beside the others, from the start
}

// tell takes up the result of a check, and what was measured, which may be empty.
type tell func(name, measured string, err error)

// suites are run in this order.
var suites = []suite{
	{name: "rotation", run: rotation, mutation: "renewal", beside: true},
	{name: "source", run: source},
	{name: "spire", run: spireSuite, mutation: "revocation"},
	{name: "processes", run: processes, mutation: "exec"},
	{name: "tokens", run: tokens, mutation: "audience"},
	{name: "tls", run: tlsClients, mutation: "impostor"},
	{name: "credentials", run: credentials, mutation: "agreement"},
	{name: "pods", run: podTokens},
	{name: "kubernetes", run: kubernetesSuite, mutation: "pod"},
}

// result is one check.
type result struct {
	suite, name string
	err         error
}

func main() {
	if len(os.Args) > 1 {
		if role, is := roles[os.Args[1]]; is {
			os.Exit(role(os.Args[2:]))
		}
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	results, err := verify(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "verify-identity:", err)
		os.Exit(2)
	}
	passed, failed := report(results)
	fmt.Printf("%d passed, %d failed\n", passed, failed)
	if failed > 0 || passed == 0 {
		os.Exit(1)
	}
}

// roles are what this program is when it is started by itself: a client, or the host next to a Kubernetes node.
var roles = map[string]func(args []string) int{
	"client": beClient, "leaf": beLeaf, "load": beLoad, "svid": fetchSVID, "watch": beWatcher, "inside": beInside,
	"podhost": bePods,
}

func verify(ctx context.Context, names []string) ([]result, error) {
	for _, name := range names {
		if !slices.ContainsFunc(suites, func(s suite) bool { return s.name == name }) {
			return nil, fmt.Errorf("no suite %q", name)
		}
	}
	l := &ledger{began: time.Now()}
	var beside sync.WaitGroup
	for _, s := range suites {
		switch {
		case len(names) > 0 && !slices.Contains(names, s.name):
		case s.beside:
			beside.Go(func() { l.run(ctx, s) })
		default:
			l.run(ctx, s)
		}
	}
	beside.Wait()
	return l.results, nil
}

// ledger has the results so far.
type ledger struct {
	began   time.Time
	mu      sync.Mutex
	results []result
}

func (l *ledger) run(ctx context.Context, s suite) {
	told := 0
	tell := func(name, measured string, err error) {
		told++
		l.add(result{s.name, name, err}, measured)
	}
	if os.Getenv("MUTATE") == "1" && s.mutation != "" {
		ctx = context.WithValue(ctx, mutationKey{}, s.mutation)
	}
	s.run(ctx, tell)
	if told == 0 {
		tell("it runs", "", errors.New("the suite told nothing"))
	}
	if ctx.Err() != nil {
		tell("it runs to its end", "", ctx.Err())
	}
}

func (l *ledger) add(r result, measured string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.results = append(l.results, r)
	fmt.Printf("%7s  %s\n", time.Since(l.began).Round(time.Second), line(r.suite+": "+r.name, measured, r.err))
}

// line is a result as it is printed: "pass  NAME" or "FAIL  NAME" and, on lines of its own, why.
func line(name, measured string, err error) string {
	if measured != "" {
		name += " [" + measured + "]"
	}
	if err != nil {
		return "FAIL  " + name + "\n" + err.Error()
	}
	return "pass  " + name
}

// mutationKey is the key of the rule that is broken.
type mutationKey struct{}

// mutation is the rule that is broken in a suite; "": none.
func mutation(ctx context.Context) string {
	name, _ := ctx.Value(mutationKey{}).(string)
	return name
}

// report prints a table of suites.
func report(results []result) (passed, failed int) {
	table := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprint(table, "\nsuite\tpassed\tfailed\n")
	for _, s := range suites {
		var p, f int
		for _, r := range results {
			switch {
			case r.suite != s.name:
			case r.err != nil:
				f++
			default:
				p++
			}
		}
		if p+f > 0 {
			fmt.Fprintf(table, "%s\t%d\t%d\n", s.name, p, f)
		}
		passed, failed = passed+p, failed+f
	}
	_ = table.Flush() // standard output: nobody is left to tell
	fmt.Println()
	return passed, failed
}

// check is one of a suite. It tells what it measured, if anything.
type check struct {
	name string
	run  func(ctx context.Context) (measured string, err error)
}

// runAll runs checks in their order, each on what the ones before it left.
func runAll(ctx context.Context, tell tell, checks []check) {
	for _, c := range checks {
		if ctx.Err() != nil {
			return
		}
		measured, err := c.run(ctx)
		tell(c.name, measured, err)
	}
}
