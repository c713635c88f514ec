package kafka

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/audit"
	"klamm/enforcer/kafka/wire"
)

// ownLogin is a login of the node that the test makes due.
type ownLogin struct {
	due       atomic.Int64 // Unix nanoseconds; 0: never
	exchanges atomic.Int32
	token     []byte
	next      time.Duration // until it is due again; 0: never
}

func (l *ownLogin) Due() time.Time {
	if at := l.due.Load(); at != 0 {
		return time.Unix(0, at)
	}
	return time.Time{}
}

func (l *ownLogin) Exchange(_ context.Context, call func(kmsg.Request) (kmsg.Response, error)) error {
	l.exchanges.Add(1)
	handshake, authenticate := handshakeRequest("PLAIN"), authenticateRequest(string(l.token))
	greeting, err := call(handshake)
	if err != nil {
		return err
	}
	if err := kerr.ErrorForCode(greeting.(*kmsg.SASLHandshakeResponse).ErrorCode); err != nil {
		return err
	}
	answer, err := call(authenticate)
	if err != nil {
		return err
	}
	l.due.Store(0)
	if l.next > 0 {
		l.due.Store(time.Now().Add(l.next).UnixNano())
	}
	return kerr.ErrorForCode(answer.(*kmsg.SASLAuthenticateResponse).ErrorCode)
}

// logsIn plays a broker that is logged in to, with success or a code.
func logsIn(t *testing.T, broker *peer, want string, code int16) {
	t.Helper()
	h, req := broker.request()
	if handshake, ok := req.(*kmsg.SASLHandshakeRequest); !ok || handshake.Mechanism != "PLAIN" {
		t.Fatalf("the broker got %T, no handshake", req)
	}
	broker.answer(h, req.ResponseKind())
	h, req = broker.request()
	if authenticate, ok := req.(*kmsg.SASLAuthenticateRequest); !ok || string(authenticate.SASLAuthBytes) != want {
		t.Fatalf("the broker got %T, not the login", req)
	}
	resp := req.ResponseKind().(*kmsg.SASLAuthenticateResponse)
	resp.ErrorCode = code
	broker.answer(h, resp)
}

func TestTheNodesLoginIsRenewedBetweenTwoRequestsUnseen(t *testing.T) {
	rig := newRig(t, ordersOnly)
	login := &ownLogin{token: []byte("\x00node\x00s3cret")}
	rig.login = login
	client, broker, ended := rig.serveScripted(t)
	produce := produceRequest(9, -1, []byte("record"), "orders")
	client.write(requestFrame(1, produce))
	first, _ := broker.request()
	login.due.Store(time.Now().Add(-time.Minute).UnixNano())
	client.write(bytes.Join([][]byte{requestFrame(2, produce), requestFrame(3, produce)}, nil))
	// The answer that is owed comes first, and reaches the client.
	broker.answer(first, produceAnswer(produce, 1))
	client.response(1, produce)
	logsIn(t, broker, "\x00node\x00s3cret", 0)
	for i := range int32(2) {
		h, req := broker.request()
		if _, ok := req.(*kmsg.ProduceRequest); !ok {
			t.Fatalf("behind the login comes %T", req)
		}
		broker.answer(h, produceAnswer(produce, int64(i)))
		client.response(2+i, produce)
	}
	if n := login.exchanges.Load(); n != 1 {
		t.Errorf("there were %d logins", n)
	}
	client.closeWrite()
	broker.closeWrite()
	if err := end(t, ended); err != nil {
		t.Error(err)
	}
	if lines := rig.log.find(t, isOperation("SASLAuthenticate")); len(lines) > 0 {
		t.Errorf("the client is said to have sent %+v", lines)
	}
}

// Nothing of a renewal goes out to the client, and what is refused behind it is answered all the same.
func TestWhatIsRefusedBehindARenewalIsAnswered(t *testing.T) {
	rig := newRig(t, ordersOnly)
	login := &ownLogin{token: []byte("\x00node\x00s3cret")}
	login.due.Store(1)
	rig.login = login
	client, broker, ended := rig.serveScripted(t)
	produce := produceRequest(9, -1, []byte("record"), "secret")
	client.write(requestFrame(1, produce))
	logsIn(t, broker, "\x00node\x00s3cret", 0)
	resp := client.response(1, produce).(*kmsg.ProduceResponse)
	if code := resp.Topics[0].Partitions[0].ErrorCode; code != kerr.TopicAuthorizationFailed.Code {
		t.Errorf("the code is %d", code)
	}
	client.closeWrite()
	broker.closeWrite()
	logEnd(t, ended)
}

