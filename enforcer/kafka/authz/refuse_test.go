package authz

import (
	"bytes"
	"fmt"
	"reflect"
	"testing"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

func TestEveryRequestCanBeRefusedAtEveryVersionInItsOwnFormat(t *testing.T) {
	for key := range int16(kmsg.MaxKey + 1) {
		for version := range kmsg.RequestForKey(key).MaxVersion() + 1 {
			t.Run(fmt.Sprintf("%s v%d", kmsg.NameForKey(key), version), func(t *testing.T) {
				req := oneOfEach(key, version)
				resp := Refuse(req, kerr.UnsupportedVersion, "why")
				wire := resp.AppendTo(nil)
				back := kmsg.ResponseForKey(key)
				back.SetVersion(resp.GetVersion())
				if err := back.ReadFrom(wire); err != nil {
					t.Fatalf("decode the refusal: %v", err)
				}
				if again := back.AppendTo(nil); !bytes.Equal(wire, again) {
					t.Errorf("the refusal %x became %x over the wire", wire, again)
				}
				if !hasCode(reflect.ValueOf(back), kerr.UnsupportedVersion.Code) {
					t.Errorf("no error code in\n%s", show(back))
				}
			})
		}
	}
}

// oneOfEach is a request with one entry in each of its lists.
func oneOfEach(key, version int16) kmsg.Request {
	req := kmsg.RequestForKey(key)
	req.SetVersion(version)
	oneEntry(reflect.ValueOf(req).Elem())
	return req
}

func oneEntry(v reflect.Value) {
	switch kind := v.Kind(); {
	case kind == reflect.Struct:
		for i := range v.NumField() {
			if field := v.Type().Field(i); field.IsExported() && field.Name != "Version" && field.Name != "UnknownTags" {
				oneEntry(v.Field(i))
			}
		}
	case kind == reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 1, 1))
		oneEntry(v.Index(0))
	case kind == reflect.String:
		v.SetString("x")
	case v.CanInt():
		v.SetInt(1)
	}
}

// hasCode tells whether an ErrorCode anywhere in v is the code.
func hasCode(v reflect.Value, code int16) bool {
	switch v.Kind() {
	case reflect.Pointer:
		return !v.IsNil() && hasCode(v.Elem(), code)
	case reflect.Slice:
		for i := range v.Len() {
			if hasCode(v.Index(i), code) {
				return true
			}
		}
	case reflect.Struct:
		for i := range v.NumField() {
			if v.Type().Field(i).Name == "ErrorCode" && v.Field(i).Int() == int64(code) || hasCode(v.Field(i), code) {
				return true
			}
		}
	}
	return false
}
