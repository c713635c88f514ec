package strict

import (
	"errors"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"klamm/test/bounds"
)

type even int

func (e *even) UnmarshalYAML(node *yaml.Node) error {
	var n int
	if err := Node(node, &n); err != nil {
		return err
	}
	if n%2 != 0 {
		return Errorf(node, "%d is odd", n)
	}
	*e = even(n)
	return nil
}

type common struct {
	Name string `yaml:"name" strict:"required"`
}

type sample struct {
	Common common            `yaml:",inline"`
	On     bool              `yaml:"on"`
	Count  uint8             `yaml:"count"`
	Ratio  float64           `yaml:"ratio"`
	Wait   time.Duration     `yaml:"wait"`
	Size   Size              `yaml:"size"`
	Addr   netip.Addr        `yaml:"addr"`
	Labels map[string]string `yaml:"labels"`
	Even   even              `yaml:"even"`
	Parts  []part            `yaml:"parts"`
	Opt    *part             `yaml:"opt"`
	Where  At[string]        `yaml:"where"`
}

type part struct {
	Topic      string   `yaml:"topic"`
	Operations []string `yaml:"operations"`
}

func TestEveryTypeIsDecoded(t *testing.T) {
	var got sample
	err := Decode("f", []byte(`
name: n
on: true
count: 0x10
ratio: 3
wait: 1m30s
size: 64MiB
addr: 10.0.0.1
labels: {a: b}
even: 4
parts: [{topic: t, operations: [Read]}]
opt: {topic: o}
where: here
`), &got)
	if err != nil {
		t.Fatal(err)
	}
	if got.Where.V != "here" || got.Where.Node.Line != 13 || got.Where.Node.Column != 8 {
		t.Errorf("where: %q at %d:%d", got.Where.V, got.Where.Node.Line, got.Where.Node.Column)
	}
	got.Where.Node = nil
	want := sample{
		Common: common{"n"}, On: true, Count: 16, Ratio: 3, Wait: 90 * time.Second, Size: 64 << 20,
		Addr: netip.MustParseAddr("10.0.0.1"), Labels: map[string]string{"a": "b"}, Even: 4,
		Parts: []part{{"t", []string{"Read"}}}, Opt: &part{Topic: "o"}, Where: At[string]{V: "here"},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

func TestWhatIsWrongIsSaidWithItsPosition(t *testing.T) {
	for name, c := range map[string]struct{ in, want string }{
		"an unknown key lists the allowed ones and the nearest": {
			"name: n\nparts:\n  - {tpoic: x}", `f:3:6: unknown key "tpoic", did you mean "topic"? (allowed: topic, operations)`},
		"an unknown key near to none suggests none": {
			"name: n\nopt: {guards: 1}", `f:2:7: unknown key "guards" (allowed: topic, operations)`},
		"a duplicate key names the first": {
			"name: n\non: true\nname: m", `f:3:1: the key "name" is given twice, first in line 1`,
		},
		"a duplicate key in a map": {
			"name: n\nlabels: {a: b, a: c}", `f:2:16: the key "a" is given twice, first in line 2`,
		},
		"a missing key":                     {"on: true", `f:1:1: the key "name" is missing`},
		"a number where a string is wanted": {"name: 12", `f:1:7: want a string, not a number: put it in quotes`},
		"a list where a string is wanted":   {"name: [a]", `f:1:7: want a string, not a list`},
		"a string where a list is wanted":   {"name: n\nparts: x", `f:2:8: want a list, not a string`},
		"a list where a mapping is wanted": {
			"name: n\nopt: [x]", `f:2:6: want a mapping of keys to values, not a list`,
		},
		"a word where a boolean is wanted": {"name: n\non: yes", `f:2:5: want true or false, not a string`},
		"a number that does not fit": {
			"name: n\ncount: 256", `f:2:8: 256 is out of range for a whole number from 0 to 255`,
		},
		"a negative number": {
			"name: n\ncount: -1", `f:2:8: -1 is out of range for a whole number from 0 to 255`,
		},
		"a duration without a unit": {"name: n\nwait: 10", `f:2:7: want a duration like 10s, not a number`},
		"a duration that is none": {
			"name: n\nwait: soon", `f:2:7: "soon" is not a duration: write it as 300ms, 10s, 15m or 1h30m`,
		},
		"a size that is none": {
			"name: n\nsize: 1.5MiB", `f:2:7: "1.5MiB" is not a size: write it as 4096, 100KB or 64MiB`,
		},
		"a size that overflows": {
			"name: n\nsize: 9000000000GiB", `f:2:7: "9000000000GiB" is not a size: write it as 4096, 100KB or 64MiB`,
		},
		"a type's own error by UnmarshalText": {"name: n\naddr: x", `f:2:7: ParseAddr("x"): unable to parse IP`},
		"a type's own error by UnmarshalYAML": {"name: n\neven: 3", `f:2:7: 3 is odd`},
		"a strict error inside such a type": {
			"name: n\neven: x",
			`f:2:7: want a whole number from -9223372036854775808 to 9223372036854775807, not a string`,
		},
		"a key without a value": {"name: n\nparts:", `f:2:7: no value: give one or leave the key out`},
		"an alias": {
			"name: &a n\nwhere: *a", `f:2:8: aliases (*a) are not supported: write the value out`,
		},
		"a merge key": {
			"name: n\nopt: {<<: {topic: x}}", `f:2:7: want a plain word as key, not a merge (<<)`,
		},
		"a key that is a list": {"name: n\n? [a]\n: 1", `f:2:3: want a plain word as key, not a list`},
		"a tagged value": {
			"name: !secret n", `f:1:7: want a string, not a value tagged !secret: put it in quotes`,
		},
		"a second document": {
			"name: n\n---\nname: m",
			`f:2:1: a second YAML document: a file holds one, put the other into a file of its own`,
		},
		"an empty file":      {"", `f:1: the file is empty`},
		"a file of comments": {"# nothing", `f:1: the file is empty`},
		"an empty document":  {"---\n", `f:1: the file is empty`},
		"what is not YAML": {
			"name: n\n  on: [", `f:2: not YAML: mapping values are not allowed in this context`,
		},
		"a broken second document": {
			"name: n\n---\n\ta: b", `f:3: not YAML: found character that cannot start any token`,
		},
		"several things at once, in file order": {
			"tname: n\ncount: -1\non: 1", "f:1:1: unknown key \"tname\", did you mean \"name\"? " +
				"(allowed: name, on, count, ratio, wait, size, " +
				"addr, labels, even, parts, opt, where)\nf:1:1: the key \"name\" is missing\n" +
				"f:2:8: -1 is out of range for a whole number from 0 to 255\nf:3:5: want true or false, not a number"},
	} {
		t.Run(name, func(t *testing.T) {
			err := Decode("f", []byte(c.in), new(sample))
			if err == nil || err.Error() != c.want {
				t.Errorf("got  %v\nwant %s", err, c.want)
			}
			var errs Errors
			if !errors.As(err, &errs) {
				t.Errorf("the error is a %T", err)
			}
		})
	}
}

func TestSizes(t *testing.T) {
	for in, want := range map[string]Size{
		"0": 0, "4096": 4096, "7B": 7, "100KB": 100_000, "1MiB": 1 << 20, "2GB": 2e9, "8GiB": 8 << 30, "3TiB": 3 << 40,
	} {
		var got Size
		if err := got.UnmarshalText([]byte(in)); err != nil || got != want {
			t.Errorf("%s: got %d, %v; want %d", in, got, err, want)
		}
	}
	for _, in := range []string{"", "MiB", "-1", "+1", "1 MiB", "1mb", "1e3", "9223372036854775808", "8388608TiB"} {
		if err := new(Size).UnmarshalText([]byte(in)); err == nil {
			t.Errorf("%q was accepted", in)
		}
	}
}

func TestASecretUnderAWrongTypeIsNotRepeated(t *testing.T) {
	for _, in := range []string{"name: 91234567", "count: hunter2secret", "opt: hunter2secret", "on: hunter2secret"} {
		err := Decode("f", []byte(in), new(sample))
		if err == nil || strings.Contains(err.Error(), "hunter2") || strings.Contains(err.Error(), "91234567") {
			t.Errorf("%s: %v", in, err)
		}
	}
}

func FuzzDecode(f *testing.F) {
	for _, seed := range []string{
		"name: n\nparts: [{topic: t, operations: [Read]}]", "a: &a [*a]", "name: n\n---\n", "? {a: b}\n: c", "size: 1MiB",
		"name: !!binary aGk=\nlabels: {<<: *x}", "count: 0b11\nratio: .inf\nwait: 1h", "\xff\xfe", "name: \"\\u0000\"",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var out sample
		var err error
		bounds.Check(t, len(data), 1<<14, func() { err = Decode("f", data, &out) })
		if err == nil {
			return
		}
		var errs Errors
		if !errors.As(err, &errs) || len(errs) == 0 {
			t.Fatalf("%T %v", err, err)
		}
		for _, e := range errs {
			if e.File != "f" || e.Line < 1 || e.Message == "" {
				t.Fatalf("an error without a place: %#v", e)
			}
		}
	})
}
