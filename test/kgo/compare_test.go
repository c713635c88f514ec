package main

import (
	"slices"
	"strings"
	"testing"
)

// play is an outcome of the test TestA, of runs that are given as "direct/node".
func play(runs ...string) outcomes {
	all := outcomes{}
	for _, run := range runs {
		d, n, both := strings.Cut(run, "/")
		ends := map[path]endings{direct: {"TestA": d}}
		if both {
			ends[node] = endings{"TestA": n}
		}
		all.add(ends)
	}
	return all
}

func TestTestsAreComparedByTheWaysTheyEnd(t *testing.T) {
	for name, c := range map[string]struct {
		runs  []string
		want  count
		shows string
	}{
		"alike":                        {[]string{"pass/pass"}, count{1, 0}, "equal"},
		"differently":                  {[]string{"pass/fail"}, count{0, 1}, "DIFFERENT"},
		"skipped by the node":          {[]string{"pass/skip"}, count{0, 1}, "DIFFERENT"},
		"skipped on both paths":        {[]string{"skip/skip"}, count{}, "not counted"},
		"alike when run again":         {[]string{"pass/fail", "pass/pass", "pass/pass"}, count{1, 0}, "equal"},
		"one of several runs differs":  {[]string{"pass/fail", "pass/pass", "pass/fail"}, count{0, 1}, "DIFFERENT"},
		"unstable on both paths":       {[]string{"pass/fail", "fail/pass", "pass/fail"}, count{1, 0}, "equal"},
		"unstable direct only":         {[]string{"pass/fail", "fail/pass", "pass/pass"}, count{1, 0}, "equal"},
		"unstable direct, never by it": {[]string{"pass/fail", "fail/fail", "pass/fail"}, count{0, 1}, "DIFFERENT"},
		"unstable direct at first":     {[]string{"fail/pass", "pass/fail", "pass/pass"}, count{1, 0}, "equal"},
		"skipped when run alone":       {[]string{"pass/fail", "skip/skip", "skip/skip"}, count{0, 1}, "DIFFERENT"},
		"failed on both paths":         {[]string{"fail/fail"}, count{0, 1}, "fail DIRECT TOO"},
		"unfinished on both paths":     {[]string{"unfinished/unfinished"}, count{0, 1}, "unfinished DIRECT TOO"},
		"unfinished at the last run": {[]string{"pass/fail", "pass/pass", "unfinished/unfinished"},
			count{0, 1}, "unfinished DIRECT TOO"},
		"passed direct only": {[]string{"pass"}, count{1, 0}, "direct only"},
		"failed direct only": {[]string{"fail"}, count{0, 1}, "direct only"},
	} {
		t.Run(name, func(t *testing.T) {
			got, remark := play(c.runs...).verdict("TestA")
			if got != c.want || !strings.Contains(remark, c.shows) {
				t.Errorf("%+v, %s", got, remark)
			}
		})
	}
}

func TestWhatIsInDoubtIsFoundByTheTestAtTopLevel(t *testing.T) {
	all := outcomes{}
	all.add(map[path]endings{
		direct: {"TestA": "pass", "TestA/x": "pass", "TestA/y": "pass", "TestB": "skip", "TestC": "pass", "TestD": "fail"},
		node:   {"TestA": "pass", "TestA/x": "fail", "TestA/y": "fail", "TestB": "skip", "TestD": "fail"},
	})
	if got := all.doubtful(); !slices.Equal(got, []string{"TestA", "TestC", "TestD"}) {
		t.Errorf("%v", got)
	}
}

func TestTheTotalIsOfWhatRan(t *testing.T) {
	for name, c := range map[string]struct {
		runs outcomes
		ok   bool
	}{
		"a pass":  {play("pass/pass"), true},
		"a skip":  {play("skip/skip"), false},
		"unequal": {play("pass/fail"), false},
		"nothing": {outcomes{}, false},
	} {
		t.Run(name, func(t *testing.T) {
			var out strings.Builder
			total, err := c.runs.report("kafka", &out)
			if err != nil {
				t.Fatal(err)
			}
			if err := total.err(); (err == nil) != c.ok {
				t.Errorf("%+v: %v\n%s", total, err, &out)
			}
		})
	}
}
