package authz

import (
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// syncGroup: Group Read. From v5 a broker first refuses a request without protocol type or name (KIP-559).
func syncGroup(c *Ctx, req *kmsg.SyncGroupRequest) Verdict {
	if req.Version >= 5 && (req.ProtocolType == nil || req.Protocol == nil) {
		return Verdict{Answer: Refuse(req, kerr.InconsistentGroupProtocol, "")}
	}
	if err := c.judgeGroup(req.Group, kmsg.ACLOperationRead); err != nil {
		return Verdict{Answer: Refuse(req, err, "")}
	}
	return Verdict{}
}
