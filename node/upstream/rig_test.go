package upstream

import (
	"context"
	"crypto/tls"
	"crypto/x509/pkix"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/test/ca"
)

// patience bounds every wait, so that a failure ends in a message.
const patience = 20 * time.Second

func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// write writes a file and returns its path.
func write(t testing.TB, name string, data []byte) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// who is an identity for tests.
type who struct {
	svid  *x509svid.SVID
	token string
	err   error
}

func (w *who) X509SVID() (*x509svid.SVID, error) { return w.svid, w.err }

func (w *who) JWTSVID(context.Context, string) (string, time.Time, error) {
	return w.token, time.Now().Add(time.Minute), w.err
}

// workload is one with an SVID.
func workload(t testing.TB, authority *ca.Authority, id, name string) *who {
	t.Helper()
	leaf := must(authority.Issue(ca.Leaf{ID: id, Subject: pkix.Name{CommonName: name}}))(t)
	chain, key, err := ca.PEM(leaf)
	if err != nil {
		t.Fatal(err)
	}
	return &who{svid: must(x509svid.Parse(chain, key))(t)}
}

// server accepts connections, and tells what became of each.
type server struct {
	addr string
	ends chan end
}

type end struct {
	state tls.ConnectionState
	got   string // what came after the handshake
	err   error  // of the handshake
}

// serve answers each connection: by TLS where conf is there, and then as the handler has it.
func serve(t testing.TB, conf *tls.Config, handle func(net.Conn) string) *server {
	t.Helper()
	l := must(net.Listen("tcp", "127.0.0.1:0"))(t)
	t.Cleanup(func() { _ = l.Close() })
	s := &server{addr: l.Addr().String(), ends: make(chan end, 100)}
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer func() { _ = conn.Close() }()
				var e end
				if conf != nil {
					secure := tls.Server(conn, conf)
					if e.err = secure.Handshake(); e.err == nil {
						e.state, e.got = secure.ConnectionState(), handle(secure)
					}
				} else {
					e.got = handle(conn)
				}
				s.ends <- e
			}()
		}
	}()
	return s
}

// end is what became of the next connection.
func (s *server) end(t testing.TB) end {
	t.Helper()
	select {
	case e := <-s.ends:
		return e
	case <-time.After(patience):
		t.Fatal("no connection has ended")
		return end{}
	}
}

// all is a handler that reads to the end.
func all(conn net.Conn) string {
	b, _ := io.ReadAll(conn)
	return string(b)
}

// kafka is a handler that answers ApiVersions, and SASL as a broker does whose session lasts as long.
func kafka(life time.Duration, accept func([]byte) (answer []byte, code int16, said string)) func(net.Conn) string {
	return func(conn net.Conn) string {
		var got []string
		for {
			key, id, body, err := request(conn)
			if err != nil {
				return strings.Join(got, " ")
			}
			got = append(got, kmsg.NameForKey(key))
			var resp kmsg.Response
			switch kmsg.Key(key) {
			case kmsg.SASLHandshake:
				resp = &kmsg.SASLHandshakeResponse{Version: 1}
			case kmsg.SASLAuthenticate:
				req := kmsg.SASLAuthenticateRequest{Version: 1}
				if err := req.ReadFrom(body); err != nil {
					return err.Error()
				}
				answer, code, said := accept(req.SASLAuthBytes)
				resp = &kmsg.SASLAuthenticateResponse{Version: 1, SASLAuthBytes: answer, ErrorCode: code, ErrorMessage: &said,
					SessionLifetimeMillis: life.Milliseconds()}
			default:
				resp = &kmsg.ApiVersionsResponse{}
			}
			frame := resp.AppendTo([]byte{0, 0, 0, 0, 0, 0, 0, id})
			frame[2], frame[3] = byte((len(frame)-4)>>8), byte(len(frame)-4)
			if _, err := conn.Write(frame); err != nil {
				return err.Error()
			}
		}
	}
}

// request reads a frame of the node's, of which correlation ids are small.
func request(conn net.Conn) (key int16, id byte, body []byte, err error) {
	head := make([]byte, 14)
	if _, err := io.ReadFull(conn, head); err != nil {
		return 0, 0, nil, err
	}
	rest := make([]byte, int(head[2])<<8+int(head[3])-10)
	_, err = io.ReadFull(conn, rest)
	return int16(head[5]), head[11], rest[int(head[13]):], err
}

// name is the server's, as the cluster has it.
const name = "broker-1.example:9093"

// open dials a server and opens the way to it.
func open(t testing.TB, o Options, s *server, w Identity) (*Broker, error) {
	t.Helper()
	return openFor(t, must(New(o))(t), s, w, patience)
}

func openFor(t testing.TB, u *Upstream, s *server, w Identity, limit time.Duration) (*Broker, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	conn := must(net.Dial("tcp", s.addr))(t)
	b, err := u.Open(ctx, conn, name, w)
	if err != nil {
		if _, err := conn.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
			t.Errorf("the refused connection is open: %v", err)
		}
		return nil, err
	}
	t.Cleanup(func() { _ = b.Close() })
	return b, nil
}

// svids is what a server takes of clients: SVIDs of this authority.
func svids(clients *ca.Authority, certificate *tls.Certificate) *tls.Config {
	return &tls.Config{Certificates: []tls.Certificate{*certificate}, MinVersion: tls.VersionTLS12,
		ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: clients.Pool()}
}

func anybody(certificate *tls.Certificate) *tls.Config {
	return &tls.Config{Certificates: []tls.Certificate{*certificate}, MinVersion: tls.VersionTLS12}
}

func subjectOf(state tls.ConnectionState) string {
	if len(state.PeerCertificates) == 0 {
		return ""
	}
	return state.PeerCertificates[0].Subject.CommonName
}

func idOf(t testing.TB, s string) spiffeid.ID {
	t.Helper()
	return must(spiffeid.FromString(s))(t)
}
