package main

import (
	"math/rand/v2"
	"slices"
)

func median(values []float64) float64 {
	s := slices.Sorted(slices.Values(values))
	if len(s)%2 == 1 {
		return s[len(s)/2]
	}
	return (s[len(s)/2-1] + s[len(s)/2]) / 2
}

// estimate is a median with its 95 % confidence interval.
type estimate struct{ median, low, high float64 }

// estimated takes the interval by bootstrap (percentiles of the medians of 10,000 samples with replacement). With few
// rounds it is little more than the range of the values.
func estimated(values []float64) estimate {
	const samples = 10_000
	random := rand.New(rand.NewPCG(1, 2)) // the same values give the same interval
	medians := make([]float64, samples)
	draw := make([]float64, len(values))
	for i := range medians {
		for j := range draw {
			draw[j] = values[random.IntN(len(values))]
		}
		medians[i] = median(draw)
	}
	slices.Sort(medians)
	return estimate{median(values), medians[samples*25/1000], medians[samples*975/1000]}
}
