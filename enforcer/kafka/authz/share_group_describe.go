package authz

import (
	"slices"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// shareGroupDescribe (KIP-932): Group Describe. Refused groups come before the broker's. A group with an assigned topic
// the subject may not describe is replaced by the error alone.
func shareGroupDescribe(c *Ctx, req *kmsg.ShareGroupDescribeRequest) Verdict {
	kept, out := sift(req.GroupIDs, func(group *string) *kerr.Error {
		return c.judgeGroup(*group, kmsg.ACLOperationDescribe)
	})
	forward, part := *req, *req
	forward.GroupIDs = kept
	var refused []kmsg.ShareGroupDescribeResponseGroup
	for _, o := range out {
		part.GroupIDs = o.entries
		refused = append(refused, as[*kmsg.ShareGroupDescribeResponse](Refuse(&part, o.err, "")).Groups...)
	}
	merge := func(c *Ctx, resp *kmsg.ShareGroupDescribeResponse) {
		described := make(map[string]bool)
		for i := range resp.Groups {
			group := &resp.Groups[i]
			if !c.describesShared(group, described) {
				part.GroupIDs = []string{group.GroupID}
				*group = as[*kmsg.ShareGroupDescribeResponse](
					Refuse(&part, kerr.TopicAuthorizationFailed, groupHasHiddenTopics)).Groups[0]
			}
			c.limitGroupOperations(group.GroupID, &group.AuthorizedOperations)
		}
		resp.Groups = slices.Concat(refused, resp.Groups)
	}
	if len(out) > 0 {
		return partly(c, &forward, len(kept), merge)
	}
	return Verdict{Edit: edit(merge)}
}

// describesShared is describesAssigned for a share group.
func (c *Ctx) describesShared(group *kmsg.ShareGroupDescribeResponseGroup, decided map[string]bool) bool {
	all := true
	for _, m := range group.Members {
		for _, t := range m.Assignment.TopicPartitions {
			all = c.describesOnce(t.Topic, decided) && all
		}
	}
	return all
}
