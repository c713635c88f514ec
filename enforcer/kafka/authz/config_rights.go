package authz

import (
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// configRight is the resource whose DescribeConfigs and AlterConfigs open a kind of config, and the refusal.
type configRight struct {
	resource kmsg.ACLResourceType
	err      *kerr.Error
	msg      string
}

var (
	configOfTopic   = configRight{kmsg.ACLResourceTypeTopic, kerr.TopicAuthorizationFailed, topicAuthorizationFailed}
	configOfGroup   = configRight{kmsg.ACLResourceTypeGroup, kerr.GroupAuthorizationFailed, groupAuthorizationFailed}
	configOfCluster = configRight{kmsg.ACLResourceTypeCluster, kerr.ClusterAuthorizationFailed, clusterAuthorizationFailed}
)

// configRights: the numbers of config resources are not those of ACL resources.
var configRights = map[kmsg.ConfigResourceType]configRight{
	kmsg.ConfigResourceTypeTopic:         configOfTopic,
	kmsg.ConfigResourceTypeGroupConfig:   configOfGroup,
	kmsg.ConfigResourceTypeBroker:        configOfCluster,
	kmsg.ConfigResourceTypeBrokerLogger:  configOfCluster,
	kmsg.ConfigResourceTypeClientMetrics: configOfCluster,
}

// allowConfig decides and records op on a config resource.
func (c *Ctx) allowConfig(right configRight, name string, op kmsg.ACLOperation) bool {
	if right.resource == kmsg.ACLResourceTypeCluster {
		name = clusterName
	}
	return c.Allow(right.resource, name, op)
}
