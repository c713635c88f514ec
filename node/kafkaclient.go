package node

import (
	"context"
	"net"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"

	"klamm/node/upstream"
	"klamm/spiffe"
)

// DialFunc opens a connection that is not redirected.
type DialFunc func(ctx context.Context, network, address string) (net.Conn, error)

// newClient is the node's own client of a cluster, which connects when it is first used. Agent is nil where there is no
// SPIRE agent.
func newClient(c ClusterConfig, agent *spiffe.Agent, dial DialFunc) (*kgo.Client, error) {
	tls, login := c.own()
	up, err := newUpstream(tls, login, agent, dial)
	if err != nil {
		return nil, err
	}
	var node upstream.Identity
	if agent != nil {
		node = agent
	}
	opts := []kgo.Opt{
		kgo.ClientID("klamm"),
		kgo.SeedBrokers(c.Bootstrap...),
		kgo.Dialer(up.Dialer(dial, node)),
		kgo.DialTimeout(5 * time.Second),
		kgo.RequestRetries(2), // who asks keeps asking, at a pace of its own
		kgo.DisableClientMetrics(),
	}
	if login != nil {
		opts = append(opts, kgo.SASL(up.Mechanism(node)))
	}
	return kgo.NewClient(opts...)
}
