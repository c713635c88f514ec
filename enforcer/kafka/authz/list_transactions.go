package authz

import (
	"slices"

	"github.com/twmb/franz-go/pkg/kmsg"
)

// listTransactions shows the transactions whose id the subject may Describe.
func listTransactions(*Ctx, *kmsg.ListTransactionsRequest) Verdict {
	return Verdict{Edit: edit(func(c *Ctx, resp *kmsg.ListTransactionsResponse) {
		resp.TransactionStates = slices.DeleteFunc(resp.TransactionStates,
			func(t kmsg.ListTransactionsResponseTransactionState) bool {
				return !c.Visible(kmsg.ACLResourceTypeTransactionalId, t.TransactionalID, kmsg.ACLOperationDescribe)
			})
	})}
}
