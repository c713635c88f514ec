package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"regexp"
	"slices"
	"strings"
	"text/tabwriter"
)

// reruns is how often a test that ended differently, or badly on both paths, runs again, without the others. Then only
// that counts through the node: it is to end in no way that it never ended direct, and to pass at times if it does so.
const reruns = 3

// path is the way to the brokers.
type path string

const (
	direct path = "direct"
	node   path = "node"
)

// outcomes is how each test ended each time, by name and path.
type outcomes map[string]map[path][]string

// count is of tests that ran: what is skipped on both paths shows nothing.
type count struct{ passed, failed int }

func (c *count) add(other count) { c.passed, c.failed = c.passed+other.passed, c.failed+other.failed }

func (c *count) err() error {
	switch {
	case c.failed > 0:
		return fmt.Errorf("%d tests end differently through the node, or badly direct", c.failed)
	case c.passed == 0:
		return errors.New("no test passed")
	}
	return nil
}

// compare runs the tests on both paths.
func (r *suiteRunner) compare(ctx context.Context, pattern string) (outcomes, error) {
	all := outcomes{}
	if err := r.runBoth(ctx, pattern, all); err != nil {
		return nil, err
	}
	for _, top := range all.doubtful() {
		for range reruns {
			if err := r.runBoth(ctx, "^"+regexp.QuoteMeta(top)+"$", all); err != nil {
				return nil, err
			}
		}
	}
	return all, nil
}

func (r *suiteRunner) runBoth(ctx context.Context, pattern string, all outcomes) error {
	d, err := r.run(ctx, pattern, false)
	if err != nil {
		return err
	}
	n, err := r.run(ctx, pattern, true)
	if err != nil {
		return err
	}
	all.add(map[path]endings{direct: d, node: n})
	return nil
}

// add takes up a run. Some tests skip themselves when they run without the others; that tells nothing.
func (o outcomes) add(run map[path]endings) {
	names := maps.Clone(run[direct])
	maps.Copy(names, run[node])
	for name := range names {
		switch before := o[name]; {
		case before == nil:
			o[name] = map[path][]string{}
		case run[direct][name] == skipped && before[direct][0] != skipped:
			continue
		}
		for by, ends := range run {
			o[name][by] = append(o[name][by], cmp.Or(ends[name], "absent"))
		}
	}
}

// doubtful are the tests at top level that show no pass, or have subtests that show none, though they should.
func (o outcomes) doubtful() []string {
	var tops []string
	for name := range o {
		if c, _ := o.verdict(name); c.failed > 0 {
			top, _, _ := strings.Cut(name, "/")
			tops = append(tops, top)
		}
	}
	slices.Sort(tops)
	return slices.Compact(tops)
}

// ways are the endings of a test, without the first one if it ran again.
func (o outcomes) ways(name string, by path) []string {
	runs := o[name][by]
	return runs[min(1, len(runs)-1):]
}

func (o outcomes) differs(name string) bool {
	foreign := func(end string) bool { return !slices.Contains(o[name][direct], end) }
	return slices.ContainsFunc(o.ways(name, node), foreign) ||
		slices.Contains(o.ways(name, direct), passed) && !slices.Contains(o[name][node], passed)
}

// verdict says what the endings of a test show. None is known to fail or to panic direct.
func (o outcomes) verdict(name string) (c count, remark string) {
	remark = "equal"
	if o[name][node] == nil {
		remark = "direct only"
	} else if o.differs(name) {
		return count{failed: 1}, "DIFFERENT"
	}
	ways := o.ways(name, direct)
	switch last := ways[len(ways)-1]; {
	case last != unfinished && slices.Contains(ways, passed):
		return count{passed: 1}, remark
	case last == skipped:
		return count{}, "not counted"
	default:
		return count{failed: 1}, remark + ", " + last + " DIRECT TOO"
	}
}

// report shows how each test ended.
func (o outcomes) report(kind string, out io.Writer) (total count, err error) {
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	row := func(columns ...string) {
		_, werr := fmt.Fprintln(table, strings.Join(columns, "\t"))
		err = errors.Join(err, werr)
	}
	row("broker", "test", string(direct), string(node), "")
	for _, name := range slices.Sorted(maps.Keys(o)) {
		c, remark := o.verdict(name)
		total.add(c)
		row(kind, name, strings.Join(o[name][direct], " "), strings.Join(o[name][node], " "), remark)
	}
	return total, errors.Join(err, table.Flush())
}
