package kafka

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/audit"
	"klamm/enforcer/kafka/sasl"
	"klamm/enforcer/kafka/wire"
	"klamm/spiffe"
)

func handshakeRequest(mechanism string) *kmsg.SASLHandshakeRequest {
	req := kmsg.NewPtrSASLHandshakeRequest()
	req.Version, req.Mechanism = 1, mechanism
	return req
}

func authenticateRequest(msg string) *kmsg.SASLAuthenticateRequest {
	req := kmsg.NewPtrSASLAuthenticateRequest()
	req.Version, req.SASLAuthBytes = 2, []byte(msg)
	return req
}

// said is one message of a client in an exchange, and how the broker answers it.
type said struct {
	msg    string
	answer string
	code   int16
	life   time.Duration
}

// greet opens an exchange.
func greet(t *testing.T, client, broker *peer, mechanism string) {
	t.Helper()
	req := handshakeRequest(mechanism)
	client.write(requestFrame(1, req))
	h, got := broker.request()
	broker.answer(h, got.ResponseKind())
	if resp := client.response(1, req).(*kmsg.SASLHandshakeResponse); resp.ErrorCode != 0 {
		t.Fatalf("the handshake is answered with %d", resp.ErrorCode)
	}
}

// exchange says a message, which the broker must get as it is, and returns what the client is answered.
func exchange(t *testing.T, client, broker *peer, s said) *kmsg.SASLAuthenticateResponse {
	t.Helper()
	req := authenticateRequest(s.msg)
	client.write(requestFrame(2, req))
	h, got := broker.request()
	if a, ok := got.(*kmsg.SASLAuthenticateRequest); !ok || string(a.SASLAuthBytes) != s.msg {
		t.Fatalf("the broker got %T %+v", got, got)
	}
	resp := got.ResponseKind().(*kmsg.SASLAuthenticateResponse)
	resp.ErrorCode, resp.SASLAuthBytes, resp.SessionLifetimeMillis = s.code, []byte(s.answer), s.life.Milliseconds()
	broker.answer(h, resp)
	return client.response(2, req).(*kmsg.SASLAuthenticateResponse)
}

// logIn is a whole exchange.
func logIn(t *testing.T, client, broker *peer, mechanism string, all ...said) {
	t.Helper()
	greet(t, client, broker, mechanism)
	for _, s := range all {
		exchange(t, client, broker, s)
	}
}

// wantLoginRefused says something that must be refused before it reaches the broker, with this message.
func wantLoginRefused(t *testing.T, rig *rig, client, broker *peer, ended <-chan error, msg, public string) {
	t.Helper()
	req := authenticateRequest(msg)
	client.write(requestFrame(3, req))
	resp := client.response(3, req).(*kmsg.SASLAuthenticateResponse)
	if resp.ErrorCode != kerr.SaslAuthenticationFailed.Code || resp.ErrorMessage == nil || *resp.ErrorMessage != public {
		t.Errorf("the answer is %d %q", resp.ErrorCode, *resp.ErrorMessage)
	}
	if n := client.drain() + broker.drain(); n != 0 {
		t.Errorf("%d bytes went on", n)
	}
	rig.wantRefusal(t, ended, audit.LoginRefused)
}

const (
	scramFirst  = "n,,n=al=2Ci=3Dce,r=nonce"
	scramServer = "r=nonceserver,s=c2FsdA==,i=4096"
	scramFinal  = "c=biws,r=nonceserver,p=cHJvb2Y="
	challenge   = `{"status":"invalid_token"}`
	iamMessage  = `{"version":"2020_10_22","host":"b-1.msk.example.test","x-amz-credential":` +
		`"AKIAEXAMPLE/20261125/eu-west-1/kafka-cluster/aws4_request","x-amz-signature":"5e55"}`
)

func bearerMessage(token string) string { return "n,,\x01auth=Bearer " + token + "\x01\x01" }

// byLogin are rules for who is logged in, and how.
const byLogin = `apiVersion: klamm/v1
rules:
  - {name: by mechanism, principals: ["spiffe://example.test/*"], when: sasl.mechanism == "GSSAPI",
     allow: [{topic: "orders*", operations: [Write]}]}
  - {name: by name, principals: ["User:al,i=ce", "User:alice"], allow: [{topic: "orders*", operations: [Write]}]}
`

