package authz

import (
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// addOffsetsToTxn: TransactionalId Write, then Group Read.
func addOffsetsToTxn(c *Ctx, req *kmsg.AddOffsetsToTxnRequest) Verdict {
	switch {
	case !c.AllowTxn(req.TransactionalID, kmsg.ACLOperationWrite):
		return Verdict{Answer: Refuse(req, kerr.TransactionalIDAuthorizationFailed, "")}
	case !c.AllowGroup(req.Group, kmsg.ACLOperationRead):
		return Verdict{Answer: Refuse(req, kerr.GroupAuthorizationFailed, "")}
	default:
		return Verdict{}
	}
}
