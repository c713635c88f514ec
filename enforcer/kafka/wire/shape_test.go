package wire

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/test/bounds"
)

// message is what kmsg's requests and responses have in common.
type message interface {
	encoder
	ReadFrom(b []byte) error
}

func newMessage(d direction, key, version int16) message {
	var m message = kmsg.RequestForKey(key)
	if d == response {
		m = kmsg.ResponseForKey(key)
	}
	m.SetVersion(version)
	return m
}

// everyMessage runs f for every message, version and direction that kmsg has.
func everyMessage(t *testing.T, f func(t *testing.T, d direction, key, version int16)) {
	for key := range int16(kmsg.MaxKey + 1) {
		for _, d := range []direction{request, response} {
			for version := int16(0); known(key, version); version++ {
				t.Run(fmt.Sprintf("%s v%d %s", kmsg.NameForKey(key), version, d), func(t *testing.T) {
					f(t, d, key, version)
				})
			}
		}
	}
}

// filler fills messages at random. Lists get up to lists elements, so that they are null, empty and more.
type filler struct {
	*rand.Rand
	lists  int
	unsent uint32 // a tag for unknown tagged fields; 0 makes none
}

func newFiller(key, version int16) *filler {
	return &filler{Rand: rand.New(rand.NewPCG(uint64(key), uint64(version))), lists: 2, unsent: 1000}
}

func (r *filler) fill(v reflect.Value) {
	if t, ok := v.Addr().Interface().(*kmsg.Tags); ok {
		for range r.IntN(3) * int(min(r.unsent, 1)) {
			t.Set(r.unsent+r.Uint32N(1<<20), make([]byte, r.IntN(3)))
		}
		return
	}
	switch v.Kind() {
	case reflect.Bool:
		v.SetBool(r.IntN(2) == 0)
	case reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		v.SetInt(r.Int64() >> r.IntN(64))
	case reflect.Uint8, reflect.Uint16, reflect.Uint32:
		v.SetUint(r.Uint64() >> r.IntN(64))
	case reflect.Float64:
		v.SetFloat(r.Float64())
	case reflect.String:
		v.SetString(strings.Repeat("s", r.IntN(4)))
	case reflect.Array:
		for i := range v.Len() {
			r.fill(v.Index(i))
		}
	case reflect.Slice:
		if n := r.IntN(r.lists+2) - 1; n >= 0 {
			v.Set(reflect.MakeSlice(v.Type(), n, n))
		}
		for i := range v.Len() {
			makeDefault(v.Index(i))
			r.fill(v.Index(i))
		}
	case reflect.Pointer:
		if r.IntN(3) > 0 {
			v.Set(reflect.New(v.Type().Elem()))
			makeDefault(v.Elem())
			r.fill(v.Elem())
		}
	case reflect.Struct:
		for i := range v.NumField() {
			r.fill(v.Field(i))
		}
	}
}

// body is a random message, encoded.
func (r *filler) body(d direction, key, version int16) []byte {
	m := newMessage(d, key, version)
	v := reflect.ValueOf(m).Elem()
	makeDefault(v)
	r.fill(v)
	m.SetVersion(version)
	return m.AppendTo(nil)
}

// walked walks a body as check does.
func walked(t testing.TB, d direction, key, version int16, body []byte) *walk {
	t.Helper()
	s, err := shapeOf(d, key, version)
	if err != nil {
		t.Fatal(err)
	}
	w := &walk{Cursor: Cursor{B: body, Flex: Flexible(key, version)}}
	w.run(s.steps)
	return w
}

func TestTheWalkOfAMessageEndsWhereTheMessageEnds(t *testing.T) {
	everyMessage(t, func(t *testing.T, d direction, key, version int16) {
		random := newFiller(key, version)
		for range 30 {
			body := random.body(d, key, version)
			if _, err := check(d, key, version, body); err != nil {
				t.Fatalf("%v\n%s", err, hex.Dump(body))
			}
			if w := walked(t, d, key, version, append(body, 0)); w.Bad || w.Off != len(body) {
				t.Fatalf("the walk ends after %d of %d bytes of\n%s", w.Off, len(body), hex.Dump(body))
			}
		}
	})
}

