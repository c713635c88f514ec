package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// machine is where the run was made.
type machine struct {
	CPU    string `json:"cpu"`
	Cores  int    `json:"cores"`
	Kernel string `json:"kernel"`
	Go     string `json:"go"`
	Date   string `json:"date"`
}

func thisMachine() (machine, error) {
	m := machine{Cores: runtime.NumCPU(), Go: runtime.Version(), Date: time.Now().UTC().Format(time.DateOnly)}
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return m, err
	}
	m.Kernel = unix.ByteSliceToString(name.Release[:])
	info, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return m, err
	}
	for line := range strings.Lines(string(info)) {
		if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == "model name" {
			m.CPU = strings.TrimSpace(value)
			break
		}
	}
	return m, nil
}

func (r *results) writeJSON(w io.Writer) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(r)
}

// quantity is a row of the first table.
type quantity struct {
	title  string
	of     func(cell) float64
	format string
	added  bool // over direct, in the same round
	open   bool // it belongs to loads at a rate
	closed bool // it belongs to closed loops
}

var quantities = []quantity{
	{title: "p50, ms", of: p50, format: "%.2f", open: true},
	{title: "p50 added to direct, ms", of: p50, format: "%.2f", added: true, open: true},
	{title: "p99, ms", of: func(c cell) float64 { return c.P99 }, format: "%.1f", open: true},
	{title: "MB/s", of: speed, format: "%.0f", closed: true},
	{title: "CPU-ms per MB", of: perMB, format: "%.2f", added: true, open: true, closed: true}, // of direct it is 0
}

func perMB(c cell) float64 { return c.CPUPerMB }
func speed(c cell) float64 { return c.MBs }
func p50(c cell) float64   { return c.P50 }

// comparison is a row of the second table: a ratio of two variants, taken in each round.
type comparison struct {
	title, load, over string
	of                func(cell) float64
	added             bool // what is added over direct is compared
	goal              string
}

var comparisons = []comparison{
	{"CPU per MB, produce, klamm ÷ hashing relay", "produce", hashRelay, perMB, false, "≤ 1.25"},
	{"CPU per MB, produce and consume, klamm ÷ hashing relay", "both", hashRelay, perMB, false, "≤ 1.25"},
	{"CPU per MB, 5,000 msg/s, klamm ÷ hashing relay", "5k", hashRelay, perMB, false, ""},
	{"CPU per MB, 20,000 msg/s, klamm ÷ hashing relay", "20k", hashRelay, perMB, false, ""},
	{"CPU per MB, produce and consume, klamm ÷ bare relay", "both", bareRelay, perMB, false, ""},
	{"MB/s, produce, klamm ÷ hashing relay", "produce", hashRelay, speed, false, "≥ 0.95"},
	{"MB/s, produce and consume, klamm ÷ hashing relay", "both", hashRelay, speed, false, "≥ 0.95"},
	{"MB/s, produce and consume, klamm ÷ direct", "both", direct, speed, false, ""},
	{"added p50, 5,000 msg/s, klamm ÷ bare relay", "5k", bareRelay, p50, true, "≤ 1.25"},
	{"added p50, 20,000 msg/s, klamm ÷ bare relay", "20k", bareRelay, p50, true, "≤ 1.25"},
}

// values are what a variant measured, one per round; added is over direct.
func (r *results) values(load, variant string, of func(cell) float64, added bool) []float64 {
	var values []float64
	for round, c := range r.Cells[load][variant] {
		v := of(c)
		if added {
			v -= of(r.Cells[load][direct][round])
		}
		values = append(values, v)
	}
	return values
}

func (r *results) markdown() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s, %d cores, Linux %s, %s, %s. Broker: %s. %d rounds, %s per load. "+
		"Medians with 95 %% confidence intervals.\n\n",
		r.Machine.CPU, r.Machine.Cores, r.Machine.Kernel, r.Machine.Go, r.Machine.Date, r.Broker, r.Rounds, r.Measured)
	r.quantities(&b)
	r.comparisons(&b)
	b.WriteString(r.Connects.sentence())
	b.WriteString(identitySentences(r.Identity))
	return b.String()
}