// A login counts from the broker's last success on, and not a message before.
func TestALoginCountsAfterTheBrokersLastSuccess(t *testing.T) {
	for mechanism, c := range map[string]struct {
		all       []said
		principal string
	}{
		"PLAIN":         {[]said{{msg: "\x00alice\x00wonder"}}, "User:alice"},
		"SCRAM-SHA-256": {[]said{{msg: scramFirst, answer: scramServer}, {msg: scramFinal, answer: "v="}}, "User:al,i=ce"},
		"SCRAM-SHA-512": {[]said{{msg: scramFirst, answer: scramServer}, {msg: scramFinal, answer: "v="}}, "User:al,i=ce"},
		"OAUTHBEARER":   {[]said{{msg: bearerMessage("alices")}}, "User:alice"},
		"AWS_MSK_IAM":   {[]said{{msg: iamMessage, answer: `{"version":"2020_10_22"}`}}, ""},
		"GSSAPI":        {[]said{{msg: "\x60ticket", answer: "reply"}, {msg: "", answer: "offer"}, {msg: "choice"}}, ""},
		"X-NEW":         {[]said{{msg: "anything"}}, ""},
	} {
		t.Run(mechanism, func(t *testing.T) {
			rig := newRig(t, byLogin)
			rig.shared.Tokens = tokens{"alices": {Subject: "alice", Issuer: "https://issuer.example.test"}}
			client, broker, ended := rig.serveScripted(t)
			if err := wroteAs(t, client, broker, false); !errors.Is(err, kerr.TopicAuthorizationFailed) {
				t.Errorf("before the login: %v", err)
			}
			logIn(t, client, broker, mechanism, c.all...)
			allowed := c.principal != "" || mechanism == "GSSAPI"
			if err := wroteAs(t, client, broker, allowed); allowed != (err == nil) {
				t.Errorf("after the login: %v", err)
			}
			client.closeWrite()
			broker.closeWrite()
			logEnd(t, ended)
			lines := rig.log.find(t, func(l auditLine) bool { return l.Change == "login" })
			if len(lines) != 1 || lines[0].To != c.principal || lines[0].Mechanism != mechanism {
				t.Errorf("the audit has %+v", lines)
			}
			lines = rig.log.find(t, func(l auditLine) bool { return l.API == "Produce" && l.Mechanism != "" })
			if len(lines) != 1 || lines[0].Principal != c.principal || lines[0].Mechanism != mechanism {
				t.Errorf("the produce is told of as %+v", lines)
			}
			for _, secret := range []string{"wonder", "cHJvb2Y", "alices", "5e55", "ticket"} {
				if strings.Contains(rig.log.text.String(), secret) {
					t.Errorf("%q is on record", secret)
				}
			}
		})
	}
}

// Whatever is left out or refused, nobody is logged in.
func TestALoginThatTheBrokerDidNotAcceptIsNone(t *testing.T) {
	failed := kerr.SaslAuthenticationFailed.Code
	for name, c := range map[string]struct {
		mechanism string
		all       []said
	}{
		"a wrong password": {"PLAIN", []said{{msg: "\x00alice\x00guessed", code: failed}}},
		"a wrong proof": {"SCRAM-SHA-256",
			[]said{{msg: scramFirst, answer: scramServer}, {msg: scramFinal, code: failed}}},
		"a token it does not like": {"OAUTHBEARER",
			[]said{{msg: bearerMessage("alices"), answer: challenge}, {msg: "\x01", code: failed}}},
		"a broker that forgets it": {"GSSAPI", []said{{msg: "ticket", code: failed}}},
	} {
		t.Run(name, func(t *testing.T) {
			rig := newRig(t, byLogin)
			rig.shared.Tokens = tokens{"alices": {Subject: "alice"}}
			client, broker, ended := rig.serveScripted(t)
			logIn(t, client, broker, c.mechanism, c.all...)
			if err := wroteAs(t, client, broker, false); !errors.Is(err, kerr.TopicAuthorizationFailed) {
				t.Errorf("who did not log in writes: %v", err)
			}
			client.closeWrite()
			broker.closeWrite()
			logEnd(t, ended)
		})
	}
}

