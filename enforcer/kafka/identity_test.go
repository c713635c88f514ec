package kafka

import (
	"errors"
	"net"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/audit"
	"klamm/spiffe"
)

// anybody lets any SPIFFE ID write to orders, and observes nothing.
const anybody = `apiVersion: klamm/v1
rules:
  - name: anybody
    principals: ["spiffe://example.test/*"]
    allow: [{topic: "orders*", operations: [Read, Write, Describe]}]
`

// wroteAs produces to orders and tells how that was answered; what is allowed reaches the broker.
func wroteAs(t *testing.T, client, broker *peer, allowed bool) error {
	t.Helper()
	req := produceRequest(9, -1, []byte("record"), "orders")
	client.write(requestFrame(7, req))
	if allowed {
		h, got := broker.request()
		broker.answer(h, produceAnswer(got.(*kmsg.ProduceRequest), 1))
	}
	resp := client.response(7, req).(*kmsg.ProduceResponse)
	return kerr.ErrorForCode(resp.Topics[0].Partitions[0].ErrorCode)
}

// losses are ways in which a workload ceases to be who it was, and what the audit calls them.
func losses() map[string]struct {
	now    *spiffe.Identity
	reason audit.Reason
} {
	ended := identified("spiffe://example.test/orders")
	ended.Lost = errors.New("the process exited")
	return map[string]struct {
		now    *spiffe.Identity
		reason audit.Reason
	}{
		"the process ended":         {ended, audit.IdentityLost},
		"no source knows it":        {identified(""), audit.IdentityLost},
		"it has become another one": {identified("spiffe://example.test/billing"), audit.IdentityChanged},
	}
}

func TestALostIdentityHasNoRightsAtTheNextFrame(t *testing.T) {
	for name, c := range losses() {
		for _, quietly := range []bool{true, false} { // whether a frame or the watcher comes first
			t.Run(name, func(t *testing.T) {
				rig := newRig(t, anybody)
				client, broker, ended := rig.serveScripted(t)
				if err := wroteAs(t, client, broker, true); err != nil {
					t.Fatal(err)
				}
				rig.who.become(c.now, quietly)
				if err := wroteAs(t, client, broker, false); !errors.Is(err, kerr.TopicAuthorizationFailed) {
					t.Errorf("what it writes then is answered with %v", err)
				}
				rig.who.become(identified("spiffe://example.test/orders"), quietly)
				if err := wroteAs(t, client, broker, true); err != nil {
					t.Errorf("when it is who it was again: %v", err)
				}
				client.closeWrite()
				broker.closeWrite()
				logEnd(t, ended)
				lines := rig.log.find(t, func(l auditLine) bool { return l.Change == string(c.reason) })
				if len(lines) != 1 || lines[0].Verdict != "deny" || lines[0].From != "spiffe://example.test/orders" ||
					lines[0].To != named(c.now) || lines[0].Why == "" || lines[0].Hint != audit.Reasons[c.reason] {
					t.Errorf("the audit has %+v", lines)
				}
				if n := rig.refused(t, c.reason); n != 1 {
					t.Errorf("it is counted %v times", n)
				}
			})
		}
	}
}

func TestALostIdentityEndsTheConnectionAtOnce(t *testing.T) {
	for name, c := range losses() {
		for why, set := range map[string]func(*rig){
			"by configuration":                   func(r *rig) { r.shared.CloseOnLoss = true },
			"the broker knows it by certificate": func(r *rig) { r.asWorkload = true },
			"the node has logged in for it":      func(r *rig) { r.login = &ownLogin{} },
		} {
			t.Run(name+", "+why, func(t *testing.T) {
				rig := newRig(t, anybody)
				set(rig)
				client, broker, ended := rig.serveScripted(t)
				req := fetchRequest(12, 0, -1, "orders")
				req.MaxWaitMillis = 1 << 30
				client.write(requestFrame(1, req)) // a long poll that nobody answers
				broker.request()
				rig.who.become(c.now, false)
				if n := client.drain(); n != 0 {
					t.Errorf("the client got %d bytes", n)
				}
				rig.wantRefusal(t, ended, c.reason)
				if lines := rig.log.find(t, func(l auditLine) bool { return l.Change != "" }); len(lines) != 1 {
					t.Errorf("the audit has the changes %+v", lines)
				}
			})
		}
	}
}

