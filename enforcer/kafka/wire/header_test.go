package wire

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/test/bounds"
)

func TestEveryHeaderThatKmsgWritesIsRead(t *testing.T) {
	for _, clientID := range []*string{nil, kmsg.StringPtr(""), kmsg.StringPtr("client-1")} {
		var opts []kmsg.RequestFormatterOpt
		if clientID != nil {
			opts = append(opts, kmsg.FormatterClientID(*clientID))
		}
		formatter := kmsg.NewRequestFormatter(opts...)
		for key := int16(0); key <= kmsg.MaxKey; key++ {
			req := kmsg.RequestForKey(key)
			if req == nil || key == int16(kmsg.ControlledShutdown) { // whose v0 has a header of its own, for brokers
				continue
			}
			for v := int16(0); v <= req.MaxVersion(); v++ {
				req.SetVersion(v)
				frame := formatter.AppendRequest(nil, req, -7)
				h, err := ParseHeader(frame[SizePrefix:])
				if err != nil || h.Key != key || h.Version != v || h.Correlation != -7 {
					t.Fatalf("%s v%d: %+v, %v", kmsg.NameForKey(key), v, h, err)
				}
				if (h.ClientID == nil) != (clientID == nil) || clientID != nil && string(h.ClientID) != *clientID {
					t.Errorf("%s v%d: client id %q", kmsg.NameForKey(key), v, h.ClientID)
				}
				if body := req.AppendTo(nil); !bytes.Equal(frame[SizePrefix+h.Len:], body) {
					t.Errorf("%s v%d: the body begins at %d of %d, not before its %d bytes",
						kmsg.NameForKey(key), v, SizePrefix+h.Len, len(frame), len(body))
				}
				again := AppendRequest(nil, frame[SizePrefix:SizePrefix+h.Len], -7, req)
				if !bytes.Equal(again, frame) {
					t.Errorf("%s v%d: %x is written as %x", kmsg.NameForKey(key), v, frame, again)
				}
			}
		}
	}
}

func TestAnAnswerIsFramedAsKmsgReadsIt(t *testing.T) {
	for key := int16(0); key <= kmsg.MaxKey; key++ {
		resp := kmsg.ResponseForKey(key)
		if resp == nil {
			continue
		}
		for v := int16(0); v <= resp.MaxVersion(); v++ {
			resp.SetVersion(v)
			frame := AppendResponse(nil, 9, resp)
			if int(binary.BigEndian.Uint32(frame)) != len(frame)-SizePrefix || binary.BigEndian.Uint32(frame[SizePrefix:]) != 9 {
				t.Fatalf("%s v%d: %x", kmsg.NameForKey(key), v, frame)
			}
			body := frame[ResponseHeaderLen(key, v):]
			read := kmsg.ResponseForKey(key)
			read.SetVersion(v)
			if err := read.ReadFrom(body); err != nil || !bytes.Equal(read.AppendTo(nil), body) {
				t.Errorf("%s v%d: the body does not read back: %v", kmsg.NameForKey(key), v, err)
			}
		}
	}
}

func FuzzParseHeader(f *testing.F) {
	req := kmsg.NewPtrMetadataRequest()
	for _, v := range []int16{0, 9, 13} {
		req.SetVersion(v)
		f.Add(kmsg.NewRequestFormatter(kmsg.FormatterClientID("x")).AppendRequest(nil, req, 1)[SizePrefix:])
	}
	f.Add([]byte{0x30, 0x39, 0, 0, 0, 0, 0, 1})
	f.Fuzz(func(t *testing.T, b []byte) {
		var h Header
		var err error
		bounds.Check(t, len(b), 0, func() { h, err = ParseHeader(b) })
		if err != nil {
			return
		}
		if h.Len < MinRequest || h.Len > len(b) || h.Key < 0 || h.Version < 0 {
			t.Errorf("%+v of %d bytes", h, len(b))
		}
		if len(h.ClientID) > h.Len-MinRequest {
			t.Errorf("a client id of %d bytes in a header of %d", len(h.ClientID), h.Len)
		}
	})
}

// Whatever is read, a cursor neither leaves its bytes nor goes back, and once it is bad it stays so and gives zeroes.
func FuzzCursor(f *testing.F) {
	f.Add([]byte{1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, []byte{0, 1, 2, 3, 4, 5, 6, 7, 8, 9}, true)
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01}, []byte{4, 5, 6}, true)
	f.Add([]byte{0x7f, 0xff, 0xff, 0xff, 0x80, 0, 0, 0}, []byte{5, 8}, false)
	f.Fuzz(func(t *testing.T, b, reads []byte, flex bool) {
		c := Cursor{B: b, Flex: flex}
		for _, read := range reads {
			before, bad := c.Off, c.Bad
			n := 0
			switch read % 10 {
			case 0:
				n = int(c.I8())
			case 1:
				n = int(c.I16())
			case 2:
				n = int(c.I32())
			case 3:
				n = int(c.I64())
			case 4:
				n = int(c.Uvarint())
			case 5:
				n = len(c.String())
			case 6:
				n = len(c.Bytes())
			case 7:
				n = c.SkipTags()
			case 8:
				if n = c.Array(4); n < 0 || n > (len(b)-c.Off)/4 {
					t.Errorf("an array of %d in %d bytes", n, len(b)-c.Off)
				}
			case 9:
				n = len(c.Take(int(read)))
			}
			if c.Off < before || c.Off > len(b) || bad && !c.Bad {
				t.Fatalf("after read %d: at %d of %d, before at %d", read%10, c.Off, len(b), before)
			}
			if bad && n != 0 {
				t.Errorf("read %d gave %d past the end", read%10, n)
			}
		}
	})
}
