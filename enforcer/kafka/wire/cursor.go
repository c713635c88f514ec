package wire

import "encoding/binary"

// Cursor reads Kafka's primitive types in place. The first read past the end sets Bad; later reads return zeroes. It
// allocates nothing.
type Cursor struct {
	B    []byte
	Off  int
	Flex bool // compact lengths and tagged fields (KIP-482)
	Bad  bool
}

// Take returns the next n bytes.
func (c *Cursor) Take(n int) []byte {
	if n < 0 || n > len(c.B)-c.Off {
		c.Bad, c.Off = true, len(c.B)
		return nil
	}
	b := c.B[c.Off : c.Off+n : c.Off+n]
	c.Off += n
	return b
}

// I8 reads an INT8.
func (c *Cursor) I8() int8 {
	if b := c.Take(1); b != nil {
		return int8(b[0])
	}
	return 0
}

// I16 reads an INT16.
func (c *Cursor) I16() int16 {
	if b := c.Take(2); b != nil {
		return int16(binary.BigEndian.Uint16(b))
	}
	return 0
}

// I32 reads an INT32.
func (c *Cursor) I32() int32 {
	if b := c.Take(4); b != nil {
		return int32(binary.BigEndian.Uint32(b))
	}
	return 0
}

// I64 reads an INT64.
func (c *Cursor) I64() int64 {
	if b := c.Take(8); b != nil {
		return int64(binary.BigEndian.Uint64(b))
	}
	return 0
}

// Uvarint reads an UNSIGNED_VARINT of at most 32 bits, in at most five bytes as Kafka does.
func (c *Cursor) Uvarint() uint32 {
	if c.Off < len(c.B) && c.B[c.Off] < 0x80 {
		c.Off++
		return uint32(c.B[c.Off-1])
	}
	v, n := binary.Uvarint(c.B[c.Off:])
	if n <= 0 || n > 5 || v > 1<<32-1 {
		c.Bad, c.Off = true, len(c.B)
		return 0
	}
	c.Off += n
	return uint32(v)
}

// Length reads the length of an array or of bytes, compact or not; -1 is null.
func (c *Cursor) Length() int {
	if c.Flex {
		return int(c.Uvarint()) - 1
	}
	return int(c.I32())
}

// Array reads an array's length, refusing one whose elements, of at least so many bytes each, the remaining bytes
// cannot hold; null counts as empty.
func (c *Cursor) Array(least int) int {
	n := c.Length()
	if n <= 0 {
		return 0
	}
	if n > (len(c.B)-c.Off)/least {
		c.Bad, c.Off = true, len(c.B)
		return 0
	}
	return n
}

// String reads a (compact) nullable string; null is nil.
func (c *Cursor) String() []byte {
	var n int
	if c.Flex {
		n = int(c.Uvarint()) - 1
	} else {
		n = int(c.I16())
	}
	if n == -1 {
		return nil
	}
	return c.Take(n)
}

// Bytes reads (compact) nullable bytes; null is nil.
func (c *Cursor) Bytes() []byte {
	n := c.Length()
	if n == -1 {
		return nil
	}
	return c.Take(n)
}

// SkipTags skips the tagged fields and tells how many there were. Messages that are not flexible have none.
func (c *Cursor) SkipTags() int {
	if !c.Flex {
		return 0
	}
	n := int(c.Uvarint())
	for range n {
		c.Uvarint()
		c.Take(int(c.Uvarint()))
		if c.Bad {
			break
		}
	}
	return n
}
