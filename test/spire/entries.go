package spire

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
)

// Entry says which processes get an SVID.
type Entry struct {
	ID              string   // SPIFFE ID
	Selectors       []string // type:value
	Hint            string
	DNSNames        []string      // the first is the common name too
	X509TTL, JWTTTL time.Duration // in whole seconds; 0: the rig's
	FederatesWith   []string      // trust domains
}

// parent is the alias of the agent, by which entries name it.
func (s *SPIRE) parent() string { return s.ID("/node") }

func (s *SPIRE) joinToken(ctx context.Context) (string, error) {
	token, err := agentv1.NewAgentClient(s.conn).CreateJoinToken(ctx, &agentv1.CreateJoinTokenRequest{
		Ttl: int32(startTimeout.Seconds()), AgentId: spiffeID(s.parent())})
	if err != nil {
		return "", fmt.Errorf("make a join token: %w", err)
	}
	return token.GetValue(), nil
}

func spiffeID(id string) *types.SPIFFEID {
	parsed := spiffeid.RequireFromString(id)
	return &types.SPIFFEID{TrustDomain: parsed.TrustDomain().Name(), Path: parsed.Path()}
}

func (s *SPIRE) entry(id string, e Entry) *types.Entry {
	out := &types.Entry{Id: id, SpiffeId: spiffeID(e.ID), ParentId: spiffeID(s.parent()), Hint: e.Hint,
		DnsNames: e.DNSNames, X509SvidTtl: int32(e.X509TTL.Seconds()), JwtSvidTtl: int32(e.JWTTTL.Seconds()),
		FederatesWith: e.FederatesWith}
	for _, selector := range e.Selectors {
		kind, value, _ := strings.Cut(selector, ":")
		out.Selectors = append(out.Selectors, &types.Selector{Type: kind, Value: value})
	}
	return out
}

// answered is a result of a batch of one.
type answered interface{ GetStatus() *types.Status }

// one is the only result of a batch, which says by itself how it went.
func one[R answered](results []R, err error) (R, error) {
	var none R
	if err != nil {
		return none, err
	}
	if len(results) != 1 {
		return none, fmt.Errorf("%d results for one", len(results))
	}
	if status := results[0].GetStatus(); status.GetCode() != int32(codes.OK) {
		return none, errors.New(status.GetMessage())
	}
	return results[0], nil
}

// Register makes an entry, which the agent knows some time later, and returns its own id.
func (s *SPIRE) Register(ctx context.Context, e Entry) (string, error) {
	answer, err := entryv1.NewEntryClient(s.conn).BatchCreateEntry(ctx,
		&entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{s.entry("", e)}})
	made, err := one(answer.GetResults(), err)
	if err != nil {
		return "", fmt.Errorf("register %s: %w", e.ID, err)
	}
	return made.GetEntry().GetId(), nil
}

// Update changes an entry.
func (s *SPIRE) Update(ctx context.Context, id string, e Entry) error {
	answer, err := entryv1.NewEntryClient(s.conn).BatchUpdateEntry(ctx,
		&entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{s.entry(id, e)}})
	if _, err := one(answer.GetResults(), err); err != nil {
		return fmt.Errorf("update %s: %w", e.ID, err)
	}
	return nil
}

// Remove revokes an entry.
func (s *SPIRE) Remove(ctx context.Context, id string) error {
	answer, err := entryv1.NewEntryClient(s.conn).BatchDeleteEntry(ctx,
		&entryv1.BatchDeleteEntryRequest{Ids: []string{id}})
	if _, err := one(answer.GetResults(), err); err != nil {
		return fmt.Errorf("remove entry %s: %w", id, err)
	}
	return nil
}

// NodeEntry is the entry of the first delegate.
func (s *SPIRE) NodeEntry(ctx context.Context) (string, error) {
	answer, err := entryv1.NewEntryClient(s.conn).ListEntries(ctx, &entryv1.ListEntriesRequest{
		Filter: &entryv1.ListEntriesRequest_Filter{BySpiffeId: spiffeID(s.opts.Delegates[0])}})
	if err != nil || len(answer.GetEntries()) != 1 {
		return "", errors.Join(fmt.Errorf("find the entry of %s", s.opts.Delegates[0]), err)
	}
	return answer.GetEntries()[0].GetId(), nil
}

// Bundle is the trust domain's X.509 bundle, in PEM.
func (s *SPIRE) Bundle(ctx context.Context) ([]byte, error) {
	bundle, err := bundlev1.NewBundleClient(s.conn).GetBundle(ctx, &bundlev1.GetBundleRequest{})
	if err != nil {
		return nil, fmt.Errorf("ask for the bundle: %w", err)
	}
	var out []byte
	for _, c := range bundle.GetX509Authorities() {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.GetAsn1()})...)
	}
	return out, nil
}

// Federate sets the bundle of another trust domain, with which entries can federate then.
func (s *SPIRE) Federate(ctx context.Context, domain string, root *x509.Certificate) error {
	answer, err := bundlev1.NewBundleClient(s.conn).BatchSetFederatedBundle(ctx, &bundlev1.BatchSetFederatedBundleRequest{
		Bundle: []*types.Bundle{{TrustDomain: domain, X509Authorities: []*types.X509Certificate{{Asn1: root.Raw}}}}})
	if _, err := one(answer.GetResults(), err); err != nil {
		return fmt.Errorf("federate with %s: %w", domain, err)
	}
	return nil
}

// Unfederate removes the bundle of another trust domain, also from the entries that federate with it.
func (s *SPIRE) Unfederate(ctx context.Context, domain string) error {
	answer, err := bundlev1.NewBundleClient(s.conn).BatchDeleteFederatedBundle(ctx,
		&bundlev1.BatchDeleteFederatedBundleRequest{TrustDomains: []string{domain},
			Mode: bundlev1.BatchDeleteFederatedBundleRequest_DISSOCIATE})
	if _, err := one(answer.GetResults(), err); err != nil {
		return fmt.Errorf("end the federation with %s: %w", domain, err)
	}
	return nil
}
