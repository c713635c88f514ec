package authz

import (
	"slices"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// describeTransactions: TransactionalId Describe. Of a transaction's topics only those are told that the subject may
// Describe. Transactions are answered in the order asked.
func describeTransactions(c *Ctx, req *kmsg.DescribeTransactionsRequest) Verdict {
	forward := *req
	forward.TransactionalIDs = make([]string, 0, len(req.TransactionalIDs))
	ours := make([]*kmsg.DescribeTransactionsResponseTransactionState, len(req.TransactionalIDs))
	for i, id := range req.TransactionalIDs {
		if c.AllowTxn(id, kmsg.ACLOperationDescribe) {
			forward.TransactionalIDs = append(forward.TransactionalIDs, id)
			continue
		}
		ours[i] = &kmsg.DescribeTransactionsResponseTransactionState{
			ErrorCode: kerr.TransactionalIDAuthorizationFailed.Code, TransactionalID: id,
		}
	}
	merge := func(c *Ctx, resp *kmsg.DescribeTransactionsResponse) {
		for i := range resp.TransactionStates {
			t := &resp.TransactionStates[i]
			t.Topics = slices.DeleteFunc(t.Topics, func(t kmsg.DescribeTransactionsResponseTransactionStateTopic) bool {
				return !c.Visible(kmsg.ACLResourceTypeTopic, t.Topic, kmsg.ACLOperationDescribe)
			})
		}
		resp.TransactionStates = weave(resp.TransactionStates, ours)
	}
	if len(forward.TransactionalIDs) == len(req.TransactionalIDs) {
		return Verdict{Edit: edit(merge)}
	}
	return partly(c, &forward, len(forward.TransactionalIDs), merge)
}
