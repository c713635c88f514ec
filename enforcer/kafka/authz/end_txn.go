package authz

import (
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// endTxn: TransactionalId Write, for commit and abort alike.
func endTxn(c *Ctx, req *kmsg.EndTxnRequest) Verdict {
	if !c.AllowTxn(req.TransactionalID, kmsg.ACLOperationWrite) {
		return Verdict{Answer: Refuse(req, kerr.TransactionalIDAuthorizationFailed, "")}
	}
	return Verdict{}
}
