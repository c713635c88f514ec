package wire

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/twmb/franz-go/pkg/kmsg"
)

// ErrShape says that a body is not the message its header claims.
var ErrShape = errors.New("the body does not have the shape of its message")

// CheckRequest walks the body of a request before kmsg decodes it. kmsg believes a declared count of tagged fields even
// when the input has run out (2^32-1 of them take minutes), and makes arrays of structs that are far larger than their
// bytes; the walk takes time linear in len(body) and allocates nothing. A nil error means that ReadFrom's work is
// bounded by the body, and weight is an upper estimate of the bytes it allocates, the message included. ReadFrom may
// still refuse, such as a null where none may be. Bytes behind the message are not looked at.
//
// What ReadFrom takes, the walk takes, but for three things that no encoder writes: a compact array length above 2^31
// (null to kmsg), tags that are not in ascending order (Kafka's TaggedFields refuses them), and a known tagged field
// whose content does not fill its size (kmsg goes by the size, Kafka by the content).
//
// The error is an ErrShape that names the field and the place, and holds nothing of the body.
func CheckRequest(key, version int16, body []byte) (weight int64, err error) {
	return check(request, key, version, body)
}

// CheckResponse is CheckRequest for the body of an answer.
func CheckResponse(key, version int16, body []byte) (weight int64, err error) {
	return check(response, key, version, body)
}

type direction int

const (
	request direction = iota
	response
)

func (d direction) String() string { return [...]string{"request", "response"}[d] }

func check(d direction, key, version int16, body []byte) (int64, error) {
	s, err := shapeOf(d, key, version)
	if err != nil {
		return 0, err
	}
	w := walk{Cursor: Cursor{B: body, Flex: Flexible(key, version)}, weight: s.weight}
	w.run(s.steps)
	if w.Bad {
		return 0, fmt.Errorf("%w: %s v%d %s: %s at byte %d of %d: %s",
			ErrShape, kmsg.NameForKey(key), version, d, w.failed.name, w.failedAt, len(body), w.why)
	}
	return w.weight, nil
}

// step is one piece of a message, in wire order. The depth of the tree of steps is the schema's.
type step struct {
	kind  kind
	name  string // for errors
	size  int    // of fixed: its bytes; of an array: the fewest bytes of an element
	mem   int64  // of an array: the memory of an element; of an optional struct: its memory
	steps []step // of an array's element; of an optional struct
	tags  []tag
}

type kind uint8

const (
	fixed        kind = iota // fields of fixed size, adjacent ones in one
	text                     // STRING
	nullableText             // NULLABLE_STRING
	opaque                   // BYTES and RECORDS, which kmsg leaves in place
	array
	optional // a nullable struct: INT8, -1 is null
	tagged   // the tagged fields of a struct (KIP-482)
)

// tag is a tagged field that kmsg knows, and decodes.
type tag struct {
	key   uint32
	steps []step
}

// Memory, in bytes, of what kmsg makes besides the elements of arrays.
const (
	stringHeader = 16  // a *string is an allocation of its own
	tagMap       = 384 // the map that holds a struct's unknown tags
	tagMapRoom   = 8   // how many it holds at first
	tagEntry     = 160 // one of them in a map with more, with what the map left behind as it grew
)

// allocated is at least what the allocator spends on n bytes: its size classes waste less than a quarter, or 16 bytes
// where small, and a header of 8 (Go 1.26, runtime/sizeclasses.go).
func allocated(n int64) int64 { return n + n/4 + 32 }

// fault is what is wrong with a body.
type fault string

const (
	short        fault = "more bytes are declared than there are"
	longArray    fault = "more elements are declared than there is room for"
	manyTags     fault = "more tagged fields are declared than there is room for"
	tagOrder     fault = "tags are not in ascending order"
	tagNotFilled fault = "the content of a tagged field does not fill its size"
)

type walk struct {
	Cursor
	weight   int64
	why      fault
	failed   *step
	failedAt int
}

func (w *walk) fail(why fault) { w.Bad, w.why = true, why }

