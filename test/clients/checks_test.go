package main

import (
	"encoding/binary"
	"testing"

	"github.com/twmb/franz-go/pkg/kgo"
)

// What the applications' checks are for must make them fail.

func TestOfTwoAcknowledgedRecords(t *testing.T) {
	values := map[at]string{{0, 5}: "a", {0, 6}: "b"}
	a, b := event{Partition: 0, Offset: 5, Value: "a"}, event{Partition: 0, Offset: 6, Value: "b"}
	for name, test := range map[string]struct {
		consumed []event
		ordered  bool
		ok       bool
	}{
		"both are consumed in order":                    {[]event{a, b}, true, true},
		"both are consumed in another order":            {[]event{b, a}, true, false},
		"both are consumed in another order, as may be": {[]event{b, a}, false, true},
		"one is lost": {[]event{a}, true, false},
		"one is consumed twice and the other lost":       {[]event{a, a}, false, false},
		"one is consumed twice":                          {[]event{a, b, b}, false, false},
		"one is consumed with another value":             {[]event{a, {Offset: 6, Value: "c"}}, true, false},
		"one is consumed where it was not acknowledged":  {[]event{a, {Offset: 7, Value: "b"}}, true, false},
		"one is consumed from where the other was":       {[]event{a, {Offset: 5, Value: "b"}}, true, false},
		"one is consumed from a partition it was not in": {[]event{a, {Partition: 1, Offset: 6, Value: "b"}}, true, false},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := consumed(values, test.consumed, test.ordered); (err == nil) != test.ok {
				t.Error(err)
			}
		})
	}
}

func TestACopy(t *testing.T) {
	given := written(t, "a", "b", "c")
	for name, test := range map[string]struct {
		made []*kgo.Record
		ok   bool
	}{
		"is complete":             {written(t, "a", "b", "c"), true},
		"lost the last":           {written(t, "a", "b"), false},
		"lost one in the middle":  {written(t, "a", "c"), false},
		"has one twice":           {written(t, "a", "b", "b", "c"), false},
		"has two in another way":  {written(t, "b", "a", "c"), false},
		"has one it was not told": {written(t, "a", "b", "c", "d"), false},
	} {
		t.Run(name, func(t *testing.T) {
			if err := sameRecords(given, test.made); (err == nil) != test.ok {
				t.Error(err)
			}
		})
	}
}

func written(t *testing.T, values ...string) (all []*kgo.Record) {
	t.Helper()
	for i, value := range values {
		all = append(all, &kgo.Record{Offset: int64(i), Value: []byte(value)})
	}
	return all
}

func TestTwoWordsOfWhichOneIsThereTwice(t *testing.T) {
	words := []string{"a", "b", "a"}
	type count struct {
		word string
		n    uint64
	}
	a1, a2, a3, b1, c1 := count{"a", 1}, count{"a", 2}, count{"a", 3}, count{"b", 1}, count{"c", 1}
	for name, test := range map[string]struct {
		counts []count
		ok     bool
	}{
		"are counted once":                  {[]count{a1, b1, a2}, true},
		"are counted from the start again":  {[]count{a1, b1, a2, b1, a1, a2}, false},
		"are counted, and another":          {[]count{a1, b1, a2, c1}, false},
		"are counted, but one":              {[]count{a1, b1}, false},
		"are counted, but one never":        {[]count{a1, a2}, false},
		"are counted, one of them twice":    {[]count{a1, b1, a2, a3}, false},
		"are counted, one of them told two": {[]count{a1, b1, a2, a2}, false},
	} {
		t.Run(name, func(t *testing.T) {
			var all []*kgo.Record
			for _, c := range test.counts {
				all = append(all, &kgo.Record{Key: []byte(c.word), Value: binary.BigEndian.AppendUint64(nil, c.n)})
			}
			if err := countedOnce(all, words); (err == nil) != test.ok {
				t.Error(err)
			}
		})
	}
}
