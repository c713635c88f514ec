// Package bounds fails a test in which a function takes more than its input is worth: memory and time are what a
// stranger's bytes may not buy.
package bounds

import (
	"runtime"
	"runtime/metrics"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// slack is what is allocated in any case, and what the runtime counts late: it looks at the objects of a size when
// their span is full.
const slack = 2 << 20

// mostCPU is far more than any input of a fuzzer's is worth, with its instrumentation on a busy machine.
var mostCPU = 10 * time.Second

// Check runs f, which may allocate perByte bytes for each byte of the input, and a little.
func Check(t testing.TB, input, perByte int, f func()) {
	t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	bytes, cpu := allocated(), consumed(t)
	f()
	if took := consumed(t) - cpu; took > mostCPU {
		t.Errorf("%d bytes of input took %v", input, took)
	}
	if took, most := allocated()-bytes, uint64(slack+input*perByte); took > most {
		t.Errorf("%d bytes of input took %d bytes of memory, more than %d", input, took, most)
	}
}

// allocated is what all goroutines have allocated until now, in bytes.
func allocated() uint64 {
	sample := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(sample)
	return sample[0].Value.Uint64()
}

// consumed is the CPU time of this thread.
func consumed(t testing.TB) time.Duration {
	var usage unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_THREAD, &usage); err != nil {
		t.Fatal(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}
