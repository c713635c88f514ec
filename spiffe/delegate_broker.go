package spiffe

import (
	"context"
	"crypto/x509"
	"fmt"
	"strings"

	"github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/anypb"
)

// onBehalf is the SPIFFE Broker API: what SPIFFE calls a broker is the node, which acts on behalf of workloads. Node
// and agent show each other their X509-SVIDs (SPIFFE_Broker_Endpoint.md).
type onBehalf struct {
	socket string
	conn   *grpc.ClientConn
	client broker.APIClient
}

func newOnBehalf(socket string, agent *Agent) (*onBehalf, error) {
	conn, err := dial(socket, credentials.NewTLS(tlsconfig.MTLSClientConfig(agent, agent, agent.authorize)))
	if err != nil {
		return nil, agentError(brokerAPI, socket, err)
	}
	return &onBehalf{socket, conn, broker.NewAPIClient(conn)}, nil
}

// authorize accepts an agent of the node's own trust domain. Only the SPIRE server can issue IDs below /spire.
func (a *Agent) authorize(id spiffeid.ID, _ [][]*x509.Certificate) error {
	own, err := a.GetX509SVID()
	if err != nil {
		return err
	}
	if !id.MemberOf(own.ID.TrustDomain()) || !strings.HasPrefix(id.Path(), "/spire/agent/") {
		return fmt.Errorf("the server is %s: want an agent of %s", id, own.ID.TrustDomain().IDString())
	}
	return nil
}

// reference names a process, with the header that tells the call from a forged one (server-side request forgery).
func reference(ctx context.Context, pid int32) (context.Context, *broker.WorkloadReference, error) {
	ref, err := anypb.New(&broker.WorkloadPIDReference{Pid: pid})
	ctx = metadata.AppendToOutgoingContext(ctx, "broker.spiffe.io", "true")
	return ctx, &broker.WorkloadReference{Reference: ref}, err
}

func (o *onBehalf) x509(ctx context.Context, pid int32, tell func([]rawSVID)) error {
	ctx, ref, err := reference(ctx, pid)
	if err != nil {
		return err
	}
	stream, err := o.client.SubscribeToX509SVID(ctx, &broker.SubscribeToX509SVIDRequest{Reference: ref})
	if err != nil {
		return agentError(brokerAPI, o.socket, err)
	}
	for {
		answer, err := stream.Recv()
		if err != nil {
			return agentError(brokerAPI, o.socket, err)
		}
		var svids []rawSVID
		for _, s := range answer.GetSvids() {
			svids = append(svids, rawSVID{chain: s.GetX509Svid(), key: s.GetX509SvidKey(), hint: s.GetHint(),
				bundle: s.GetBundle()})
		}
		tell(svids)
	}
}

func (o *onBehalf) jwt(ctx context.Context, pid int32, audience string) (tokens []string, err error) {
	ctx, ref, err := reference(ctx, pid)
	if err != nil {
		return nil, err
	}
	answer, err := o.client.FetchJWTSVID(ctx, &broker.FetchJWTSVIDRequest{Reference: ref, Audience: []string{audience}})
	if err != nil {
		return nil, agentError(brokerAPI, o.socket, err)
	}
	for _, s := range answer.GetSvids() {
		tokens = append(tokens, s.GetSvid())
	}
	if len(tokens) == 0 {
		return nil, agentError(brokerAPI, o.socket, errNoToken)
	}
	return tokens, nil
}

func (o *onBehalf) close() error { return o.conn.Close() }
