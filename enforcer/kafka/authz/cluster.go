package authz

import (
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// onCluster is the verdict on a request that one operation on the cluster opens, or refuses, as a whole. Where a broker
// says why, it shows the request as its Java object, addresses and all; msg stands for that.
func (c *Ctx) onCluster(req kmsg.Request, op kmsg.ACLOperation, msg string) Verdict {
	if c.AllowCluster(op) {
		return Verdict{}
	}
	return Verdict{Answer: Refuse(req, kerr.ClusterAuthorizationFailed, msg)}
}
