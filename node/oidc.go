package node

import (
	"context"
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"klamm/enforcer/kafka"
	"klamm/spiffe"
)

// issuers are those whose tokens the node verifies.
type issuers struct {
	*spiffe.Tokens
	keys []issuerKeys
}

type issuerKeys struct {
	name  string
	state func() spiffe.KeySetState
}

// openIssuers gets all issuers ready. None of them needs to be there.
func (n *Node) openIssuers() error {
	var trusted []spiffe.Issuer
	var bundles *spiffe.JWTBundles
	n.issuers = &issuers{}
	for _, c := range n.config.OIDC {
		i := spiffe.Issuer{Issuer: c.Issuer, Audiences: c.Audiences, Algorithms: c.Algorithms, Skew: c.Skew,
			MaxAge: c.MaxAge, Principal: c.PrincipalClaim, Required: c.RequiredClaims}
		of := issuerKeys{name: c.Name()}
		if c.TrustDomain == "" {
			i.Keys = spiffe.NewKeySet(c.keys())
			of.state = i.Keys.State
		} else {
			if bundles == nil {
				bundles = spiffe.OpenJWTBundles(n.config.SPIRE.WorkloadAPI)
				n.closers = append(n.closers, bundles)
			}
			i.TrustDomain, i.Bundles = spiffeid.RequireTrustDomainFromString(c.TrustDomain), bundles
			of.state = func() spiffe.KeySetState { return bundles.State(i.TrustDomain) }
		}
		trusted, n.issuers.keys = append(trusted, i), append(n.issuers.keys, of)
	}
	var err error
	n.issuers.Tokens, err = spiffe.NewTokens(trusted...)
	n.registry.MustRegister(n.issuers)
	return err
}

// logins are the tokens of SASL/OAUTHBEARER logins; nil where no issuer is trusted.
func (n *Node) logins() kafka.Tokens {
	if len(n.config.OIDC) == 0 {
		return nil
	}
	return n.issuers
}

func (n *Node) openKubernetes(p *spiffe.Processes) (spiffe.Source, error) {
	c := n.config.Kubernetes
	o := spiffe.KubernetesOptions{Path: c.Token, Audience: c.Audience, Issuer: c.Issuer, Node: c.Node}
	if c.Review != nil {
		o.Review = spiffe.NewReview(c.Review.options())
	}
	return spiffe.NewKubernetes(n.issuers.Tokens, p, o)
}

func (n *Node) openTokenFiles(p *spiffe.Processes) (spiffe.Source, error) {
	var files []spiffe.TokenFileOptions
	for _, f := range n.config.TokenFiles {
		files = append(files, spiffe.TokenFileOptions(f))
	}
	return spiffe.NewTokenFile(n.issuers.Tokens, p, files...)
}

// IssuerStatus is an issuer that is trusted.
type IssuerStatus struct {
	Issuer string    `json:"issuer"`
	Ready  bool      `json:"ready"` // tokens of it can be verified
	Keys   int       `json:"keys"`
	At     time.Time `json:"at,omitzero"` // of the keys
	Error  string    `json:"error,omitempty"`
}

func (is *issuers) status() (all []IssuerStatus) {
	for _, i := range is.keys {
		state := i.state()
		s := IssuerStatus{Issuer: i.name, Ready: state.Ready(), Keys: state.Keys, At: state.At}
		if state.Err != nil {
			s.Error = state.Err.Error()
		}
		all = append(all, s)
	}
	return all
}

// ready fails where the tokens of an issuer cannot be verified.
func (is *issuers) ready() error {
	for _, s := range is.status() {
		if !s.Ready {
			return fmt.Errorf("issuer %s: %s", s.Issuer, s.Error)
		}
	}
	return nil
}

var (
	issuerKeysDesc = prometheus.NewDesc("klamm_oidc_keys",
		"Keys of an issuer that count; 0 while its tokens cannot be verified.", []string{"issuer"}, nil)
	issuerTimeDesc = prometheus.NewDesc("klamm_oidc_keys_timestamp_seconds",
		"When the keys of an issuer were fetched; 0 while there are none.", []string{"issuer"}, nil)
	issuerFetchesDesc = prometheus.NewDesc("klamm_oidc_fetches_total",
		"Fetches of an issuer's keys, by result (ok, failed).", []string{"issuer", "result"}, nil)
	tokensDesc = prometheus.NewDesc("klamm_oidc_tokens_total",
		"Tokens by what became of them: accepted, or the check they failed.", []string{"result"}, nil)
)

// Describe is prometheus.Collector's.
func (is *issuers) Describe(out chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{issuerKeysDesc, issuerTimeDesc, issuerFetchesDesc, tokensDesc} {
		out <- d
	}
}

// Collect is prometheus.Collector's.
func (is *issuers) Collect(out chan<- prometheus.Metric) {
	for _, i := range is.keys {
		state := i.state()
		at := 0.0
		if !state.At.IsZero() {
			at = float64(state.At.Unix())
		}
		out <- prometheus.MustNewConstMetric(issuerKeysDesc, prometheus.GaugeValue, float64(state.Keys), i.name)
		out <- prometheus.MustNewConstMetric(issuerTimeDesc, prometheus.GaugeValue, at, i.name)
		for result, n := range map[string]uint64{"ok": state.Fetched, "failed": state.Failed} {
			out <- prometheus.MustNewConstMetric(issuerFetchesDesc, prometheus.CounterValue, float64(n), i.name, result)
		}
	}
	for result, n := range is.Counts() {
		out <- prometheus.MustNewConstMetric(tokensDesc, prometheus.CounterValue, float64(n), result)
	}
}

// ProbeIssuer fetches the keys of an issuer, and tells how many it has.
func ProbeIssuer(ctx context.Context, c IssuerConfig) (string, error) {
	set := spiffe.NewKeySet(c.keys())
	if err := set.Refresh(ctx); err != nil {
		return "", err
	}
	state := set.State()
	return fmt.Sprintf("%d keys", state.Keys), state.Err
}

// ProbeReview asks the API server to review what is no token.
func ProbeReview(ctx context.Context, c KubernetesConfig) (string, error) {
	if err := spiffe.NewReview(c.Review.options()).Probe(ctx, c.Audience); err != nil {
		return "", err
	}
	return c.Review.Server + " reviews tokens for this node", nil
}
