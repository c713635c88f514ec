package spiffe

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// ErrNoSVID says that the workload has no SVID now: there is no SPIRE source, it does not know the workload, or what it
// gave has expired.
var ErrNoSVID = errors.New("the workload has no SVID")

// X509SVID is the workload's own X509-SVID, which has not expired. ErrNoSVID where it has none; what Identity.Lost says
// where nobody is left who could have one.
func (h *Attested) X509SVID() (*x509svid.SVID, error) { return h.Identity().x509SVID() }

func (id *Identity) x509SVID() (*x509svid.SVID, error) {
	if id.Lost != nil {
		return nil, id.Lost
	}
	for _, e := range id.Evidence {
		if e.svid == nil {
			continue
		}
		if !time.Now().Before(e.Expires) {
			return nil, fmt.Errorf("%w: that of %s expired at %s", ErrNoSVID, e.ID, e.Expires.Format(time.RFC3339))
		}
		return e.svid, nil
	}
	return nil, ErrNoSVID
}

// JWTSVID is a JWT-SVID of the workload for an audience, and when it expires. Its SPIFFE ID is X509SVID's. The agent is
// asked by pid, with the process proven before and after. The same token is given out until half of its life is over,
// and to its end where the agent cannot be reached. Errors are X509SVID's, ErrGone, ErrChanged, an *AgentError. It
// takes no longer than ctx.
func (h *Attested) JWTSVID(ctx context.Context, audience string) (token string, expires time.Time, err error) {
	r := h.record.Load()
	svid, err := r.current.Load().x509SVID()
	if err != nil {
		return "", time.Time{}, err
	}
	peer := r.subject.peer
	if _, err = h.attestor.processes.check(peer); err != nil {
		return "", time.Time{}, err
	}
	t, err := r.tokens.get(ctx, tokenKey{svid.ID, audience}, func() (jwtToken, error) {
		return h.attestor.jwt(ctx, peer, svid.ID, audience)
	})
	return t.token, t.expires, err
}

// jwt fetches a JWT-SVID of a process whose SPIFFE ID is id.
func (a *Attestor) jwt(ctx context.Context, peer Peer, id spiffeid.ID, audience string) (jwtToken, error) {
	i := slices.IndexFunc(a.sources, func(s Source) bool { return s.Name() == SourceSPIRE })
	if i < 0 {
		return jwtToken{}, ErrNoSVID
	}
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	tokens, err := a.sources[i].(*SPIRE).delegate.jwt(ctx, int32(peer.TGID), audience)
	if err != nil {
		return jwtToken{}, err
	}
	if _, err := a.processes.check(peer); err != nil {
		return jwtToken{}, err
	}
	return pickJWT(tokens, id, audience)
}

// pickJWT is the token that has the SPIFFE ID. The broker that gets it verifies its signature, and nobody here relies
// on it: it is looked at only to hand out no other one.
func pickJWT(tokens []string, id spiffeid.ID, audience string) (jwtToken, error) {
	for _, token := range tokens {
		svid, err := jwtsvid.ParseInsecure(token, []string{audience})
		if err != nil {
			return jwtToken{}, fmt.Errorf("the agent's JWT-SVID for audience %q: %w", audience, err)
		}
		if svid.ID == id && time.Now().Before(svid.Expiry) {
			return jwtToken{token, issuedAt(svid), svid.Expiry}, nil
		}
	}
	return jwtToken{}, fmt.Errorf("%w of %s for audience %q, though an X509-SVID", ErrNoSVID, id, audience)
}

// issuedAt is when a token's life began, now where it does not say. The agent gives out the same one for half of its
// life as well.
func issuedAt(svid *jwtsvid.SVID) time.Time {
	now := time.Now()
	if iat, ok := svid.Claims["iat"].(float64); ok && iat > 0 && iat < float64(now.Unix()) {
		return time.Unix(int64(iat), 0)
	}
	return now
}

// jwtToken is a JWT-SVID.
type jwtToken struct {
	token           string
	issued, expires time.Time
}

type tokenKey struct {
	id       spiffeid.ID
	audience string
}

// fetchTimeout is how long the agent may take for a JWT-SVID, for which it may have to ask its server.
const fetchTimeout = 10 * time.Second

// maxTokens bounds the audiences a workload has tokens for: one per cluster.
const maxTokens = 64

// tokens are the JWT-SVIDs of one record, each fetched by one caller at a time.
type tokens struct {
	turn chan struct{} // held while one is fetched
	bounded[tokenKey, jwtToken]
}

