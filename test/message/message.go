// Package message writes Kafka's messages as YAML and reads them, with the field names of kmsg.
//
// Fields left out have kmsg's defaults, unknown ones are an error. A topic id is hex, with leading zeroes left out; an
// int16 may be the name of an error code (TOPIC_AUTHORIZATION_FAILED). Bytes are a string, or a mapping that says what
// they hold: {Batch: {...}} is a batch of records, {Consumer: {...}} and {Assignment: {...}} what consumers write into
// the messages of their group (kmsg.ConsumerMemberMetadata, kmsg.ConsumerMemberAssignment).
package message

import (
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"reflect"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
	"go.yaml.in/yaml/v3"
)

// Fill sets what v points to from YAML.
func Fill(n *yaml.Node, v any) error { return fill(n, reflect.ValueOf(v).Elem()) }

func fill(n *yaml.Node, v reflect.Value) error {
	if d, ok := v.Addr().Interface().(interface{ Default() }); ok {
		d.Default()
	}
	switch kind := v.Kind(); {
	case n.ShortTag() == "!!null":
		v.SetZero()
	case kind == reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		return fill(n, v.Elem())
	case v.Type() == reflect.TypeFor[[]byte]():
		raw, err := content(n)
		v.SetBytes(raw)
		return err
	case kind == reflect.Struct && n.Kind == yaml.MappingNode:
		return fillStruct(n, v)
	case v.Type() == reflect.TypeFor[[16]byte]():
		return DecodeID(n.Value, v.Slice(0, v.Len()).Bytes())
	case kind == reflect.Slice && n.Kind == yaml.SequenceNode:
		v.Set(reflect.MakeSlice(v.Type(), len(n.Content), len(n.Content)))
		for i, item := range n.Content {
			if err := fill(item, v.Index(i)); err != nil {
				return err
			}
		}
	case v.CanInt() && n.ShortTag() == "!!int": // also into kmsg's enumerations, which by themselves read names only
		var i int64
		if err := n.Decode(&i); err != nil || v.OverflowInt(i) {
			return fmt.Errorf("line %d: %s is no %s", n.Line, n.Value, v.Type())
		}
		v.SetInt(i)
	case kind == reflect.Int16 && errorCodes[n.Value] != 0:
		v.SetInt(int64(errorCodes[n.Value]))
	default:
		return n.Decode(v.Addr().Interface())
	}
	return nil
}

func fillStruct(n *yaml.Node, v reflect.Value) error {
	for i := 0; i < len(n.Content); i += 2 {
		field := v.FieldByName(n.Content[i].Value)
		if !field.IsValid() {
			return fmt.Errorf("line %d: %s has no field %s", n.Content[i].Line, v.Type(), n.Content[i].Value)
		}
		if err := fill(n.Content[i+1], field); err != nil {
			return err
		}
	}
	return nil
}

// content is what a field of bytes holds.
func content(n *yaml.Node) ([]byte, error) {
	switch {
	case n.Kind == yaml.MappingNode && len(n.Content) == 2:
		m := contents(n.Content[0].Value)
		if m == nil {
			return nil, fmt.Errorf("line %d: no such content of bytes: %s", n.Line, n.Content[0].Value)
		}
		err := Fill(n.Content[1], m)
		return m.AppendTo(nil), err
	case n.ShortTag() == "!!binary":
		return base64.StdEncoding.DecodeString(n.Value)
	case n.Kind == yaml.ScalarNode:
		return []byte(n.Value), nil
	default:
		return nil, fmt.Errorf("line %d: bytes are a string or a mapping of one entry", n.Line)
	}
}

func contents(name string) interface{ AppendTo(dst []byte) []byte } {
	switch name {
	case "Batch":
		return new(Batch)
	case "Consumer":
		return new(kmsg.ConsumerMemberMetadata)
	case "Assignment":
		return new(kmsg.ConsumerMemberAssignment)
	}
	return nil
}

// DecodeID reads a topic id of up to 32 hex digits.
func DecodeID(text string, id []byte) error {
	raw, err := hex.DecodeString(fmt.Sprintf("%032s", text))
	if err != nil || len(raw) != len(id) {
		return fmt.Errorf("%q is not a topic id of up to 32 hex digits", text)
	}
	copy(id, raw)
	return nil
}

// errorCodes are Kafka's error codes by name.
var errorCodes = func() map[string]int16 {
	codes := map[string]int16{}
	for code := int16(1); code < 1000; code++ {
		if e := kerr.TypedErrorForCode(code); e != nil && e.Code == code {
			codes[e.Message] = code
		}
	}
	return codes
}()

// Show prints a message as Fill reads it, without the fields that have their default.
func Show(m any) string {
	text, err := yaml.Marshal(plain(reflect.ValueOf(m)))
	if err != nil {
		return err.Error()
	}
	return string(text)
}

func plain(v reflect.Value) any {
	switch v.Kind() {
	case reflect.Invalid:
		return nil
	case reflect.Pointer, reflect.Interface:
		return plain(v.Elem())
	case reflect.Struct:
		defaults := reflect.New(v.Type())
		if d, ok := defaults.Interface().(interface{ Default() }); ok {
			d.Default()
		}
		fields := map[string]any{}
		for i := range v.NumField() {
			if field := v.Type().Field(i); field.IsExported() &&
				!reflect.DeepEqual(v.Field(i).Interface(), defaults.Elem().Field(i).Interface()) {
				fields[field.Name] = plain(v.Field(i))
			}
		}
		return fields
	case reflect.Array:
		return fmt.Sprintf("%x", v.Interface())
	case reflect.Slice:
		if v.Type().Elem().Kind() == reflect.Uint8 {
			return string(v.Bytes())
		}
		items := []any{}
		for i := range v.Len() {
			items = append(items, plain(v.Index(i)))
		}
		return items
	default:
		return v.Interface()
	}
}