// A broker answers a refused token without an error code first (RFC 7628): a client could take that for success.
func TestAChallengedTokenIsNoLogin(t *testing.T) {
	rig := newRig(t, byLogin)
	rig.shared.Tokens = tokens{"alices": {Subject: "alice"}}
	client, broker, ended := rig.serveScripted(t)
	logIn(t, client, broker, "OAUTHBEARER", said{msg: bearerMessage("alices"), answer: challenge},
		said{msg: "\x01"}) // and a broker that does not say so
	req := produceRequest(9, -1, []byte("record"), "orders")
	client.write(requestFrame(7, req))
	resp := client.response(7, req).(*kmsg.ProduceResponse)
	if code := resp.Topics[0].Partitions[0].ErrorCode; code != kerr.IllegalSaslState.Code {
		t.Errorf("the code is %d", code)
	}
	if n := broker.drain(); n != 0 {
		t.Errorf("the broker got %d bytes", n)
	}
	rig.wantRefusal(t, ended, audit.LoginRefused)
}

func TestOnlySASLAuthenticateIsLegalWithinAnExchange(t *testing.T) {
	metadata := kmsg.NewPtrMetadataRequest()
	metadata.Version = 12
	version := kmsg.NewPtrApiVersionsRequest()
	version.Version, version.ClientSoftwareName, version.ClientSoftwareVersion = 3, "test", "1"
	for name, req := range map[string]kmsg.Request{
		"a produce":             produceRequest(9, -1, []byte("record"), "orders"),
		"a produce without ack": produceRequest(9, 0, []byte("record"), "orders"),
		"a fetch":               fetchRequest(12, 0, -1, "orders"),
		"a metadata":            metadata,
		"another handshake":     handshakeRequest("PLAIN"),
		"ApiVersions":           version,
		"an API that is hidden": kmsg.NewPtrDescribeACLsRequest(),
	} {
		for _, begun := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, the exchange begun: %v", name, begun), func(t *testing.T) {
				rig := newRig(t, ordersOnly)
				client, broker, ended := rig.serveScripted(t)
				greet(t, client, broker, "SCRAM-SHA-256")
				if begun {
					exchange(t, client, broker, said{msg: scramFirst, answer: "r=nonceserver,s=c2FsdA==,i=4096"})
				}
				client.write(requestFrame(3, req))
				client.write(requestFrame(4, authenticateRequest(scramFirst)))
				if n := client.drain(); n == 0 != (name == "a produce without ack") {
					t.Errorf("the client got %d bytes", n)
				}
				if n := broker.drain(); n != 0 {
					t.Errorf("the broker got %d bytes", n)
				}
				reason := audit.LoginRefused
				if name == "an API that is hidden" {
					reason = audit.UnsupportedVersion
				}
				rig.wantRefusal(t, ended, reason)
			})
		}
	}
}

// Who sends SaslAuthenticate without a handshake hears what the broker says then: one that wants a login closes.
func TestATokenOutsideOfAnExchangeIsTheBrokersToRefuse(t *testing.T) {
	rig := newRig(t, anybody)
	client, broker, ended := rig.serveScripted(t)
	req := authenticateRequest("\x00alice\x00wonder")
	client.write(requestFrame(1, req))
	h, got := broker.request()
	refused := got.ResponseKind().(*kmsg.SASLAuthenticateResponse)
	refused.ErrorCode = kerr.IllegalSaslState.Code // a PLAINTEXT listener
	broker.answer(h, refused)
	if resp := client.response(1, req).(*kmsg.SASLAuthenticateResponse); resp.ErrorCode != kerr.IllegalSaslState.Code {
		t.Errorf("the code is %d", resp.ErrorCode)
	}
	if err := wroteAs(t, client, broker, true); err != nil {
		t.Error(err)
	}
	client.closeWrite()
	broker.closeWrite()
	logEnd(t, ended)
}

func TestALoginThatABrokerAcceptsOutsideOfAnExchangeEndsTheConnection(t *testing.T) {
	rig := newRig(t, anybody)
	client, broker, ended := rig.serveScripted(t)
	client.write(requestFrame(1, authenticateRequest("\x00alice\x00wonder")))
	h, got := broker.request()
	broker.answer(h, got.ResponseKind())
	if n := client.drain(); n != 0 {
		t.Errorf("the client got %d bytes", n)
	}
	rig.wantRefusal(t, ended, audit.LoginRefused)
}

func TestAHandshakeThatTheBrokerRefusesOpensNoExchange(t *testing.T) {
	rig := newRig(t, anybody)
	client, broker, ended := rig.serveScripted(t)
	req := handshakeRequest("PLAIN")
	client.write(requestFrame(1, req))
	h, got := broker.request()
	refused := got.ResponseKind().(*kmsg.SASLHandshakeResponse)
	refused.ErrorCode = kerr.IllegalSaslState.Code // a PLAINTEXT listener
	broker.answer(h, refused)
	client.response(1, req)
	if err := wroteAs(t, client, broker, true); err != nil {
		t.Error(err)
	}
	client.closeWrite()
	broker.closeWrite()
	logEnd(t, ended)
}