func TestAMessageThatIsCutIsRefusedWhereKmsgRefusesIt(t *testing.T) {
	everyMessage(t, func(t *testing.T, d direction, key, version int16) {
		body := newFiller(key, version).body(d, key, version)
		for n := range min(len(body), 300) {
			_, err := check(d, key, version, body[:n])
			derr := newMessage(d, key, version).ReadFrom(body[:n])
			if (err == nil) != (derr == nil) {
				t.Fatalf("after %d bytes the walk says %v, kmsg says %v\n%s", n, err, derr, hex.Dump(body[:n]))
			}
		}
	})
}

func TestWhatKmsgTakesIsAccepted(t *testing.T) {
	everyMessage(t, func(t *testing.T, d direction, key, version int16) {
		body := newFiller(key, version).body(d, key, version)
		body = body[:min(len(body), 300)]
		for n := range body {
			was := body[n]
			for _, b := range []byte{0, 1, 2, 0x7f, 0x80, 0xff, was + 1, was - 1} {
				body[n] = b
				agree(t, d, key, version, body)
			}
			body[n] = was
		}
	})
}

// agree fails if kmsg takes a body that the walk refuses, other than for the three reasons that CheckRequest names.
// Where the count of tagged fields is at fault, kmsg is asked only if it soon ends.
func agree(t *testing.T, d direction, key, version int16, body []byte) {
	t.Helper()
	w := walked(t, d, key, version, body)
	at := Cursor{B: body, Off: w.failedAt, Flex: w.Flex}
	switch {
	case w.why == tagOrder, w.why == tagNotFilled:
		return
	case w.why == longArray && w.Flex && at.Uvarint() > 1<<31:
		return
	case w.why == manyTags && at.Uvarint() > 1000:
		return
	}
	if err := newMessage(d, key, version).ReadFrom(body); err == nil && w.Bad {
		t.Fatalf("kmsg takes what is refused at byte %d (%s): %s\n%s", w.failedAt, w.failed.name, w.why, hex.Dump(body))
	}
}

func TestATagCountBeyondTheBytesIsRefused(t *testing.T) {
	// A group, a generation, a member, no instance, and the tagged fields.
	attack := []byte("\x02g" + "\x00\x00\x00\x01" + "\x02m" + "\x00" + "\xff\xff\xff\xff\x0f")
	if _, err := CheckRequest(int16(kmsg.Heartbeat), 4, attack); !errors.Is(err, ErrShape) {
		t.Errorf("the Heartbeat is not refused: %v", err)
	}
	everyMessage(t, func(t *testing.T, d direction, key, version int16) {
		if !Flexible(key, version) {
			return
		}
		random := newFiller(key, version)
		random.unsent = 0
		for range 5 {
			m := newMessage(d, key, version)
			v := reflect.ValueOf(m).Elem()
			makeDefault(v)
			random.fill(v)
			m.SetVersion(version)
			for _, tags := range tagsIn(v) {
				tooMany(t, d, key, version, m, tags)
			}
		}
	})
}

// tagsIn finds the unknown tagged fields of all structs of a message.
func tagsIn(v reflect.Value) (all []*kmsg.Tags) {
	if t, ok := v.Addr().Interface().(*kmsg.Tags); ok {
		return []*kmsg.Tags{t}
	}
	switch v.Kind() {
	case reflect.Slice:
		for i := range v.Len() {
			all = append(all, tagsIn(v.Index(i))...)
		}
	case reflect.Pointer:
		if !v.IsNil() {
			return tagsIn(v.Elem())
		}
	case reflect.Struct:
		for i := range v.NumField() {
			all = append(all, tagsIn(v.Field(i))...)
		}
	}
	return all
}

