package authz

import (
	"slices"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// streamsGroupDescribe (KIP-1071): Group Describe. Refused groups come before the broker's. A group whose topology has
// a topic the subject may not describe is replaced by the error alone.
func streamsGroupDescribe(c *Ctx, req *kmsg.StreamsGroupDescribeRequest) Verdict {
	kept, out := sift(req.Groups, func(group *string) *kerr.Error {
		return c.judgeGroup(*group, kmsg.ACLOperationDescribe)
	})
	forward, part := *req, *req
	forward.Groups = kept
	var refused []kmsg.StreamsGroupDescribeResponseGroup
	for _, o := range out {
		part.Groups = o.entries
		refused = append(refused, as[*kmsg.StreamsGroupDescribeResponse](Refuse(&part, o.err, "")).Groups...)
	}
	merge := func(c *Ctx, resp *kmsg.StreamsGroupDescribeResponse) {
		described := make(map[string]bool)
		for i := range resp.Groups {
			group := &resp.Groups[i]
			if !c.describesTopology(group.Topology, described) {
				part.Groups = []string{group.Group}
				*group = as[*kmsg.StreamsGroupDescribeResponse](
					Refuse(&part, kerr.TopicAuthorizationFailed, topologyHasHiddenTopics)).Groups[0]
			}
			c.limitGroupOperations(group.Group, &group.AuthorizedOperations)
		}
		resp.Groups = slices.Concat(refused, resp.Groups)
	}
	if len(out) > 0 {
		return partly(c, &forward, len(kept), merge)
	}
	return Verdict{Edit: edit(merge)}
}

const topologyHasHiddenTopics = "The described group uses topics that the client is not authorized to describe."

// describesTopology tells whether the subject may describe every topic of the topology.
func (c *Ctx) describesTopology(t *kmsg.StreamsGroupDescribeResponseGroupTopology, decided map[string]bool) bool {
	all := true
	for i := 0; t != nil && i < len(t.Subtopologies); i++ {
		s := &t.Subtopologies[i]
		for _, topic := range slices.Concat(s.SourceTopics, s.RepartitionSinkTopics, namesOf(s.RepartitionSourceTopics),
			namesOf(s.StateChangelogTopics)) {
			all = c.describesOnce(topic, decided) && all
		}
	}
	return all
}

// namesOf are the names of internal topics of a topology.
func namesOf(topics []kmsg.TopicInfo) []string {
	names := make([]string, 0, len(topics))
	for i := range topics {
		names = append(names, topics[i].Topic)
	}
	return names
}
