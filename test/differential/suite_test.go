package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/twmb/franz-go/pkg/kmsg"
)

// metadataOf is a Metadata answer with these topics.
func metadataOf(topics ...string) *kmsg.MetadataResponse {
	resp := kmsg.NewPtrMetadataResponse()
	resp.Version = 9
	for _, name := range topics {
		t := kmsg.NewMetadataResponseTopic()
		t.Topic = &name
		resp.Topics = append(resp.Topics, t)
	}
	return resp
}

func TestAnswersDifferWhereOneFieldDoes(t *testing.T) {
	type answer = kmsg.MetadataResponse
	for name, c := range map[string]struct {
		change func(*answer)
		want   string
	}{
		"the same":         {func(*answer) {}, ""},
		"one is throttled": {func(a *answer) { a.ThrottleMillis = 9 }, ""},
		"an error code":    {func(a *answer) { a.Topics[1].ErrorCode = 3 }, "Metadata.Topics.ErrorCode"},
		"an empty list in place of null": {
			func(a *answer) { a.Brokers = []kmsg.MetadataResponseBroker{} }, "Metadata.Brokers",
		},
		"an entry more":                   {func(a *answer) { *a = *metadataOf("a", "b", "c") }, "Metadata.Topics"},
		"other order, where that is none": {func(a *answer) { *a = *metadataOf("b", "a") }, ""},
		"another name":                    {func(a *answer) { *a = *metadataOf("a", "x") }, "Metadata.Topics"},
		"null in place of a text":         {func(a *answer) { a.Topics[0].Topic = nil }, "Metadata.Topics"},
	} {
		t.Run(name, func(t *testing.T) {
			p := &play{sides: []*side{{host: "127.0.0.1"}, {host: "127.0.0.2"}}, kept: []map[string]string{{}, {}}}
			theirs, ours := metadataOf("a", "b"), metadataOf("a", "b")
			c.change(ours)
			var shown [2]any
			for i, answer := range []kmsg.Response{theirs, ours} {
				var err error
				if shown[i], err = p.show(i, outcome{answer: answer}); err != nil {
					t.Fatal(err)
				}
			}
			var got []string
			for _, d := range differences("Metadata", shown[0], shown[1]) {
				got = append(got, d.path)
			}
			if strings.Join(got, " ") != c.want {
				t.Errorf("they differ in %v, want %q", got, c.want)
			}
			closedOne := differences("Metadata", shown[0], closed)
			if len(closedOne) != 1 || covers([]*deliberate{{Fields: []string{"Metadata"}, Ours: "x"}}, "", closedOne[0]) {
				t.Errorf("an answer and none: %v", closedOne)
			}
		})
	}
}

func TestNoErrorCodeAndNoIdentifierIsOnTheListOfDifferences(t *testing.T) {
	for text, ok := range map[string]bool{
		`[{fields: [CreateACLs.Results.ErrorMessage], ours: m, reason: r}]`:         true,
		`[{fields: [CreateACLs.Results.ErrorMessage], ours: m}]`:                    false,
		`[{fields: [CreateACLs.Results.ErrorMessage], reason: r}]`:                  false,
		`[{fields: [Metadata.Topics.ErrorCode], ours: m, reason: r}]`:               false,
		`[{fields: [Metadata.Topics.Topic], ours: m, reason: r}]`:                   false,
		`[{fields: [Fetch.ErrorCode], scenario: a, codes: [A, B], reason: r}]`:      true,
		`[{fields: [Fetch.ErrorCode], scenario: a, reason: r}]`:                     false,
		`[{fields: [Fetch.Topics.TopicID], scenario: a, codes: [A, B], reason: r}]`: false,
		"[" + strings.Repeat(`{fields: [A.B], ours: m, reason: r},`, 16) + "]":      false,
	} {
		file := filepath.Join(t.TempDir(), "differences.yaml")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := readDifferences(file); (err == nil) != ok {
			t.Errorf("%s: %v", text, err)
		}
	}
}

