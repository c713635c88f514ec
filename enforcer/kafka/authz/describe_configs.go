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
	type resource = kmsg.DescribeConfigsRequestResource
	forward, part := *req, *req
	forward.Resources = make([]resource, 0, len(req.Resources))
	var refused []kmsg.DescribeConfigsResponseResource
	for _, r := range req.Resources {
		right := configRights[r.ResourceType]
		if c.allowConfig(right, r.ResourceName, kmsg.ACLOperationDescribeConfigs) {
			forward.Resources = append(forward.Resources, r)
			continue
		}
		part.Resources = []resource{r}
		refused = append(refused, as[*kmsg.DescribeConfigsResponse](Refuse(&part, right.err, right.msg)).Resources...)
	}
	if refused == nil {
		return Verdict{}
	}
	return partly(c, &forward, len(forward.Resources), func(_ *Ctx, resp *kmsg.DescribeConfigsResponse) {
		resp.Resources = append(resp.Resources, refused...)
	})
}
