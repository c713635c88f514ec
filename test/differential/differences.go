package main

import (
	"fmt"
	"slices"
	"strings"
)

// deliberate is an entry of differences.yaml: where we differ from a broker on purpose.
type deliberate struct {
	Fields   []string // as a failure shows them, without places in lists
	Ours     string   // what we have there, always
	Scenario string   // or only in this one (API/sentence), where the fields may have whatever
	Codes    []string // but of error codes these: a broker's and ours
	Reason   string   // with the KIP, where there is one
	used     map[string]bool
}

const mostDifferences = 15

func readDifferences(file string) (all []*deliberate, err error) {
	if err := readStrictly(file, &all); err != nil {
		return nil, err
	}
	if len(all) > mostDifferences {
		return nil, fmt.Errorf("%s: %d differences, of which there may be %d", file, len(all), mostDifferences)
	}
	for i, d := range all {
		d.used = map[string]bool{}
		if d.Reason == "" || (d.Ours == "") == (d.Scenario == "") || (d.Scenario == "") != (d.Codes == nil) {
			return nil, fmt.Errorf("%s: difference %d: each has a reason, and is one of a text or of a scenario with two codes",
				file, i+1)
		}
		for _, f := range d.Fields {
			name := f[strings.LastIndexByte(f, '.')+1:]
			if slices.Contains(naming, name) || d.Scenario == "" && name == errorCode {
				return nil, fmt.Errorf("%s: difference %d: %s: an error code or identifier never differs", file, i+1, f)
			}
		}
	}
	return all, nil
}

const errorCode = "ErrorCode"

// covers tells whether a difference in a scenario is one on purpose.
func covers(all []*deliberate, scenario string, d difference) bool {
	for _, known := range all {
		if slices.Contains(known.Fields, d.path) && known.is(scenario, d) {
			known.used[d.path] = true
			return true
		}
	}
	return false
}

func (known *deliberate) is(scenario string, d difference) bool {
	switch {
	case known.Scenario == "": // that there is a text on one side alone is no difference of texts
		_, there := d.kafka.(string)
		return there && d.ours == known.Ours
	case strings.HasSuffix(d.path, "."+errorCode):
		return known.Scenario == scenario && d.kafka == known.Codes[0] && d.ours == known.Codes[1]
	default:
		return known.Scenario == scenario
	}
}
