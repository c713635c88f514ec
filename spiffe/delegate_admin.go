package spiffe

import (
	"bytes"
	"context"
	"errors"

	delegatedidentityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/delegatedidentity/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// admin is the Delegated Identity API, at the agent's admin socket. The agent tells by the socket who the node is.
type admin struct {
	socket string
	conn   *grpc.ClientConn
	client delegatedidentityv1.DelegatedIdentityClient
}

func newAdmin(socket string) (*admin, error) {
	conn, err := dial(socket, insecure.NewCredentials())
	if err != nil {
		return nil, agentError(adminAPI, socket, err)
	}
	return &admin{socket, conn, delegatedidentityv1.NewDelegatedIdentityClient(conn)}, nil
}

func (a *admin) x509(ctx context.Context, pid int32, tell func([]rawSVID)) error {
	stream, err := a.client.SubscribeToX509SVIDs(ctx, &delegatedidentityv1.SubscribeToX509SVIDsRequest{Pid: pid})
	if err != nil {
		return agentError(adminAPI, a.socket, err)
	}
	for {
		answer, err := stream.Recv()
		if err != nil {
			return agentError(adminAPI, a.socket, err)
		}
		var svids []rawSVID
		for _, s := range answer.GetX509Svids() {
			svids = append(svids, rawSVID{chain: bytes.Join(s.GetX509Svid().GetCertChain(), nil), key: s.GetX509SvidKey(),
				hint: s.GetX509Svid().GetHint()})
		}
		tell(svids)
	}
}

func (a *admin) jwt(ctx context.Context, pid int32, audience string) (tokens []string, err error) {
	answer, err := a.client.FetchJWTSVIDs(ctx,
		&delegatedidentityv1.FetchJWTSVIDsRequest{Pid: pid, Audience: []string{audience}})
	if err != nil {
		return nil, agentError(adminAPI, a.socket, err)
	}
	for _, s := range answer.GetSvids() {
		tokens = append(tokens, s.GetToken())
	}
	if len(tokens) == 0 {
		return nil, agentError(adminAPI, a.socket, errNoToken)
	}
	return tokens, nil
}

var errNoToken = errors.New("an answer without a JWT-SVID")

func (a *admin) close() error { return a.conn.Close() }