// tooMany finds the count of one struct's tagged fields, by adding one, and declares more than there is room for.
func tooMany(t *testing.T, d direction, key, version int16, m message, tags *kmsg.Tags) {
	t.Helper()
	base := m.AppendTo(nil)
	tags.Set(1<<31, []byte("mark"))
	marked := m.AppendTo(nil)
	*tags = kmsg.Tags{}
	mark := bytes.Index(marked, []byte{0x80, 0x80, 0x80, 0x80, 8, 4, 'm', 'a', 'r', 'k'})
	if mark < 0 {
		return // not of this version
	}
	first := 0
	for first < len(base) && base[first] == marked[first] {
		first++
	}
	var sizes []int // of the tagged fields that the struct is in
	at := first
	if marked[at] != base[at]+1 {
		sizes, at = []int{first}, mark-1
	}
	for _, count := range []uint32{uint32(len(marked)), 1 << 20, 1<<31 - 1, 1 << 31, 1<<32 - 1} {
		declared := binary.AppendUvarint(nil, uint64(count))
		body := slices.Replace(slices.Clone(marked), at, at+1, declared...)
		for _, size := range sizes {
			body[size] += byte(len(declared) - 1)
		}
		w := walked(t, d, key, version, body)
		if w.why != manyTags || w.failedAt != at {
			t.Fatalf("%d tagged fields are declared at byte %d, the walk stops at %d for %q\n%s",
				count, at, w.failedAt, w.why, hex.Dump(body))
		}
	}
}

func TestTheWeightIsWhatKmsgAllocatesOrMore(t *testing.T) {
	worst := 0.0
	everyMessage(t, func(t *testing.T, d direction, key, version int16) {
		random := newFiller(key, version)
		random.lists = 5
		for range 2 {
			weigh(t, d, key, version, random.body(d, key, version))
		}
		for _, body := range longLists(d, key, version) {
			weight, allocated := weigh(t, d, key, version, body)
			// Charging far too much would refuse what there is room for.
			if weight > 2*allocated+4096 {
				t.Errorf("%d bytes are charged, %d are allocated", weight, allocated)
			}
			worst = max(worst, float64(allocated)/float64(len(body)+1))
		}
	})
	t.Logf("at the worst a body takes %.0f times its bytes", worst)
}

// perAppend is how often append(a, make([]T, n)...) allocates, which is how kmsg makes its arrays: twice under the race
// detector, once otherwise.
var perAppend = func() int64 {
	n := 1000
	return int64(testing.AllocsPerRun(10, func() { made = append([]byte(nil), make([]byte, n)...) }))
}()

var made []byte

// weigh compares a weight with what reading allocates. It measures again if that is more, as the runtime allocates too.
func weigh(t *testing.T, d direction, key, version int16, body []byte) (weight, allocated int64) {
	t.Helper()
	weight, err := check(d, key, version, body)
	if err != nil {
		t.Fatal(err)
	}
	allocated = math.MaxInt64
	for tries := 0; tries < 3 && allocated > weight*perAppend; tries++ {
		m := newMessage(d, key, version)
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		err = m.ReadFrom(body)
		runtime.ReadMemStats(&after)
		if err != nil {
			t.Fatal(err)
		}
		message := int64(reflect.TypeOf(m).Elem().Size())
		allocated = min(allocated, int64(after.TotalAlloc-before.TotalAlloc)+message)
	}
	if weight*perAppend < allocated {
		t.Errorf("%d bytes are charged, %d are allocated for a body of %d bytes", weight, allocated, len(body))
	}
	return weight, allocated
}

// longLists gives, for every list of a message, a body in which it has many elements of the fewest bytes, and one in
// which each of those has an unknown tagged field; and for every struct a body in which it has many of those.
func longLists(d direction, key, version int16) (bodies [][]byte) {
	const many = 1000
	m := newMessage(d, key, version)
	root := reflect.ValueOf(m).Elem()
	makeDefault(root)
	m.SetVersion(version)
	var visit func(v reflect.Value)
	visit = func(v reflect.Value) {
		switch v.Kind() {
		case reflect.Slice:
			if v.Type().Elem().Kind() == reflect.Uint8 {
				return
			}
			v.Set(reflect.MakeSlice(v.Type(), many, many))
			for i := range many {
				makeDefault(v.Index(i))
			}
			bodies = append(bodies, m.AppendTo(nil))
			if v.Index(0).Kind() == reflect.Struct && Flexible(key, version) {
				for i := range many {
					unknownTags(v.Index(i)).Set(1000, nil)
				}
				bodies = append(bodies, m.AppendTo(nil))
			}
			v.Set(v.Slice(0, 1))
			visit(v.Index(0))
			v.SetZero()
		case reflect.Pointer:
			v.Set(reflect.New(v.Type().Elem()))
			makeDefault(v.Elem())
			visit(v.Elem())
			v.SetZero()
		case reflect.Struct:
			if v.Type() == reflect.TypeFor[kmsg.Tags]() {
				return
			}
			if Flexible(key, version) {
				for i := range uint32(many) {
					unknownTags(v).Set(1000+i, nil)
				}
				bodies = append(bodies, m.AppendTo(nil))
				*unknownTags(v) = kmsg.Tags{}
			}
			for i := range v.NumField() {
				visit(v.Field(i))
			}
		}
	}
	visit(root)
	return bodies
}

