package authz

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
	"go.yaml.in/yaml/v3"

	"klamm/enforcer/policy"
)

// A scenario is one file testdata/<API>/<sentence>.yaml. It is played at every version it names, through real bytes:
// the request is encoded and decoded before the handler sees it, and whatever comes out is compared as the bytes of
// that version. A field that a version does not have is therefore dropped from the request and from the expectation
// alike, and one file may cover versions of different shapes.
//
// Messages are written with the field names of kmsg. Fields left out have kmsg's defaults; unknown ones are an error.
// Topic ids are hex, with leading zeroes left out; bytes are strings; an int16 may be the name of an error code
// (TOPIC_AUTHORIZATION_FAILED).
type scenario struct {
	Versions   string            // "2-8", "3" or "0, 4-6"; every version of the row when empty
	Policy     yaml.Node         // a policy file without its apiVersion; no rules when absent
	Subject    subject           // User:alice when absent
	Topics     map[string]string // topic id: name, what the cluster is known to have
	AutoCreate bool              // the cluster creates topics that Metadata names
	Request    yaml.Node
	Expect     struct {
		Forward yaml.Node // "original", or the reduced request; absent when the broker hears nothing
		Answer  yaml.Node // our own answer
		Close   string    // why the connection is closed

		Broker yaml.Node // what the broker answers to what was forwarded; absent when its bytes are relayed unseen
		Client yaml.Node // what the client gets then

		Checks  []string // "Read topic orders.placed: allow by reads orders"; not compared when absent
		Missing []string // topic ids asked for and not known
		Barrier bool
	}
}

type subject struct{ Cluster, SPIFFE, Principal, Host string }

func TestScenarios(t *testing.T) {
	files, err := filepath.Glob("testdata/*/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scenario files below testdata (error: %v)", err)
	}
	for _, file := range files {
		api, sentence := filepath.Base(filepath.Dir(file)), strings.TrimSuffix(filepath.Base(file), ".yaml")
		t.Run(api+"/"+sentence, func(t *testing.T) { playFile(t, file, api) })
	}
}

func TestEveryRowHasScenarios(t *testing.T) {
	for key, api := range Table {
		if api.Decide == nil {
			continue
		}
		name := kmsg.NameForKey(int16(key))
		if files, err := filepath.Glob("testdata/" + name + "/*.yaml"); err != nil || len(files) == 0 {
			t.Errorf("no scenario files in testdata/%s (error: %v)", name, err)
		}
	}
}

func playFile(t *testing.T, file, name string) {
	s, key := load(t, file), keyNamed(name)
	if key < 0 || Table[key].Decide == nil {
		t.Fatalf("the folder is not named like a row of the table: %q", name)
	}
	view := s.view(t)
	for _, version := range s.versions(t, Table[key]) {
		t.Run(fmt.Sprintf("v%d", version), func(t *testing.T) { s.play(t, view, key, version) })
	}
}

func load(t testing.TB, file string) *scenario {
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	s := &scenario{}
	s.Subject.Principal = "User:alice"
	dec := yaml.NewDecoder(bytes.NewReader(text))
	dec.KnownFields(true)
	if err := dec.Decode(s); err != nil {
		t.Fatalf("%s: %v", file, err)
	}
	return s
}

func keyNamed(name string) int16 {
	for key := range int16(kmsg.MaxKey + 1) {
		if kmsg.NameForKey(key) == name {
			return key
		}
	}
	return -1
}

