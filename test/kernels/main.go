// Command kernels boots other Linux kernels in virtual machines, runs there the tests of what depends on the kernel,
// and prints a table of kernel by suite. It needs the root of the repository as working directory: make verify-kernels.
//
// Environment: MUTATE=1 builds the tests with one rule of the product broken, so that the run must fail.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"text/tabwriter"
	"time"

	"golang.org/x/sync/errgroup"
)

func main() {
	if err := run(os.Args[1:]); err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "kernels:", err)
		os.Exit(1)
	}
}

func run(args []string) (err error) {
	flags := flag.NewFlagSet("kernels", flag.ContinueOnError)
	cache := flags.String("cache", os.Getenv("KLAMM_CACHE"), "where scripts/setup put kernels and disks")
	only := flags.String("guest", "", "only these guests, separated by commas")
	suites := flags.String("suites", "", "only these suites, separated by commas")
	pattern := flags.String("run", "", "only tests that match, as in go test -run")
	if err := flags.Parse(args); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	dir, err := os.MkdirTemp("", "klamm-kernels-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	r := &report{out: os.Stdout}
	built := binaries{dir: filepath.Join(dir, "built"), flags: []string{"-trimpath", "-ldflags=-s -w"}}
	chosen := guests
	if os.Getenv("MUTATE") == "1" {
		chosen = mutated
		overlay, err := broken.overlay(dir)
		if err != nil {
			return err
		}
		built.flags = append(built.flags, overlay)
	}
	var booted errgroup.Group
	booted.SetLimit(workers)
	for _, k := range chosen {
		if *only != "" && !slices.Contains(strings.Split(*only, ","), k.name) {
			continue
		}
		if *suites != "" {
			k.suites = slices.DeleteFunc(slices.Clone(k.suites), func(s suite) bool {
				return !slices.Contains(strings.Split(*suites, ","), s.Name)
			})
		}
		if *pattern != "" {
			k.suites = matching(k.suites, *pattern)
		}
		files := filepath.Join(dir, k.name)
		if err := k.prepare(ctx, built, files); err != nil {
			return err
		}
		row := r.row(k.name)
		booted.Go(func() error { return k.verify(ctx, *cache, files, r, row) })
	}
	if len(r.rows) == 0 {
		return fmt.Errorf("there is no guest %q", *only)
	}
	if err := booted.Wait(); err != nil {
		return err
	}
	for _, arch := range architectures {
		r.check("GOARCH="+arch+" builds", goCommand(ctx, arch, "build", "-o", filepath.Join(dir, arch), "./cmd/klamm"))
	}
	r.print()
	if r.failed > 0 {
		return fmt.Errorf("%d failed", r.failed)
	}
	return nil
}

// workers is how many guests run at a time: one for each core of a small machine.
const workers = 2

// architectures are all that must build, booted or not.
var architectures = []string{"amd64", "arm64"}

// verify boots one guest and takes down how its suites ended.
func (k *kind) verify(ctx context.Context, cache, files string, r *report, row *row) error {
	kernel := filepath.Join(cache, "kernels", k.kernel)
	modules, err := os.ReadDir(filepath.Join(kernel, "lib/modules"))
	if err != nil {
		return fmt.Errorf("find the kernel (scripts/setup kernels fetches it): %w", err)
	}
	g := guest{kernel: kernel, files: files, log: files + ".log", append: k.append,
		note: func(suite, test, end string) { r.line(k.name, suite, end, test) }}
	if k.disk != "" {
		g.disk = filepath.Join(cache, k.disk)
		g.append = append(g.append, "KLAMM_DISK=/dev/vda")
	}
	began := time.Now()
	ends, err := g.boot(ctx, k.suites)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	row.release, row.took = modules[0].Name(), time.Since(began).Round(time.Second)
	for _, s := range k.suites {
		r.take(row, s, ends[s.Name])
	}
	if err != nil {
		r.fail("%s: %v", k.name, err)
	}
	return nil
}

// report is the table and what is said below it.
type report struct {
	out             io.Writer
	mu              sync.Mutex // of all below, while guests run
	rows            []*row
	passed, failed  int
	notes, failures []string
}

type row struct {
	name, release string
	took          time.Duration
	cells         map[string]string // by suite
}

func (r *report) row(name string) *row {
	added := &row{name: name, cells: map[string]string{}}
	r.rows = append(r.rows, added)
	return added
}

func (r *report) line(columns ...string) {
	_, _ = fmt.Fprintln(r.out, strings.Join(columns, "  ")) // standard output: nobody is left to tell
}

func (r *report) fail(format string, args ...any) {
	r.failed++
	r.failures = append(r.failures, fmt.Sprintf(format, args...))
}

func (r *report) check(what string, err error) {
	if err != nil {
		r.fail("%s: %v", what, err)
		r.line("fail", what)
		return
	}
	r.passed++
	r.line("pass", what)
}

// take counts how a suite ended; one that never did has failed, and so has one that lacks its reason.
func (r *report) take(row *row, s suite, e *ended) {
	if e == nil {
		row.cells[s.Name] = "FAIL"
		r.fail("%s, %s: it did not run", row.name, s.Name)
		return
	}
	for line := range strings.Lines(e.output.String()) {
		if slices.ContainsFunc(measured, func(text string) bool { return strings.Contains(line, text) }) {
			r.notes = append(r.notes, fmt.Sprintf("%s, %s: %s", row.name, s.Name, strings.TrimSpace(line)))
		}
	}
	if s.pkg == "" {
		err := s.judge(e)
		row.cells[s.Name] = map[bool]string{true: s.cell(), false: "FAIL"}[err == nil]
		r.check(fmt.Sprintf("%s, %s (%s)", row.name, s.Name, e.took), err)
		return
	}
	count := map[string]int{}
	for _, name := range slices.Sorted(maps.Keys(e.tests)) {
		end := e.tests[name]
		count[end]++
		switch end {
		case "pass":
			r.passed++
		case "skip":
			r.notes = append(r.notes, fmt.Sprintf("%s, %s: skipped %s", row.name, s.Name, name))
		default:
			r.failed++
		}
	}
	bad := count["fail"] + count["unfinished"]
	cell := fmt.Sprintf("%d pass", count["pass"])
	if n := count["skip"]; n > 0 {
		cell += fmt.Sprintf(", %d skip", n)
	}
	if bad > 0 {
		cell += fmt.Sprintf(", %d FAIL", bad)
	} else if e.exit != 0 || count["pass"] == 0 {
		r.failed++
		bad, cell = 1, "FAIL"
	}
	if bad > 0 {
		r.failures = append(r.failures, fmt.Sprintf("%s, %s: exit code %d\n%s", row.name, s.Name, e.exit, e.output.String()))
	}
	row.cells[s.Name] = cell + " " + e.took
}

// print ends with the line that everybody looks for.
func (r *report) print() {
	var names []string
	for _, row := range r.rows {
		for _, name := range slices.Sorted(maps.Keys(row.cells)) {
			if !slices.Contains(names, name) {
				names = append(names, name)
			}
		}
	}
	table := tabwriter.NewWriter(r.out, 0, 0, 2, ' ', 0)
	r.line("")
	_, _ = fmt.Fprintf(table, "guest\tkernel\t%s\ttook\n", strings.Join(names, "\t"))
	for _, row := range r.rows {
		_, _ = fmt.Fprintf(table, "%s\t%s", row.name, row.release)
		for _, name := range names {
			cell, ran := row.cells[name]
			if !ran {
				cell = "-"
			}
			_, _ = fmt.Fprint(table, "\t", cell)
		}
		_, _ = fmt.Fprintf(table, "\t%s\n", row.took)
	}
	_ = table.Flush()
	for _, e := range exceptions {
		r.notes = append(r.notes, fmt.Sprintf("not run, %s: %s: %s", e.suite, e.tests, e.reason))
	}
	r.line("\n" + strings.Join(r.notes, "\n"))
	for _, text := range r.failures {
		r.line("\n" + text)
	}
	r.line(fmt.Sprintf("\n%d passed, %d failed", r.passed, r.failed))
}
