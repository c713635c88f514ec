package fake

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"net"
	"os"
	"slices"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	delegatedidentityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/delegatedidentity/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"klamm/test/spire"
)

// byPeer tells who is at the other end of a unix socket.
type byPeer struct {
	credentials.TransportCredentials
}

// user is the real user id of a peer.
type user uint32

// AuthType is credentials.AuthInfo's.
func (user) AuthType() string { return "peer" }

// ServerHandshake asks the kernel.
func (byPeer) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return nil, nil, err
	}
	var cred *unix.Ucred
	var serr error
	err = raw.Control(func(fd uintptr) { cred, serr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err := errors.Join(err, serr); err != nil {
		return nil, nil, err
	}
	return conn, user(cred.Uid), nil
}

// Info says that nothing is encrypted.
func (byPeer) Info() credentials.ProtocolInfo { return credentials.ProtocolInfo{} }

// Clone is itself.
func (b byPeer) Clone() credentials.TransportCredentials { return b }

func caller(ctx context.Context) uint32 {
	p, _ := peer.FromContext(ctx)
	return uint32(p.AuthInfo.(user))
}

var errNoIdentity = status.Error(codes.PermissionDenied, "no identity issued")

// workloadServer is the Workload API.
func (a *Agent) workloadServer() *grpc.Server {
	s := grpc.NewServer(grpc.Creds(byPeer{}))
	workload.RegisterSpiffeWorkloadAPIServer(s, &workloadAPI{Agent: a})
	return s
}

type workloadAPI struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	*Agent
}

// FetchX509SVID is the Workload API's.
func (w *workloadAPI) FetchX509SVID(_ *workload.X509SVIDRequest,
	stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	return w.follow(stream.Context(), caller(stream.Context()), func(entries []*entry) error {
		if len(entries) == 0 {
			return errNoIdentity
		}
		answer := &workload.X509SVIDResponse{FederatedBundles: w.bundles(entries)}
		for _, e := range entries {
			answer.Svids = append(answer.Svids, &workload.X509SVID{SpiffeId: e.ID, X509Svid: e.svid.chain,
				X509SvidKey: e.svid.key, Bundle: w.root.Certificate.Raw, Hint: e.Hint})
		}
		return stream.Send(answer)
	})
}

// FetchJWTSVID is the Workload API's.
func (w *workloadAPI) FetchJWTSVID(ctx context.Context, req *workload.JWTSVIDRequest) (
	*workload.JWTSVIDResponse, error) {
	if err := w.gate(ctx); err != nil {
		return nil, err
	}
	answer := &workload.JWTSVIDResponse{}
	err := w.tokens(caller(ctx), req.GetAudience(), func(e *entry, token string, _ time.Time) {
		answer.Svids = append(answer.Svids, &workload.JWTSVID{SpiffeId: e.ID, Svid: token, Hint: e.Hint})
	})
	return answer, err
}

// FetchJWTBundles is the Workload API's.
func (w *workloadAPI) FetchJWTBundles(_ *workload.JWTBundlesRequest,
	stream grpc.ServerStreamingServer[workload.JWTBundlesResponse]) error {
	return w.follow(stream.Context(), caller(stream.Context()), func(entries []*entry) error {
		if len(entries) == 0 {
			return errNoIdentity
		}
		keys, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: w.key.Public(), KeyID: keyID}}})
		if err != nil {
			return err
		}
		return stream.Send(&workload.JWTBundlesResponse{Bundles: map[string][]byte{"spiffe://" + spire.TrustDomain: keys}})
	})
}

// adminServer is the Delegated Identity API.
func (a *Agent) adminServer() *grpc.Server {
	s := grpc.NewServer(grpc.Creds(byPeer{}))
	delegatedidentityv1.RegisterDelegatedIdentityServer(s, &adminAPI{Agent: a})
	return s
}

type adminAPI struct {
	delegatedidentityv1.UnimplementedDelegatedIdentityServer
	*Agent
}