// The raw tokens that follow SaslHandshake v0 have no header by which they could be told from requests.
func TestAnOldHandshakeIsRefusedAndEndsTheConnection(t *testing.T) {
	rig := newRig(t, ordersOnly)
	client, broker, ended := rig.serveScripted(t)
	old := handshakeRequest("PLAIN")
	old.Version = 0
	client.write(requestFrame(1, old))
	client.write([]byte("\x00\x00\x00\x0d\x00alice\x00wonder")) // as it would go on
	if resp := client.response(1, old).(*kmsg.SASLHandshakeResponse); resp.ErrorCode != kerr.UnsupportedVersion.Code {
		t.Errorf("the code is %d", resp.ErrorCode)
	}
	if n := client.drain() + broker.drain(); n != 0 {
		t.Errorf("%d bytes went on", n)
	}
	rig.wantRefusal(t, ended, audit.UnsupportedVersion)
}

func TestAFrameThatNoLoginHasIsRefusedUnread(t *testing.T) {
	large := requestFrame(1, authenticateRequest(strings.Repeat("x", wire.BaseBuffer)))
	other := requestFrame(1, produceRequest(9, -1, make([]byte, wire.BaseBuffer), "orders"))
	handshake := requestFrame(1, handshakeRequest("PLAIN"))
	binary.BigEndian.PutUint32(handshake, wire.BaseBuffer)
	for name, c := range map[string]struct {
		bytes []byte
		greet bool
	}{
		"a token of Kafka 0.9":                {[]byte("\x00\x00\x02\x00\x60\x82\x01\xfc\x06\x09"), false},
		"a large SaslAuthenticate":            {large[:20], false},
		"a large SaslAuthenticate in time":    {large[:20], true},
		"a large other request in its place":  {other[:20], true},
		"a large handshake":                   {handshake, false},
		"a token of Kafka 0.9 in an exchange": {[]byte("\x00\x00\x02\x00\x60\x82\x01\xfc\x06\x09"), true},
	} {
		t.Run(name, func(t *testing.T) {
			rig := newRig(t, ordersOnly)
			client, broker, ended := rig.serveScripted(t)
			if c.greet {
				greet(t, client, broker, "PLAIN")
			}
			client.write(c.bytes)
			if n := client.drain() + broker.drain(); n != 0 {
				t.Errorf("%d bytes went on", n)
			}
			rig.wantRefusal(t, ended, audit.BadFrame)
		})
	}
}

func TestAMalformedMessageIsRefusedAsABrokerDoes(t *testing.T) {
	for mechanism, msg := range map[string]string{
		"PLAIN":         "alice\x00wonder",
		"SCRAM-SHA-256": "y,,n=alice,r=nonce",
		"OAUTHBEARER":   "n,,\x01auth=Bearer a\x01auth=Bearer b\x01\x01",
		"AWS_MSK_IAM":   "{}",
	} {
		t.Run(mechanism, func(t *testing.T) {
			rig := newRig(t, ordersOnly)
			client, broker, ended := rig.serveScripted(t)
			greet(t, client, broker, mechanism)
			wantLoginRefused(t, rig, client, broker, ended, msg,
				"Authentication failed during authentication due to invalid credentials with SASL mechanism "+mechanism)
		})
	}
}

// tokens are those that are known, by their text. Others are of an issuer that is not.
type tokens map[string]spiffe.Evidence

func (all tokens) Verify(_ context.Context, token string) (*spiffe.Evidence, error) {
	switch token {
	case "forged":
		return nil, &spiffe.TokenError{Check: spiffe.CheckSignature, Err: errors.New("no key has made it")}
	case "issuer-down":
		return nil, context.DeadlineExceeded
	}
	e, ok := all[token]
	if !ok {
		return nil, &spiffe.TokenError{Check: spiffe.CheckIssuer, Err: errors.New("of another issuer")}
	}
	e.Source = spiffe.SourceSASL
	return &e, nil
}

