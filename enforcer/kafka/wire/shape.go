package wire

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"reflect"
	"sync"
	"sync/atomic"

	"github.com/twmb/franz-go/pkg/kmsg"
)

// ErrShape says that a body is not the message its header claims.
var ErrShape = errors.New("the body does not have the shape of its message")

// CheckRequest walks the body of a request before kmsg decodes it. kmsg believes a declared count of tagged fields even
// when the input has run out (2^32-1 of them take minutes), and makes arrays of structs that are far larger than their
// bytes; the walk takes time linear in len(body) and allocates nothing. A nil error means that ReadFrom's work is bounded
// by the body, and weight is an upper estimate of the bytes it allocates. Bytes behind the message are not looked at.
//
// What ReadFrom takes, the walk takes, but for three things no encoder writes and Kafka reads in another way: a compact
// array length of 2^31 and more (null to kmsg), tags that are not in ascending order (refused by Kafka too), and a known
// tagged field whose content does not fill its size (Kafka does not look at the size).
//
// The error is an ErrShape that names the field and the place, and holds nothing of the body.
func CheckRequest(key, version int16, body []byte) (weight int64, err error) {
	return check(request, key, version, body)
}

// CheckResponse is CheckRequest for the body of an answer.
func CheckResponse(key, version int16, body []byte) (weight int64, err error) {
	return check(response, key, version, body)
}

type direction int

const (
	request direction = iota
	response
)

func (d direction) String() string { return [...]string{"request", "response"}[d] }

func check(d direction, key, version int16, body []byte) (int64, error) {
	s, err := shapeOf(d, key, version)
	if err != nil {
		return 0, err
	}
	w := walk{Cursor: Cursor{B: body, Flex: Flexible(key, version)}, weight: s.weight}
	w.run(s.steps)
	if w.Bad {
		return 0, fmt.Errorf("%w: %s v%d %s: %s, at byte %d of %d",
			ErrShape, kmsg.NameForKey(key), version, d, w.failed.name, w.failedAt, len(body))
	}
	return w.weight, nil
}

// step is one piece of a message, in wire order. The depth of the tree of steps is the schema's.
type step struct {
	kind  kind
	name  string // for errors
	size  int    // of fixed: its bytes; of an array: the fewest bytes of an element
	mem   int64  // of an array: the memory of an element; of an optional struct: its memory
	steps []step // of an array's element; of an optional struct
	tags  []tag
}

type kind uint8

const (
	fixed        kind = iota // fields of fixed size, adjacent ones in one
	text                     // STRING
	nullableText             // NULLABLE_STRING
	opaque                   // BYTES and RECORDS, which kmsg leaves in place
	array
	optional // a nullable struct: INT8, -1 is null
	tagged   // the tagged fields of a struct (KIP-482)
)

// tag is a tagged field that kmsg knows, and decodes.
type tag struct {
	key   uint32
	steps []step
}

// Memory, in bytes, of what kmsg makes besides the elements of arrays.
const (
	stringHeader = 16  // a *string is an allocation of its own
	tagMap       = 512 // the map that holds a struct's unknown tags, with room for eight
	tagEntry     = 160 // one of them in a large map, with what the map left behind as it grew
)

// allocated is at least what the allocator spends on n bytes: its size classes waste less than a quarter, or 16 bytes
// where small, and a header of 8 (Go 1.26, runtime/sizeclasses.go).
func allocated(n int64) int64 { return n + n/4 + 32 }

type walk struct {
	Cursor
	weight   int64
	failed   *step
	failedAt int
}

func (w *walk) run(steps []step) {
	for i := range steps {
		s := &steps[i]
		at := w.Off
		switch s.kind {
		case fixed:
			w.Take(s.size)
		case text, nullableText:
			w.text(s.kind == nullableText)
		case opaque:
			if n := w.Length(); n > 0 {
				w.Take(n)
			}
		case array:
			w.array(s)
		case optional:
			if w.I8() != -1 {
				w.weight += allocated(s.mem)
				w.run(s.steps)
			}
		case tagged:
			w.tagged(s)
		}
		if w.Bad {
			if w.failed == nil {
				w.failed, w.failedAt = s, at
			}
			return
		}
	}
}

func (w *walk) text(nullable bool) {
	var n int
	if w.Flex {
		n = int(w.Uvarint()) - 1
	} else {
		n = int(w.I16())
	}
	if n < 0 && nullable {
		return
	}
	w.Take(n)
	if nullable {
		w.weight += stringHeader
	}
	if n > 0 {
		w.weight += allocated(int64(n))
	}
}

func (w *walk) array(s *step) {
	n := w.Array(s.size)
	if n == 0 {
		return
	}
	w.weight += allocated(int64(n) * s.mem)
	if len(s.steps) == 1 && s.steps[0].kind == fixed {
		w.Take(n * s.size)
		return
	}
	for range n {
		if w.run(s.steps); w.Bad {
			return
		}
	}
}