// Requests come in numbers while the login is due all the time; each is answered, in turn.
func TestRenewalLosesAndReordersNothingUnderLoad(t *testing.T) {
	rig := newRig(t, ordersOnly)
	rig.audit = audit.New(io.Discard, "node-1")
	login := &ownLogin{token: []byte("\x00node\x00s3cret"), next: time.Millisecond}
	login.due.Store(1)
	rig.login = login
	client, broker, ended := rig.serveScripted(t)
	played := make(chan error, 1)
	go func() { played <- answersAtOnce(broker) }()
	started, produce := time.Now(), produceRequest(9, -1, []byte("record"), "orders")
	sent := make(chan int32, 1)
	go func() {
		n := int32(0)
		for ; login.exchanges.Load() < 3 && time.Since(started) < patience; n++ {
			if _, err := client.Write(requestFrame(n, produce)); err != nil {
				break
			}
		}
		_ = client.Conn.(*net.TCPConn).CloseWrite() // the answers tell what became of it
		sent <- n
	}()
	answered := int32(0)
	for ; ; answered++ {
		b, err := client.frame()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if got := int32(binary.BigEndian.Uint32(b)); got != answered {
			t.Fatalf("the answer to request %d came where that to %d was due", got, answered)
		}
	}
	if n := <-sent; answered != n {
		t.Errorf("%d of %d requests were answered", answered, n)
	}
	if n := login.exchanges.Load(); n < 3 || n > int32(time.Since(started)/time.Second)+1 {
		t.Errorf("there were %d logins in %s: a broker takes one a second", n, time.Since(started))
	}
	if err := errors.Join(<-played, end(t, ended)); err != nil {
		t.Error(err)
	}
}

// answersAtOnce plays a broker that holds nothing back, until the requests end.
func answersAtOnce(p *peer) error {
	for {
		b, err := p.frame()
		if errors.Is(err, io.EOF) {
			return p.Conn.(*net.TCPConn).CloseWrite()
		}
		if err != nil {
			return err
		}
		h, err := wire.ParseHeader(b)
		if err != nil {
			return err
		}
		req := kmsg.RequestForKey(h.Key)
		req.SetVersion(h.Version)
		if err := req.ReadFrom(b[h.Len:]); err != nil {
			return err
		}
		resp := req.ResponseKind()
		if produce, ok := req.(*kmsg.ProduceRequest); ok {
			resp = produceAnswer(produce, 1)
		}
		if _, err := p.Write(wire.AppendResponse(nil, h.Correlation, resp)); err != nil {
			return err
		}
	}
}

func TestARenewalThatFailsEndsTheConnection(t *testing.T) {
	for name, play := range map[string]func(t *testing.T, broker *peer){
		"the broker refuses": func(t *testing.T, broker *peer) {
			logsIn(t, broker, "\x00node\x00s3cret", kerr.SaslAuthenticationFailed.Code)
		},
		"the broker ends": func(_ *testing.T, broker *peer) {
			broker.request()
			_ = broker.Close()
		},
		"the broker answers nonsense": func(_ *testing.T, broker *peer) {
			h, _ := broker.request()
			broker.write(responseFrame(h.Correlation, bytes.Repeat([]byte{0xff}, 9)))
		},
		"the broker answers without end": func(_ *testing.T, broker *peer) {
			h, _ := broker.request()
			broker.write([]byte{0x10, 0, 0, 0, byte(h.Correlation >> 24), byte(h.Correlation >> 16), byte(h.Correlation >> 8),
				byte(h.Correlation)})
		},
	} {
		t.Run(name, func(t *testing.T) {
			rig := newRig(t, ordersOnly)
			login := &ownLogin{token: []byte("\x00node\x00s3cret")}
			login.due.Store(1)
			rig.login = login
			client, broker, ended := rig.serveScripted(t)
			client.write(requestFrame(1, produceRequest(9, -1, []byte("record"), "orders")))
			play(t, broker)
			if n := client.drain(); n != 0 {
				t.Errorf("the client got %d bytes", n)
			}
			var refusal *Error
			if err := end(t, ended); !errors.As(err, &refusal) && name != "the broker ends" {
				t.Errorf("the session ended with %v", err)
			} else if refusal != nil && refusal.Reason != audit.UpstreamLogin && refusal.Reason != audit.BadAnswer {
				t.Errorf("the session was refused as %q", refusal.Reason)
			}
			if strings.Contains(fmt.Sprint(rig.log.text.String(), refusal), "s3cret") {
				t.Error("the password is on record")
			}
		})
	}
}

// Where the node has logged in the listener is to the client what a PLAINTEXT one is.
func TestAClientMayNotLogInWhereTheNodeHas(t *testing.T) {
	rig := newRig(t, ordersOnly)
	rig.login = &ownLogin{}
	client, broker, ended := rig.serveScripted(t)
	greeting := client.ask(1, handshakeRequest("PLAIN")).(*kmsg.SASLHandshakeResponse)
	answer := client.ask(2, authenticateRequest("\x00alice\x00wonder")).(*kmsg.SASLAuthenticateResponse)
	if greeting.ErrorCode != kerr.IllegalSaslState.Code || answer.ErrorCode != kerr.IllegalSaslState.Code {
		t.Errorf("the answers have the codes %d and %d", greeting.ErrorCode, answer.ErrorCode)
	}
	if err := wroteAs(t, client, broker, true); err != nil {
		t.Errorf("afterwards: %v", err)
	}
	client.closeWrite()
	broker.closeWrite()
	logEnd(t, ended)
}