func TestATokenThatIsNotGoodDoesNotReachTheBroker(t *testing.T) {
	for name, c := range map[string]struct{ msg, public string }{
		"forged":         {bearerMessage("forged"), "Authentication failed: token rejected: signature"},
		"not verifiable": {bearerMessage("issuer-down"), "Authentication failed: the token could not be verified"},
		"for somebody else": {"n,a=bob,\x01auth=Bearer alices\x01\x01",
			"Authentication failed: the authorization id is not the token's principal"},
	} {
		t.Run(name, func(t *testing.T) {
			rig := newRig(t, ordersOnly)
			rig.shared.Tokens = tokens{"alices": {Subject: "alice"}}
			client, broker, ended := rig.serveScripted(t)
			greet(t, client, broker, "OAUTHBEARER")
			wantLoginRefused(t, rig, client, broker, ended, c.msg, c.public)
		})
	}
}

// Tokens that we cannot read are the broker's matter, as long as the policy does not ask whose they are.
func TestATokenOfAnotherIssuerGivesNoPrincipal(t *testing.T) {
	const logins = `connections:
  - {name: alice, principals: ["spiffe://example.test/*"], sasl: ["User:alice"]}
`
	for _, trusted := range []Tokens{nil, tokens{}} {
		rig := newRig(t, byLogin)
		rig.shared.Tokens = trusted
		client, broker, ended := rig.serveScripted(t)
		logIn(t, client, broker, "OAUTHBEARER", said{msg: bearerMessage("opaque")})
		if err := wroteAs(t, client, broker, false); !errors.Is(err, kerr.TopicAuthorizationFailed) {
			t.Errorf("it writes: %v", err)
		}
		client.closeWrite()
		broker.closeWrite()
		logEnd(t, ended)

		rig = newRig(t, byLogin+logins)
		rig.shared.Tokens = trusted
		client, broker, ended = rig.serveScripted(t)
		greet(t, client, broker, "OAUTHBEARER")
		wantLoginRefused(t, rig, client, broker, ended, bearerMessage("opaque"), "Authentication failed: the policy does "+
			"not let this workload log in as a principal that OAUTHBEARER does not show")
	}
}

func TestTheBrokerDoesNotHearOfALoginThatThePolicyRefuses(t *testing.T) {
	const logins = `connections:
  - {name: alice, principals: ["spiffe://example.test/orders"], sasl: ["User:alice"]}
`
	for mechanism, msg := range map[string]string{
		"PLAIN":         "\x00bob\x00builder",
		"SCRAM-SHA-512": "n,,n=bob,r=nonce",
		"OAUTHBEARER":   bearerMessage("bobs"),
	} {
		rig := newRig(t, byLogin+logins)
		rig.shared.Tokens = tokens{"bobs": {Subject: "bob"}}
		client, broker, ended := rig.serveScripted(t)
		greet(t, client, broker, mechanism)
		wantLoginRefused(t, rig, client, broker, ended, msg,
			"Authentication failed: the policy does not let this workload log in as User:bob")
	}
	for mechanism, msg := range map[string]string{"AWS_MSK_IAM": iamMessage, "GSSAPI": "\x60ticket",
		"SCRAM-SHA-256": "n,,n=token-id,r=nonce,tokenauth=true"} {
		rig := newRig(t, byLogin+logins)
		client, broker, ended := rig.serveScripted(t)
		greet(t, client, broker, mechanism)
		wantLoginRefused(t, rig, client, broker, ended, msg, "Authentication failed: the policy does not let this workload "+
			"log in as a principal that "+mechanism+" does not show")
	}
	rig := newRig(t, byLogin+logins)
	client, broker, ended := rig.serveScripted(t)
	logIn(t, client, broker, "PLAIN", said{msg: "\x00alice\x00wonder"})
	if err := wroteAs(t, client, broker, true); err != nil {
		t.Errorf("who may log in: %v", err)
	}
	client.closeWrite()
	broker.closeWrite()
	logEnd(t, ended)
}

func TestAConditionSeesTheLoginThatIsAskedFor(t *testing.T) {
	const logins = `connections:
  - {name: by token, when: sasl.mechanism == "OAUTHBEARER" && sasl.claims.azp == "orders", sasl: ["User:*"]}
`
	trusted := tokens{"alices": {Subject: "alice", Claims: map[string]any{"azp": "orders"}},
		"others": {Subject: "alice", Claims: map[string]any{"azp": "others"}}}
	for mechanism, msg := range map[string]string{"PLAIN": "\x00alice\x00wonder", "OAUTHBEARER": bearerMessage("others")} {
		rig := newRig(t, byLogin+logins)
		rig.shared.Tokens = trusted
		client, broker, ended := rig.serveScripted(t)
		greet(t, client, broker, mechanism)
		wantLoginRefused(t, rig, client, broker, ended, msg,
			"Authentication failed: the policy does not let this workload log in as User:alice")
	}
	rig := newRig(t, byLogin+logins)
	rig.shared.Tokens = trusted
	client, broker, ended := rig.serveScripted(t)
	logIn(t, client, broker, "OAUTHBEARER", said{msg: bearerMessage("alices")})
	if err := wroteAs(t, client, broker, true); err != nil {
		t.Errorf("who may log in: %v", err)
	}
	client.closeWrite()
	broker.closeWrite()
	logEnd(t, ended)
}

