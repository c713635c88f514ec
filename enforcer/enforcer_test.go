package enforcer

import (
	"bytes"
	"encoding/json"
	"io"
	"net"
	"net/netip"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"klamm/enforcer/audit"
	"klamm/enforcer/kafka"
	"klamm/enforcer/policy"
	"klamm/spiffe"
)

// noTopics is a cluster that nobody asks.
type noTopics struct{ kafka.Cluster }

// nobody is a workload that no source knows.
type nobody struct{}

func (nobody) Identity() *spiffe.Identity { return new(spiffe.Identity) }
func (nobody) Watch(func()) func()        { return func() {} }

func pair(t *testing.T) (dialled, accepted net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if dialled, err = net.Dial("tcp", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if accepted, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = dialled.Close()
		_ = accepted.Close()
	})
	return dialled, accepted
}

func TestTheLastLineOfADrainedConnectionSaysSo(t *testing.T) {
	var lines bytes.Buffer
	e := New(Options{Policy: policy.New(), Audit: audit.New(&lines, "node-1"), MaxFrame: 1 << 20,
		Memory: MinMemory(1 << 20), Metrics: prometheus.NewRegistry()})
	client, downstream := pair(t)
	upstream, broker := pair(t)
	go func() {
		_, _ = io.Copy(io.Discard, broker) // its end is all it waits for
		_ = broker.Close()
	}()
	ended := make(chan error, 1)
	go func() {
		ended <- e.Serve(t.Context(), &Conn{Client: Client{ID: "1", Destination: netip.MustParseAddrPort("127.0.0.1:9092")},
			Downstream: downstream, Upstream: upstream, Workload: nobody{}, Kafka: noTopics{}})
	}()
	if cut := e.Drain(t.Context(), 0); cut != 0 {
		t.Errorf("%d connections were cut", cut)
	}
	if b, err := io.ReadAll(client); err != nil || len(b) > 0 {
		t.Errorf("the client read %q, %v", b, err)
	}
	if err := <-ended; err != nil {
		t.Errorf("the connection ended with %v", err)
	}
	all := bytes.Split(bytes.TrimSpace(lines.Bytes()), []byte("\n"))
	var last struct {
		State   string
		Drained bool
		Error   string
	}
	if err := json.Unmarshal(all[len(all)-1], &last); err != nil {
		t.Fatal(err)
	}
	if last.State != "closed" || !last.Drained || last.Error != "" {
		t.Errorf("the last line is %s", all[len(all)-1])
	}
}