func (s *scenario) play(t *testing.T, view *policy.View, key, version int16) {
	c := &Ctx{View: view, Topics: s.topics(t), AutoCreate: s.AutoCreate}
	req := kmsg.RequestForKey(key)
	build(t, &s.Request, req, version)
	original := req.AppendTo(nil)
	v, missing := decide(c, req)
	if !bytes.Equal(req.AppendTo(nil), original) {
		t.Errorf("the handler changed the request in place to\n%s", show(req))
	}

	e := &s.Expect
	if (v.Answer != nil) != !e.Answer.IsZero() {
		t.Fatalf("answers without the broker: %v; answer:\n%s", v.Answer != nil, show(v.Answer))
	}
	if v.Answer != nil {
		same(t, "the answer", v.Answer, kmsg.ResponseForKey(key), &e.Answer, version)
	}
	if v.Close != e.Close {
		t.Errorf("closes because of %q, expected %q", v.Close, e.Close)
	}
	toBroker := v.Answer == nil && v.Close == ""
	switch {
	case toBroker != !e.Forward.IsZero():
		t.Fatalf("forwards to the broker: %v", toBroker)
	case toBroker && e.Forward.Value == "original":
		if v.Forward != nil {
			t.Errorf("forwards a new request in place of the original bytes:\n%s", show(v.Forward))
		}
	case toBroker:
		if v.Forward == nil {
			t.Fatal("forwards the original bytes")
		}
		same(t, "the forwarded request", v.Forward, kmsg.RequestForKey(key), &e.Forward, version)
	}

	switch {
	case e.Broker.IsZero() != e.Client.IsZero():
		t.Fatal("a scenario has both broker and client, or none of them")
	case e.Broker.IsZero() && v.Edit != nil:
		t.Error("edits the broker's answer, but the scenario gives none")
	case !e.Broker.IsZero():
		resp := kmsg.ResponseForKey(key)
		build(t, &e.Broker, resp, version)
		if v.Edit != nil {
			c.Missing, c.Resolved = nil, false
			v.Edit(c, resp)
		}
		if missing = append(missing, c.Missing...); len(c.Missing) > 0 { // the session starts over when it has asked
			build(t, &e.Broker, resp, version)
			c.Missing, c.Resolved = nil, true
			v.Edit(c, resp)
		}
		same(t, "what the client gets", resp, kmsg.ResponseForKey(key), &e.Client, version)
	}

	if got := lines(c.Checks); e.Checks != nil && !slices.Equal(got, e.Checks) {
		t.Errorf("checks\n  %s\nexpected\n  %s", strings.Join(got, "\n  "), strings.Join(e.Checks, "\n  "))
	}
	var unknown []TopicID
	for _, text := range e.Missing {
		unknown = append(unknown, topicID(t, text))
	}
	if !slices.Equal(missing, unknown) {
		t.Errorf("missing topic ids %x, expected %x", missing, unknown)
	}
	if v.Barrier != e.Barrier {
		t.Errorf("barrier: %v", v.Barrier)
	}
}

// decide asks the handler as a session does: once more when it missed topic ids.
func decide(c *Ctx, req kmsg.Request) (v Verdict, missing []TopicID) {
	api := &Table[req.Key()]
	if v = api.Decide(c, req); len(c.Missing) > 0 {
		missing = c.Missing
		c.Missing, c.Checks, c.Resolved = nil, nil, true
		v = api.Decide(c, req)
	}
	return v, missing
}

func (s *scenario) view(t testing.TB) *policy.View {
	text := []byte("rules: []")
	if !s.Policy.IsZero() {
		s.Policy.Style &^= yaml.FlowStyle // it follows a line of its own
		var err error
		if text, err = yaml.Marshal(&s.Policy); err != nil {
			t.Fatal(err)
		}
	}
	set, err := policy.Parse("the scenario's policy", append([]byte("apiVersion: klamm/v1\n"), text...))
	if err != nil {
		t.Fatal(err)
	}
	subject := policy.Subject{Cluster: s.Subject.Cluster, SPIFFE: s.Subject.SPIFFE, Principal: s.Subject.Principal}
	if s.Subject.Host != "" {
		subject.Host = netip.MustParseAddr(s.Subject.Host)
	}
	return policy.New(set).For(subject)
}

func (s *scenario) versions(t testing.TB, row API) (versions []int16) {
	if s.Versions == "" {
		s.Versions = fmt.Sprintf("%d-%d", row.Min, row.Max)
	}
	for _, part := range strings.Split(s.Versions, ",") {
		from, to, isRange := strings.Cut(strings.TrimSpace(part), "-")
		if !isRange {
			to = from
		}
		lo, errLo := strconv.ParseInt(from, 10, 16)
		hi, errHi := strconv.ParseInt(to, 10, 16)
		if errLo != nil || errHi != nil || int16(lo) < row.Min || int16(hi) > row.Max || lo > hi {
			t.Fatalf("versions %q are none of the row's %d-%d", s.Versions, row.Min, row.Max)
		}
		for v := int16(lo); v <= int16(hi); v++ {
			versions = append(versions, v)
		}
	}
	return versions
}

type topicMap map[TopicID]string

func (m topicMap) Name(id TopicID) (string, bool) {
	name, known := m[id]
	return name, known
}

func (s *scenario) topics(t testing.TB) topicMap {
	m := topicMap{}
	for id, name := range s.Topics {
		m[topicID(t, id)] = name
	}
	return m
}

func topicID(t testing.TB, text string) (id TopicID) {
	if err := decodeID(text, id[:]); err != nil {
		t.Fatal(err)
	}
	return id
}

