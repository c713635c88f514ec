package strict

import (
	"encoding"
	"fmt"
	"math"
	"math/big"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// Node decodes one node into out (a pointer) as Decode does. The error is an Errors without a file.
func Node(node *yaml.Node, out any) error {
	v := reflect.ValueOf(out)
	if v.Kind() != reflect.Pointer || v.IsNil() {
		return Errors{Errorf(node, "decoding into %T: want a pointer", out)}
	}
	var d decoder
	d.value(node, v.Elem())
	if len(d.errs) == 0 {
		return nil
	}
	return d.errs
}

type decoder struct{ errs Errors }

func (d *decoder) fail(node *yaml.Node, format string, args ...any) {
	d.errs = append(d.errs, Errorf(node, format, args...))
}

// value checks what holds for every type, then asks the type itself, then its kind.
func (d *decoder) value(node *yaml.Node, v reflect.Value) {
	switch {
	case node.Kind == yaml.AliasNode:
		d.fail(node, "aliases (*%s) are not supported: write the value out", node.Value)
		return
	case node.ShortTag() == "!!null":
		d.fail(node, "no value: give one or leave the key out")
		return
	}
	if v.Kind() == reflect.Pointer {
		if v.IsNil() {
			v.Set(reflect.New(v.Type().Elem()))
		}
		d.value(node, v.Elem())
		return
	}
	switch own := v.Addr().Interface().(type) {
	case yaml.Unmarshaler:
		d.errs = append(d.errs, positioned(node, own.UnmarshalYAML(node))...)
	case encoding.TextUnmarshaler:
		if d.is(node, v, "!!str", "!!int", "!!float") {
			d.errs = append(d.errs, positioned(node, own.UnmarshalText([]byte(node.Value)))...)
		}
	case *time.Duration:
		d.duration(node, own)
	default:
		d.kind(node, v)
	}
}

func (d *decoder) kind(node *yaml.Node, v reflect.Value) {
	switch v.Kind() {
	case reflect.Struct:
		d.structure(node, v)
	case reflect.Map:
		d.mapping(node, v)
	case reflect.Slice:
		d.sequence(node, v)
	case reflect.String:
		if d.is(node, v, "!!str") {
			v.SetString(node.Value)
		}
	case reflect.Bool:
		if d.is(node, v, "!!bool") {
			v.SetBool(strings.EqualFold(node.Value, "true"))
		}
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64,
		reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		if d.is(node, v, "!!int") {
			d.integer(node, v)
		}
	case reflect.Float32, reflect.Float64:
		if d.is(node, v, "!!float", "!!int") {
			d.float(node, v)
		}
	default:
		d.fail(node, "decoding into %s is not supported", v.Type())
	}
}

// is checks the node's resolved type against the accepted ones.
func (d *decoder) is(node *yaml.Node, v reflect.Value, tags ...string) bool {
	if slices.Contains(tags, node.ShortTag()) {
		return true
	}
	hint := ""
	if v.Kind() == reflect.String && node.Kind == yaml.ScalarNode {
		hint = ": put it in quotes"
	}
	d.fail(node, "want %s, not %s%s", wanted(v.Type()), describe(node), hint)
	return false
}

func (d *decoder) integer(node *yaml.Node, v reflect.Value) {
	n, ok := new(big.Int).SetString(node.Value, 0)
	switch {
	case ok && v.CanInt() && n.IsInt64() && !v.OverflowInt(n.Int64()):
		v.SetInt(n.Int64())
	case ok && v.CanUint() && n.IsUint64() && !v.OverflowUint(n.Uint64()):
		v.SetUint(n.Uint64())
	default:
		d.fail(node, "%s is out of range for %s", node.Value, wanted(v.Type()))
	}
}

func (d *decoder) float(node *yaml.Node, v reflect.Value) {
	f, err := strconv.ParseFloat(node.Value, v.Type().Bits())
	if err != nil { // .inf and .nan too: no setting means them
		d.fail(node, "%s is not a usable number", node.Value)
		return
	}
	v.SetFloat(f)
}

func (d *decoder) duration(node *yaml.Node, out *time.Duration) {
	if !d.is(node, reflect.ValueOf(out).Elem(), "!!str") {
		return
	}
	n, err := time.ParseDuration(node.Value)
	if err != nil {
		d.fail(node, "%q is not a duration: write it as 300ms, 10s, 15m or 1h30m", node.Value)
		return
	}
	*out = n
}

func (d *decoder) sequence(node *yaml.Node, v reflect.Value) {
	if node.ShortTag() != "!!seq" {
		d.fail(node, "want %s, not %s", wanted(v.Type()), describe(node))
		return
	}
	list := reflect.MakeSlice(v.Type(), len(node.Content), len(node.Content))
	for i, item := range node.Content {
		d.value(item, list.Index(i))
	}
	v.Set(list)
}

func (d *decoder) mapping(node *yaml.Node, v reflect.Value) {
	if v.Type().Key().Kind() != reflect.String {
		d.fail(node, "decoding into %s is not supported", v.Type())
		return
	}
	out := reflect.MakeMap(v.Type())
	d.pairs(node, v.Type(), func(key, value *yaml.Node) {
		item := reflect.New(v.Type().Elem()).Elem()
		d.value(value, item)
		out.SetMapIndex(reflect.ValueOf(key.Value).Convert(v.Type().Key()), item)
	})
	v.Set(out)
}

func (d *decoder) structure(node *yaml.Node, v reflect.Value) {
	fields := map[string]field{}
	names := collect(v, fields)
	given := map[string]bool{}
	if !d.pairs(node, v.Type(), func(key, value *yaml.Node) {
		given[key.Value] = true
		if f, ok := fields[key.Value]; ok {
			d.value(value, f.value)
			return
		}
		d.fail(key, "%s", Unknown("key", key.Value, names))
	}) {
		return
	}
	for _, name := range names {
		if fields[name].required && !given[name] {
			d.fail(node, "the key %q is missing", name)
		}
	}
}

// pairs calls f for each key and value of a mapping, each key once. False when the node is no mapping.
func (d *decoder) pairs(node *yaml.Node, t reflect.Type, f func(key, value *yaml.Node)) bool {
	if node.ShortTag() != "!!map" {
		d.fail(node, "want %s, not %s", wanted(t), describe(node))
		return false
	}
	first := map[string]int{}
	for i := 0; i+1 < len(node.Content); i += 2 {
		key, value := node.Content[i], node.Content[i+1]
		if key.Kind != yaml.ScalarNode || key.ShortTag() == "!!merge" {
			d.fail(key, "want a plain word as key, not %s", describe(key))
			continue
		}
		if line, twice := first[key.Value]; twice {
			d.fail(key, "the key %q is given twice, first in line %d", key.Value, line)
			continue
		}
		first[key.Value] = key.Line
		f(key, value)
	}
	return true
}

type field struct {
	value    reflect.Value
	required bool
}

// collect finds the fields of a struct by key and returns the keys in the order of the struct.
func collect(v reflect.Value, into map[string]field) []string {
	var names []string
	for i := range v.NumField() {
		f := v.Type().Field(i)
		name, option, _ := strings.Cut(f.Tag.Get("yaml"), ",")
		switch {
		case option == "inline":
			names = append(names, collect(v.Field(i), into)...)
			continue
		case !f.IsExported() || name == "-":
			continue
		case name == "":
			name = strings.ToLower(f.Name)
		}
		names = append(names, name)
		into[name] = field{v.Field(i), f.Tag.Get("strict") == "required"}
	}
	return names
}

// Unknown says that a word is none of the allowed ones, which of them is nearest, and which there are. What tells what
// the word is: "key", "operation".
func Unknown(what, word string, allowed []string) string {
	near := ""
	best := min(len(word)/2, 3) + 1 // farther than this is another word, not a typing error
	for _, a := range allowed {
		if n := distance(strings.ToLower(word), strings.ToLower(a)); n < best {
			near, best = fmt.Sprintf(", did you mean %q?", a), n
		}
	}
	return fmt.Sprintf("unknown %s %q%s (allowed: %s)", what, word, near, strings.Join(allowed, ", "))
}

// distance is the optimal string alignment distance: insertions, deletions, substitutions, swaps of neighbours.
func distance(a, b string) int {
	before, last, row := make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		before, last, row = last, row, before
		row[0] = i + 1
		for j := range len(b) {
			row[j+1] = min(last[j+1], row[j]) + 1
			if a[i] == b[j] {
				row[j+1] = min(row[j+1], last[j])
			} else {
				row[j+1] = min(row[j+1], last[j]+1)
			}
			if i > 0 && j > 0 && a[i] == b[j-1] && a[i-1] == b[j] {
				row[j+1] = min(row[j+1], before[j-1]+1)
			}
		}
	}
	return row[len(b)]
}

