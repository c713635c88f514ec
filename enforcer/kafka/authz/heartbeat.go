package authz

import "github.com/twmb/franz-go/pkg/kmsg"

// heartbeat: Group Read.
func heartbeat(c *Ctx, req *kmsg.HeartbeatRequest) Verdict {
	if err := c.judgeGroup(req.Group, kmsg.ACLOperationRead); err != nil {
		return Verdict{Answer: Refuse(req, err, "")}
	}
	return Verdict{}
}
