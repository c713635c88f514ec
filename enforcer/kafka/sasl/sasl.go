// Package sasl reads what SASL clients tell Kafka brokers of who they are. It decides nothing and believes nothing:
// what a client claims counts once the broker has accepted it.
//
// A message is read as Apache Kafka's own servers read it, and refused where they, or another broker, could read it in
// two ways.
package sasl

import (
	"errors"
	"fmt"
)

// ErrMalformed says that a message is not what its mechanism wants. It never tells of the content.
var ErrMalformed = errors.New("the message is not one of the mechanism")

// Claim is what a client says of itself. The zero value is what opaque mechanisms (GSSAPI) show.
type Claim struct {
	Principal string // as Kafka writes it, "User:alice"; empty where the mechanism does not show it
	// Token is that of OAUTHBEARER, in place: a part of the message.
	Token   []byte
	AuthzID string // of OAUTHBEARER: whom the client wants to be; empty: whom the token names
	// DelegationToken is the id of the token (KIP-48) by which a SCRAM client logs in as the token's owner.
	DelegationToken string
	AccessKeyID     string // of AWS_MSK_IAM
	Region          string // of AWS_MSK_IAM
}

// mechanism is one whose messages we can read.
type mechanism struct {
	claim  func(msg []byte) (Claim, error)
	rounds int // successful answers that complete an exchange
}

var mechanisms = map[string]mechanism{
	"PLAIN":         {plain, 1},
	"SCRAM-SHA-256": {scram, 2},
	"SCRAM-SHA-512": {scram, 2},
	oauthBearer:     {bearer, 1},
	"AWS_MSK_IAM":   {mskIAM, 1},
}

const oauthBearer = "OAUTHBEARER"

// Exchange follows one exchange, from the SaslHandshake that names its mechanism.
type Exchange struct {
	Mechanism string

	answers    int  // successful ones
	challenged bool // OAUTHBEARER: the last answer refuses the token (RFC 7628, section 3.2.3)
}

// Opaque tells whether nothing in the exchange can be read, not even its end.
func (x *Exchange) Opaque() bool {
	_, known := mechanisms[x.Mechanism]
	return !known
}

// Client takes a message of the client. The claim is nil where the message makes none.
func (x *Exchange) Client(msg []byte) (*Claim, error) {
	m, known := mechanisms[x.Mechanism]
	switch {
	case !known && x.answers == 0:
		return &Claim{}, nil
	case !known, x.answers > 0 && !x.challenged:
		return nil, nil
	case x.challenged && len(msg) == 1 && msg[0] == 1:
		return nil, nil // the client has seen why, and waits for the end
	}
	claim, err := m.claim(msg)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", x.Mechanism, err)
	}
	x.answers, x.challenged = 0, false
	return &claim, nil
}

// Answered takes the broker's answer to it, one without an error code, and tells whether that is its success.
func (x *Exchange) Answered(msg []byte) (done bool) {
	if x.Mechanism == oauthBearer && (x.challenged || len(msg) > 0) {
		x.answers, x.challenged = 1, true
		return false
	}
	x.answers++
	m, known := mechanisms[x.Mechanism]
	return known && x.answers == m.rounds
}

// Begun tells whether the broker has answered.
func (x *Exchange) Begun() bool { return x.answers > 0 }
