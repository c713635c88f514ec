package secure

import (
	"bytes"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509/pkix"
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"klamm/enforcer/hello"
	"klamm/test/ca"
)

// pair is a TCP connection, both of its ends.
func pair(t testing.TB) (client, server net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if client, err = net.Dial("tcp", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if server, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = client.Close(), server.Close() })
	return client, server
}

func configs(t testing.TB) (client, server *tls.Config) {
	t.Helper()
	root, err := ca.New("brokers")
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := root.Issue(ca.Leaf{Subject: pkix.Name{CommonName: "broker"}, Names: []string{"broker.example"}})
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Config{RootCAs: root.Pool(), ServerName: "broker.example", MinVersion: tls.VersionTLS12},
		&tls.Config{Certificates: []tls.Certificate{*leaf}, MinVersion: tls.VersionTLS12, SessionTicketsDisabled: true}
}

// established is a TLS connection whose ClientHello was read before.
func established(t testing.TB, clientConf, serverConf *tls.Config) (*tls.Conn, *Conn) {
	t.Helper()
	near, far := pair(t)
	client := tls.Client(near, clientConf)
	done := make(chan error, 1)
	go func() { done <- client.Handshake() }()
	h, read, err := hello.Read(far)
	if err != nil || h.ServerName != "broker.example" {
		t.Fatalf("%+v, %v", h, err)
	}
	server := Server(far, read, serverConf)
	if err := errors.Join(server.Handshake(), <-done); err != nil {
		t.Fatal(err)
	}
	return client, server
}

func TestAReadThatDoesNotWaitGoesOnWhereItWas(t *testing.T) {
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		clientConf, serverConf := configs(t)
		clientConf.MaxVersion = version
		client, server := established(t, clientConf, serverConf)
		b := make([]byte, 1<<20)
		if n, err := server.TryRead(b); n != 0 || !errors.Is(err, unix.EAGAIN) {
			t.Fatalf("nothing was sent: %d, %v", n, err)
		}
		sent := make([]byte, 3<<20)
		_, _ = rand.Read(sent)
		go func() {
			_, _ = client.Write(sent)
			_ = client.Close()
		}()
		var got []byte
		for {
			n, err := server.TryRead(b)
			got = append(got, b[:n]...)
			if errors.Is(err, unix.EAGAIN) {
				err = server.Wait()
			}
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		if !bytes.Equal(got, sent) {
			t.Errorf("%d of %d bytes came", len(got), len(sent))
		}
	}
}

func TestADeadlineEndsAWait(t *testing.T) {
	_, server := established(configsOf(t))
	go func() { _ = server.SetReadDeadline(time.Unix(1, 0)) }()
	if err := server.Wait(); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error(err)
	}
}

// configsOf lets configs be the arguments of established.
func configsOf(t testing.TB) (testing.TB, *tls.Config, *tls.Config) {
	t.Helper()
	client, server := configs(t)
	return t, client, server
}

func TestTheEndOfADirectionIsSaidInTLSAndBelow(t *testing.T) {
	client, server := established(configsOf(t))
	if _, err := server.Write([]byte("the last answer")); err != nil {
		t.Fatal(err)
	}
	if err := server.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(client); err != nil || string(b) != "the last answer" {
		t.Errorf("the client read %q, %v", b, err)
	}
	if n, err := client.NetConn().Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("below there is %d, %v", n, err)
	}
	if _, err := client.Write([]byte("more")); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 4)
	if _, err := io.ReadFull(server, b); err != nil || string(b) != "more" {
		t.Errorf("the other direction: %q, %v", b, err)
	}
}

func TestAnIdleConnectionHoldsLittle(t *testing.T) {
	const connections = 200
	clientConf, serverConf := configs(t)
	clientConf.DynamicRecordSizingDisabled = true // as Java and OpenSSL have it
	for what, sent := range map[string]int{"a request": 200, "a large batch": 1 << 20} {
		clients, servers := make([]*tls.Conn, connections), make([]*Conn, connections)
		before := inUse()
		for i := range servers {
			clients[i], servers[i] = established(t, clientConf, serverConf)
			go func() { _, _ = clients[i].Write(make([]byte, sent)) }()
			b := make([]byte, 64<<10)
			for n := 0; n < sent; {
				k, err := servers[i].Read(b)
				if err != nil {
					t.Fatal(err)
				}
				n += k
			}
			if _, err := servers[i].TryRead(b); !errors.Is(err, unix.EAGAIN) {
				t.Fatal(err)
			}
		}
		each := (inUse() - before) / connections
		t.Logf("after %s: %d bytes, both ends", what, each)
		if each > 36<<10 {
			t.Errorf("after %s an idle connection holds %d bytes, both ends", what, each)
		}
		runtime.KeepAlive(clients)
		runtime.KeepAlive(servers)
	}
}

func inUse() uint64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m.HeapAlloc + m.StackInuse
}
