package authz

import (
	"bytes"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/policy"
	"klamm/test/bounds"
	"klamm/test/message"
)

// FuzzDecide gives every handler messages made up from the fuzzer's bytes, as a request and as the broker's answer to
// it. The subject may do anything with what is named "ok…", and nothing else.
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
	topics := topicMap{{15: 1}: "ok", {15: 2}: "secret"}
	seed(f)

	f.Fuzz(func(t *testing.T, key, version int16, request, answer []byte) {
		if key < 0 || key > kmsg.MaxKey || Table[key].Decide == nil || version < Table[key].Min || version > Table[key].Max {
			return
		}
		req := kmsg.RequestForKey(key)
		makeUp(t, req, version, request)
		canonical := req.AppendTo(nil)
		c := &Ctx{View: view, Topics: topics, Groups: &groups{
			names: []string{"oh", "ok", "ok-1", "secret"}, edition: 1, members: map[MemberName]*Member{
				{"ok", "ok"}:     {Subscription: Subscription{regex: ".*"}},
				{"ok", "secret"}: {Subscription: Subscription{regex: ".*", native: true}},
			},
		}}
		var v Verdict
		bounds.Check(t, len(request), 1<<12, func() { v, _ = decide(c, req) })
		if !bytes.Equal(req.AppendTo(nil), canonical) {
			t.Errorf("the handler changed the request in place to\n%s", message.Show(req))
		}
		switch {
		case v.Close != "" && v.Forward == nil:
			return
		case v.Answer != nil:
			overWire(t, v.Answer, version)
			return
		case v.Forward != nil:
			if v.Edit == nil && v.Close == "" {
				t.Error("forwards a part, but merges nothing into the answer")
			}
			req = v.Forward
			overWire(t, req, version)
		}
		namesOnlyAllowed(t, reflect.ValueOf(req).Elem(), topics, req)
		if v.Edit != nil {
			resp := kmsg.ResponseForKey(key)
			makeUp(t, resp, version, answer)
			bounds.Check(t, len(request)+len(answer), 1<<12, func() { v.Edit(c, resp) })
			overWire(t, resp, version)
		}
	})
}

// FuzzRefuse refuses made up requests of every key and version that kmsg knows, in their own format.
func FuzzRefuse(f *testing.F) {
	for key := range int16(kmsg.MaxKey + 1) {
		f.Add(key, int16(0), []byte{3, 1, 2, 3, 4, 3, 2, 1, 0, 3, 2, 1})
		f.Add(key, kmsg.RequestForKey(key).MaxVersion(), bytes.Repeat([]byte{2, 1, 3}, 20))
	}
	f.Fuzz(func(t *testing.T, key, version int16, request []byte) {
		if resp := Unsupported(key, version); resp != nil {
			overWire(t, resp, resp.GetVersion())
		}
		req := kmsg.RequestForKey(key)
		if req == nil || version < 0 || version > req.MaxVersion() {
			return
		}
		makeUp(t, req, version, request)
		canonical := req.AppendTo(nil)
		for _, err := range []*kerr.Error{kerr.UnsupportedVersion, kerr.TopicAuthorizationFailed} {
			var resp kmsg.Response
			bounds.Check(t, len(request), 1<<12, func() { resp = Refuse(req, err, "why") })
			if resp != nil {
				overWire(t, resp, resp.GetVersion())
			}
		}
		if !bytes.Equal(req.AppendTo(nil), canonical) {
			t.Errorf("to refuse it changed the request to\n%s", message.Show(req))
		}
	})
}

// seed adds a few messages of every version of every row.
func seed(f *testing.F) {
	random := rand.New(rand.NewPCG(1, 2))
	for key := range int16(kmsg.MaxKey + 1) {
		for version := Table[key].Min; Table[key].Decide != nil && version <= Table[key].Max; version++ {
			for range 2 {
				var bytes [2][]byte
				for i := range bytes {
					bytes[i] = make([]byte, random.IntN(200))
					for j := range bytes[i] {
						bytes[i][j] = byte(random.Uint32())
					}
				}
				f.Add(key, version, bytes[0], bytes[1])
			}
		}
	}
}

// makeUp fills a message from bytes and passes it over the wire.
func makeUp(t *testing.T, m wireMessage, version int16, from []byte) {
	t.Helper()
	arbitrary(reflect.ValueOf(m).Elem(), &from)
	overWire(t, m, version)
}

// arbitrary takes names from a handful, so that they meet, and lists of up to three entries, null ones too. Where the
// bytes end, all is zero.
func arbitrary(v reflect.Value, from *[]byte) {
	next := func() (b byte) {
		if len(*from) > 0 {
			b, *from = (*from)[0], (*from)[1:]
		}
		return b
	}
	switch kind := v.Kind(); {
	case v.Type() == reflect.TypeFor[kmsg.Tags]():
	case kind == reflect.Struct:
		for i := range v.NumField() {
			arbitrary(v.Field(i), from)
		}
	case kind == reflect.Pointer:
		if next()%4 > 0 {
			v.Set(reflect.New(v.Type().Elem()))
			arbitrary(v.Elem(), from)
		}
	case kind == reflect.Slice:
		if n := int(next() % 5); n > 0 {
			v.Set(reflect.MakeSlice(v.Type(), n-1, n-1))
		}
		for i := range v.Len() {
			arbitrary(v.Index(i), from)
		}
	case kind == reflect.Array:
		v.Index(v.Len() - 1).SetUint(uint64(next() % 4))
	case kind == reflect.String:
		v.SetString([]string{"", "ok", "ok-1", "secret", "oh"}[next()%5])
	case kind == reflect.Bool:
		v.SetBool(next()%2 > 0)
	case v.CanInt():
		v.SetInt(int64(int8(next())))
	case v.CanUint():
		v.SetUint(uint64(next()))
	}
}

// resourceFields name topics, groups and transactional ids in requests.
var resourceFields = []string{
	"CoordinatorKey", "CoordinatorKeys", "Group", "GroupID", "GroupIDs", "Groups", "SubscribedTopicNames", "Topic",
	"TopicID", "TopicNames", "Topics", "TransactionalID",
}

// unasked are lists of a request that may name anything, since the broker shows nothing for it.
var unasked = map[kmsg.Key]string{
	kmsg.Fetch:                   "ForgottenTopics", // leave the fetch session
	kmsg.ConsumerGroupHeartbeat:  "Topics",          // what the member was assigned
	kmsg.ShareFetch:              "ForgottenTopicsData",
	kmsg.DescribeTopicPartitions: "Topics", // what stands before the cursor is skipped
}

// namesOnlyAllowed walks a request that leaves for the broker.
func namesOnlyAllowed(t *testing.T, v reflect.Value, topics topicMap, req kmsg.Request) {
	switch v.Kind() {
	case reflect.Struct:
		if partitions := v.FieldByName("Partitions"); partitions.IsValid() && partitions.Len() == 0 {
			return // asks for nothing
		}
		for i := range v.NumField() {
			field, name := v.Field(i), v.Type().Field(i).Name
			if unasked[kmsg.Key(req.Key())] == name {
				continue
			}
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
		if v.String() != "" && v.String() != noTopic && !strings.HasPrefix(v.String(), "ok") {
			t.Errorf("forwards %q, which nothing allows:\n%s", v.String(), message.Show(req))
		}
	case reflect.Array:
		if id := v.Interface().(TopicID); !v.IsZero() && topics[id] != "ok" {
			t.Errorf("forwards topic id %x, which nothing allows:\n%s", id, message.Show(req))
		}
	}
}
