package authz

import (
	"slices"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// txnOffsetCommit: TransactionalId Write, Group Read, and Topic Read per topic, which version 6 names by id (KIP-1319).
func txnOffsetCommit(c *Ctx, req *kmsg.TxnOffsetCommitRequest) Verdict {
	switch {
	case !c.AllowTxn(req.TransactionalID, kmsg.ACLOperationWrite):
		return Verdict{Answer: Refuse(req, kerr.TransactionalIDAuthorizationFailed, "")}
	case !c.AllowGroup(req.Group, kmsg.ACLOperationRead):
		return Verdict{Answer: Refuse(req, kerr.GroupAuthorizationFailed, "")}
	}
	kept, out := sift(req.Topics, func(t *kmsg.TxnOffsetCommitRequestTopic) *kerr.Error {
		return c.judgeTopic(req.Version >= 6, t.Topic, t.TopicID, kmsg.ACLOperationRead)
	})
	if len(out) == 0 {
		return Verdict{}
	}
	forward, part := *req, *req
	forward.Topics = kept
	var refused []kmsg.TxnOffsetCommitResponseTopic
	for _, o := range out {
		part.Topics = o.entries
		refused = append(refused, as[*kmsg.TxnOffsetCommitResponse](Refuse(&part, o.err, "")).Topics...)
	}
	return partly(c, &forward, len(kept), func(_ *Ctx, resp *kmsg.TxnOffsetCommitResponse) {
		resp.Topics = slices.Concat(refused, resp.Topics)
	})
}
