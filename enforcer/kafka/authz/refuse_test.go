package authz

import (
	"bytes"
	"fmt"
	"os"
	"reflect"
	"testing"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
	"go.yaml.in/yaml/v3"

	"klamm/test/message"
)

func TestEveryRequestCanBeRefusedAtEveryVersionInItsOwnFormat(t *testing.T) {
	for key := range int16(kmsg.MaxKey + 1) {
		for version := range kmsg.RequestForKey(key).MaxVersion() + 1 {
			t.Run(fmt.Sprintf("%s v%d", kmsg.NameForKey(key), version), func(t *testing.T) {
				back := overTheWire(t, Refuse(oneOfEach(t, key, version), kerr.UnsupportedVersion, "why"))
				// Until version 3 only directories have a code, and the request names none.
				codeless := key == int16(kmsg.DescribeLogDirs) && version < 3
				if hasCode(reflect.ValueOf(back), kerr.UnsupportedVersion.Code) == codeless {
					t.Errorf("error code: %v, in\n%s", !codeless, message.Show(back))
				}
				overTheWire(t, Refuse(kmsg.RequestForKey(key), kerr.UnsupportedVersion, ""))
			})
		}
	}
}

func TestRefusalsSayTheErrorWhereABrokerSaysIt(t *testing.T) {
	text, err := os.ReadFile("testdata/refusals.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var cases []struct {
		API, Versions string
		Answer        yaml.Node
	}
	if err := yaml.Unmarshal(text, &cases); err != nil {
		t.Fatal(err)
	}
	type keyVersion struct{ key, version int16 }
	shown := map[keyVersion]bool{}
	for _, c := range cases {
		key := keyNamed(c.API)
		s := scenario{Versions: c.Versions}
		for _, version := range s.versions(t, API{Min: 0, Max: kmsg.RequestForKey(key).MaxVersion()}) {
			shown[keyVersion{key, version}] = true
			t.Run(fmt.Sprintf("%s v%d", c.API, version), func(t *testing.T) {
				resp := Refuse(oneOfEach(t, key, version), kerr.UnsupportedVersion, "why")
				same(t, "the refusal", resp, kmsg.ResponseForKey(key), &c.Answer, version)
			})
		}
	}
	for key, row := range Table {
		for version := row.Min; version <= row.Max && row.Decide != nil && key != int(kmsg.ApiVersions); version++ {
			if !shown[keyVersion{int16(key), version}] {
				t.Errorf("%s v%d is in the table, but its refusal is not in refusals.yaml", kmsg.NameForKey(int16(key)), version)
			}
		}
	}
}

func TestAnUnsupportedVersionIsRefusedWhereAnAnswerCanBeWritten(t *testing.T) {
	for _, c := range []struct {
		what         string
		key, version int16
		want         kmsg.Response
	}{
		{"an API that is not in the table", 52, 0, &kmsg.VoteResponse{ErrorCode: kerr.UnsupportedVersion.Code}},
		{"a version below the table's", 19, 0, &kmsg.CreateTopicsResponse{}},
		{"a version nobody knows", 3, 99, nil},
		{"a negative version", 3, -1, nil},
		{"a key nobody knows", kmsg.MaxKey + 1, 0, nil},
		{"a negative key", -1, 0, nil},
		{"an ApiVersions request of the future has version 0 of the answer", 18, 99, &kmsg.ApiVersionsResponse{
			ErrorCode: kerr.UnsupportedVersion.Code,
			ApiKeys:   []kmsg.ApiVersionsResponseApiKey{{ApiKey: 18, MinVersion: 0, MaxVersion: 5}},
		}},
	} {
		t.Run(c.what, func(t *testing.T) {
			got := Unsupported(c.key, c.version)
			if (got == nil) != (c.want == nil) {
				t.Fatalf("answer %v, expected %v", got, c.want)
			}
			if got != nil && !bytes.Equal(overTheWire(t, got).AppendTo(nil), c.want.AppendTo(nil)) {
				t.Errorf("answer\n%s\nexpected\n%s", message.Show(got), message.Show(c.want))
			}
		})
	}
}

func TestAProduceRequestWithoutAcksHasNoRefusal(t *testing.T) {
	if resp := Refuse(&kmsg.ProduceRequest{Version: 9, Acks: 0}, kerr.InvalidRequest, ""); resp != nil {
		t.Errorf("answer\n%s", message.Show(resp))
	}
}

// overTheWire encodes and decodes a response; what changed on the way is an error.
func overTheWire(t *testing.T, resp kmsg.Response) kmsg.Response {
	t.Helper()
	if p, ok := resp.(*kmsg.ProduceResponse); ok && p == nil || resp == nil {
		return nil
	}
	wire := resp.AppendTo(nil)
	back := kmsg.ResponseForKey(resp.Key())
	back.SetVersion(resp.GetVersion())
	if err := back.ReadFrom(wire); err != nil {
		t.Fatalf("decode %x: %v", wire, err)
	}
	if again := back.AppendTo(nil); !bytes.Equal(wire, again) {
		t.Errorf("%x became %x over the wire", wire, again)
	}
	return back
}

// oneOfEach is a request with one entry in each list the version has, with "x", 2 and ids of 01 in all fields.
func oneOfEach(t *testing.T, key, version int16) kmsg.Request {
	t.Helper()
	all, req := kmsg.RequestForKey(key), kmsg.RequestForKey(key)
	oneEntry(reflect.ValueOf(all).Elem())
	all.SetVersion(version)
	req.SetVersion(version)
	if err := req.ReadFrom(all.AppendTo(nil)); err != nil {
		t.Fatal(err)
	}
	return req
}

func oneEntry(v reflect.Value) {
	switch kind := v.Kind(); {
	case kind == reflect.Struct:
		for i := range v.NumField() {
			if v.Type().Field(i).Name != "UnknownTags" {
				oneEntry(v.Field(i))
			}
		}
	case kind == reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 1, 1))
		oneEntry(v.Index(0))
	case kind == reflect.Array:
		for i := range v.Len() {
			v.Index(i).SetUint(1)
		}
	case kind == reflect.Pointer && v.Type().Elem().Kind() == reflect.String:
		v.Set(reflect.New(v.Type().Elem()))
		v.Elem().SetString("x")
	case kind == reflect.String:
		v.SetString("x")
	case v.CanInt():
		v.SetInt(2)
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
	default:
	}
	return false
}
