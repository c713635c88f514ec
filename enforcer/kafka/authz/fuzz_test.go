package authz

import (
	"bytes"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/policy"
)

// FuzzDecide gives handlers whatever kmsg decodes, as a request and as the broker's answer to it. The subject may do
// anything with what is named "ok…", and nothing else.
func FuzzDecide(f *testing.F) {
	set, err := policy.Parse("fuzz", []byte(`
apiVersion: klamm/v1
rules:
  - name: ok
    principals: ["User:alice"]
    allow:
      - {topic: "ok*", operations: [All]}
      - {group: "ok*", operations: [All]}
      - {transactional-id: "ok*", operations: [All]}
`))
	if err != nil {
		f.Fatal(err)
	}
	view := policy.New(set).For(policy.Subject{Principal: "User:alice"})
	topics := topicMap{topicID(f, "aa"): "ok", topicID(f, "bb"): "secret"}
	seed(f)

	f.Fuzz(func(t *testing.T, key, version int16, request, answer []byte) {
		if key < 0 || key > kmsg.MaxKey || Table[key].Decide == nil || version < Table[key].Min || version > Table[key].Max {
			return
		}
		req := kmsg.RequestForKey(key)
		req.SetVersion(version)
		if req.ReadFrom(request) != nil {
			return
		}
		canonical := req.AppendTo(nil)
		c := &Ctx{View: view, Topics: topics}
		v, _ := decide(c, req)
		if !bytes.Equal(req.AppendTo(nil), canonical) {
			t.Errorf("the handler changed the request in place to\n%s", show(req))
		}
		switch {
		case v.Close != "":
			return
		case v.Answer != nil:
			again(t, v.Answer, v.Answer.RequestKind().ResponseKind())
			return
		case v.Forward != nil:
			if v.Edit == nil {
				t.Error("forwards a part, but merges nothing into the answer")
			}
			forwarded := kmsg.RequestForKey(key)
			again(t, v.Forward, forwarded)
			req = forwarded
		}
		namesOnlyAllowed(t, reflect.ValueOf(req).Elem(), topics, req)
		resp := req.ResponseKind()
		if v.Edit != nil && resp.ReadFrom(answer) == nil {
			v.Edit(c, resp)
			again(t, resp, req.ResponseKind())
		}
	})
}

// seed adds what the scenarios say at every version.
func seed(f *testing.F) {
	files, err := filepath.Glob("testdata/*/*.yaml")
	if err != nil || len(files) == 0 {
		f.Fatalf("no scenario files below testdata (error: %v)", err)
	}
	for _, file := range files {
		key := keyNamed(filepath.Base(filepath.Dir(file)))
		s := load(f, file)
		for _, version := range s.versions(f, Table[key]) {
			req, resp := kmsg.RequestForKey(key), kmsg.ResponseForKey(key)
			build(f, &s.Request, req, version)
			build(f, &s.Expect.Broker, resp, version)
			f.Add(key, version, req.AppendTo(nil), resp.AppendTo(nil))
		}
	}
}

// again decodes what was encoded.
func again(t *testing.T, m, into message) {
	t.Helper()
	into.SetVersion(m.GetVersion())
	if err := into.ReadFrom(m.AppendTo(nil)); err != nil {
		t.Errorf("not readable once encoded: %v\n%s", err, show(m))
	}
}

// resourceFields name topics, groups and transactional ids in requests.
var resourceFields = []string{
	"CoordinatorKey", "CoordinatorKeys", "Group", "Groups", "SubscribedTopicNames", "Topic", "TopicID", "TopicNames",
	"Topics", "TransactionalID",
}

// namesOnlyAllowed walks a request that leaves for the broker.
func namesOnlyAllowed(t *testing.T, v reflect.Value, topics topicMap, req kmsg.Request) {
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			field, name := v.Field(i), v.Type().Field(i).Name
			below := field.Kind() == reflect.Slice && field.Type().Elem().Kind() == reflect.Struct
			if below || field.Kind() == reflect.Struct || slices.Contains(resourceFields, name) {
				namesOnlyAllowed(t, field, topics, req)
			}
		}
	case reflect.Slice:
		for i := range v.Len() {
			namesOnlyAllowed(t, v.Index(i), topics, req)
		}
	case reflect.Pointer:
		if !v.IsNil() {
			namesOnlyAllowed(t, v.Elem(), topics, req)
		}
	case reflect.String:
		if v.String() != "" && !strings.HasPrefix(v.String(), "ok") {
			t.Errorf("forwards %q, which nothing allows:\n%s", v.String(), show(req))
		}
	case reflect.Array:
		if id := v.Interface().(TopicID); !v.IsZero() && topics[id] != "ok" {
			t.Errorf("forwards topic id %x, which nothing allows:\n%s", id, show(req))
		}
	}
}