func TestTagsAreAscendingAndFilled(t *testing.T) {
	// An ApiVersions v3 answer: no error, no keys, no throttling, then tagged fields; 1 is an INT64, 3 a BOOLEAN.
	const epoch = "01 08 0000000000000007"
	for name, c := range map[string]struct {
		tags string
		want fault
	}{
		"a known tag":                         {"01" + epoch, ""},
		"known and unknown tags":              {"03" + epoch + "03 01 01" + "ffffffff0f 00", ""},
		"a known tag twice":                   {"02" + epoch + epoch, tagOrder},
		"an unknown tag twice":                {"02" + "0900" + "0900", tagOrder},
		"a lower tag behind a higher one":     {"02" + "03 01 01" + epoch, tagOrder},
		"a known tag that is too long":        {"01" + "01 09 000000000000000700", tagNotFilled},
		"a known tag that is too short":       {"01" + "01 07 00000000000000", short},
		"a known tag that is empty":           {"01" + "01 00", short},
		"a list in a tag longer than the tag": {"02" + "00 01 03" + "09 05 0000000000", longArray},
		"a size beyond the end":               {"01" + "09 05 00", short},
		"a tag of six bytes":                  {"01" + "898080808000 00", short},
	} {
		t.Run(name, func(t *testing.T) {
			body, err := hex.DecodeString(strings.ReplaceAll("0000 01 00000000"+c.tags, " ", ""))
			if err != nil {
				t.Fatal(err)
			}
			w := walked(t, response, int16(kmsg.ApiVersions), 3, body)
			if w.why != c.want || (!w.Bad && w.Off != len(body)) {
				t.Errorf("the fault is %q, not %q", w.why, c.want)
			}
		})
	}
}

func TestTheErrorNamesThePlaceAndNothingOfTheBody(t *testing.T) {
	_, err := CheckRequest(int16(kmsg.Heartbeat), 4, []byte("\x07secret\x00\x00\x00\x01\x07sec"))
	const want = "the body does not have the shape of its message: Heartbeat v4 request: MemberID at byte 11 of 15: " +
		string(short)
	if !errors.Is(err, ErrShape) || err.Error() != want {
		t.Errorf("got %v\nnot %s", err, want)
	}
	for _, c := range [][2]int16{{-1, 0}, {kmsg.MaxKey + 1, 0}, {0, -1}, {0, 100}} {
		if _, err := CheckResponse(c[0], c[1], nil); !errors.Is(err, ErrShape) {
			t.Errorf("key %d, version %d: %v", c[0], c[1], err)
		}
	}
}

