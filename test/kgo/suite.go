package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"text/tabwriter"

	"klamm/test/kafka"
)

// suiteRunner runs the tests against one broker.
type suiteRunner struct {
	binary  string
	records int
	seeds   string
	logs    string      // directory
	through kafka.Place // where a process is redirected to the node
}

// endings is how each test ended: pass, fail or skip, by name. Subtests are tests of their own.
type endings map[string]string

// event is one line of go tool test2json.
type event struct{ Action, Test string }

// run runs the tests that match. That some fail is a result and no error.
func (r *suiteRunner) run(ctx context.Context, pattern string, through bool) (endings, error) {
	test := exec.CommandContext(ctx, r.binary, "-test.v=test2json", "-test.timeout", "5m", "-test.run", pattern)
	test.Dir = filepath.Dir(r.binary)
	test.Env = append(os.Environ(), "KGO_SEEDS="+r.seeds, "KGO_TEST_RF=1", "KGO_LOG_LEVEL=none",
		fmt.Sprintf("KGO_TEST_RECORDS=%d", r.records))
	log, err := os.CreateTemp(r.logs, "log-")
	if err != nil {
		return nil, err
	}
	defer func() { _ = log.Close() }()
	test.Stdout, test.Stderr = log, log
	place := kafka.Place{}
	if through {
		place = r.through
	}
	if err := place.Start(test); err != nil {
		return nil, err
	}
	var failed *exec.ExitError
	if err := test.Wait(); err != nil && !errors.As(err, &failed) || ctx.Err() != nil {
		return nil, errors.Join(ctx.Err(), err)
	}
	if _, err := log.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	ends, err := parse(ctx, log)
	if err != nil {
		return nil, fmt.Errorf("%w\n%s", err, end(log))
	}
	return ends, nil
}

// end is the last of a log.
func end(log *os.File) []byte {
	const most = 2000
	size, err := log.Seek(0, io.SeekEnd)
	if err != nil {
		return nil
	}
	tail := make([]byte, min(size, most))
	n, _ := log.ReadAt(tail, size-int64(len(tail))) // what it could read
	return tail[:n]
}

func parse(ctx context.Context, log io.Reader) (endings, error) {
	convert := exec.CommandContext(ctx, "go", "tool", "test2json")
	convert.Stdin = log
	events, err := convert.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := convert.Start(); err != nil {
		return nil, err
	}
	ends := endings{}
	for decoder := json.NewDecoder(events); ; {
		var e event
		if err := decoder.Decode(&e); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, errors.Join(err, convert.Wait())
		}
		if e.Test == "" {
			continue
		}
		switch e.Action {
		case "run":
			ends[e.Test] = "unfinished" // of a run that panicked or was out of time
		case "pass", "fail", "skip":
			ends[e.Test] = e.Action
		}
	}
	if len(ends) == 0 {
		return nil, errors.Join(errors.New("no test ran"), convert.Wait())
	}
	return ends, convert.Wait()
}

// maxReruns is how often a test that ended differently runs again, without the others, on both sides: one that is not
// stable direct proves nothing.
const maxReruns = 2

// compare runs the tests direct and through the node.
func (r *suiteRunner) compare(
	ctx context.Context, pattern, kind string, out io.Writer,
) (passed, failed int, err error) {
	direct, err := r.run(ctx, pattern, false)
	if err != nil {
		return 0, 0, err
	}
	through, err := r.run(ctx, pattern, true)
	if err != nil {
		return 0, 0, err
	}
	reruns := map[string]int{}
	for _, top := range differing(direct, through) {
		for ; reruns[top] < maxReruns && slices.Contains(differing(direct, through), top); reruns[top]++ {
			if err := r.again(ctx, top, direct, through); err != nil {
				return 0, 0, err
			}
		}
	}

	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	defer func() { err = errors.Join(err, table.Flush()) }()
	row := func(columns ...any) {
		_, werr := fmt.Fprintf(table, strings.Repeat("%v\t", len(columns))+"\n", columns...)
		err = errors.Join(err, werr)
	}
	row("broker", "test", "direct", "node", "")
	for _, name := range both(direct, through) {
		verdict := "equal"
		if direct[name] == through[name] {
			passed++
		} else {
			verdict = "DIFFERENT"
			failed++
		}
		if n := reruns[topLevel(name)]; n > 0 {
			verdict += fmt.Sprintf(", reruns: %d", n)
		}
		row(kind, name, direct[name], through[name], verdict)
	}
	return passed, failed, err
}

func topLevel(name string) string {
	top, _, _ := strings.Cut(name, "/")
	return top
}

// both are the names of either side, sorted.
func both(a, b endings) []string {
	names := maps.Clone(a)
	maps.Copy(names, b)
	return slices.Sorted(maps.Keys(names))
}

// differing are the tests at top level that do not end alike, subtests included.
func differing(a, b endings) []string {
	var tops []string
	for _, name := range both(a, b) {
		if top := topLevel(name); a[name] != b[name] && !slices.Contains(tops, top) {
			tops = append(tops, top)
		}
	}
	return tops
}

// again runs one test on both sides and takes up how it and its subtests end now. Some skip themselves when they run
// without the others; that tells nothing, and the earlier ends stand.
func (r *suiteRunner) again(ctx context.Context, top string, direct, through endings) error {
	pattern := "^" + regexp.QuoteMeta(top) + "$"
	d, err := r.run(ctx, pattern, false)
	if err != nil {
		return err
	}
	t, err := r.run(ctx, pattern, true)
	if err != nil {
		return err
	}
	for _, name := range both(d, t) {
		if d[name] != "skip" || direct[name] == "skip" {
			direct[name], through[name] = d[name], t[name]
		}
	}
	return nil
}

// list shows how each test ended.
func (e endings) list(out io.Writer, kind string) (passed, failed int) {
	for _, name := range slices.Sorted(maps.Keys(e)) {
		if e[name] == "fail" || e[name] == "unfinished" {
			failed++
		} else {
			passed++
		}
		_, _ = fmt.Fprintln(out, kind, name, e[name])
	}
	return passed, failed
}