var (
	sizeType     = reflect.TypeFor[Size]()
	durationType = reflect.TypeFor[time.Duration]()
	textType     = reflect.TypeFor[encoding.TextUnmarshaler]()
)

func wanted(t reflect.Type) string {
	switch {
	case t == sizeType:
		return "a size like 64MiB"
	case t == durationType:
		return "a duration like 10s"
	case reflect.PointerTo(t).Implements(textType):
		return "a string"
	}
	switch t.Kind() {
	case reflect.Struct, reflect.Map:
		return "a mapping of keys to values"
	case reflect.Slice:
		return "a list"
	case reflect.Bool:
		return "true or false"
	case reflect.String:
		return "a string"
	case reflect.Float32, reflect.Float64:
		return "a number"
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		return fmt.Sprintf("a whole number from 0 to %d", uint64(math.MaxUint64)>>(64-t.Bits()))
	default:
		unused := 64 - t.Bits()
		return fmt.Sprintf("a whole number from %d to %d", int64(math.MinInt64)>>unused, int64(math.MaxInt64)>>unused)
	}
}

var shapes = map[string]string{
	"!!map": "a mapping", "!!seq": "a list", "!!merge": "a merge (<<)",
	"!!str": "a string", "!!int": "a number", "!!float": "a number", "!!bool": "true or false", "!!timestamp": "a date",
}

// describe names the shape of a value and never the value: it may be a secret under a mistyped key.
func describe(node *yaml.Node) string {
	if shape, ok := shapes[node.ShortTag()]; ok {
		return shape
	}
	return "a value tagged " + node.Tag
}