func TestADifferenceOnPurposeIsJustThat(t *testing.T) {
	list := []*deliberate{
		{Fields: []string{"A.ErrorMessage"}, Ours: "refused", used: map[string]bool{}},
		{Fields: []string{"B.ErrorCode", "B.Topics"}, Scenario: "B/one", Codes: []string{"NONE", "BAD"},
			used: map[string]bool{}},
	}
	for name, c := range map[string]struct {
		scenario string
		d        difference
		want     bool
	}{
		"the text":                        {"A/b", difference{path: "A.ErrorMessage", kafka: "long", ours: "refused"}, true},
		"another text":                    {"A/any", difference{path: "A.ErrorMessage", kafka: "long", ours: "x"}, false},
		"a text where there is none":      {"A/any", difference{path: "A.ErrorMessage", ours: "refused"}, false},
		"the codes":                       {"B/one", difference{path: "B.ErrorCode", kafka: "NONE", ours: "BAD"}, true},
		"other codes":                     {"B/one", difference{path: "B.ErrorCode", kafka: "NONE", ours: "WORSE"}, false},
		"what the code brings with it":    {"B/one", difference{path: "B.Topics", kafka: []any{1}, ours: nil}, true},
		"the codes in another scenario":   {"B/two", difference{path: "B.ErrorCode", kafka: "NONE", ours: "BAD"}, false},
		"the rest in another scenario":    {"B/two", difference{path: "B.Topics", kafka: []any{1}, ours: nil}, false},
		"a field that is not on the list": {"B/one", difference{path: "B.Host", kafka: "a", ours: "b"}, false},
	} {
		if got := covers(list, c.scenario, c.d); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

func TestWhatARequestAsks(t *testing.T) {
	s := &side{ids: map[[16]byte]string{{1}: "orders"}, topics: map[string]bool{"orders": true}}
	topic := func(name string, id [16]byte) kmsg.MetadataRequestTopic {
		t := kmsg.MetadataRequestTopic{TopicID: id}
		if name != "" {
			t.Topic = &name
		}
		return t
	}
	for name, c := range map[string]struct {
		version int16
		topics  []kmsg.MetadataRequestTopic
		want    []string
	}{
		"all topics":          {12, nil, []string{"null"}},
		"before null was all": {0, nil, []string{"empty"}},
		"no topics":           {12, []kmsg.MetadataRequestTopic{}, []string{"empty"}},
		"a name":              {9, []kmsg.MetadataRequestTopic{topic("orders", [16]byte{})}, []string{"name"}},
		"an unknown name":     {9, []kmsg.MetadataRequestTopic{topic("x", [16]byte{})}, []string{"name", "unknown"}},
		"an id":               {12, []kmsg.MetadataRequestTopic{topic("", [16]byte{1})}, []string{"id"}},
		"an unknown id": {
			12, []kmsg.MetadataRequestTopic{topic("", [16]byte{2})}, []string{"id", "unknown"},
		},
		"an id before there were": {9, []kmsg.MetadataRequestTopic{topic("orders", [16]byte{1})}, []string{"name"}},
	} {
		req := &kmsg.MetadataRequest{Version: c.version, Topics: c.topics}
		got := asked(req, s)
		if slices.Sort(got); !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
	if !applies(cell{int16(kmsg.Metadata), 12}, "id") || applies(cell{int16(kmsg.Metadata), 9}, "id") ||
		!applies(cell{int16(kmsg.Metadata), 1}, "null") || applies(cell{int16(kmsg.Heartbeat), 4}, "partly") {
		t.Error("what a version can ask is not what it can")
	}
}

func TestAScenarioSaysItsVersionsAndReleases(t *testing.T) {
	spoken := versionRange{2, 9}
	for text, want := range map[string][]int16{
		"": {2, 3, 4, 5, 6, 7, 8, 9}, "0-3": {2, 3}, "8-": {8, 9}, "0, 5": {5}, "10-": nil,
	} {
		got, err := (&scenario{Versions: text}).versions(spoken)
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("versions %q: %v, %v", text, got, err)
		}
	}
	for text, want := range map[string]bool{"": true, ">=4.0": true, "<4.0": false, ">=4.4.0": true, ">=4.5": false} {
		if got, err := (&scenario{Kafka: text}).suits("4.4.0"); err != nil || got != want {
			t.Errorf("kafka %q: %v, %v", text, got, err)
		}
	}
	if _, err := (&scenario{Kafka: "4.0"}).suits("4.4.0"); err == nil {
		t.Error("a release without a sign is taken")
	}
}

func TestARandomRequestIsTheSameOnBothSides(t *testing.T) {
	w := &world{names: []string{"admin", "alice"}, spoken: map[int16]versionRange{int16(kmsg.ListOffsets): {0, 9}}}
	w.direct, w.through = &side{}, &side{}
	seen := map[string]bool{}
	for n := range 20 {
		p, st := w.randomPlay(1, int16(kmsg.ListOffsets), n)
		var bytes [2]string
		for i := range bytes {
			req, err := p.request(i, st)
			if err != nil {
				t.Fatal(err)
			}
			req.SetVersion(p.version)
			bytes[i] = string(req.AppendTo(nil))
		}
		if bytes[0] != bytes[1] {
			t.Fatalf("request %d differs", n)
		}
		seen[bytes[0]] = true
	}
	if len(seen) < 10 {
		t.Errorf("20 requests are %d different ones", len(seen))
	}
}
