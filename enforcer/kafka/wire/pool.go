package wire

import (
	"math/bits"
	"sync"
)

// BaseBuffer is the buffer, in bytes, a direction of a connection reads into while it has something to read. Idle
// directions hold none.
const BaseBuffer = 64 << 10

// pools[k] holds buffers of bufferSize(k) bytes.
var pools [16]sync.Pool

// bufferSize has room for the size of a frame beside one of BaseBuffer<<k bytes, which limits are set to.
func bufferSize(k int) int {
	if k == 0 {
		return BaseBuffer
	}
	return BaseBuffer<<k + SizePrefix
}

func getBuffer(n int) *[]byte {
	k := class(n)
	if b, ok := pools[k].Get().(*[]byte); ok {
		return b
	}
	b := make([]byte, bufferSize(k))
	return &b
}

func putBuffer(b *[]byte) { pools[class(len(*b))].Put(b) }

// HeldSize is what a frame of n bytes takes of a budget while it is held whole, but for its size.
func HeldSize(n int) int64 {
	if n <= BaseBuffer {
		return 0
	}
	return BaseBuffer << class(n)
}

func class(n int) int {
	if n <= BaseBuffer {
		return 0
	}
	return max(1, bits.Len(uint(n-SizePrefix-1)/BaseBuffer))
}
