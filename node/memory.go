package node

import (
	"context"
	"math"
	"runtime/debug"
	"time"
)

// What the collector is told to stay below, beside limits.memory: the node itself with its policy and topics; and for
// every open connection a buffer in each direction, TLS, and its state. Without it, memory for frames that was given
// back would count twice: the heap may grow to twice what lives before it is collected.
const (
	memoryOfNode       = 128 << 20
	memoryOfConnection = 256 << 10
)

func memoryLimit(frames int64, connections int) int64 {
	return frames + memoryOfNode + int64(connections)*memoryOfConnection
}

// followMemory adapts the memory limit of the Go runtime to the connections that are open, until ctx ends. It leaves a
// limit alone that was set from outside (GOMEMLIMIT).
func (n *Node) followMemory(ctx context.Context) {
	if debug.SetMemoryLimit(-1) != math.MaxInt64 {
		return
	}
	defer debug.SetMemoryLimit(math.MaxInt64)
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for last := int64(0); ; {
		if limit := memoryLimit(int64(n.config.Limits.Memory), len(n.slots)); limit != last {
			debug.SetMemoryLimit(limit)
			last = limit
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}