func decodeID(text string, id []byte) error {
	raw, err := hex.DecodeString(fmt.Sprintf("%032s", text))
	if err != nil || len(raw) != len(id) {
		return fmt.Errorf("%q is not a topic id of up to 32 hex digits", text)
	}
	copy(id, raw)
	return nil
}

// lines are checks as a scenario writes them.
func lines(checks []Check) (lines []string) {
	for _, c := range checks {
		outcome := "deny"
		switch {
		case c.WouldDeny:
			outcome = "would deny"
		case c.Allowed:
			outcome = "allow"
		}
		if c.Rule != "" {
			outcome += " by " + c.Rule
		}
		resource := strings.ReplaceAll(strings.ToLower(c.Type.String()), "_", "-")
		lines = append(lines, fmt.Sprintf("%s %s %s: %s", camel(c.Operation.String()), resource, c.Name, outcome))
	}
	return lines
}

// camel turns Kafka's constant names into the policy's words: DESCRIBE_CONFIGS is DescribeConfigs.
func camel(name string) string {
	var s strings.Builder
	for _, word := range strings.Split(name, "_") {
		s.WriteString(word[:1] + strings.ToLower(word[1:]))
	}
	return s.String()
}

// message is what kmsg's requests and responses have in common.
type message interface {
	SetVersion(version int16)
	GetVersion() int16
	AppendTo(dst []byte) []byte
	ReadFrom(src []byte) error
}

// build fills m from a scenario's text and passes it over the wire, so that it is what a peer would decode.
func build(t testing.TB, text *yaml.Node, m message, version int16) {
	t.Helper()
	if err := fill(text, reflect.ValueOf(m).Elem()); err != nil {
		t.Fatal(err)
	}
	wire := overWire(t, m, version)
	if again := m.AppendTo(nil); !bytes.Equal(again, wire) {
		t.Fatalf("kmsg does not keep this message over the wire: %x became %x", wire, again)
	}
}

// overWire encodes m at the version and decodes it again into m, which loses the fields the version does not have.
func overWire(t testing.TB, m message, version int16) (wire []byte) {
	t.Helper()
	m.SetVersion(version)
	wire = m.AppendTo(nil)
	reflect.ValueOf(m).Elem().SetZero()
	m.SetVersion(version)
	if err := m.ReadFrom(wire); err != nil {
		t.Fatalf("decode what was just encoded: %v", err)
	}
	return wire
}

// same compares a message with the scenario's text as bytes of the version.
func same(t *testing.T, what string, got, empty message, want *yaml.Node, version int16) {
	t.Helper()
	build(t, want, empty, version)
	if got.GetVersion() != version {
		t.Errorf("%s has version %d", what, got.GetVersion())
	}
	if !bytes.Equal(got.AppendTo(nil), empty.AppendTo(nil)) {
		t.Errorf("%s is\n%s\nexpected\n%s", what, show(got), show(empty))
	}
}

// fill sets v from YAML: the names are those of the Go fields, absent ones get kmsg's defaults.
func fill(n *yaml.Node, v reflect.Value) error {
	if d, ok := v.Addr().Interface().(interface{ Default() }); ok {
		d.Default()
	}
	switch kind := v.Kind(); {
	case n.Tag == "!!null":
		v.SetZero()
	case kind == reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		return fill(n, v.Elem())
	case kind == reflect.Struct && n.Kind == yaml.MappingNode:
		for i := 0; i < len(n.Content); i += 2 {
			field := v.FieldByName(n.Content[i].Value)
			if !field.IsValid() {
				return fmt.Errorf("line %d: %s has no field %s", n.Content[i].Line, v.Type(), n.Content[i].Value)
			}
			if err := fill(n.Content[i+1], field); err != nil {
				return err
			}
		}
	case v.Type() == reflect.TypeFor[TopicID]():
		return decodeID(n.Value, v.Slice(0, v.Len()).Bytes())
	case v.Type() == reflect.TypeFor[[]byte]():
		v.SetBytes([]byte(n.Value))
	case kind == reflect.Slice && n.Kind == yaml.SequenceNode:
		v.Set(reflect.MakeSlice(v.Type(), len(n.Content), len(n.Content)))
		for i, item := range n.Content {
			if err := fill(item, v.Index(i)); err != nil {
				return err
			}
		}
	case v.CanInt() && n.Tag == "!!int": // also into kmsg's enumerations, which by themselves read names only
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

// show prints a message as a scenario would write it.
func show(m any) string {
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
