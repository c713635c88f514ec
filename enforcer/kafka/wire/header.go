package wire

import (
	"encoding/binary"
	"errors"
	"math"

	"github.com/twmb/franz-go/pkg/kmsg"
)

// Sizes on the wire, in bytes.
const (
	SizePrefix       = 4                  // INT32 length of what follows
	MinRequest       = 2 + 2 + 4          // api_key, api_version, correlation_id
	CorrelationAt    = SizePrefix + 2 + 2 // offset of a request's correlation id in its frame
	responseHeaderV0 = SizePrefix + 4
)

// flexibleFrom[key] is the first version with compact types and tagged fields (KIP-482).
var flexibleFrom = func() (from [kmsg.MaxKey + 1]int16) {
	for key := range from {
		from[key] = math.MaxInt16
		req := kmsg.RequestForKey(int16(key))
		if req == nil {
			continue
		}
		for v := int16(0); v <= req.MaxVersion(); v++ {
			req.SetVersion(v)
			if req.IsFlexible() {
				from[key] = v
				break
			}
		}
	}
	return from
}()

// Flexible tells whether messages of this key and version use compact types and tagged fields.
func Flexible(key, version int16) bool {
	return key >= 0 && key <= kmsg.MaxKey && version >= flexibleFrom[key]
}

// Header is a request header (v1, or v2 where the message is flexible).
type Header struct {
	Key, Version int16
	Correlation  int32
	ClientID     []byte // in place; nil is null
	Len          int    // bytes of the header, so that the body is frame[SizePrefix+Len:]
}

// ErrHeader says that a frame does not begin with a request header.
var ErrHeader = errors.New("the frame does not begin with a Kafka request header")

// ParseHeader reads the header of a request; b is the frame behind its size. Where only the fixed part can be read (an
// unknown key), the client id is left empty and Len covers the fixed part.
func ParseHeader(b []byte) (Header, error) {
	c := Cursor{B: b}
	h := Header{Key: c.I16(), Version: c.I16(), Correlation: c.I32()}
	h.Len = c.Off
	if c.Bad || h.Key < 0 || h.Version < 0 {
		return h, ErrHeader
	}
	if h.Key > kmsg.MaxKey {
		return h, nil
	}
	h.ClientID = c.String() // never compact, even in header v2
	c.Flex = Flexible(h.Key, h.Version)
	c.SkipTags()
	h.Len = c.Off
	if c.Bad {
		return h, ErrHeader
	}
	return h, nil
}

// ResponseHeaderLen is how many bytes stand before the body of an answer without tagged header fields, the size prefix
// included: header v0, or v1 where the message is flexible. ApiVersions always has v0 (KIP-511).
func ResponseHeaderLen(key, version int16) int {
	if key != int16(kmsg.ApiVersions) && Flexible(key, version) {
		return responseHeaderV0 + 1
	}
	return responseHeaderV0
}

// AppendResponse appends the whole frame of an answer.
func AppendResponse(dst []byte, correlation int32, resp kmsg.Response) []byte {
	at := len(dst)
	dst = append(dst, 0, 0, 0, 0)
	dst = binary.BigEndian.AppendUint32(dst, uint32(correlation))
	if ResponseHeaderLen(resp.Key(), resp.GetVersion()) > responseHeaderV0 {
		dst = append(dst, 0)
	}
	dst = resp.AppendTo(dst)
	binary.BigEndian.PutUint32(dst[at:], uint32(len(dst)-at-SizePrefix))
	return dst
}

// AppendRequest appends the whole frame of a request whose header bytes (behind the size) are given; its correlation id
// is replaced.
func AppendRequest(dst, header []byte, correlation int32, req kmsg.Request) []byte {
	at := len(dst)
	dst = append(dst, 0, 0, 0, 0)
	dst = append(dst, header...)
	binary.BigEndian.PutUint32(dst[at+CorrelationAt:], uint32(correlation))
	dst = req.AppendTo(dst)
	binary.BigEndian.PutUint32(dst[at:], uint32(len(dst)-at-SizePrefix))
	return dst
}