func TestWhoLosesItsIdentityBetweenTwoFramesGetsNothingThrough(t *testing.T) {
	rig := newRig(t, anybody)
	rig.shared.CloseOnLoss = true
	client, broker, ended := rig.serveScripted(t)
	rig.who.become(identified(""), true)
	client.write(requestFrame(1, produceRequest(9, -1, []byte("record"), "orders")))
	if n := broker.drain(); n != 0 {
		t.Errorf("the broker got %d bytes", n)
	}
	rig.wantRefusal(t, ended, audit.IdentityLost)
}

func TestAnIdentityMayComeLateAndBeRenewed(t *testing.T) {
	rig := newRig(t, anybody)
	rig.shared.CloseOnLoss, rig.asWorkload = true, true
	rig.who = newWorkload(identified(""))
	client, broker, ended := rig.serveScripted(t)
	if err := wroteAs(t, client, broker, false); !errors.Is(err, kerr.TopicAuthorizationFailed) {
		t.Errorf("an unknown workload is answered with %v", err)
	}
	for range 3 {
		renewed := identified("spiffe://example.test/orders")
		renewed.Evidence[0].Expires = time.Now().Add(time.Minute)
		rig.who.become(renewed, false)
		if err := wroteAs(t, client, broker, true); err != nil {
			t.Errorf("it is answered with %v", err)
		}
	}
	client.closeWrite()
	broker.closeWrite()
	if err := end(t, ended); err != nil {
		t.Error(err)
	}
	lines := rig.log.find(t, func(l auditLine) bool { return l.Change != "" })
	if len(lines) != 1 || lines[0].Change != "identity" || lines[0].Verdict != "allow" || lines[0].From != "" ||
		lines[0].To != "spiffe://example.test/orders" || lines[0].Source != spiffe.SourceSPIRE {
		t.Errorf("the audit has the changes %+v", lines)
	}
	for _, l := range rig.log.find(t, isOperation("Produce")) {
		if known := l.SPIFFE != ""; known != (l.Verdict == "allow") {
			t.Errorf("the line of the produce is %+v", l)
		}
	}
}

// The subject of a token stands in for a SPIFFE ID until there is one.
func TestAWorkloadThatIsKnownByATokenAloneIsLostWithIt(t *testing.T) {
	token := func(subject string) *spiffe.Identity {
		if subject == "" {
			return &spiffe.Identity{}
		}
		return &spiffe.Identity{Evidence: []spiffe.Evidence{
			{Source: spiffe.SourceKubernetes, Issuer: "https://issuer.example.test", Subject: subject}}}
	}
	late := identified("spiffe://example.test/orders")
	for name, c := range map[string]struct {
		identities []*spiffe.Identity
		want       audit.Reason
	}{
		"it is renewed":                 {[]*spiffe.Identity{token("a"), token("a")}, ""},
		"it ended":                      {[]*spiffe.Identity{token("a"), token("")}, audit.IdentityLost},
		"it is another's":               {[]*spiffe.Identity{token("a"), token("b")}, audit.IdentityChanged},
		"a SPIFFE ID takes over":        {[]*spiffe.Identity{token("a"), late}, ""},
		"the SPIFFE ID that took over":  {[]*spiffe.Identity{token("a"), late, token("a")}, audit.IdentityLost},
		"nobody is nobody for all time": {[]*spiffe.Identity{token(""), token("")}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			var h holder
			var got audit.Reason
			for _, id := range c.identities {
				if lost := h.missing(id); lost != nil {
					got = lost.Reason
				}
			}
			if got != c.want {
				t.Errorf("it is lost as %q, not %q", got, c.want)
			}
		})
	}
}

