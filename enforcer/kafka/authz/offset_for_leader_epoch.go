package authz

import (
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// offsetForLeaderEpoch: Topic Describe, or Cluster ClusterAction for all (replicas ask too). Refused topics follow the
// broker's, with the error on each partition.
func offsetForLeaderEpoch(c *Ctx, req *kmsg.OffsetForLeaderEpochRequest) Verdict {
	// A right that is only there to observe would hide what the topics' own rules refuse.
	d := c.View.Decide(kmsg.ACLResourceTypeCluster, clusterName, kmsg.ACLOperationClusterAction)
	if d.Allowed && !d.WouldDeny {
		return Verdict{}
	}
	kept, out := sift(req.Topics, func(t *kmsg.OffsetForLeaderEpochRequestTopic) *kerr.Error {
		return c.judgeTopic(false, t.Topic, TopicID{}, kmsg.ACLOperationDescribe)
	})
	if len(out) == 0 {
		return Verdict{}
	}
	forward, part := *req, *req
	forward.Topics = kept
	var refused []kmsg.OffsetForLeaderEpochResponseTopic
	for _, o := range out {
		part.Topics = o.entries
		refused = append(refused, as[*kmsg.OffsetForLeaderEpochResponse](Refuse(&part, o.err, "")).Topics...)
	}
	return partly(c, &forward, len(kept), func(_ *Ctx, resp *kmsg.OffsetForLeaderEpochResponse) {
		resp.Topics = append(resp.Topics, refused...)
	})
}
