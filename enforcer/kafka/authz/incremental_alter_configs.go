package authz

import "github.com/twmb/franz-go/pkg/kmsg"

// incrementalAlterConfigs: AlterConfigs on the topic or group, and on the cluster for brokers, their log levels and
// client metrics. The answer has the order of the request.
func incrementalAlterConfigs(c *Ctx, req *kmsg.IncrementalAlterConfigsRequest) Verdict {
	changes := make([]configChange, len(req.Resources))
	for i, r := range req.Resources {
		changes[i] = configChange{kind: r.ResourceType, name: r.ResourceName}
		for _, s := range r.Configs {
			changes[i].add(s.Name, s.Value, s.Op != kmsg.IncrementalAlterConfigOpDelete)
		}
	}
	forward := *req
	forward.Resources = make([]kmsg.IncrementalAlterConfigsRequestResource, 0, len(req.Resources))
	ours := make([]*kmsg.IncrementalAlterConfigsResponseResource, len(req.Resources))
	for i, refusal := range c.refuseChanges(changes, configRights) {
		if r := req.Resources[i]; refusal == nil {
			forward.Resources = append(forward.Resources, r)
		} else {
			ours[i] = &kmsg.IncrementalAlterConfigsResponseResource{ErrorCode: refusal.err.Code,
				ErrorMessage: refusal.msg, ResourceType: r.ResourceType, ResourceName: r.ResourceName}
		}
	}
	if len(forward.Resources) == len(req.Resources) {
		return Verdict{}
	}
	return partly(c, &forward, len(forward.Resources), func(_ *Ctx, resp *kmsg.IncrementalAlterConfigsResponse) {
		resp.Resources = weave(resp.Resources, ours)
	})
}
