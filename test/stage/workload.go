package stage

import (
	"context"
	"net"
	"testing"

	"github.com/twmb/franz-go/pkg/kgo"

	"klamm/test/host"
	"klamm/test/kafka"
)

// Workload is a process that connects for the test, and ends with it.
type Workload struct{ *host.Dialer }

// Main is called by TestMain. In a process that was started as a workload it does not return.
func Main() { host.BeDialer() }

// StartWorkload starts a workload that ends with the test. exe is the test binary or a copy of it; "" is itself.
func StartWorkload(t testing.TB, place kafka.Place, exe string) *Workload {
	t.Helper()
	w, err := host.StartDialer(place, exe)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.End(); err != nil {
			t.Errorf("a workload: %v", err)
		}
	})
	return &Workload{w}
}

// DialContext has the workload connect to an IP address and port by TCP. It is a kgo.Dialer.
func (w *Workload) DialContext(_ context.Context, _, address string) (net.Conn, error) {
	return w.Dialer.Dial("", address)
}

// Dial is DialContext for a test that goes no further without a connection. It ends with the test.
func (w *Workload) Dial(t testing.TB, address string) net.Conn {
	t.Helper()
	return w.DialFrom(t, "", address)
}

// DialFrom is Dial from an IP address, or any where that is "".
func (w *Workload) DialFrom(t testing.TB, from, address string) net.Conn {
	t.Helper()
	conn, err := w.Dialer.Dial(from, address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// Client is a Kafka client whose connections are the workload's.
func (w *Workload) Client(t testing.TB, broker string, opts ...kgo.Opt) *kgo.Client {
	t.Helper()
	opts = append([]kgo.Opt{kgo.SeedBrokers(broker), kgo.Dialer(w.DialContext), kgo.ClientID("workload"),
		kgo.DisableClientMetrics(), kgo.DisableIdempotentWrite(), kgo.UnknownTopicRetries(0)}, opts...)
	client, err := kgo.NewClient(opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Close)
	return client
}
