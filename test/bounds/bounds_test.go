package bounds

import (
	"testing"
	"time"
)

// failures counts instead of failing.
type failures struct {
	testing.TB
	n int
}

func (f *failures) Errorf(string, ...any) { f.n++ }

var sink []byte

func TestWhatAnInputIsNotWorthFails(t *testing.T) {
	mostCPU = 200 * time.Millisecond
	for name, c := range map[string]struct {
		f    func()
		want int
	}{
		"nothing":          {func() {}, 0},
		"what it is worth": {func() { sink = make([]byte, 1<<20) }, 0},
		"more memory":      {func() { sink = make([]byte, 8<<20) }, 1},
		"more memory in small pieces": {func() {
			for range 1 << 16 {
				sink = make([]byte, 128)
			}
		}, 1},
		"more time": {func() {
			for begin := consumed(t); consumed(t)-begin < mostCPU+100*time.Millisecond; {
			}
		}, 1},
	} {
		counted := &failures{TB: t}
		if Check(counted, 1<<10, 1<<10, c.f); counted.n != c.want {
			t.Errorf("%s: %d failures, want %d", name, counted.n, c.want)
		}
	}
}