func (w *walk) tagged(s *step) {
	n := int(w.Uvarint())
	if n == 0 {
		return
	}
	const least = 2 // bytes of a tagged field: its tag and its size
	if n > (len(w.B)-w.Off)/least {
		w.Bad = true
		return
	}
	unknown := 0
	for last := int64(-1); n > 0; n-- {
		key, size := w.Uvarint(), int(w.Uvarint())
		start := w.Off
		w.Take(size)
		if w.Bad || int64(key) <= last {
			w.Bad = true
			return
		}
		last = int64(key)
		if !w.known(s.tags, key, start) {
			unknown++
		}
		if w.Bad {
			return
		}
	}
	if unknown > 0 {
		w.weight += tagMap + int64(unknown)*tagEntry
	}
}

// known checks the content of a tagged field, from start to where the cursor is, if kmsg decodes it.
func (w *walk) known(tags []tag, key uint32, start int) bool {
	for i := range tags {
		if tags[i].key != key {
			continue
		}
		whole, end := w.B, w.Off
		w.B, w.Off = whole[:end], start
		w.run(tags[i].steps)
		w.B, w.Bad = whole, w.Bad || w.Off != end
		return true
	}
	return false
}

// shape is the layout of a message at a version.
type shape struct {
	steps  []step
	weight int64 // of the message itself
}

// shapes[direction][key][version] is made from kmsg's own encoder when it is first asked for.
var shapes = func() (all [2][kmsg.MaxKey + 1][]atomic.Pointer[shape]) {
	for key := range all[request] {
		if req := kmsg.RequestForKey(int16(key)); req != nil {
			for d := range all {
				all[d][key] = make([]atomic.Pointer[shape], req.MaxVersion()+1)
			}
		}
	}
	return all
}()

var deriving sync.Mutex

func shapeOf(d direction, key, version int16) (*shape, error) {
	if !Known(key, version) {
		return nil, fmt.Errorf("%w: there is no %s of key %d and version %d", ErrShape, d, key, version)
	}
	slot := &shapes[d][key][version]
	if s := slot.Load(); s != nil {
		return s, nil
	}
	deriving.Lock()
	defer deriving.Unlock()
	if s := slot.Load(); s != nil {
		return s, nil
	}
	s, err := derive(d, key, version)
	if err != nil {
		return nil, err
	}
	slot.Store(s)
	return s, nil
}

// encoder is what kmsg's requests and responses have in common.
type encoder interface {
	SetVersion(version int16)
	AppendTo(dst []byte) []byte
}

// derive learns a layout from kmsg. Its structs have their fields in wire order; what the version has of them shows by
// changing one field at a time and encoding: the bytes stay as they were, or they change, or a tagged field appears.
func derive(d direction, key, version int16) (*shape, error) {
	var m encoder = kmsg.RequestForKey(key)
	if d == response {
		m = kmsg.ResponseForKey(key)
	}
	m.SetVersion(version)
	v := reflect.ValueOf(m).Elem()
	makeDefault(v)
	p := prober{message: m, flex: Flexible(key, version)}
	steps, err := p.fields(v, "")
	if err != nil {
		return nil, fmt.Errorf("%w: %s v%d %s: its layout is not understood: %w",
			ErrShape, kmsg.NameForKey(key), version, d, err)
	}
	return &shape{steps, allocated(int64(v.Type().Size()))}, nil
}

type prober struct {
	message encoder
	flex    bool
	depth   uint32 // of structs in structs
}

