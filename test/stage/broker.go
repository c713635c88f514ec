package stage

import (
	"bytes"
	"net"
	"net/netip"
	"sync"
	"testing"

	"github.com/twmb/franz-go/pkg/kfake"
)

// Broker is a Kafka cluster in this process, so outside the cgroup of the workloads, that notes what reaches it.
type Broker struct {
	*kfake.Cluster

	mu    sync.Mutex
	conns []*arrival
}

// arrival is one connection at a broker.
type arrival struct {
	net.Conn
	broker *Broker
	begin  []byte // of what was read
	n      int64
}

// beginning is how much of a connection is kept: enough to tell whose it is.
const beginning = 64

// NodesOwn is the client id of the node's own client.
const NodesOwn = "klamm"

// StartBroker starts a cluster of one broker with the topics orders, payroll and public, of one partition each.
func StartBroker(t testing.TB, opts ...kfake.Opt) *Broker {
	t.Helper()
	return StartBrokerAt(t, "", opts...)
}

// StartBrokerAt is StartBroker at an address, host:port, which the cluster itself does not advertise.
func StartBrokerAt(t testing.TB, address string, opts ...kfake.Opt) *Broker {
	t.Helper()
	b := new(Broker)
	listen := kfake.ListenFn(func(network, proposed string) (net.Listener, error) {
		if address != "" {
			proposed = address
		}
		l, err := net.Listen(network, proposed)
		return door{l, b}, err
	})
	var err error
	b.Cluster, err = kfake.NewCluster(append([]kfake.Opt{kfake.NumBrokers(1), listen,
		kfake.SeedTopics(1, "orders", "payroll", "public")}, opts...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Close)
	return b
}

// Addr is the address of the first broker.
func (b *Broker) Addr() string { return b.ListenAddrs()[0] }

// Port is its port.
func (b *Broker) Port() uint16 { return netip.MustParseAddrPort(b.Addr()).Port() }

// Arrived are the connections so far but the node's own, and the bytes they brought. Of a connection without bytes it
// is not known whose it is; it counts.
func (b *Broker) Arrived() (conns int, n int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, a := range b.conns {
		if !bytes.Contains(a.begin, []byte(NodesOwn)) {
			conns++
			n += a.n
		}
	}
	return conns, n
}

// Records is how many records a topic has.
func (b *Broker) Records(topic string) int64 { return b.PartitionInfo(topic, 0).HighWatermark }

// CameFrom tells whether a connection at the broker is the other end of this one: nothing is in between.
func (b *Broker) CameFrom(conn net.Conn) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, a := range b.conns {
		if a.RemoteAddr().String() == conn.LocalAddr().String() {
			return true
		}
	}
	return false
}

// door notes whom it lets in.
type door struct {
	net.Listener
	broker *Broker
}

// Accept implements net.Listener.
func (d door) Accept() (net.Conn, error) {
	conn, err := d.Listener.Accept()
	if err != nil {
		return nil, err
	}
	a := &arrival{Conn: conn, broker: d.broker}
	d.broker.mu.Lock()
	defer d.broker.mu.Unlock()
	d.broker.conns = append(d.broker.conns, a)
	return a, nil
}

// Read implements net.Conn.
func (a *arrival) Read(p []byte) (int, error) {
	n, err := a.Conn.Read(p)
	a.broker.mu.Lock()
	defer a.broker.mu.Unlock()
	a.n += int64(n)
	if room := beginning - len(a.begin); room > 0 {
		a.begin = append(a.begin, p[:min(n, room)]...)
	}
	return n, err
}
