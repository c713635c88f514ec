package node

import (
	"context"
	"errors"

	"klamm/enforcer/audit"
	"klamm/node/upstream"
	"klamm/spiffe"
)

// upstreamReason is why a connection is refused whose broker was dialled in vain.
func upstreamReason(err error) audit.Reason {
	for cause, reason := range map[error]audit.Reason{upstream.ErrNoSVID: audit.NoSVID, upstream.ErrTLS: audit.UpstreamTLS,
		upstream.ErrLogin: audit.UpstreamLogin} {
		if errors.Is(err, cause) {
			return reason
		}
	}
	return audit.BrokerUnreachable
}

// whileCurrent ends with ctx, and when the broker no longer knows the workload as who it is. Of a workload that is lost
// the session takes care.
func whileCurrent(ctx context.Context, broker *upstream.Broker, workload *spiffe.Attested) (
	_ context.Context, stop func()) {
	ctx, end := context.WithCancelCause(ctx)
	look := func() {
		if err := broker.Current(); err != nil && workload.Identity().Lost == nil {
			end(err)
		}
	}
	forget := workload.Watch(look)
	look()
	return ctx, func() {
		forget()
		end(nil)
	}
}

// agent is the SPIRE agent; nil where none is asked.
func (n *Node) agent() *spiffe.Agent {
	if n.spire == nil {
		return nil
	}
	return n.spire.Agent()
}
