package authz

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/twmb/franz-go/pkg/kmsg"
	"go.yaml.in/yaml/v3"

	"klamm/enforcer/policy"
	"klamm/test/message"
)

// A scenario is one file testdata/<API>/<sentence>.yaml. It is played at every version it names, through real bytes:
// the request is encoded and decoded before the handler sees it, and whatever comes out is compared as the bytes of
// that version. A field that a version does not have is therefore dropped from the request and from the expectation
// alike, and one file may cover versions of different shapes.
//
// Messages are written as package message reads them.
type scenario struct {
	Versions   string            // "2-8", "3" or "0, 4-6"; every version of the row when empty
	Policy     yaml.Node         // a policy file without its apiVersion; no rules when absent
	Subject    subject           // User:alice when absent
	Login      string            // the principal of a SASL login the client made itself; none when absent
	Topics     map[string]string // topic id: name, what the cluster is known to have
	AutoCreate bool              // the cluster creates topics that Metadata names
	Listed     []string          // the topics there are, sorted, as far as the handler may know; unknown when absent
	// Members are what was looked up of members of consumer groups, by "group/member", as ConsumerGroupDescribe tells it.
	Members map[string]yaml.Node
	Before  struct { // what came before, on the connection or of the same member
		Policy   yaml.Node // by which it was decided; the scenario's own when absent
		Listed   []string  // as above, then
		Requests []yaml.Node
		Answers  []yaml.Node // the broker's, where the handler looks at them
	}
	Request yaml.Node
	Expect  struct {
		Forward yaml.Node // "original", or the reduced request; absent when the broker hears nothing
		Answer  yaml.Node // our own answer
		Close   string    // why the connection is closed

		Broker yaml.Node // what the broker answers to what was forwarded; absent when its bytes are relayed unseen
		Client yaml.Node // what the client gets then

		Checks  []string // "Read topic orders.placed: allow by reads orders"; not compared when absent
		Missing []string // topic ids asked for and not known
		Stale   bool     // the list of topics is renewed for the decision
		Unmet   string   // the member to be looked up, as "group/member"
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
	c := &Ctx{View: view, Topics: s.topics(t), AutoCreate: s.AutoCreate, Groups: s.groups(t),
		Principal: s.Login}
	s.playBefore(t, c, key, version)
	req := kmsg.RequestForKey(key)
	build(t, &s.Request, req, version)
	original := req.AppendTo(nil)
	v, missing := decide(c, req)
	if !bytes.Equal(req.AppendTo(nil), original) {
		t.Errorf("the handler changed the request in place to\n%s", message.Show(req))
	}

	e := &s.Expect
	if (v.Answer != nil) != !e.Answer.IsZero() {
		t.Fatalf("answers without the broker: %v; answer:\n%s", v.Answer != nil, message.Show(v.Answer))
	}
	if v.Answer != nil {
		same(t, "the answer", v.Answer, kmsg.ResponseForKey(key), &e.Answer, version)
	}
	if v.Close != e.Close {
		t.Errorf("closes because of %q, expected %q", v.Close, e.Close)
	}
	toBroker := v.Answer == nil && (v.Close == "" || v.Forward != nil)
	switch {
	case toBroker != !e.Forward.IsZero():
		t.Fatalf("forwards to the broker: %v", toBroker)
	case toBroker && e.Forward.Value == "original":
		if v.Forward != nil {
			t.Errorf("forwards a new request in place of the original bytes:\n%s", message.Show(v.Forward))
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
	if c.Stale != e.Stale {
		t.Errorf("renews the list of topics: %v", c.Stale)
	}
	unmet := ""
	if c.Unmet != nil {
		unmet = c.Unmet.Group + "/" + c.Unmet.ID
	}
	if unmet != e.Unmet {
		t.Errorf("looks up member %q, expected %q", unmet, e.Unmet)
	}
}

// playBefore leaves the sessions behind in c.
func (s *scenario) playBefore(t *testing.T, c *Ctx, key, version int16) {
	before := Ctx{View: c.View, Topics: c.Topics, AutoCreate: c.AutoCreate}
	if !s.Before.Policy.IsZero() {
		before.View = s.viewOf(t, &s.Before.Policy)
	}
	if s.Before.Listed != nil {
		c.Groups.(*groups).names, c.Groups.(*groups).edition = s.Before.Listed, 1
	}
	before.Groups = c.Groups
	for i := range s.Before.Requests {
		req := kmsg.RequestForKey(key)
		build(t, &s.Before.Requests[i], req, version)
		v, _ := decide(&before, req)
		if i < len(s.Before.Answers) && v.Edit != nil {
			resp := kmsg.ResponseForKey(key)
			build(t, &s.Before.Answers[i], resp, version)
			v.Edit(&before, resp)
		}
		before = Ctx{View: before.View, Topics: c.Topics, AutoCreate: c.AutoCreate, Fetch: before.Fetch, Share: before.Share,
			Groups: c.Groups}
	}
	c.Fetch, c.Share = before.Fetch, before.Share
	c.Groups.(*groups).list(s.Listed)
}

// decide asks the handler as a session does: once more when it missed topic ids, or which topics there are.
func decide(c *Ctx, req kmsg.Request) (v Verdict, missing []TopicID) {
	api := &Table[req.Key()]
	if v = api.Decide(c, req); len(c.Missing) > 0 || c.Stale {
		missing = c.Missing
		c.Missing, c.Checks, c.Resolved, c.Renewed = nil, nil, true, true
		v = api.Decide(c, req)
	}
	return v, missing
}

func (s *scenario) view(t testing.TB) *policy.View { return s.viewOf(t, &s.Policy) }

func (s *scenario) viewOf(t testing.TB, rules *yaml.Node) *policy.View {
	text := []byte("rules: []")
	if !rules.IsZero() {
		rules.Style &^= yaml.FlowStyle // it follows a line of its own
		var err error
		if text, err = yaml.Marshal(rules); err != nil {
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

// groups is the memory of a node.
type groups struct {
	names   []string
	edition uint64
	members map[MemberName]*Member
}

func (g *groups) TopicNames() ([]string, uint64) { return g.names, g.edition }

func (g *groups) Member(group, id string) *Member { return g.members[MemberName{group, id}] }

func (g *groups) SetMember(group, id string, m *Member) { g.members[MemberName{group, id}] = m }

// list makes names the list, which nil leaves unknown.
func (g *groups) list(names []string) {
	if g.names = names; names != nil {
		g.edition++
	} else {
		g.edition = 0
	}
}

func (s *scenario) groups(t testing.TB) *groups {
	g := &groups{members: map[MemberName]*Member{}}
	for name, text := range s.Members {
		group, id, _ := strings.Cut(name, "/")
		m := kmsg.NewConsumerGroupDescribeResponseGroupMember()
		if err := message.Fill(&text, &m); err != nil {
			t.Fatal(err)
		}
		g.members[MemberName{group, id}] = MemberDescribed(&m)
	}
	return g
}

type topicMap map[TopicID]string

func (m topicMap) ID(name string) (TopicID, bool) {
	for id, n := range m {
		if n == name {
			return id, true
		}
	}
	return TopicID{}, false
}

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
	if err := message.DecodeID(text, id[:]); err != nil {
		t.Fatal(err)
	}
	return id
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

// wireMessage is what kmsg's requests and responses have in common.
type wireMessage interface {
	SetVersion(version int16)
	GetVersion() int16
	AppendTo(dst []byte) []byte
	ReadFrom(src []byte) error
}

// build fills m from a scenario's text and passes it over the wire, so that it is what a peer would decode.
func build(t testing.TB, text *yaml.Node, m wireMessage, version int16) {
	t.Helper()
	if err := message.Fill(text, m); err != nil {
		t.Fatal(err)
	}
	wire := overWire(t, m, version)
	if again := m.AppendTo(nil); !bytes.Equal(again, wire) {
		t.Fatalf("kmsg does not keep this message over the wire: %x became %x", wire, again)
	}
}

// overWire encodes m at the version and decodes it again into m, which loses the fields the version does not have.
func overWire(t testing.TB, m wireMessage, version int16) (wire []byte) {
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
func same(t *testing.T, what string, got, empty wireMessage, want *yaml.Node, version int16) {
	t.Helper()
	build(t, want, empty, version)
	if got.GetVersion() != version {
		t.Errorf("%s has version %d", what, got.GetVersion())
	}
	if !bytes.Equal(got.AppendTo(nil), empty.AppendTo(nil)) {
		t.Errorf("%s is\n%s\nexpected\n%s", what, message.Show(got), message.Show(empty))
	}
}
