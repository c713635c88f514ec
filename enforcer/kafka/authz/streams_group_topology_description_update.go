package authz

import (
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// streamsGroupTopologyDescriptionUpdate: Group Read. What a member describes is its own program, for people to read:
// Kafka looks at none of the topics in it.
func streamsGroupTopologyDescriptionUpdate(c *Ctx, req *kmsg.StreamsGroupTopologyDescriptionUpdateRequest) Verdict {
	if !c.AllowGroup(req.Group, kmsg.ACLOperationRead) {
		return Verdict{Answer: Refuse(req, kerr.GroupAuthorizationFailed, "")}
	}
	return Verdict{}
}
