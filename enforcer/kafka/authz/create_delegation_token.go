package authz

import (
	"strings"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// createDelegationToken: nothing for a token of one's own, User CreateTokens for another's (KIP-373). Who logs in with
// a token is its owner (KIP-48), so only a client that logged in itself may ask for one.
func createDelegationToken(c *Ctx, req *kmsg.CreateDelegationTokenRequest) Verdict {
	requester, owner := principalOf(c.Principal), principalOf(c.Principal)
	if c.Principal == "" {
		requester, owner = anonymous, anonymous
	}
	if name := req.OwnerPrincipalName; name != nil && *name != "" {
		owner = principal{name: *name}
		if req.OwnerPrincipalType != nil {
			owner.kind = *req.OwnerPrincipalType
		}
	}
	var err *kerr.Error
	switch {
	case !c.ownLogin(kmsg.ACLOperationCreate):
		err = kerr.DelegationTokenRequestNotAllowed
	case owner != requester && !c.Allow(kmsg.ACLResourceTypeUser, owner.String(), kmsg.ACLOperationCreateTokens):
		err = kerr.DelegationTokenAuthorizationFailed
	default:
		return Verdict{}
	}
	answer := as[*kmsg.CreateDelegationTokenResponse](Refuse(req, err, ""))
	answer.PrincipalType, answer.PrincipalName = owner.kind, owner.name
	answer.TokenRequesterPrincipalType, answer.TokenRequesterPrincipalName = requester.kind, requester.name
	answer.IssueTimestamp, answer.ExpiryTimestamp, answer.MaxTimestamp = -1, -1, -1
	return Verdict{Answer: answer}
}

// ownLogin tells whether the client logged in itself. That it did not is on record as a refusal.
func (c *Ctx) ownLogin(op kmsg.ACLOperation) bool {
	if c.Principal == "" {
		c.Checks = append(c.Checks, Check{Type: kmsg.ACLResourceTypeDelegationToken, Operation: op})
	}
	return c.Principal != ""
}

// principal is Kafka's KafkaPrincipal.
type principal struct{ kind, name string }

// anonymous is KafkaPrincipal.ANONYMOUS.
var anonymous = principal{"User", "ANONYMOUS"}

// principalOf takes "User:alice" apart.
func principalOf(text string) principal {
	kind, name, _ := strings.Cut(text, ":")
	return principal{kind, name}
}

func (p principal) String() string { return p.kind + ":" + p.name }
