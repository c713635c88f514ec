package authz

import (
	"slices"

	"github.com/twmb/franz-go/pkg/kmsg"
)

// listGroups: Cluster Describe shows all groups; without it, those with Group Describe.
func listGroups(c *Ctx, _ *kmsg.ListGroupsRequest) Verdict {
	if c.Visible(kmsg.ACLResourceTypeCluster, clusterName, kmsg.ACLOperationDescribe) {
		return Verdict{}
	}
	return Verdict{Edit: edit(func(c *Ctx, resp *kmsg.ListGroupsResponse) {
		resp.Groups = slices.DeleteFunc(resp.Groups, func(g kmsg.ListGroupsResponseGroup) bool {
			return !c.Visible(kmsg.ACLResourceTypeGroup, g.Group, kmsg.ACLOperationDescribe)
		})
	})}
}
