// Package kafka enforces policy on one Kafka connection: frames in, verdicts, frames out.
package kafka

import (
	"context"
	"net"
	"sync/atomic"

	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/audit"
	"klamm/enforcer/kafka/authz"
	"klamm/enforcer/kafka/wire"
	"klamm/enforcer/policy"
)

// Cluster is what a session needs to know of the Kafka cluster it talks to.
type Cluster interface {
	authz.Topics
	// Resolve looks ids up in the cluster; those it does not have stay unknown. It may block until ctx ends.
	Resolve(ctx context.Context, ids []authz.TopicID) error
	// Learn takes up the topic ids of an answer by one of the cluster's own brokers.
	Learn(*kmsg.MetadataResponse)
}

// Shared is what all sessions of a node have in common.
type Shared struct {
	Policy   *atomic.Pointer[policy.Policy] // the current policy, loaded once per frame
	Requests *wire.Budget                   // for requests held whole
	Answers  *wire.Budget                   // for answers held whole
	Decoded  *wire.Budget                   // for what is decoded of either
	MaxFrame int                            // largest request, in bytes (Kafka: socket.request.max.bytes)
	Metrics  *Metrics

	sessions sessions
}

// Conn is one client connection with its way to the broker.
type Conn struct {
	Client, Broker net.Conn
	Cluster        Cluster
	AutoCreate     bool           // see authz.Ctx
	Policy         policy.Subject // its Principal is set by the session, once the broker accepted one
	Audit          *audit.Log
	Subject        audit.Subject
}
