package main

import (
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestEndingsAreReadFromReportAndLog(t *testing.T) {
	dir := t.TempDir()
	const report = `{ "id": "1_bare", "tests": {"<MAIN>": {"name": "<MAIN>", "state": "PASSED", "report": [ ] }, ` +
		`"0001_a": {"name": "0001_a", "state": "PASSED", "duration": 1.5, "report": [ {"x": 1} ] }, ` +
		`"0001_d": {"name": "0001_d", "state": "FAILED", "report": [ ] }, ` +
		`"0001_b": {"name": "0001_b", "state": "SKIPPED", "report": [ ] }}, "tests_run": 1}`
	if err := os.WriteFile(filepath.Join(dir, reportFile), []byte(report), 0o600); err != nil {
		t.Fatal(err)
	}
	states, err := readReport(dir)
	if err != nil {
		t.Fatal(err)
	}
	const log = "\x1b[36m[0001_a                      /  0.000s] Setting test timeout to 30s\n" +
		"\x1b[31m### Test \"0001_d (part: 1)\" failed at d.c:12:check() at Thu Nov 26 00:14:59 2026: ###\nno\nreally\n" +
		"\x1b[0m\x1b[33m[0001_b                      /  0.000s] WARN: SKIPPING TEST: Not today\n\x1b[0m"
	for name, c := range map[string]struct {
		names     []string
		succeeded bool
		want      endings
	}{
		"all is well": {[]string{"0001_a", "0001_b"}, true,
			endings{"0001_a": {state: passed}, "0001_b": {skipped, "Not today"}}},
		"a test failed": {[]string{"0001_a", "0001_d"}, false,
			endings{"0001_a": {state: passed}, "0001_d": {failed, "d.c:12:check() no"}}},
		"no test failed, but the process": {[]string{"0001_a", "0001_b"}, false,
			endings{"0001_a": {state: aborted}, "0001_b": {state: aborted}}},
		"a test is not in the report": {[]string{"0001_c"}, true, endings{"0001_c": {state: aborted}}},
	} {
		t.Run(name, func(t *testing.T) {
			if ends := (group{"0001", c.names}).endings(states, []byte(log), c.succeeded); !maps.Equal(ends, c.want) {
				t.Errorf("%v, not %v", ends, c.want)
			}
		})
	}
}

func TestAProcessThatCrashedHasNoReport(t *testing.T) {
	if states, err := readReport(t.TempDir()); states != nil || err != nil {
		t.Errorf("%v, %v", states, err)
	}
}

func TestTestsAreComparedByTheWaysTheyEnd(t *testing.T) {
	ends := func(states string) (all []endings) {
		for state := range strings.FieldsSeq(states) {
			all = append(all, endings{"0001_a": {state: state}})
		}
		return all
	}
	for name, c := range map[string]struct {
		direct, node string
		differs      bool
	}{
		"alike":                                  {"PASSED", "PASSED", false},
		"both failed":                            {"FAILED", "FAILED", false},
		"differently":                            {"PASSED", "FAILED", true},
		"alike when run again":                   {"PASSED PASSED PASSED", "FAILED PASSED PASSED", false},
		"differently when run again":             {"PASSED PASSED PASSED", "FAILED PASSED FAILED", true},
		"in several ways on both paths":          {"PASSED FAILED PASSED", "FAILED PASSED FAILED", false},
		"by node well only at first":             {"FAILED PASSED FAILED", "PASSED FAILED FAILED", false},
		"in several ways direct, at first":       {"FAILED PASSED PASSED", "PASSED FAILED PASSED", false},
		"in several ways direct, well by node":   {"PASSED FAILED PASSED", "FAILED PASSED PASSED", false},
		"in several ways direct, in one by node": {"PASSED FAILED PASSED", "FAILED FAILED FAILED", true},
	} {
		t.Run(name, func(t *testing.T) {
			r := result{by: map[path][]endings{direct: ends(c.direct), node: ends(c.node)}}
			if got := r.differs("0001_a"); got != c.differs {
				t.Errorf("differs: %v", got)
			}
		})
	}
}

func TestTheReportCountsWhatRan(t *testing.T) {
	one := func(state, reason string) []endings { return []endings{{"0001_a": {state, reason}}} }
	for name, c := range map[string]struct {
		direct, node []endings
		want         count
		shows        string
	}{
		"passed on both paths":  {one(passed, ""), one(passed, ""), count{1, 0}, "equal"},
		"failed on both paths":  {one(failed, ""), one(failed, ""), count{0, 1}, "FAILED DIRECT TOO"},
		"aborted on both paths": {one(aborted, ""), one(aborted, ""), count{0, 1}, "ABORTED DIRECT TOO"},
		"skipped by the node":   {one(passed, ""), one(skipped, "no"), count{0, 1}, "DIFFERENT"},
		"skipped otherwise":     {one(skipped, "no"), one(skipped, "yes"), count{0, 1}, "DIFFERENT"},
		"skipped on both paths": {one(skipped, "no"), one(skipped, "no"), count{}, "not counted: no"},
		"left out by flags":     {one(skipped, unasked), one(skipped, unasked), count{}, "left out"},
		"failed direct only":    {one(failed, ""), nil, count{0, 1}, "direct only"},
		"passed direct only":    {one(passed, ""), nil, count{1, 0}, "direct only"},
	} {
		t.Run(name, func(t *testing.T) {
			r := result{group{"0001", []string{"0001_a"}}, map[path][]endings{direct: c.direct, node: c.node}}
			var out strings.Builder
			if got, err := report([]result{r}, "old", &out); got != c.want || err != nil {
				t.Errorf("%+v, %v", got, err)
			}
			if !strings.Contains(out.String(), c.shows) {
				t.Errorf("%q is not in\n%s", c.shows, &out)
			}
		})
	}
}

func TestWhatIsKnownOfATestIsNoFailure(t *testing.T) {
	for name, c := range map[string]struct {
		test, direct, node string
		want               count
		shows              string
	}{
		"it fails":         {"0077_compaction", failed, failed, count{}, "fails direct too: "},
		"it does not":      {"0077_compaction", passed, passed, count{1, 0}, "equal"},
		"only direct":      {"0077_compaction", failed, passed, count{}, "fails direct too: "},
		"only by node":     {"0077_compaction", passed, failed, count{0, 1}, "DIFFERENT"},
		"it hangs":         {"0077_compaction", aborted, aborted, count{}, "fails direct too: "},
		"it skips itself":  {"0077_compaction", skipped, skipped, count{}, ""},
		"klamm refuses it": {"0052_msg_timestamps", passed, failed, count{}, "not counted: klamm refuses Produce"},
		"nothing is known": {"0001_a", failed, failed, count{0, 1}, "FAILED DIRECT TOO"},
	} {
		t.Run(name, func(t *testing.T) {
			r := result{by: map[path][]endings{direct: {{c.test: {state: c.direct}}}, node: {{c.test: {state: c.node}}}}}
			if got, remark := r.verdict(c.test, "old"); got != c.want || !strings.Contains(remark, c.shows) {
				t.Errorf("%+v, %s", got, remark)
			}
		})
	}
}

func TestTheTotalIsOfWhatPassed(t *testing.T) {
	for c, ok := range map[count]bool{{1, 0}: true, {0, 0}: false, {0, 1}: false, {1, 1}: false} {
		if err := c.err(); (err == nil) != ok {
			t.Errorf("%+v: %v", c, err)
		}
	}
}
