// Command clients runs foreign Kafka clients, unmodified and configured for the brokers only, through a node that
// redirects them, and prints a table of client by check. So it does with Apache Kafka's own applications, each with no
// more rights than it needs. It needs root, bin/klamm, and the root of the repository as working directory: make
// verify-clients.
//
// Environment: MUTATE=1 makes the policy grant what it must forbid, so that the run must fail. DIRECT=1
// starts no node, which tells what the clients do by themselves; the checks of refusal fail then.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"text/tabwriter"
	"time"
)

// sources is where this program's files are, seen from the root of the repository.
const sources = "test/clients"

// workers is how many clients and applications are checked at a time: enough to use the waits of each, on two cores.
const workers = 3

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	passed, failed, err := verify(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "verify-clients:", err)
		os.Exit(2)
	}
	fmt.Printf("%d passed, %d failed\n", passed, failed)
	if failed > 0 {
		os.Exit(1)
	}
}

// verify runs all checks and prints what they found. An error means that there was nothing to check against.
func verify(ctx context.Context) (passed, failed int, err error) {
	began := time.Now()
	r, err := newRig(ctx, os.Getenv("DIRECT") == "1", os.Getenv("MUTATE") == "1")
	if err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, r.close()) }()

	say := func(what string) { fmt.Printf("%6s  %s\n", time.Since(began).Round(time.Second), what) }
	sheets, programs := clientSheets(ctx, r), applicationSheets(ctx, r)
	watch := r.watchSockets(ctx)
	queue := make(chan *sheet)
	var all sync.WaitGroup
	for range workers {
		all.Go(func() {
			for s := range queue {
				s.run(ctx, r, s)
				say(s.name)
			}
		})
	}
	for _, s := range append(programs, sheets...) { // those that take longest first
		if s.obtained {
			queue <- s
		}
	}
	close(queue)
	all.Wait()
	say("a broker goes down and comes back")
	if err := outage(ctx, r, sheets); err != nil {
		return 0, 0, err
	}
	say("all brokers are restarted, one after the other")
	for _, s := range programs {
		if s.obtained && s.application.steady != nil {
			s.note(delivers, s.application.steady(ctx, r, s.application))
		}
	}
	suite := suiteChecks(ctx, r, watch)
	if err := ctx.Err(); err != nil {
		return 0, 0, err
	}
	passed, failed = report(sheets, programs, suite)
	fmt.Printf("took %s, logs in %s\n", time.Since(began).Round(time.Second), r.logs)
	return passed, failed, nil
}

// sheet is what the checks of one client or application found.
type sheet struct {
	name        string
	client      *client      // one of these two
	application *application //
	obtained    bool
	run         func(context.Context, *rig, *sheet) // the checks that need no broker to go down
	mu          sync.Mutex
	results     map[string]error // by check; a check that does not apply has none
}

// errNotApplicable is returned by a check of something the client does not do.
var errNotApplicable = errors.New("not applicable")

func (s *sheet) note(check string, err error) {
	if errors.Is(err, errNotApplicable) {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.results[check] = err
}

func clientSheets(ctx context.Context, r *rig) []*sheet {
	var sheets []*sheet
	for i := range clients {
		s := &sheet{name: clients[i].name, client: &clients[i], run: func(ctx context.Context, r *rig, s *sheet) {
			for _, c := range checks {
				s.note(c.name, c.run(ctx, r, s.client))
			}
		}}
		s.obtain(ctx, r, s.client.obtain, clientColumns())
		sheets = append(sheets, s)
	}
	return sheets
}

func applicationSheets(ctx context.Context, r *rig) []*sheet {
	var sheets []*sheet
	for i := range applications {
		s := &sheet{name: applications[i].name, application: &applications[i], run: runApplication}
		s.obtain(ctx, r, s.application.obtain, applicationColumns)
		sheets = append(sheets, s)
	}
	return sheets
}

// obtain obtains a client. One that cannot be obtained has failed every check.
func (s *sheet) obtain(ctx context.Context, r *rig, by func(context.Context, *rig) error, columns []string) {
	s.results = map[string]error{}
	err := by(ctx, r)
	s.obtained = err == nil
	for _, name := range columns {
		if err != nil {
			s.note(name, fmt.Errorf("it could not be obtained: %w", err))
		}
	}
}

func clientColumns() []string {
	var names []string
	for _, c := range checks {
		names = append(names, c.name)
	}
	return append(names, brokerDown)
}

type finding struct {
	name string
	err  error
}

// report prints the tables, what concerns the whole run, and the reason of each failure.
func report(clients, applications []*sheet, suite []finding) (passed, failed int) {
	var failures []finding
	count := func(name string, err error) string {
		if err != nil {
			failed++
			failures = append(failures, finding{name, err})
			return "FAIL"
		}
		passed++
		return "pass"
	}
	printTable("client", clientColumns(), clients, count)
	printTable("application", applicationColumns, applications, count)
	fmt.Println()
	for _, f := range suite {
		fmt.Printf("%s  %s\n", count(f.name, f.err), f.name)
	}
	for _, f := range failures {
		fmt.Printf("\nFAIL %s:\n%v\n", f.name, f.err)
	}
	fmt.Println()
	return passed, failed
}

// printTable prints one line for each sheet.
func printTable(of string, columns []string, sheets []*sheet, count func(string, error) string) {
	table := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprint(table, "\n", of)
	for _, name := range columns {
		fmt.Fprint(table, "\t", name)
	}
	for _, s := range sheets {
		fmt.Fprint(table, "\n", s.name)
		for _, name := range columns {
			cell := "-"
			if err, applies := s.results[name]; applies {
				cell = count(s.name+", "+name, err)
			}
			fmt.Fprint(table, "\t", cell)
		}
	}
	fmt.Fprintln(table)
	_ = table.Flush() // standard output: nobody is left to tell
}