func newTokens() tokens {
	return tokens{make(chan struct{}, 1), newBounded[tokenKey, jwtToken](maxTokens)}
}

func (t tokens) get(ctx context.Context, key tokenKey, fetch func() (jwtToken, error)) (jwtToken, error) {
	select {
	case t.turn <- struct{}{}:
		defer func() { <-t.turn }()
	case <-ctx.Done():
		return jwtToken{}, fmt.Errorf("wait for a JWT-SVID of %s: %w", key.id, context.Cause(ctx))
	}
	now := time.Now()
	old, ok := t.bounded.get(key)
	if ok && now.Before(old.issued.Add(old.expires.Sub(old.issued)/2)) {
		return old, nil
	}
	got, err := fetch()
	if err == nil {
		t.put(key, got)
		return got, nil
	}
	var agent *AgentError
	if ok && time.Now().Before(old.expires) && errors.As(err, &agent) && !denied(err) {
		return old, nil
	}
	return jwtToken{}, err
}

// choose finds the SVID among those of a workload by which it is known, and believes it only if it is well-formed, of a
// trusted domain, in force, and issued by that domain as far as the node knows its bundle.
func (s *SPIRE) choose(raw []rawSVID) (*x509svid.SVID, error) {
	svids := make([]*x509svid.SVID, len(raw))
	for i, r := range raw {
		var err error
		if svids[i], err = x509svid.ParseRaw(r.chain, r.key); err != nil {
			return nil, fmt.Errorf("the agent's X509-SVID: %w", err)
		}
		svids[i].Hint = r.hint
	}
	i, err := pick(svids, s.options.Hint)
	if err != nil {
		return nil, err
	}
	return svids[i], s.believe(svids[i], raw[i].bundle)
}

// pick is the place of the SVID that has the only SPIFFE ID, or the hint, if that says which.
func pick(svids []*x509svid.SVID, hint string) (int, error) {
	first, several := -1, false
	for i, s := range svids {
		if s.Hint != hint || hint == "" {
			continue
		}
		several = several || first >= 0 && s.ID != svids[first].ID
		if first < 0 {
			first = i
		}
	}
	if first >= 0 && !several {
		return first, nil
	}
	for _, s := range svids[1:] {
		if s.ID != svids[0].ID {
			return 0, ambiguous(svids, hint)
		}
	}
	return 0, nil
}

func ambiguous(svids []*x509svid.SVID, hint string) error {
	var all []string
	for _, s := range svids {
		all = append(all, fmt.Sprintf("%s (hint %q)", s.ID, s.Hint))
	}
	remedy := "set spire.hint to the hint of the one meant for Kafka"
	if hint != "" {
		remedy = fmt.Sprintf("give the hint %q to exactly one of its entries in SPIRE", hint)
	}
	return fmt.Errorf("the workload has several SPIFFE IDs: %s: %s", strings.Join(all, ", "), remedy)
}

func (s *SPIRE) believe(svid *x509svid.SVID, bundle []byte) error {
	td, leaf, now := svid.ID.TrustDomain(), svid.Certificates[0], time.Now()
	trusted := s.options.TrustDomains
	if len(trusted) == 0 {
		own, err := s.agent.trustDomain()
		if err != nil {
			return fmt.Errorf("it is not known whether to believe %s: %w", svid.ID, err)
		}
		trusted = []spiffeid.TrustDomain{own}
	}
	switch {
	case !slices.Contains(trusted, td):
		return fmt.Errorf("%s is not of a trusted domain: add %s to spire.trust-domains if it should be", svid.ID, td)
	case !now.Before(leaf.NotAfter):
		return fmt.Errorf("the X509-SVID of %s expired at %s", svid.ID, leaf.NotAfter.Format(time.RFC3339))
	case now.Before(leaf.NotBefore):
		return fmt.Errorf("the X509-SVID of %s holds from %s: compare this host's clock with the SPIRE server's",
			svid.ID, leaf.NotBefore.Format(time.RFC3339))
	}
	var source x509bundle.Source = s.agent
	if _, err := s.agent.GetX509BundleForTrustDomain(td); err != nil {
		if len(bundle) == 0 {
			return nil // the agent's word, over its own socket, is all there is
		}
		if source, err = x509bundle.ParseRaw(td, bundle); err != nil {
			return fmt.Errorf("the agent's bundle of %s: %w", td, err)
		}
	}
	if _, _, err := x509svid.Verify(svid.Certificates, source); err != nil {
		return fmt.Errorf("%s is not issued by its trust domain: %w", svid.ID, err)
	}
	return nil
}
