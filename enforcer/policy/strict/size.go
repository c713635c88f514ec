package strict

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// Size is a number of bytes, at least 0: "4096", "100KB" (1000 bytes each) or "64MiB" (1024 × 1024 each).
type Size int64

var units = []struct {
	suffix string
	bytes  int64
}{ // longest first: every one of them ends in B
	{"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30}, {"TiB", 1 << 40},
	{"KB", 1e3}, {"MB", 1e6}, {"GB", 1e9}, {"TB", 1e12},
	{"B", 1}, {"", 1},
}

// UnmarshalText reads a size. Sizes beyond 8 EiB and fractions are errors.
func (s *Size) UnmarshalText(text []byte) error {
	for _, u := range units {
		digits, ok := strings.CutSuffix(string(text), u.suffix)
		if !ok {
			continue
		}
		n, err := strconv.ParseUint(digits, 10, 63)
		if err != nil || int64(n) > math.MaxInt64/u.bytes {
			break
		}
		*s = Size(int64(n) * u.bytes)
		return nil
	}
	return fmt.Errorf("%q is not a size: write it as 4096, 100KB or 64MiB", text)
}
