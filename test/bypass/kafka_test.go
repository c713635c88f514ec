package bypass

import (
	"context"
	"flag"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"testing"

	"github.com/twmb/franz-go/pkg/kfake"

	"klamm/test/kafka"
)

// verify is what make verify-interception sets: a real Kafka, the binary, and the table in the document.
var verify = os.Getenv("KLAMM_VERIFY") == "1"

var realKafka = flag.Bool("kafka", verify, "the broker is a real Kafka (scripts/setup kafka), not franz-go's kfake")

// backend is the one Kafka of this test binary: all brokers of all worlds.
type backend struct {
	address netip.AddrPort // that it says it has
	take    func(net.Conn)
	stop    func() error
}

var theBackend = sync.OnceValues(func() (*backend, error) {
	if *realKafka {
		c, err := kafka.New(context.Background(), kafka.Options{})
		if err != nil {
			return nil, err
		}
		address := c.Addrs()[0]
		return &backend{netip.MustParseAddrPort(address), func(conn net.Conn) { go relay(conn, address) }, c.Stop}, nil
	}
	address := netip.AddrPortFrom(broker4, brokerPort)
	d := door{make(chan net.Conn), address}
	c, err := kfake.NewCluster(kfake.NumBrokers(1), kfake.SeedTopics(1, "orders"),
		kfake.ListenFn(func(string, string) (net.Listener, error) { return d, nil }))
	if err != nil {
		return nil, err
	}
	return &backend{address, func(conn net.Conn) { d.conns <- conn }, func() error {
		close(d.conns)
		c.Close()
		return nil
	}}, nil
})

// serveKafka makes brokers of listeners, until the test ends.
func serveKafka(t testing.TB, listeners ...net.Listener) {
	t.Helper()
	b, err := theBackend()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range listeners {
		t.Cleanup(func() { _ = l.Close() })
		go func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				b.take(conn)
			}
		}()
	}
}

// door is a listener to which connections are carried.
type door struct {
	conns   chan net.Conn
	address netip.AddrPort
}

// Accept implements net.Listener.
func (d door) Accept() (net.Conn, error) {
	conn, open := <-d.conns
	if !open {
		return nil, net.ErrClosed
	}
	return conn, nil
}

// Close implements net.Listener.
func (d door) Close() error { return nil }

// Addr implements net.Listener.
func (d door) Addr() net.Addr { return net.TCPAddrFromAddrPort(d.address) }

func relay(conn net.Conn, address string) {
	defer func() { _ = conn.Close() }()
	to, err := net.Dial("tcp", address)
	if err != nil {
		return
	}
	defer func() { _ = to.Close() }()
	go func() {
		_, _ = io.Copy(to, conn)
		_ = to.(*net.TCPConn).CloseWrite()
	}()
	_, _ = io.Copy(conn, to)
}