func TestALoginThatThePolicyDoesNotAllowAnyMoreHasNoRights(t *testing.T) {
	rig := newRig(t, byLogin)
	client, broker, ended := rig.serveScripted(t)
	logIn(t, client, broker, "PLAIN", said{msg: "\x00alice\x00wonder"})
	if err := wroteAs(t, client, broker, true); err != nil {
		t.Errorf("before: %v", err)
	}
	rig.shared.Policy.Store(parsePolicy(t, byLogin+"connections: [{name: c, principals: ['*'], sasl: ['User:bob']}]"))
	if err := wroteAs(t, client, broker, false); !errors.Is(err, kerr.TopicAuthorizationFailed) {
		t.Errorf("after: %v", err)
	}
	client.closeWrite()
	broker.closeWrite()
	logEnd(t, ended)
}

func TestARenewedLoginIsOfTheSamePrincipal(t *testing.T) {
	for name, c := range map[string]struct{ mechanism, msg, public string }{
		"another principal": {"PLAIN", "\x00bob\x00builder",
			"Cannot change principals during re-authentication from User:alice: User:bob"},
		"another mechanism": {"SCRAM-SHA-256", "n,,n=alice,r=nonce", "SASL mechanism 'SCRAM-SHA-256' requested by client " +
			"is not supported for re-authentication of mechanism 'PLAIN'"},
	} {
		t.Run(name, func(t *testing.T) {
			rig := newRig(t, byLogin)
			client, broker, ended := rig.serveScripted(t)
			logIn(t, client, broker, "PLAIN", said{msg: "\x00alice\x00wonder", life: time.Minute})
			greet(t, client, broker, c.mechanism)
			wantLoginRefused(t, rig, client, broker, ended, c.msg, c.public)
		})
	}
}

// The login that is renewed while requests are on their way has rights all along.
func TestALoginMayBeRenewedAtAnyTime(t *testing.T) {
	rig := newRig(t, byLogin)
	rig.shared.CloseOnLoss = true
	client, broker, ended := rig.serveScripted(t)
	logIn(t, client, broker, "PLAIN", said{msg: "\x00alice\x00wonder", life: time.Second})
	until := time.Now().Add(2500 * time.Millisecond)
	for i := 0; time.Now().Before(until); i++ {
		produce := produceRequest(9, -1, []byte("record"), "orders")
		client.write(append(requestFrame(8, produce), requestFrame(1, handshakeRequest("PLAIN"))...)) // without waiting
		h, _ := broker.request()
		greeting, _ := broker.request()
		broker.write(append(wire.AppendResponse(nil, h.Correlation, produceAnswer(produce, int64(i))),
			wire.AppendResponse(nil, greeting.Correlation, handshakeRequest("PLAIN").ResponseKind())...))
		client.response(8, produce)
		client.response(1, handshakeRequest("PLAIN"))
		exchange(t, client, broker, said{msg: "\x00alice\x00wonder", life: time.Second})
	}
	client.closeWrite()
	broker.closeWrite()
	if err := end(t, ended); err != nil {
		t.Error(err)
	}
	if lines := rig.log.find(t, func(l auditLine) bool { return l.Change != "" }); len(lines) != 1 {
		t.Errorf("the audit has the changes %+v", lines)
	}
}

func TestALoginThatTheBrokerDoesNotRenewEndsTheConnection(t *testing.T) {
	rig := newRig(t, byLogin)
	client, broker, ended := rig.serveScripted(t)
	logIn(t, client, broker, "PLAIN", said{msg: "\x00alice\x00wonder", life: time.Minute})
	greet(t, client, broker, "PLAIN")
	resp := exchange(t, client, broker, said{msg: "\x00alice\x00changed", code: kerr.SaslAuthenticationFailed.Code})
	if resp.ErrorCode != kerr.SaslAuthenticationFailed.Code {
		t.Errorf("the client is answered %d", resp.ErrorCode)
	}
	if n := client.drain(); n != 0 {
		t.Errorf("%d bytes went on", n)
	}
	rig.wantRefusal(t, ended, audit.LoginRefused)
}

