package wire

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"reflect"

	"github.com/twmb/franz-go/pkg/kmsg"
)

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
		mark = putMark(v, p.depth)
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
		if !p.change(field) {
			return nil, errKind(name, field)
		}
		changed := p.message.AppendTo(nil)
		present := !bytes.Equal(base, changed)
		key, isTag, err := tagOf(base, changed, mark)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		var inner []step
		// Without tagged fields to leave a mark in, a struct shows by its own fields only.
		if present || field.Kind() == reflect.Struct && !p.flex {
			if inner, err = p.value(field, name); err != nil {
				return nil, err
			}
		}
		if isTag {
			tags = append(tags, tag{key, inner})
		} else {
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
	return nil, errKind(name, v)
}

func errKind(name string, v reflect.Value) error {
	return fmt.Errorf("%s: no type of Kafka's is a %s", name, v.Type())
}

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

// change gives a field another value, one that has one element where it can have many. It tells whether it can.
func (p *prober) change(v reflect.Value) bool {
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
			putMark(v, p.depth+1)
		}
	default:
		return false
	}
	return true
}

// makeDefault gives a struct the values at which kmsg leaves its tagged fields away.
func makeDefault(v reflect.Value) {
	if d, ok := v.Addr().Interface().(interface{ Default() }); ok {
		d.Default()
	}
}

// putMark puts an unknown tagged field into a struct and returns how it is encoded. It comes after the known ones; and
// a struct that has one is encoded where it is itself a tagged field.
func putMark(v reflect.Value, depth uint32) []byte {
	const first = 1 << 31 // Kafka numbers tags from 0 up
	key := first + depth
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