// admit is whether the caller may ask, and the user of the process it asks about.
func (a *adminAPI) admit(ctx context.Context, pid int32, selectors []*types.Selector) (uint32, error) {
	if err := a.delegate(ctx); err != nil {
		return 0, err
	}
	if len(selectors) > 0 || pid == 0 {
		return 0, status.Error(codes.InvalidArgument, "must provide either selectors or non-zero PID, but not both")
	}
	uid, err := uidOf(pid)
	if err != nil {
		return 0, status.Error(codes.Unavailable, "workload attestation failed")
	}
	return uid, nil
}

func (a *adminAPI) delegate(ctx context.Context) error {
	known, listed := a.authorized(caller(ctx))
	switch {
	case !known:
		return errNoIdentity
	case !listed:
		return status.Error(codes.PermissionDenied, "caller not configured as an authorized delegate")
	}
	return nil
}

// SubscribeToX509SVIDs is the Delegated Identity API's.
func (a *adminAPI) SubscribeToX509SVIDs(req *delegatedidentityv1.SubscribeToX509SVIDsRequest,
	stream grpc.ServerStreamingServer[delegatedidentityv1.SubscribeToX509SVIDsResponse]) error {
	uid, err := a.admit(stream.Context(), req.GetPid(), req.GetSelectors())
	if err != nil {
		return err
	}
	return a.follow(stream.Context(), uid, func(entries []*entry) error {
		if err := a.delegate(stream.Context()); err != nil {
			return err
		}
		answer := &delegatedidentityv1.SubscribeToX509SVIDsResponse{}
		for _, e := range entries {
			answer.X509Svids = append(answer.X509Svids, &delegatedidentityv1.X509SVIDWithKey{X509SvidKey: e.svid.key,
				X509Svid: &types.X509SVID{Id: protoID(e.ID), CertChain: [][]byte{e.svid.chain}, Hint: e.Hint,
					ExpiresAt: e.svid.end.Unix()}})
		}
		return stream.Send(answer)
	})
}

// FetchJWTSVIDs is the Delegated Identity API's.
func (a *adminAPI) FetchJWTSVIDs(ctx context.Context, req *delegatedidentityv1.FetchJWTSVIDsRequest) (
	*delegatedidentityv1.FetchJWTSVIDsResponse, error) {
	if err := a.gate(ctx); err != nil {
		return nil, err
	}
	uid, err := a.admit(ctx, req.GetPid(), req.GetSelectors())
	if err != nil {
		return nil, err
	}
	answer := &delegatedidentityv1.FetchJWTSVIDsResponse{}
	err = a.tokens(uid, req.GetAudience(), func(e *entry, token string, expires time.Time) {
		answer.Svids = append(answer.Svids, &types.JWTSVID{Id: protoID(e.ID), Token: token, Hint: e.Hint,
			ExpiresAt: expires.Unix()})
	})
	return answer, err
}

// tokens makes a token for each entry of a user, of which there must be one.
func (a *Agent) tokens(uid uint32, audience []string, add func(*entry, string, time.Time)) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	found, _, err := a.matching(uid)
	if err != nil {
		return err
	}
	for _, e := range found {
		token, expires, err := a.token(e, audience)
		if err != nil {
			return err
		}
		add(e, token, expires)
	}
	if len(found) == 0 {
		return errNoIdentity
	}
	return nil
}

func protoID(id string) *types.SPIFFEID {
	parsed := spiffeid.RequireFromString(id)
	return &types.SPIFFEID{TrustDomain: parsed.TrustDomain().Name(), Path: parsed.Path()}
}

// brokerServer is the SPIFFE Broker API. Who it is, and who is admitted, is looked up for each connection.
func (a *Agent) brokerServer() *grpc.Server {
	config := func(*tls.ClientHelloInfo) (*tls.Config, error) {
		issued, err := a.issue(spire.Entry{ID: cmp.Or(a.opts.Impostor, a.ID("/spire/agent/fake"))})
		if err != nil {
			return nil, err
		}
		own, err := x509svid.ParseRaw(issued.chain, issued.key)
		if err != nil {
			return nil, err
		}
		a.mu.Lock()
		defer a.mu.Unlock()
		trust := x509bundle.FromX509Authorities(own.ID.TrustDomain(), []*x509.Certificate{a.root.Certificate})
		c := tlsconfig.MTLSServerConfig(own, trust, tlsconfig.AuthorizeOneOf(parseIDs(a.delegates)...))
		c.NextProtos = []string{"h2"}
		return c, nil
	}
	each := credentials.NewTLS(&tls.Config{GetConfigForClient: config, MinVersion: tls.VersionTLS12})
	s := grpc.NewServer(grpc.Creds(each))
	broker.RegisterAPIServer(s, &brokerAPI{Agent: a})
	return s
}

