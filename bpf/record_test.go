package bpf

import (
	"bytes"
	"testing"
	"unsafe"
)

// Whatever is in the ring, an event is one of its own length, and what it tells can be told.
func FuzzEvent(f *testing.F) {
	f.Add(make([]byte, unsafe.Sizeof(Event{})))
	f.Add(bytes.Repeat([]byte{0xff}, int(unsafe.Sizeof(Event{}))))
	f.Add([]byte{1})
	f.Fuzz(func(t *testing.T, b []byte) {
		e, ok := parseEvent(b)
		if ok != (len(b) == int(unsafe.Sizeof(e))) {
			t.Fatalf("%d bytes are an event: %v", len(b), ok)
		}
		if ok && e.Destination().Addr().Is4In6() {
			t.Errorf("%+v", e)
		}
		if name := e.Comm.String(); len(name) > len(e.Comm) {
			t.Errorf("a name of %d bytes in %d", len(name), len(e.Comm))
		}
	})
}
