package main

import (
	"maps"
	"strings"
	"testing"
)

func TestEndingsAreReadFromTheTestsOutput(t *testing.T) {
	const log = "\x16=== RUN   TestA\n\x16=== RUN   TestA/sub\n\x16--- PASS: TestA (0.00s)\n" +
		"    \x16--- SKIP: TestA/sub (0.00s)\n" +
		"\x16=== RUN   TestB\n\x16--- FAIL: TestB (0.00s)\n\x16=== RUN   TestC\npanic: test timed out\n"
	ends, err := parse(t.Context(), strings.NewReader(log))
	if err != nil {
		t.Fatal(err)
	}
	want := endings{"TestA": "pass", "TestA/sub": "skip", "TestB": "fail", "TestC": "unfinished"}
	if !maps.Equal(ends, want) {
		t.Errorf("%v, not %v", ends, want)
	}
	if _, err := parse(t.Context(), strings.NewReader("panic: before any test\n")); err == nil {
		t.Error("a run without tests is a result")
	}
}
