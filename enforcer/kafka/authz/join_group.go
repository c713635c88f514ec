package authz

import "github.com/twmb/franz-go/pkg/kmsg"

// joinGroup: Group Read.
func joinGroup(c *Ctx, req *kmsg.JoinGroupRequest) Verdict {
	if err := c.judgeGroup(req.Group, kmsg.ACLOperationRead); err != nil {
		return Verdict{Answer: Refuse(req, err, "")}
	}
	return Verdict{}
}