// soon is when short sessions end.
const soon = 300 * time.Millisecond

// shortSessions are logins that end soon: by the broker, or with the token.
func shortSessions() map[string]struct {
	mechanism string
	said      said
	tokens    Tokens
} {
	return map[string]struct {
		mechanism string
		said      said
		tokens    Tokens
	}{
		"the broker's session": {"PLAIN", said{msg: "\x00alice\x00wonder", life: soon}, nil},
		"the token": {"OAUTHBEARER", said{msg: bearerMessage("alices"), life: time.Hour},
			tokens{"alices": {Subject: "alice", Expires: time.Now().Add(soon)}, "alices-next": {Subject: "alice"}}},
		"the token, of which the broker knows no end": {"OAUTHBEARER", said{msg: bearerMessage("alices")},
			tokens{"alices": {Subject: "alice", Expires: time.Now().Add(soon)}, "alices-next": {Subject: "alice"}}},
	}
}

// As a broker does: whoever uses the connection after its session is cut off without an answer.
func TestAnExpiredSessionEndsWithTheNextFrame(t *testing.T) {
	for name := range shortSessions() {
		t.Run(name, func(t *testing.T) {
			c := shortSessions()[name]
			rig := newRig(t, byLogin)
			rig.shared.Tokens = c.tokens
			client, broker, ended := rig.serveScripted(t)
			logIn(t, client, broker, c.mechanism, c.said)
			<-time.After(soon)
			client.write(requestFrame(3, produceRequest(9, -1, []byte("record"), "orders")))
			if n := client.drain() + broker.drain(); n != 0 {
				t.Errorf("%d bytes went on", n)
			}
			rig.wantRefusal(t, ended, audit.SessionExpired)
		})
	}
}

func TestAnExpiredSessionMayStillBeRenewed(t *testing.T) {
	for name := range shortSessions() {
		t.Run(name, func(t *testing.T) {
			c := shortSessions()[name]
			rig := newRig(t, byLogin)
			rig.shared.Tokens = c.tokens
			client, broker, ended := rig.serveScripted(t)
			logIn(t, client, broker, c.mechanism, c.said)
			<-time.After(soon)
			c.said.life, c.said.msg = time.Hour, strings.Replace(c.said.msg, "alices", "alices-next", 1)
			logIn(t, client, broker, c.mechanism, c.said)
			if err := wroteAs(t, client, broker, true); err != nil {
				t.Error(err)
			}
			client.closeWrite()
			broker.closeWrite()
			logEnd(t, ended)
		})
	}
}

func TestAnIdleConnectionEndsWithinASecondAfterItsSession(t *testing.T) {
	for name := range shortSessions() {
		t.Run(name, func(t *testing.T) {
			c := shortSessions()[name]
			rig := newRig(t, byLogin)
			rig.shared.Tokens, rig.shared.CloseOnLoss = c.tokens, true
			client, broker, ended := rig.serveScripted(t)
			logIn(t, client, broker, c.mechanism, c.said)
			started := time.Now()
			if n := client.drain() + broker.drain(); n != 0 {
				t.Errorf("%d bytes went on", n)
			}
			if took := time.Since(started); took > soon+time.Second {
				t.Errorf("it took %s", took)
			}
			rig.wantRefusal(t, ended, audit.SessionExpired)
		})
	}
}

// What was asked in time: a broker whose session has ended still answers, and with a token its rights end.
func TestWhatIsOwedWhenASessionEnds(t *testing.T) {
	for name := range shortSessions() {
		t.Run(name, func(t *testing.T) {
			c := shortSessions()[name]
			rig := newRig(t, strings.ReplaceAll(byLogin, "[Write]", "[Read, Write]"))
			rig.shared.Tokens = c.tokens
			rig.shared.CloseOnLoss = c.tokens == nil
			client, broker, ended := rig.serveScripted(t)
			logIn(t, client, broker, c.mechanism, c.said)
			req := fetchRequest(12, 0, -1, "orders")
			client.write(requestFrame(3, req))
			h, _ := broker.request()
			<-time.After(soon + soon/3)
			broker.answer(h, fetchAnswer(12, "orders", batch([]byte("record"))))
			resp := client.response(3, req).(*kmsg.FetchResponse)
			if got := len(resp.Topics[0].Partitions[0].RecordBatches) > 0; got != (c.tokens == nil) {
				t.Errorf("records came: %v", got)
			}
			client.closeWrite()
			broker.closeWrite()
			logEnd(t, ended)
		})
	}
}

