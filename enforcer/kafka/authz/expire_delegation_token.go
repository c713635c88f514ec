package authz

import (
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// expireDelegationToken: nothing. The broker lets the owner of the token and its renewers, whom it knows by their
// principals, so only a client that logged in itself may ask.
func expireDelegationToken(c *Ctx, req *kmsg.ExpireDelegationTokenRequest) Verdict {
	if c.ownLogin(kmsg.ACLOperationAlter) {
		return Verdict{}
	}
	answer := as[*kmsg.ExpireDelegationTokenResponse](Refuse(req, kerr.DelegationTokenRequestNotAllowed, ""))
	answer.ExpiryTimestamp = -1
	return Verdict{Answer: answer}
}
