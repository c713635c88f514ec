package authz

import (
	"maps"

	"github.com/twmb/franz-go/pkg/kmsg"
)

// alterConfigs: AlterConfigs on the topic or group, and on the cluster for brokers and client metrics. The answer has
// the order of the request.
func alterConfigs(c *Ctx, req *kmsg.AlterConfigsRequest) Verdict {
	changes := make([]configChange, len(req.Resources))
	for i, r := range req.Resources {
		changes[i] = configChange{kind: r.ResourceType, name: r.ResourceName}
		for _, s := range r.Configs {
			changes[i].add(s.Name, s.Value, true)
		}
	}
	forward := *req
	forward.Resources = make([]kmsg.AlterConfigsRequestResource, 0, len(req.Resources))
	ours := make([]*kmsg.AlterConfigsResponseResource, len(req.Resources))
	for i, refusal := range c.refuseChanges(changes, alterConfigsRights) {
		if r := req.Resources[i]; refusal == nil {
			forward.Resources = append(forward.Resources, r)
		} else {
			ours[i] = &kmsg.AlterConfigsResponseResource{ErrorCode: refusal.err.Code, ErrorMessage: refusal.msg,
				ResourceType: r.ResourceType, ResourceName: r.ResourceName}
		}
	}
	if len(forward.Resources) == len(req.Resources) {
		return Verdict{}
	}
	return partly(c, &forward, len(forward.Resources), func(_ *Ctx, resp *kmsg.AlterConfigsResponse) {
		resp.Resources = weave(resp.Resources, ours)
	})
}

// alterConfigsRights: log levels can only be altered incrementally (KIP-412).
var alterConfigsRights = func() map[kmsg.ConfigResourceType]configRight {
	rights := maps.Clone(configRights)
	delete(rights, kmsg.ConfigResourceTypeBrokerLogger)
	return rights
}()
