package kafka

import (
	"bytes"
	"strings"

	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/kafka/wire"
)

// sasl follows a SASL exchange as far as it tells who the client is to the broker. What the client claims counts only
// after the broker's success.
type sasl struct {
	mechanism string
	claimed   string // principal; empty where the mechanism does not show it
	answers   int    // successful SaslAuthenticate answers of this exchange
}

// saslRounds is how many successful answers complete an exchange, by mechanism. Of others no principal is taken.
var saslRounds = map[string]int{"PLAIN": 1, "SCRAM-SHA-256": 2, "SCRAM-SHA-512": 2}

func (s *sasl) handshake(req *kmsg.SASLHandshakeRequest) { *s = sasl{mechanism: req.Mechanism} }

// authenticate reads the client's first message.
func (s *sasl) authenticate(msg []byte) {
	if s.answers > 0 || s.claimed != "" {
		return
	}
	switch {
	case s.mechanism == "PLAIN": // RFC 4616: authzid NUL authcid NUL passwd
		if parts := bytes.Split(msg, []byte{0}); len(parts) == 3 {
			s.claimed = "User:" + string(parts[1])
		}
	case strings.HasPrefix(s.mechanism, "SCRAM-"): // RFC 5802: gs2-header "n=" saslname "," …
		if parts := strings.SplitN(string(msg), ",", 4); len(parts) == 4 && strings.HasPrefix(parts[2], "n=") {
			s.claimed = "User:" + strings.NewReplacer("=2C", ",", "=3D", "=").Replace(parts[2][2:])
		}
	}
}

// loggedIn acts on the broker's answer to SaslAuthenticate. The request loop waits for it, so nothing else looks at the
// exchange meanwhile.
func (s *session) loggedIn(body []byte) {
	c := wire.Cursor{B: body}
	if code := c.I16(); code != 0 || c.Bad {
		return
	}
	s.sasl.answers++
	if s.sasl.claimed == "" || s.sasl.answers != saslRounds[s.sasl.mechanism] {
		return
	}
	s.mu.Lock()
	s.conn.Policy.Principal = s.sasl.claimed
	s.bind(s.conn.Policy, s.Policy.Load())
	s.mu.Unlock()
	s.conn.Subject.Principal = s.sasl.claimed
	s.downTrail.Become(s.conn.Subject)
}