// Records that were on the way when the identity was lost do not arrive, whatever form the answer has.
func TestAnAnswerInFlightIsFilteredWhenTheIdentityIsLost(t *testing.T) {
	for name, topics := range map[string][]string{"all allowed": {"orders"}, "a part refused": {"orders", "secret"}} {
		t.Run(name, func(t *testing.T) {
			rig := newRig(t, anybody)
			client, broker, ended := rig.serveScripted(t)
			req := fetchRequest(12, 0, -1, topics...)
			client.write(requestFrame(1, req))
			h, _ := broker.request()
			rig.who.become(identified(""), false)
			broker.answer(h, fetchAnswer(12, "orders", batch([]byte("record"))))
			resp := client.response(1, req).(*kmsg.FetchResponse)
			for _, topic := range resp.Topics {
				p := topic.Partitions[0]
				if len(p.RecordBatches) > 0 || p.ErrorCode != kerr.TopicAuthorizationFailed.Code {
					t.Errorf("of %s came %d bytes of records, error %d", topic.Topic, len(p.RecordBatches), p.ErrorCode)
				}
			}
			client.closeWrite()
			broker.closeWrite()
			logEnd(t, ended)
		})
	}
}

func TestTheSameHoldsWhenThePolicyChangesUnderAPartlyRefusedFetch(t *testing.T) {
	rig := newRig(t, anybody)
	client, broker, ended := rig.serveScripted(t)
	req := fetchRequest(12, 0, -1, "orders", "secret")
	client.write(requestFrame(1, req))
	h, _ := broker.request()
	rig.shared.Policy.Store(parsePolicy(t, "apiVersion: klamm/v1\nrules: []\n"))
	broker.answer(h, fetchAnswer(12, "orders", batch([]byte("record"))))
	for _, topic := range client.response(1, req).(*kmsg.FetchResponse).Topics {
		if n := len(topic.Partitions[0].RecordBatches); n > 0 {
			t.Errorf("%d bytes of records of %s came", n, topic.Topic)
		}
	}
	client.closeWrite()
	broker.closeWrite()
	logEnd(t, ended)
}

func TestInObserveModeALostIdentityPassesAndIsOnRecord(t *testing.T) {
	rig := newRig(t, "mode: observe\n"+anybody)
	client, broker, ended := rig.serveScripted(t)
	rig.who.become(identified(""), false)
	if err := wroteAs(t, client, broker, true); err != nil {
		t.Error(err)
	}
	client.closeWrite()
	broker.closeWrite()
	logEnd(t, ended)
	lines := rig.log.find(t, func(l auditLine) bool { return l.API == "Produce" && l.Topic == "orders" })
	if len(lines) != 1 || lines[0].Verdict != string(audit.WouldDeny) {
		t.Errorf("the lines are %+v", lines)
	}
}

// What was asked before a change is told of who asked.
func TestALineIsAboutWhoAskedThen(t *testing.T) {
	rig := newRig(t, anybody)
	client, broker, ended := rig.serveScripted(t)
	req := produceRequest(9, -1, []byte("record"), "orders")
	client.write(requestFrame(1, req))
	h, _ := broker.request()
	rig.who.become(identified("spiffe://example.test/billing"), false)
	broker.answer(h, produceAnswer(req, 1))
	client.response(1, req)
	client.closeWrite()
	broker.closeWrite()
	logEnd(t, ended)
	lines := rig.log.find(t, func(l auditLine) bool { return l.API == "Produce" && l.Topic == "orders" })
	if len(lines) != 1 || lines[0].SPIFFE != "spiffe://example.test/orders" {
		t.Errorf("the lines are %+v", lines)
	}
}

func TestALossThatCannotBePutOnRecordEndsTheConnection(t *testing.T) {
	rig := newRig(t, anybody)
	rig.audit = audit.New(brokenSink{}, "node-1")
	client, _, ended := rig.serveScripted(t)
	rig.who.become(identified(""), false)
	if n := client.drain(); n != 0 {
		t.Errorf("the client got %d bytes", n)
	}
	var refusal *Error
	if err := end(t, ended); !errors.As(err, &refusal) || refusal.Reason != audit.AuditFailed {
		t.Errorf("the session ended with %v", err)
	}
}

// brokenSink takes no line.
type brokenSink struct{}

func (brokenSink) Write([]byte) (int, error) { return 0, net.ErrClosed }