type brokerAPI struct {
	broker.UnimplementedAPIServer
	*Agent
}

// admit is the user of the process that is asked about.
func (b *brokerAPI) admit(ctx context.Context, ref *broker.WorkloadReference) (pid int32, uid uint32, err error) {
	md, _ := metadata.FromIncomingContext(ctx)
	if !slices.Equal(md["broker.spiffe.io"], []string{"true"}) {
		return 0, 0, status.Error(codes.InvalidArgument, "security header missing from request")
	}
	var p broker.WorkloadPIDReference
	if err := ref.GetReference().UnmarshalTo(&p); err != nil {
		return 0, 0, status.Error(codes.InvalidArgument, "workload reference must be provided")
	}
	uid, err = uidOf(p.GetPid())
	switch {
	case err == nil:
		return p.GetPid(), uid, nil
	case b.opts.Conforms:
		return 0, 0, status.Error(codes.NotFound, "no such process")
	}
	return 0, 0, status.Error(codes.Internal, "failed to get process: process does not exist")
}

// SubscribeToX509SVID is the Broker API's.
func (b *brokerAPI) SubscribeToX509SVID(req *broker.SubscribeToX509SVIDRequest,
	stream grpc.ServerStreamingServer[broker.SubscribeToX509SVIDResponse]) error {
	pid, uid, err := b.admit(stream.Context(), req.GetReference())
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(stream.Context())
	defer cancel(nil)
	if b.opts.Conforms {
		go b.untilGone(ctx, pid, cancel)
	}
	err = b.follow(ctx, uid, func(entries []*entry) error {
		if len(entries) == 0 && b.opts.Conforms {
			return status.Error(codes.PermissionDenied, "not entitled to an identity of this workload")
		}
		answer := &broker.SubscribeToX509SVIDResponse{FederatedBundles: b.bundles(entries)}
		for _, e := range entries {
			answer.Svids = append(answer.Svids, &broker.X509SVID{SpiffeId: e.ID, X509Svid: e.svid.chain,
				X509SvidKey: e.svid.key, Bundle: b.root.Certificate.Raw, Hint: e.Hint})
		}
		return stream.Send(answer)
	})
	if err == nil {
		err = context.Cause(ctx)
	}
	return err
}

// untilGone ends a stream with its process.
func (b *brokerAPI) untilGone(ctx context.Context, pid int32, cancel context.CancelCauseFunc) {
	gone := status.Error(codes.NotFound, "the process has ended")
	fd, err := unix.PidfdOpen(int(pid), 0)
	if err != nil {
		cancel(gone)
		return
	}
	end := os.NewFile(uintptr(fd), "pidfd")
	defer func() { _ = end.Close() }()
	for ctx.Err() == nil {
		if n, _ := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 50); n > 0 {
			cancel(gone)
			return
		}
	}
}

// FetchJWTSVID is the Broker API's.
func (b *brokerAPI) FetchJWTSVID(ctx context.Context, req *broker.FetchJWTSVIDRequest) (
	*broker.FetchJWTSVIDResponse, error) {
	if err := b.gate(ctx); err != nil {
		return nil, err
	}
	_, uid, err := b.admit(ctx, req.GetReference())
	if err != nil {
		return nil, err
	}
	answer := &broker.FetchJWTSVIDResponse{}
	err = b.tokens(uid, req.GetAudience(), func(e *entry, token string, _ time.Time) {
		answer.Svids = append(answer.Svids, &broker.JWTSVID{SpiffeId: e.ID, Svid: token, Hint: e.Hint})
	})
	return answer, err
}