func TestAShapeIsMadeOnceForAllThatAskTogether(t *testing.T) {
	slot := &shapes[response][kmsg.Fetch][4]
	slot.Store(nil)
	got := make([]*shape, 8)
	var wg sync.WaitGroup
	for i := range got {
		wg.Go(func() {
			var err error
			if got[i], err = shapeOf(response, int16(kmsg.Fetch), 4); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for _, s := range got {
		if s == nil || s != slot.Load() {
			t.Errorf("a shape of its own: %p", s)
		}
	}
}

func TestTheWalkAllocatesNothing(t *testing.T) {
	body := metadata(100)
	allocs := testing.AllocsPerRun(100, func() {
		if _, err := CheckResponse(int16(kmsg.Metadata), 12, body); err != nil {
			t.Error(err)
		}
	})
	if allocs != 0 {
		t.Errorf("%v allocations", allocs)
	}
}

// metadata is a Metadata v12 answer of so many topics, of three partitions and three replicas each.
func metadata(topics int) []byte {
	resp := kmsg.NewMetadataResponse()
	resp.Version = 12
	for i := range int32(3) {
		resp.Brokers = append(resp.Brokers, kmsg.MetadataResponseBroker{NodeID: i, Host: "broker.kafka.svc", Port: 9092})
	}
	for i := range topics {
		topic := kmsg.NewMetadataResponseTopic()
		name := fmt.Sprintf("orders.payments.%d", i)
		topic.Topic, topic.TopicID = &name, [16]byte{byte(i)}
		for p := range int32(3) {
			topic.Partitions = append(topic.Partitions, kmsg.MetadataResponseTopicPartition{
				Partition: p, Replicas: []int32{0, 1, 2}, ISR: []int32{0, 1, 2}})
		}
		resp.Topics = append(resp.Topics, topic)
	}
	return resp.AppendTo(nil)
}

func BenchmarkCheck(b *testing.B) {
	topic := "orders.payments"
	meta := kmsg.NewMetadataRequest()
	meta.Version = 12
	meta.Topics = []kmsg.MetadataRequestTopic{{Topic: &topic}, {Topic: &topic}}
	join := kmsg.NewJoinGroupRequest()
	join.Version, join.Group, join.ProtocolType = 9, "orders-service", "consumer"
	for _, name := range []string{"range", "cooperative-sticky"} {
		join.Protocols = append(join.Protocols, kmsg.JoinGroupRequestProtocol{Name: name, Metadata: make([]byte, 100)})
	}
	commit := kmsg.NewOffsetCommitRequest()
	commit.Version, commit.Group, commit.MemberID = 8, "orders-service", "orders-service-7d4f9c-1"
	partitions := make([]kmsg.OffsetCommitRequestTopicPartition, 6)
	commit.Topics = []kmsg.OffsetCommitRequestTopic{{Topic: topic, Partitions: partitions}}
	for _, c := range []struct {
		name         string
		d            direction
		key, version int16
		body         []byte
	}{
		{"Metadata request", request, meta.Key(), 12, meta.AppendTo(nil)},
		{"JoinGroup request", request, join.Key(), 9, join.AppendTo(nil)},
		{"OffsetCommit request", request, commit.Key(), 8, commit.AppendTo(nil)},
		{"Metadata response of 1000 topics", response, meta.Key(), 12, metadata(1000)},
	} {
		b.Run(c.name, func(b *testing.B) {
			b.SetBytes(int64(len(c.body)))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := check(c.d, c.key, c.version, c.body); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// FuzzCheck gives the walk arbitrary bytes. What it accepts, kmsg must come to an end with.
func FuzzCheck(f *testing.F) {
	for key := range int16(kmsg.MaxKey + 1) {
		for version := int16(0); known(key, version); version++ {
			random := newFiller(key, version)
			f.Add(key, version, random.body(request, key, version), random.body(response, key, version))
		}
	}
	f.Fuzz(func(t *testing.T, key, version int16, req, resp []byte) {
		for d, body := range [][]byte{request: req, response: resp} {
			d := direction(d)
			var weight int64
			var err error
			bounds.Check(t, len(body), 0, func() { weight, err = check(d, key, version, body) })
			if err != nil {
				if !errors.Is(err, ErrShape) {
					t.Errorf("an error of another kind: %v", err)
				}
				continue
			}
			if most := int64(len(body)+1) * 2048; weight > most {
				t.Errorf("%d bytes weigh %d", len(body), weight)
			}
			m := newMessage(d, key, version)
			bounds.Check(t, int(weight), 1, func() { err = m.ReadFrom(body) })
			if err != nil {
				continue // such as a null that is not allowed
			}
			again := m.AppendTo(nil)
			if w := walked(t, d, key, version, again); w.Bad || w.Off != len(again) {
				t.Errorf("re-encoded, it is refused: %s", w.why)
			}
		}
	})
}

// known tells whether kmsg has a message of this key and version.
func known(key, version int16) bool {
	if key < 0 || key > kmsg.MaxKey || version < 0 {
		return false
	}
	req := kmsg.RequestForKey(key)
	return req != nil && version <= req.MaxVersion()
}
