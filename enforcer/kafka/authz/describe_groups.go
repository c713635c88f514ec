package authz

import (
	"slices"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// describeGroups: Group Describe. Refused groups come before the broker's. The authorized operations (v3+, KIP-430)
// are those the broker and the policy both allow.
func describeGroups(c *Ctx, req *kmsg.DescribeGroupsRequest) Verdict {
	kept, out := sift(req.Groups, func(group *string) *kerr.Error {
		return c.judgeGroup(*group, kmsg.ACLOperationDescribe)
	})
	forward, part := *req, *req
	forward.Groups = kept
	var refused []kmsg.DescribeGroupsResponseGroup
	for _, o := range out {
		part.Groups = o.entries
		refused = append(refused, as[*kmsg.DescribeGroupsResponse](Refuse(&part, o.err, "")).Groups...)
	}
	merge := func(c *Ctx, resp *kmsg.DescribeGroupsResponse) {
		for i := range resp.Groups {
			c.limitGroupOperations(resp.Groups[i].Group, &resp.Groups[i].AuthorizedOperations)
		}
		resp.Groups = slices.Concat(refused, resp.Groups)
	}
	switch {
	case len(out) > 0:
		return partly(c, &forward, len(kept), merge)
	case req.IncludeAuthorizedOperations:
		return Verdict{Edit: edit(merge)}
	default:
		return Verdict{}
	}
}

// limitGroupOperations takes from a group's authorized operations what the policy refuses.
func (c *Ctx) limitGroupOperations(group string, bits *int32) {
	if *bits != noOperations {
		*bits &= c.Operations(kmsg.ACLResourceTypeGroup, group)
	}
}
