package authz

import (
	"slices"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// describeDelegationToken: nothing for tokens that are the client's own, that it asked for or may renew; else
// DelegationToken Describe, or User DescribeTokens on the owner (KIP-373). The answer has the secrets of the tokens, so
// what it may not see is left out, and only a client that logged in itself may ask. Until version 3 the answer does not
// tell who asked for a token, and who is neither its owner nor a renewer has to have a right.
func describeDelegationToken(c *Ctx, req *kmsg.DescribeDelegationTokenRequest) Verdict {
	if !c.ownLogin(kmsg.ACLOperationDescribe) {
		return Verdict{Answer: Refuse(req, kerr.DelegationTokenRequestNotAllowed, "")}
	}
	return Verdict{Edit: edit(func(c *Ctx, resp *kmsg.DescribeDelegationTokenResponse) {
		resp.TokenDetails = slices.DeleteFunc(resp.TokenDetails,
			func(t kmsg.DescribeDelegationTokenResponseTokenDetail) bool { return !c.seesToken(&t) })
	})}
}

// seesToken is Kafka's DelegationTokenManager.filterToken, without the owners asked for, which the broker has obeyed.
func (c *Ctx) seesToken(t *kmsg.DescribeDelegationTokenResponseTokenDetail) bool {
	own, owner := principalOf(c.Principal), principal{t.PrincipalType, t.PrincipalName}
	return owner == own || own == principal{t.TokenRequesterPrincipalType, t.TokenRequesterPrincipalName} ||
		slices.ContainsFunc(t.Renewers, func(r kmsg.DescribeDelegationTokenResponseTokenDetailRenewer) bool {
			return own == principal{r.PrincipalType, r.PrincipalName}
		}) ||
		c.reveals(kmsg.ACLResourceTypeDelegationToken, t.TokenID, kmsg.ACLOperationDescribe) ||
		c.reveals(kmsg.ACLResourceTypeUser, owner.String(), kmsg.ACLOperationDescribeTokens)
}
