package authz

import (
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// deleteGroups: Group Delete. Refused groups follow the broker's; one that is named twice is answered once.
func deleteGroups(c *Ctx, req *kmsg.DeleteGroupsRequest) Verdict {
	kept, out := sift(once(req.Groups, func(group *string) string { return *group }), func(group *string) *kerr.Error {
		return c.judgeGroup(*group, kmsg.ACLOperationDelete)
	})
	if len(out) == 0 {
		return Verdict{}
	}
	forward, part := *req, *req
	forward.Groups = kept
	var refused []kmsg.DeleteGroupsResponseGroup
	for _, o := range out {
		part.Groups = o.entries
		refused = append(refused, as[*kmsg.DeleteGroupsResponse](Refuse(&part, o.err, "")).Groups...)
	}
	return partly(c, &forward, len(kept), func(_ *Ctx, resp *kmsg.DeleteGroupsResponse) {
		resp.Groups = append(resp.Groups, refused...)
	})
}
