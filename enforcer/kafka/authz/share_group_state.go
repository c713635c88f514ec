package authz

import (
	"github.com/twmb/franz-go/pkg/kmsg"
)

// The five requests a broker sends to the share coordinator (KIP-932: InitializeShareGroupState, ReadShareGroupState,
// WriteShareGroupState, DeleteShareGroupState, ReadShareGroupStateSummary): Cluster ClusterAction, and all or nothing.
// They are in one file because a broker treats them all alike.
func shareGroupState(c *Ctx, req kmsg.Request) Verdict {
	return c.onCluster(req, kmsg.ACLOperationClusterAction, clusterAuthorizationFailed)
}