func (w *walk) run(steps []step) {
	for i := range steps {
		s := &steps[i]
		at := w.Off
		switch s.kind {
		case fixed:
			w.Take(s.size)
		case text, nullableText:
			w.text(s.kind == nullableText)
		case opaque:
			if n := w.Length(); n > 0 {
				w.Take(n)
			}
		case array:
			w.array(s)
		case optional:
			if w.I8() != -1 {
				w.weight += allocated(s.mem)
				w.run(s.steps)
			}
		case tagged:
			w.tagged(s)
		}
		if w.Bad {
			if w.failed == nil {
				w.failed, w.failedAt = s, at
			}
			if w.why == "" {
				w.why = short
			}
			return
		}
	}
}

func (w *walk) text(nullable bool) {
	var n int
	if w.Flex {
		n = int(w.Uvarint()) - 1
	} else {
		n = int(w.I16())
	}
	if n < 0 && nullable {
		return
	}
	w.Take(n)
	if nullable {
		w.weight += stringHeader
	}
	if n > 0 {
		w.weight += allocated(int64(n))
	}
}

func (w *walk) array(s *step) {
	n := w.Length()
	if n <= 0 {
		return
	}
	if n > (len(w.B)-w.Off)/s.size {
		w.fail(longArray)
		return
	}
	w.weight += allocated(int64(n) * s.mem)
	if len(s.steps) == 1 && s.steps[0].kind == fixed {
		w.Take(n * s.size)
		return
	}
	for range n {
		if w.run(s.steps); w.Bad {
			return
		}
	}
}

func (w *walk) tagged(s *step) {
	n := int(w.Uvarint())
	if n == 0 {
		return
	}
	const least = 2 // bytes of a tagged field: its tag and its size
	if n > (len(w.B)-w.Off)/least {
		w.fail(manyTags)
		return
	}
	unknown := 0
	for last := int64(-1); n > 0; n-- {
		key, size := w.Uvarint(), int(w.Uvarint())
		start := w.Off
		if w.Take(size); w.Bad {
			return
		}
		if int64(key) <= last {
			w.fail(tagOrder)
			return
		}
		last = int64(key)
		if !w.known(s.tags, key, start) {
			unknown++
		}
		if w.Bad {
			return
		}
	}
	if unknown > 0 {
		w.weight += tagMap
	}
	if unknown > tagMapRoom {
		w.weight += int64(unknown) * tagEntry
	}
}

// known checks the content of a tagged field, from start to where the cursor is, if kmsg decodes it.
func (w *walk) known(tags []tag, key uint32, start int) bool {
	for i := range tags {
		if tags[i].key != key {
			continue
		}
		whole, end := w.B, w.Off
		w.B, w.Off = whole[:end], start
		if w.run(tags[i].steps); !w.Bad && w.Off < end {
			w.fail(tagNotFilled)
		}
		w.B = whole
		return true
	}
	return false
}

// shape is the layout of a message at a version.
type shape struct {
	steps  []step
	weight int64 // of the message itself
}

// shapes[direction][key][version] is made from kmsg's own encoder when it is first asked for.
var shapes = func() (all [2][kmsg.MaxKey + 1][]atomic.Pointer[shape]) {
	for key := range all[request] {
		if req := kmsg.RequestForKey(int16(key)); req != nil {
			for d := range all {
				all[d][key] = make([]atomic.Pointer[shape], req.MaxVersion()+1)
			}
		}
	}
	return all
}()

var deriving sync.Mutex

func shapeOf(d direction, key, version int16) (*shape, error) {
	if key < 0 || key > kmsg.MaxKey || version < 0 || int(version) >= len(shapes[d][key]) {
		return nil, fmt.Errorf("%w: there is no %s of key %d and version %d", ErrShape, d, key, version)
	}
	slot := &shapes[d][key][version]
	if s := slot.Load(); s != nil {
		return s, nil
	}
	deriving.Lock()
	defer deriving.Unlock()
	if s := slot.Load(); s != nil {
		return s, nil
	}
	s, err := derive(d, key, version)
	if err != nil {
		return nil, err
	}
	slot.Store(s)
	return s, nil
}
