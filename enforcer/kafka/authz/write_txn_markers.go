package authz

import (
	"slices"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// writeTxnMarkers: Cluster Alter or ClusterAction (KIP-664: to abort a transaction that hangs). The refusal has each
// producer once, with the topics of its last marker.
func writeTxnMarkers(c *Ctx, req *kmsg.WriteTxnMarkersRequest) Verdict {
	if c.either(c.check(kmsg.ACLResourceTypeCluster, clusterName, kmsg.ACLOperationAlter),
		c.check(kmsg.ACLResourceTypeCluster, clusterName, kmsg.ACLOperationClusterAction)) {
		return Verdict{}
	}
	type (
		marker    = kmsg.WriteTxnMarkersResponseMarker
		topic     = kmsg.WriteTxnMarkersResponseMarkerTopic
		partition = kmsg.WriteTxnMarkersResponseMarkerTopicPartition
	)
	answer := as[*kmsg.WriteTxnMarkersResponse](Refuse(req, kerr.ClusterAuthorizationFailed, ""))
	answer.Markers = fold(answer.Markers, func(m *marker) int64 { return m.ProducerID },
		func(first, other *marker) { *first = *other })
	for i := range answer.Markers {
		m := &answer.Markers[i]
		m.Topics = fold(m.Topics, func(t *topic) string { return t.Topic },
			func(first, other *topic) { first.Partitions = append(first.Partitions, other.Partitions...) })
		for j := range m.Topics {
			m.Topics[j].Partitions = fold(m.Topics[j].Partitions, func(p *partition) int32 { return p.Partition },
				func(_, _ *partition) {})
		}
		m.Topics = slices.DeleteFunc(m.Topics, func(t topic) bool { return len(t.Partitions) == 0 })
	}
	return Verdict{Answer: answer}
}
