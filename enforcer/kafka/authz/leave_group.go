package authz

import "github.com/twmb/franz-go/pkg/kmsg"

// leaveGroup: Group Read. The refusal names no members, in the versions with several (v3+, KIP-345) as well.
func leaveGroup(c *Ctx, req *kmsg.LeaveGroupRequest) Verdict {
	if err := c.judgeGroup(req.Group, kmsg.ACLOperationRead); err != nil {
		return Verdict{Answer: Refuse(req, err, "")}
	}
	return Verdict{}
}