// fields derives the steps of a struct that stands somewhere in the message.
func (p *prober) fields(v reflect.Value, path string) ([]step, error) {
	p.depth++
	defer func() { p.depth-- }()
	var mark []byte
	if p.flex {
		mark = p.mark(v)
		defer unmark(v)
	}
	base := p.message.AppendTo(nil)
	var steps []step
	var tags []tag
	for i := range v.NumField() {
		field, name := v.Field(i), path+v.Type().Field(i).Name
		if name == "Version" || field.Type() == reflect.TypeFor[kmsg.Tags]() {
			continue
		}
		was := reflect.ValueOf(field.Interface())
		if err := p.change(field); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		changed := p.message.AppendTo(nil)
		present := !bytes.Equal(base, changed)
		key, isTag, err := tagOf(base, changed, mark)
		var inner []step
		// Without tagged fields to leave a mark in, a struct shows by its own fields only.
		if present || field.Kind() == reflect.Struct && !p.flex {
			inner, err = p.value(field, name)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		switch {
		case isTag:
			tags = append(tags, tag{key, inner})
		default:
			steps = appendSteps(steps, inner)
		}
		field.Set(was)
	}
	if p.flex {
		steps = append(steps, step{kind: tagged, name: path + "tagged fields", tags: tags})
	}
	return steps, nil
}

// value derives the steps of a value that the message has; arrays have one element, pointers point to something.
func (p *prober) value(v reflect.Value, name string) ([]step, error) {
	switch v.Kind() {
	case reflect.Bool, reflect.Int8, reflect.Int16, reflect.Uint16, reflect.Int32, reflect.Uint32, reflect.Int64,
		reflect.Float64, reflect.Array:
		return []step{{kind: fixed, name: name, size: int(v.Type().Size())}}, nil
	case reflect.String:
		return []step{{kind: text, name: name}}, nil
	case reflect.Struct:
		return p.fields(v, name+".")
	case reflect.Pointer:
		if v.Type().Elem().Kind() == reflect.String {
			return []step{{kind: nullableText, name: name}}, nil
		}
		inner, err := p.fields(v.Elem(), name+".")
		return []step{{kind: optional, name: name, mem: int64(v.Type().Elem().Size()), steps: inner}}, err
	case reflect.Slice:
		if v.Type().Elem().Kind() == reflect.Uint8 {
			return []step{{kind: opaque, name: name}}, nil
		}
		inner, err := p.value(v.Index(0), name)
		// kmsg, too, wants a byte for every element.
		return []step{{kind: array, name: name, mem: int64(v.Type().Elem().Size()), size: max(1, p.least(inner)),
			steps: inner}}, err
	}
	return nil, errKind(v)
}

func errKind(v reflect.Value) error { return fmt.Errorf("a %s is of no known kind", v.Type()) }

// appendSteps joins fixed fields that stand side by side.
func appendSteps(steps, more []step) []step {
	for _, s := range more {
		if n := len(steps); s.kind == fixed && n > 0 && steps[n-1].kind == fixed {
			steps[n-1].size += s.size
			continue
		}
		steps = append(steps, s)
	}
	return steps
}

// least is the fewest bytes that steps take.
func (p *prober) least(steps []step) (n int) {
	notFlexible := [...]int{text: 2, nullableText: 2, opaque: 4, array: 4, optional: 1, tagged: 1}
	for _, s := range steps {
		switch {
		case s.kind == fixed:
			n += s.size
		case p.flex:
			n++
		default:
			n += notFlexible[s.kind]
		}
	}
	return n
}

// change gives a field another value, one that has one element where it can have many.
func (p *prober) change(v reflect.Value) error {
	const other = 0x55
	switch v.Kind() {
	case reflect.Bool:
		v.SetBool(!v.Bool())
	case reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		v.SetInt(v.Int() ^ other)
	case reflect.Uint8, reflect.Uint16, reflect.Uint32:
		v.SetUint(v.Uint() ^ other)
	case reflect.Float64:
		v.SetFloat(v.Float() + 1)
	case reflect.String:
		v.SetString(v.String() + "U")
	case reflect.Array:
		return p.change(v.Index(0))
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 1, 1))
		makeDefault(v.Index(0))
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		makeDefault(v.Elem())
		if v.Elem().Kind() == reflect.String {
			return p.change(v.Elem())
		}
	case reflect.Struct:
		if p.flex {
			p.mark(v)
		}
	default:
		return errKind(v)
	}
	return nil
}

// makeDefault gives a struct the values at which kmsg leaves its tagged fields away.
func makeDefault(v reflect.Value) {
	if d, ok := v.Addr().Interface().(interface{ Default() }); ok {
		d.Default()
	}
}

// mark puts an unknown tagged field into a struct and returns how it is encoded. It comes after the known ones; and a
// struct that has one is encoded where it is itself a tagged field.
func (p *prober) mark(v reflect.Value) []byte {
	const first = 1 << 31 // Kafka numbers tags from 0 up
	key := first + p.depth
	value := []byte("mark")
	unknownTags(v).Set(key, value)
	return append(append(binary.AppendUvarint(nil, uint64(key)), byte(len(value))), value...)
}

func unmark(v reflect.Value) { *unknownTags(v) = kmsg.Tags{} }

func unknownTags(v reflect.Value) *kmsg.Tags {
	return v.FieldByName("UnknownTags").Addr().Interface().(*kmsg.Tags)
}

// tagOf tells whether a change made a tagged field appear, and its tag: before it, mark is the only tagged field of the
// struct; after it, mark is the second.
func tagOf(base, changed, mark []byte) (key uint32, isTag bool, err error) {
	if mark == nil || bytes.Equal(base, changed) {
		return 0, false, nil
	}
	count, end := bytes.Index(base, mark)-1, bytes.Index(changed, mark)
	if count < 0 || base[count] != 1 || end < 0 {
		return 0, false, errors.New("its tagged fields are not where they should be")
	}
	c := Cursor{B: changed[:end], Off: min(count+1, end), Flex: true}
	key = c.Uvarint()
	c.Take(int(c.Uvarint()))
	if !c.Bad && c.Off == end && changed[count] == 2 {
		return key, true, nil
	}
	if changed[end-1] != 1 {
		return 0, false, errors.New("the change shows in an unknown way")
	}
	return 0, false, nil
}
