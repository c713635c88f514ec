package audit

import (
	"bytes"
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"klamm/spiffe"
)

// writes is a sink that counts its writes and can break.
type writes struct {
	bytes.Buffer
	n      int
	broken error
}

func (w *writes) Write(b []byte) (int, error) {
	w.n++
	if w.broken != nil {
		return 0, w.broken
	}
	return w.Buffer.Write(b)
}

func TestALineTellsWhoAndWhat(t *testing.T) {
	var sink writes
	trail := New(&sink, "node-1").Trail(Subject{Connection: "c1", Cluster: "payments", Destination: "10.0.0.1:9092",
		Identity: spiffe.Identity{ID: spiffeid.RequireFromString("spiffe://example.test/a"), Source: "static",
			Process: spiffe.Process{PID: 7, UID: 1000, Exe: "/usr/bin/a", ContainerID: "c0ffee", PodUID: "u1",
				Namespace: "shop", Pod: "orders-1", Container: "app"}}})
	batches := Batches{{BaseOffset: 5, LastOffset: 6, Count: 2, Bytes: 99, ProducerID: -1, SHA256: [32]byte{0xab}}}
	trail.Line("operation", Allow).Array("batches", &batches).Send()
	if err := trail.Flush(); err != nil {
		t.Fatal(err)
	}
	var line struct {
		Level, Node, Conn, Cluster, Destination, Event, Verdict, Exe, Time string
		SPIFFE                                                             string `json:"spiffe_id"`
		ContainerID                                                        string `json:"container_id"`
		PodUID                                                             string `json:"pod_uid"`
		Namespace                                                          string `json:"pod_namespace"`
		Pod, Container                                                     string
		PID, UID                                                           int
		Batches                                                            []map[string]any
	}
	if err := json.Unmarshal(sink.Bytes(), &line); err != nil {
		t.Fatalf("%v: %s", err, sink.Bytes())
	}
	if line.Node != "node-1" || line.Conn != "c1" || line.SPIFFE != "spiffe://example.test/a" || line.PID != 7 ||
		line.UID != 1000 || line.Exe != "/usr/bin/a" || line.Verdict != "allow" || line.Level != "info" || line.Time == "" ||
		line.ContainerID != "c0ffee" || line.PodUID != "u1" || line.Namespace != "shop" || line.Pod != "orders-1" ||
		line.Container != "app" {
		t.Errorf("the line is %s", sink.Bytes())
	}
	b := line.Batches[0]
	if sum, _ := b["sha256"].(string); !strings.HasPrefix(sum, "ab00") || b["count"] != 2.0 || b["producer_id"] != nil {
		t.Errorf("the batch is %v", b)
	}
}

func TestAPrincipalIsInTheLinesThatFollow(t *testing.T) {
	var sink writes
	trail := New(&sink, "n").Trail(Subject{Connection: "c"})
	trail.Line("operation", Deny).Send()
	trail.Become(Subject{Connection: "c", Principal: "User:alice"})
	trail.Line("operation", Deny).Send()
	if err := trail.Flush(); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(sink.String()), "\n")
	if len(lines) != 2 || strings.Contains(lines[0], "alice") || !strings.Contains(lines[1], `"principal":"User:alice"`) {
		t.Errorf("the lines are %q", lines)
	}
	if !strings.Contains(lines[0], `"level":"warn"`) {
		t.Errorf("a refusal is no warning: %s", lines[0])
	}
}

func TestLinesAreWrittenTogetherUntilTheyAreMany(t *testing.T) {
	var sink writes
	trail := New(&sink, "n").Trail(Subject{Connection: "c"})
	for range 10 {
		trail.Line("operation", Allow).Send()
	}
	if sink.n != 0 {
		t.Errorf("%d writes before the flush", sink.n)
	}
	if err := trail.Flush(); err != nil || sink.n != 1 {
		t.Errorf("%d writes, %v", sink.n, err)
	}
	trail.Line("operation", Allow).Str("long", strings.Repeat("x", maxPending)).Send()
	if sink.n != 2 {
		t.Errorf("%d writes: what is too much to hold is not written", sink.n)
	}
	if err := trail.Flush(); err != nil || sink.n != 2 {
		t.Errorf("%d writes for nothing, %v", sink.n, err)
	}
}

func TestALostLineIsAnErrorOfTheFlushEvenIfLaterOnesAreWritten(t *testing.T) {
	full := errors.New("no space left")
	sink := writes{broken: full}
	trail := New(&sink, "n").Trail(Subject{Connection: "c"})
	trail.Line("operation", Allow).Str("long", strings.Repeat("x", maxPending)).Send()
	sink.broken = nil
	trail.Line("operation", Allow).Send()
	if err := trail.Flush(); !errors.Is(err, full) {
		t.Errorf("the flush says %v", err)
	}
}

func TestEveryReasonTellsWhatToDo(t *testing.T) {
	for reason, hint := range Reasons {
		if reason == "" || hint == "" {
			t.Errorf("reason %q with hint %q", reason, hint)
		}
	}
}
