//go:build !race

package kafka

import "testing"

// Not under the race detector, where sync.Pool forgets on purpose.
func TestTheSteadyStateAllocatesNothing(t *testing.T) {
	for name, c := range steadyCases() {
		t.Run(name, func(t *testing.T) {
			s := newSteady(t, ordersOnly, c[0], c[1])
			if n := testing.AllocsPerRun(200, func() { s.once(t) }); n != 0 {
				t.Errorf("%v allocations per request", n)
			}
		})
	}
}