func (r *results) quantities(b *strings.Builder) {
	fmt.Fprintf(b, "| | %s |\n|---%s|\n", strings.Join(r.Variants, " | "), strings.Repeat("|---", len(r.Variants)))
	for _, l := range loads {
		for _, q := range quantities {
			if len(r.Cells[l.name]) == 0 || l.rate > 0 && !q.open || l.rate == 0 && !q.closed {
				continue
			}
			fmt.Fprintf(b, "| %s, %s |", l.title, q.title)
			for _, v := range r.Variants {
				if q.added && v == direct {
					b.WriteString(" – |")
					continue
				}
				e := estimated(r.values(l.name, v, q.of, q.added))
				fmt.Fprintf(b, " "+q.format+" ("+q.format+" to "+q.format+") |", e.median, e.low, e.high)
			}
			b.WriteString("\n")
		}
	}
	b.WriteString("| resident memory at most, MB | – |")
	for _, v := range r.Variants[1:] {
		fmt.Fprintf(b, " %.0f |", float64(r.Memory[v])/1e6)
	}
	b.WriteString("\n")
}

func (r *results) comparisons(b *strings.Builder) {
	b.WriteString("\n| ratio, by round | median | 95 % | aim |\n|---|---|---|---|\n")
	for _, c := range comparisons {
		ours := r.values(c.load, klammItself, c.of, c.added)
		theirs := r.values(c.load, c.over, c.of, c.added)
		if len(ours) == 0 {
			continue
		}
		if estimated(theirs).low <= 0 { // a ratio to what may be nothing says nothing
			fmt.Fprintf(b, "| %s | – | the %s adds nothing that can be told from noise | %s |\n", c.title, c.over, c.goal)
			continue
		}
		e := estimated(ratios(ours, theirs))
		fmt.Fprintf(b, "| %s | %.2f | %.2f to %.2f | %s |\n", c.title, e.median, e.low, e.high, c.goal)
	}
}

func (c *connects) sentence() string {
	var programs []string
	for _, name := range slices.Sorted(maps.Keys(c.Programs)) {
		programs = append(programs, fmt.Sprintf("%s %.0f ns", name, c.Programs[name]))
	}
	return fmt.Sprintf("\nconnect(2) takes %.1f µs directly and %.1f µs redirected; to a port that is no broker's "+
		"%.1f µs, and %.1f µs where a redirect is attached. A byte there and back by such a connection takes %.2f µs, and "+
		"%.2f µs where the second line looks at its packets. From the first socket of a network namespace to a redirected "+
		"connect it takes %.0f µs. One run of an eBPF program: %s.\n",
		c.Direct, c.Redirected, c.Foreign, c.ForeignRedirected, c.RoundTrip, c.RoundTripAttached, c.Enrolment,
		strings.Join(programs, ", "))
}

// ratios divides what was measured in the same round.
func ratios(ours, theirs []float64) []float64 {
	all := make([]float64, len(ours))
	for i := range ours {
		all[i] = ours[i] / theirs[i]
	}
	return all
}

const (
	beginMark = "<!-- bench: begin -->\n"
	endMark   = "<!-- bench: end -->"
)

// update replaces what stands between the markers of a file.
func (r *results) update(file string) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	before, rest, ok := bytes.Cut(text, []byte(beginMark))
	_, after, found := bytes.Cut(rest, []byte(endMark))
	if !ok || !found {
		return errors.New(file + ": no markers " + strings.TrimSpace(beginMark) + " and " + endMark)
	}
	out := slices.Concat(before, []byte(beginMark+"\n"+r.markdown()+"\n"+endMark), after)
	return os.WriteFile(file, out, 0o644)
}
