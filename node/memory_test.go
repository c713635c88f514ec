package node_test

import (
	"math"
	"runtime/debug"
	"testing"

	"klamm/test/stage"
)

func TestTheCollectorIsToldHowMuchMemoryThereIs(t *testing.T) {
	if debug.SetMemoryLimit(-1) != math.MaxInt64 {
		t.Fatal("the test was started with a GOMEMLIMIT")
	}
	broker := stage.StartBroker(t)
	n := stage.Start(t, broker.Addr(), stage.OrdersOnly, stage.Config{"limits": "{memory: 600MiB}"})
	const idle = (600 + 128) << 20
	stage.Await(t, "the limit", func() bool { return debug.SetMemoryLimit(-1) == idle })
	conn := n.Workload(stage.OrdersUID).Dial(t, broker.Addr())
	stage.Await(t, "that of a connection", func() bool { return debug.SetMemoryLimit(-1) == idle+256<<10 })
	if err := conn.Close(); err != nil {
		t.Fatal(err)
	}
	stage.Await(t, "its end", func() bool { return debug.SetMemoryLimit(-1) == idle })
	n.Stop()
	if got := debug.SetMemoryLimit(-1); got != math.MaxInt64 {
		t.Errorf("behind the node the limit is %d", got)
	}
}
