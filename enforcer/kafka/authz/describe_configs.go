package authz

import (
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// describeConfigs: DescribeConfigs on the topic or group, and on the cluster for brokers, their loggers and client
// metrics. A resource type Kafka does not know refuses the whole request.
func describeConfigs(c *Ctx, req *kmsg.DescribeConfigsRequest) Verdict {
	for i := range req.Resources {
		if _, known := configRights[req.Resources[i].ResourceType]; !known {
			return Verdict{Answer: Refuse(req, kerr.InvalidRequest, invalidRequest)}
		}
	}
	kept, out := sift(req.Resources, func(r *kmsg.DescribeConfigsRequestResource) *kerr.Error {
		right := configRights[r.ResourceType]
		if !c.allowConfig(right, r.ResourceName, kmsg.ACLOperationDescribeConfigs) {
			return right.err
		}
		return nil
	})
	if len(out) == 0 {
		return Verdict{}
	}
	forward, part := *req, *req
	forward.Resources = kept
	var refused []kmsg.DescribeConfigsResponseResource
	for _, o := range out {
		part.Resources = o.entries
		msg := configRights[o.entries[0].ResourceType].msg
		refused = append(refused, as[*kmsg.DescribeConfigsResponse](Refuse(&part, o.err, msg)).Resources...)
	}
	return partly(c, &forward, len(kept), func(_ *Ctx, resp *kmsg.DescribeConfigsResponse) {
		resp.Resources = append(resp.Resources, refused...)
	})
}
