// Package kafka enforces policy on one Kafka connection: frames in, verdicts, frames out.
package kafka

import (
	"context"
	"net"
	"sync/atomic"
	"time"

	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/audit"
	"klamm/enforcer/kafka/authz"
	"klamm/enforcer/kafka/wire"
	"klamm/enforcer/policy"
	"klamm/spiffe"
)

// Cluster is what a session needs to know of the Kafka cluster it talks to.
type Cluster interface {
	authz.Topics
	authz.Groups
	// Resolve looks ids up in the cluster; those it does not have become unknown. It may block until ctx ends.
	Resolve(ctx context.Context, ids []authz.TopicID) error
	// Relist returns when TopicNames has a list that the cluster gave after the call. It may block until ctx ends.
	Relist(ctx context.Context) error
	// Recall has a member looked up, for its next heartbeat. It does not block.
	Recall(authz.MemberName)
	// Learn takes up the topic ids of an answer by one of the cluster's own brokers.
	Learn(*kmsg.MetadataResponse)
}

// Shared is what all sessions of a node have in common.
type Shared struct {
	Policy   *atomic.Pointer[policy.Policy] // the current policy, loaded once per frame
	Requests *wire.Budget                   // for requests held whole
	Answers  *wire.Budget                   // for answers held whole
	Decoded  *wire.Budget                   // for what is decoded of either
	Kept     *wire.Budget                   // for what is kept of requests until they are answered
	MaxFrame int                            // largest request, in bytes (Kafka: socket.request.max.bytes)
	Metrics  *Metrics
	Tokens   Tokens // nil: no issuer is trusted
	// CloseOnLoss ends connections whose workload is no longer who it was; else only its rights end.
	CloseOnLoss bool

	sessions sessions
}

// Workload is who is behind a connection, from moment to moment; see spiffe.Attested.
type Workload interface {
	Identity() *spiffe.Identity
	// Watch calls changed after every change, until stop is called. It must not block.
	Watch(changed func()) (stop func())
}

// Tokens verifies the OIDC tokens of SASL/OAUTHBEARER logins.
type Tokens interface {
	Verify(ctx context.Context, token string) (*spiffe.Evidence, error)
}

// Login is the node's own login at the broker, on behalf of the workload.
type Login interface {
	// Due is when it must be renewed (KIP-368); zero: never.
	Due() time.Time
	// Exchange logs in: call sends a request and returns its answer.
	Exchange(ctx context.Context, call func(kmsg.Request) (kmsg.Response, error)) error
}

// Conn is one client connection with its way to the broker.
type Conn struct {
	Client, Broker net.Conn
	Cluster        Cluster
	Workload       Workload
	// Login is nil where the client logs in itself, or nobody does. It has logged in already.
	Login Login
	// AsWorkload tells that the broker knows the connection as the workload's, by its certificate: it ends with the
	// workload's identity whatever Shared.CloseOnLoss says, as it does where there is a Login.
	AsWorkload bool
	AutoCreate bool           // see authz.Ctx
	Policy     policy.Subject // cluster and host; who it is, the session adds from moment to moment
	Audit      *audit.Log
	Subject    audit.Subject // its identity and login are the session's matter as well
}
