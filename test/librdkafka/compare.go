package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"text/tabwriter"
)

// reruns is how often tests that ended differently, or badly on both paths, run again. Then only that counts
// through the node: they are to end in no way that they never ended direct, and to pass at times if they do so.
const reruns = 3

// result is how the tests of a group ended each time.
type result struct {
	group
	by map[path][]endings
}

// count is of tests that ran: what is skipped on both paths, or fails on both, shows nothing.
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

// runAll runs all groups on these paths, the suite's number at a time.
func (s *suite) runAll(ctx context.Context, groups []group, paths ...path) ([]result, error) {
	results := make([]result, len(groups))
	for i, g := range groups {
		results[i] = result{g, map[path][]endings{}}
	}
	return results, s.runAgain(ctx, results, 0, paths...)
}

// runAgain runs all groups once more, each on one path after the other, because some see the topics of themselves on
// the other, and adds to the results how they ended.
func (s *suite) runAgain(ctx context.Context, results []result, attempt int, paths ...path) error {
	var mu sync.Mutex
	var failures []error
	var all sync.WaitGroup
	free := make(chan struct{}, s.parallel)
	for _, r := range results {
		free <- struct{}{}
		all.Go(func() {
			for _, by := range paths {
				ends, err := s.run(ctx, r.group, attempt, by)
				mu.Lock()
				r.by[by] = append(r.by[by], ends)
				failures = append(failures, err)
				mu.Unlock()
			}
			<-free
		})
	}
	all.Wait()
	return errors.Join(failures...)
}

// compare runs all groups on both paths, and those again in which a test does not end as it should.
func (s *suite) compare(ctx context.Context, groups []group) ([]result, error) {
	results, err := s.runAll(ctx, groups, direct, node)
	if err != nil {
		return nil, err
	}
	doubtful := slices.DeleteFunc(slices.Clone(results), func(r result) bool { return !r.doubtful(s.name) })
	for attempt := range reruns {
		if err := s.runAgain(ctx, doubtful, attempt+1, direct, node); err != nil {
			return nil, err
		}
	}
	return results, nil
}

// ways are the endings of a test. Where it failed is none of them: a test fails at another place when it is busy.
func (r *result) ways(name string, by path) []ending {
	var ways []ending
	for _, ends := range r.by[by] {
		end := ends[name]
		if end.state == failed {
			end.reason = ""
		}
		ways = append(ways, end)
	}
	return ways
}

// last is without the first one, if the test ran again.
func last(ways []ending) []ending { return ways[min(1, len(ways)-1):] }

// good is how a test should end.
var good = ending{state: passed}

func (r *result) differs(name string) bool {
	d, n := r.ways(name, direct), r.ways(name, node)
	foreign := func(end ending) bool { return !slices.Contains(d, end) }
	return slices.ContainsFunc(last(n), foreign) || slices.Contains(last(d), good) && !slices.Contains(n, good)
}

// states shows each ending of a test.
func (r *result) states(name string, by path) string {
	var all []string
	for _, ends := range r.by[by] {
		all = append(all, ends[name].state)
	}
	return strings.Join(all, " ")
}

// failure is where a test failed last.
func (r *result) failure(name string, by path) string {
	for _, ends := range slices.Backward(r.by[by]) {
		if end := ends[name]; end.state == failed {
			return end.reason
		}
	}
	return ""
}

// unasked is why the suite skips what its flags leave out: tests that need no broker, and those with known issues.
const unasked = "Filtered due to negative test flags"

// verdict says what the endings of a test show in a setting. Without remark there is nothing to show: the test is not
// of this scenario.
func (r *result) verdict(name, setting string) (c count, remark string) {
	ways := last(r.ways(name, direct))
	end, fails := ways[len(ways)-1], failsDirect[setting][name]
	bad := func(e ending) bool { return e.state == failed || e.state == aborted }
	remark = "equal"
	switch {
	case refused[setting][name] != "" && r.by[node] != nil:
		return count{}, "not counted: klamm refuses " + refused[setting][name]
	case fails != "" && slices.ContainsFunc(ways, bad):
		return count{}, "fails direct too: " + fails
	case r.by[node] == nil:
		remark = "direct only"
	case r.differs(name):
		return count{failed: 1}, "DIFFERENT"
	}
	switch {
	case end.state != aborted && slices.Contains(ways, good):
		return count{passed: 1}, remark
	case end.state == skipped && end.reason == "":
		return count{}, ""
	case end.state == skipped:
		return count{}, "not counted: " + end.reason
	}
	return count{failed: 1}, remark + ", " + end.state + " DIRECT TOO, which is not known of it"
}

func (r *result) doubtful(setting string) bool {
	return slices.ContainsFunc(r.names, func(name string) bool {
		c, _ := r.verdict(name, setting)
		return c.failed > 0
	})
}

// report shows how each test ended, and where those that failed, be it on both paths.
func report(results []result, setting string, out io.Writer) (total count, err error) {
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	row := func(columns ...string) {
		_, werr := fmt.Fprintln(table, strings.Join(columns, "\t"))
		err = errors.Join(err, werr)
	}
	var left, failures []string
	row("setting", "test", string(direct), string(node), "")
	for _, r := range results {
		for _, name := range r.names {
			c, remark := r.verdict(name, setting)
			switch {
			case remark == "":
				continue
			case strings.HasSuffix(remark, unasked):
				left = append(left, name)
				continue
			}
			total.add(c)
			row(setting, name, r.states(name, direct), r.states(name, node), remark)
			for _, by := range []path{direct, node} {
				if where := r.failure(name, by); where != "" {
					failures = append(failures, fmt.Sprintf("%s %s %s: %s", setting, name, by, where))
				}
			}
		}
	}
	if len(left) > 0 {
		row(setting, "left out by the suite's own flags: they need no broker, or have a known issue: "+
			strings.Join(left, " "))
	}
	err = errors.Join(err, table.Flush())
	for _, f := range failures {
		_, werr := fmt.Fprintln(out, f)
		err = errors.Join(err, werr)
	}
	return total, err
}
