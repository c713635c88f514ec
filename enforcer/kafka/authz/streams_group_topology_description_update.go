package authz

import "github.com/twmb/franz-go/pkg/kmsg"

// streamsGroupTopologyDescriptionUpdate: Group Read. What a member describes is its own program, for people to read:
// Kafka looks at none of the topics in it.
func streamsGroupTopologyDescriptionUpdate(c *Ctx, req *kmsg.StreamsGroupTopologyDescriptionUpdateRequest) Verdict {
	if err := c.judgeGroup(req.Group, kmsg.ACLOperationRead); err != nil {
		return Verdict{Answer: Refuse(req, err, "")}
	}
	return Verdict{}
}
