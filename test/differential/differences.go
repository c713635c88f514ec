package main

import (
	"fmt"
	"slices"
	"strings"
)

// deliberate is an entry of differences.yaml: where we differ from a broker on purpose.
type deliberate struct {
	Fields []string // as a failure shows them, without places in lists
	Reason string   // with the KIP, where there is one
	used   bool
}

const mostDifferences = 15

// theList is the one list that may differ: that of the APIs itself.
const theList = "ApiVersions.ApiKeys"

func readDifferences(file string) (all []*deliberate, err error) {
	if err := readStrictly(file, &all); err != nil {
		return nil, err
	}
	if len(all) > mostDifferences {
		return nil, fmt.Errorf("%s: %d differences, of which there may be %d", file, len(all), mostDifferences)
	}
	for i, d := range all {
		for _, f := range d.Fields {
			name := f[strings.LastIndexByte(f, '.')+1:]
			if f != theList && (name == "ErrorCode" || slices.Contains(naming, name)) || d.Reason == "" {
				return nil, fmt.Errorf("%s: difference %d: %s: an error code or identifier never differs, and each has its "+
					"reason", file, i+1, f)
			}
		}
	}
	return all, nil
}

// covers tells whether a difference is one on purpose. That something is there or not, or another thing, never is.
func covers(all []*deliberate, d difference) bool {
	if d.path != theList && (!plainValue(d.kafka) || !plainValue(d.ours)) {
		return false
	}
	for _, known := range all {
		if slices.Contains(known.Fields, d.path) {
			known.used = true
			return true
		}
	}
	return false
}

func plainValue(v any) bool {
	switch v.(type) {
	case fields, []any, []string, nil:
		return false
	}
	return true
}
