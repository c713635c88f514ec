package kafka

import (
	"context"
	"fmt"
	"time"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
	"github.com/twmb/franz-go/pkg/sasl/plain"
)

// Admin returns a client that logs in as the super user [Admin]. The caller closes it.
func (c *Cluster) Admin(opts ...kgo.Opt) (*kgo.Client, error) {
	login := plain.Auth{User: Admin, Pass: AdminPassword}.AsMechanism()
	client, err := kgo.NewClient(append(opts, kgo.SeedBrokers(c.SASLAddrs()...), kgo.SASL(login))...)
	if err != nil {
		return nil, fmt.Errorf("make an admin client: %w", err)
	}
	return client, nil
}

// CreateTopic creates a topic, replicated to up to three brokers, as [Admin]. It returns when every running broker
// knows the topic.
func (c *Cluster) CreateTopic(ctx context.Context, name string, partitions int32) error {
	topic := kmsg.NewCreateTopicsRequestTopic()
	topic.Topic, topic.NumPartitions, topic.ReplicationFactor = name, partitions, -1
	create := kmsg.NewPtrCreateTopicsRequest()
	create.Topics = append(create.Topics, topic)
	create.TimeoutMillis = 30_000
	described := kmsg.NewPtrMetadataRequest()
	described.Topics = []kmsg.MetadataRequestTopic{{Topic: &name}}
	err := c.change(ctx, create, described, func(answer kmsg.Response) (bool, error) {
		switch answer := answer.(type) {
		case *kmsg.CreateTopicsResponse:
			return true, kerr.ErrorForCode(answer.Topics[0].ErrorCode)
		case *kmsg.MetadataResponse:
			return answer.Topics[0].ErrorCode == 0 && len(answer.Topics[0].Partitions) == int(partitions), nil
		}
		return false, nil
	})
	if err != nil {
		return fmt.Errorf("create topic %s: %w", name, err)
	}
	return nil
}

// Allow adds an ACL for a principal, from any host, on the resource of exactly this name, as [Admin]. It returns when
// every running broker obeys it.
func (c *Cluster) Allow(
	ctx context.Context, principal string, resource kmsg.ACLResourceType, name string, operation kmsg.ACLOperation,
) error {
	anyHost := "*"
	acl := kmsg.NewCreateACLsRequestCreation()
	acl.ResourceType, acl.ResourceName, acl.ResourcePatternType = resource, name, kmsg.ACLResourcePatternTypeLiteral
	acl.Principal, acl.Host = principal, anyHost
	acl.Operation, acl.PermissionType = operation, kmsg.ACLPermissionTypeAllow
	create := kmsg.NewPtrCreateACLsRequest()
	create.Creations = append(create.Creations, acl)
	described := kmsg.NewPtrDescribeACLsRequest()
	described.ResourceType, described.ResourceName = resource, &name
	described.ResourcePatternType = kmsg.ACLResourcePatternTypeLiteral
	described.Principal, described.Host = &principal, &anyHost
	described.Operation, described.PermissionType = operation, kmsg.ACLPermissionTypeAllow
	err := c.change(ctx, create, described, func(answer kmsg.Response) (bool, error) {
		switch answer := answer.(type) {
		case *kmsg.CreateACLsResponse:
			return true, kerr.ErrorForCode(answer.Results[0].ErrorCode)
		case *kmsg.DescribeACLsResponse:
			return len(answer.Resources) > 0, kerr.ErrorForCode(answer.ErrorCode)
		}
		return false, nil
	})
	if err != nil {
		return fmt.Errorf("allow %s %v on %s: %w", principal, operation, name, err)
	}
	return nil
}

// change sends a request that changes the cluster's metadata and then repeats one that describes the change until
// every running broker has it: brokers learn from the controller each in its own time.
func (c *Cluster) change(
	ctx context.Context, request, described kmsg.Request, accepted func(kmsg.Response) (bool, error),
) error {
	admin, err := c.Admin()
	if err != nil {
		return err
	}
	defer admin.Close()
	answer, err := admin.Request(ctx, request)
	if err != nil {
		return err
	}
	if _, err := accepted(answer); err != nil {
		return err
	}
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for i, b := range c.brokers {
		for b.cmd != nil {
			answer, err := admin.SeedBrokers()[i].Request(ctx, described)
			if err != nil {
				return fmt.Errorf("ask broker %d: %w", b.id, err)
			}
			if done, err := accepted(answer); err != nil {
				return fmt.Errorf("ask broker %d: %w", b.id, err)
			} else if done {
				break
			}
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-tick.C:
			}
		}
	}
	return nil
}
