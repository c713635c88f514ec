package authz

import (
	"math"

	"github.com/twmb/franz-go/pkg/kmsg"
)

// noOperations is the authorized-operations field of an answer that was not asked for it (KIP-430).
const noOperations = math.MinInt32

// limitTopicOperations takes from a topic's authorized operations what the policy refuses.
func (c *Ctx) limitTopicOperations(topic *string, bits *int32) {
	if topic != nil && *bits != noOperations {
		*bits &= c.Operations(kmsg.ACLResourceTypeTopic, *topic)
	}
}

// limitClusterOperations does so for the cluster. Without Cluster Describe there are none.
func (c *Ctx) limitClusterOperations(bits *int32) {
	switch {
	case *bits == noOperations:
	case c.Visible(kmsg.ACLResourceTypeCluster, clusterName, kmsg.ACLOperationDescribe):
		*bits &= c.Operations(kmsg.ACLResourceTypeCluster, clusterName)
	default:
		*bits = 0
	}
}
