package kafka

import (
	"testing"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// Who logs in with a delegation token is its owner. What the broker makes a token for must be the client's own
// principal, never the node's, by which the broker knows connections whose clients have not logged in.
func TestDelegationTokensAreForClientsThatLoggedInThemselves(t *testing.T) {
	const all = byLogin + `  - {name: all users, principals: ["*"], allow: [{user: "*", operations: [All]}]}
`
	plain := []said{{msg: "\x00alice\x00wonder"}}
	ticket := []said{{msg: "\x60ticket"}, {msg: ""}, {msg: "choice"}}
	for what, c := range map[string]struct {
		mechanism string
		login     []said
		afterward string // a policy that comes into force after the login
		made      bool
	}{
		"no login":                          {},
		"a login the broker refused":        {mechanism: "PLAIN", login: []said{{msg: plain[0].msg, code: 58}}},
		"a login that shows no principal":   {mechanism: "GSSAPI", login: ticket},
		"a login with a delegation token":   {mechanism: "SCRAM-SHA-256", login: tokenLogin},
		"a login":                           {mechanism: "PLAIN", login: plain, made: true},
		"a login that is not allowed again": {mechanism: "PLAIN", login: plain, afterward: onlyBob},
	} {
		t.Run(what, func(t *testing.T) {
			rig := newRig(t, all)
			client, broker, ended := rig.serveScripted(t)
			if c.mechanism != "" {
				logIn(t, client, broker, c.mechanism, c.login...)
			}
			if c.afterward != "" {
				rig.shared.Policy.Store(parsePolicy(t, all+c.afterward))
			}
			req := kmsg.NewPtrCreateDelegationTokenRequest()
			req.Version = 3
			client.write(requestFrame(7, req))
			if c.made {
				h, got := broker.request()
				broker.answer(h, got.ResponseKind())
			}
			resp := client.response(7, req).(*kmsg.CreateDelegationTokenResponse)
			if made := resp.ErrorCode == 0; made != c.made {
				t.Errorf("the answer is %d", resp.ErrorCode)
			}
			if !c.made && resp.ErrorCode != kerr.DelegationTokenRequestNotAllowed.Code {
				t.Errorf("it is refused with %d", resp.ErrorCode)
			}
			client.closeWrite()
			if n := broker.drain(); n != 0 {
				t.Errorf("the broker gets %d bytes more", n)
			}
			broker.closeWrite()
			logEnd(t, ended)
		})
	}
}

const onlyBob = "connections: [{name: c, principals: ['*'], sasl: ['User:bob']}]"

// tokenLogin is by the id and the secret of a token (KIP-48).
var tokenLogin = []said{
	{msg: "n,,n=token-id,r=nonce,tokenauth=true", answer: scramServer}, {msg: scramFinal, answer: "v="},
}
