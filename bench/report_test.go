package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// measured is two rounds of one load.
func measured() *results {
	cells := func(p50, cpu float64) []cell {
		return []cell{{P50: p50, CPUPerMB: cpu}, {P50: p50 + 1, CPUPerMB: cpu}}
	}
	return &results{
		Variants: []string{direct, bareRelay, hashRelay, klammItself},
		Cells: map[string]map[string][]cell{"20k": {
			direct: cells(1, 0), bareRelay: cells(1.5, 2), hashRelay: cells(1.5, 4), klammItself: cells(2, 5),
		}},
		Memory: map[string]int64{klammItself: 30e6},
	}
}

func TestAReportComparesWithinRounds(t *testing.T) {
	text := measured().markdown()
	for _, want := range []string{
		"20,000 msg/s, p50 added to direct, ms | – | 0.50 (0.50 to 0.50) | 0.50 (0.50 to 0.50) | 1.00 (1.00 to 1.00) |",
		"| produce at 20,000 msg/s, CPU-ms per MB | – | 2.00 (2.00 to 2.00) | 4.00 (4.00 to 4.00) | 5.00 (5.00 to 5.00) |",
		"| CPU per MB, 20,000 msg/s, klamm ÷ hashing relay | 1.25 | 1.25 to 1.25 |",
		"| added p50, 20,000 msg/s, klamm ÷ bare relay | 2.00 | 2.00 to 2.00 |",
		"| resident memory at most, MB | – | 0 | 0 | 30 |",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no line %q in\n%s", want, text)
		}
	}
}

func TestARatioToNothingIsNotShown(t *testing.T) {
	r := measured()
	r.Cells["20k"][bareRelay] = r.Cells["20k"][direct]
	if text := r.markdown(); !strings.Contains(text, "klamm ÷ bare relay | – | the bare relay adds nothing") {
		t.Error(text)
	}
}

func TestAnUpdateReplacesWhatStandsBetweenTheMarkers(t *testing.T) {
	file := filepath.Join(t.TempDir(), "performance.md")
	if err := os.WriteFile(file, []byte("before\n"+beginMark+"old\n"+endMark+"\nafter\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := measured().update(file); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	want := "before\n" + beginMark + "\n" + measured().markdown() + "\n" + endMark + "\nafter\n"
	if string(text) != want {
		t.Errorf("%s", text)
	}
	if err := os.WriteFile(file, []byte("no markers"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := measured().update(file); err == nil {
		t.Error("a file without markers was updated")
	}
}

func TestAnIntervalHoldsTheMedianAndStaysWithinTheValues(t *testing.T) {
	for _, values := range [][]float64{{1}, {1, 2}, {5, 1, 3}, {1, 1, 1, 9, 9}, {4, 3, 2, 1, 0, -1}} {
		e := estimated(values)
		if e.low > e.median || e.median > e.high || e.low < min(values[0], values[len(values)-1], 1) || e.high > 9 {
			t.Errorf("%v: %+v", values, e)
		}
	}
	if m := median([]float64{4, 1, 3, 2}); m != 2.5 {
		t.Errorf("the median is %v", m)
	}
}
