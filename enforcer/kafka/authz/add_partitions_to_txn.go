package authz

import (
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// addPartitionsToTxn: TransactionalId Write and Topic Write. It is all or nothing: when one topic is refused, the
// others get OPERATION_NOT_ATTEMPTED and the transaction stays as it was. Versions 4 and up are for brokers alone.
func addPartitionsToTxn(c *Ctx, req *kmsg.AddPartitionsToTxnRequest) Verdict {
	if !c.AllowTxn(req.TransactionalID, kmsg.ACLOperationWrite) {
		return Verdict{Answer: Refuse(req, kerr.TransactionalIDAuthorizationFailed, "")}
	}
	anyRefused := false
	refused := make([]bool, len(req.Topics))
	for i := range req.Topics {
		refused[i] = !c.AllowTopic(req.Topics[i].Topic, kmsg.ACLOperationWrite)
		anyRefused = anyRefused || refused[i]
	}
	if !anyRefused {
		return Verdict{}
	}
	answer := as[*kmsg.AddPartitionsToTxnResponse](Refuse(req, kerr.OperationNotAttempted, ""))
	for i := range answer.Topics {
		for j := range answer.Topics[i].Partitions {
			if refused[i] {
				answer.Topics[i].Partitions[j].ErrorCode = kerr.TopicAuthorizationFailed.Code
			}
		}
	}
	return Verdict{Answer: answer}
}