// The client of a token is told to come back before that ends, sooner than the broker says: a fetch may wait meanwhile.
func TestTheClientIsToldOfTheEndOfItsToken(t *testing.T) {
	rig := newRig(t, byLogin)
	rig.shared.Tokens = tokens{"alices": {Subject: "alice", Expires: time.Now().Add(time.Minute)}}
	for life, want := range map[time.Duration]time.Duration{
		time.Hour: 50 * time.Second, 30 * time.Second: 25 * time.Second,
		0: 0, // a broker that renews no login
	} {
		client, broker, ended := rig.serveScripted(t)
		greet(t, client, broker, "OAUTHBEARER")
		resp := exchange(t, client, broker, said{msg: bearerMessage("alices"), life: life})
		got := time.Duration(resp.SessionLifetimeMillis) * time.Millisecond
		if got > want || got < want-10*time.Second {
			t.Errorf("of the broker's %s the client hears %s", life, got)
		}
		client.closeWrite()
		broker.closeWrite()
		logEnd(t, ended)
	}
}

// answering is a broker that accepts whatever it gets, and keeps hold of the memory it was given it from.
type answering struct {
	*session
	given [][]byte
}

func (a *answering) Write(b []byte) (int, error) {
	a.given = append(a.given, b)
	a.queue.Next()
	a.queue.Done()
	return len(b), a.queue.Written()
}

// After a login neither the pipe nor what was sent still holds what the client knows, whether the broker was to hear of
// it or not.
func TestNoSecretStaysInMemoryOfOurs(t *testing.T) {
	const secret = "a-secret-in-memory"
	for name, c := range map[string]struct {
		mechanism, msg string
		sent           bool
		lacks          int // bytes at the end that do not come
	}{
		"a password":               {"PLAIN", "\x00alice\x00" + secret, true, 0},
		"a password, sent anew":    {"PLAIN", "\x00alice\x00" + secret, true, 0},
		"a token":                  {"OAUTHBEARER", bearerMessage(secret), true, 0},
		"a malformed message":      {"PLAIN", "alice\x00" + secret, false, 0},
		"a login that may not be":  {"PLAIN", "\x00bob\x00" + secret, false, 0},
		"outside of an exchange":   {"", "\x00alice\x00" + secret, true, 0},
		"a client that dies of it": {"PLAIN", "\x00alice\x00" + secret, false, 2},
	} {
		t.Run(name, func(t *testing.T) {
			const logins = `connections:
  - {name: a, principals: ["spiffe://example.test/*"], sasl: ["User:alice", "*"]}
`
			rig := newRig(t, byLogin+logins)
			if strings.HasPrefix(name, "a login") {
				rig.who.become(identified(""), true)
			}
			s := newSession(t.Context(), rig.shared, rig.conn(nil, nil))
			s.queue = wire.NewQueue[pending](io.Discard, maxInFlight, s.memory.kept)
			frame := requestFrame(1, authenticateRequest(c.msg))
			if strings.HasSuffix(name, "anew") { // the length of the message in one byte more than it takes
				at := bytes.Index(frame, []byte(c.msg))
				frame = slices.Insert(frame, at, 0)
				frame[at-1] |= 0x80
				frame[wire.SizePrefix-1]++
			}
			broker := &answering{session: s}
			in := bytes.NewReader(frame[:len(frame)-c.lacks])
			s.up = wire.NewPipe(in, broker, s.memory.requested, nil, nil)
			if c.mechanism != "" {
				s.attempt = &attempt{Exchange: sasl.Exchange{Mechanism: c.mechanism}}
			}
			read, err := s.up.Need(in.Len())
			if err != nil || !bytes.Contains(read, []byte(secret)) == (c.lacks == 0) {
				t.Fatal(err)
			}
			if err := s.requests(); err == nil {
				t.Error("the requests have no end")
			}
			if (len(broker.given) > 0) != c.sent {
				t.Errorf("the broker got %d frames", len(broker.given))
			}
			if c.lacks > 0 {
				s.up.Close() // as at the end of the connection
			}
			for _, b := range append(broker.given, read) {
				if bytes.Contains(b, []byte(secret[:8])) {
					t.Errorf("memory still holds %q", b)
				}
			}
		})
	}
}
