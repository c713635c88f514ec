package spiffe

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	josejwt "github.com/go-jose/go-jose/v4/jwt"
)

// KubernetesOptions say which service account tokens count.
type KubernetesOptions struct {
	Path     string // of the token, absolute, as the workload sees it
	Audience string // the only one the token may have: that of its volume (serviceAccountToken.audience)
	// Issuer is the API server's name in Tokens: its keys prove the token, which then counts until its exp even if the
	// pod is gone. Empty: only Review says whether a token is right.
	Issuer string
	// Review asks the API server again and again, which knows of deleted pods. Nil: Issuer is required.
	Review *Review
	// Node is what the token must say of the pod's node; empty: anything.
	Node string
}

// Kubernetes is the source that takes the projected service account token of a pod for evidence of its service account.
// The token must be bound to the very pod in whose cgroup the process is.
type Kubernetes struct {
	KubernetesOptions
	tokens    *Tokens
	processes *Processes
	pace      time.Duration
}

// NewKubernetes fails where nothing would verify the tokens.
func NewKubernetes(tokens *Tokens, processes *Processes, o KubernetesOptions) (*Kubernetes, error) {
	if o.Issuer == "" && o.Review == nil {
		return nil, errors.New("kubernetes: neither issuer nor review")
	}
	if o.Issuer != "" && tokens.find(o.Issuer) == nil {
		return nil, fmt.Errorf("kubernetes: unknown issuer %q", o.Issuer)
	}
	k := &Kubernetes{o, tokens, processes, tokenPace}
	if o.Review != nil {
		k.pace = o.Review.o.Every
	}
	return k, nil
}

// Name is SourceKubernetes.
func (k *Kubernetes) Name() string { return SourceKubernetes }

func (k *Kubernetes) watch(ctx context.Context, p subject, tell func(*Evidence, error)) error {
	if p.PodUID == "" {
		tell(nil, nil)
		return nil
	}
	reader := tokenReader{pace: k.pace, keep: keepUnknown}
	if k.Review != nil {
		reader.keep = k.Review.o.MaxStale
	}
	reader.read = func(ctx context.Context) (string, error) { return k.processes.readToken(ctx, p, k.Path) }
	reader.verify = func(ctx context.Context, token string) (*Evidence, error) {
		e, err := k.verify(ctx, token, p.PodUID)
		k.tokens.count(err)
		if err != nil {
			return nil, fmt.Errorf("%s of process %d in pod %s: %w", k.Path, p.peer.TGID, p.PodUID, err)
		}
		return e, nil
	}
	return reader.follow(ctx, tell)
}

func (k *Kubernetes) verify(ctx context.Context, token, podUID string) (*Evidence, error) {
	prove := k.unproven
	if k.Issuer != "" {
		prove = func(ctx context.Context, token string) (*Evidence, error) {
			return k.tokens.evidence(ctx, token, k.Issuer, []string{k.Audience})
		}
	}
	e, err := prove(ctx, token)
	if err != nil {
		return nil, err
	}
	e.Source = SourceKubernetes
	if err = k.bind(e, podUID); err != nil {
		return nil, err
	}
	if k.Review == nil {
		return e, nil
	}
	// Only now: a token that is not this pod's, or is for somebody else, is sent to nobody.
	return e, k.Review.check(ctx, token, k.Audience, e.Subject, podUID)
}

// unproven is what a token says that the API server is to prove. It has no skew: that server has the last word.
func (k *Kubernetes) unproven(_ context.Context, token string) (*Evidence, error) {
	parsed, err := parseToken(token)
	if err != nil {
		return nil, err
	}
	var claims josejwt.Claims
	var all map[string]any
	if parsed.UnsafeClaimsWithoutVerification(&claims, &all) != nil {
		return nil, rejected(CheckFormat, "its claims are not those of a JWT (RFC 7519)")
	}
	i := issuer{Issuer: Issuer{Issuer: claims.Issuer, Principal: "sub"}}
	return i.accept(verified{claims: claims, all: all}, time.Now(), []string{k.Audience})
}

// bind checks that a token is of this pod, of its node, for us alone, and of the service account that it names.
func (k *Kubernetes) bind(e *Evidence, podUID string) error {
	if audience := audiencesOf(e.Claims); !slices.Equal(audience, []string{k.Audience}) {
		return rejected(CheckAudience, "it is for %.200q: want %q alone", audience, k.Audience)
	}
	if uid := claim(e.Claims, "kubernetes.io", "pod", "uid"); uid == "" || uid != podUID {
		return rejected(CheckPod, "it is of the pod with the uid %.100q", uid)
	}
	if node := claim(e.Claims, "kubernetes.io", "node", "name"); k.Node != "" && node != k.Node {
		return rejected(CheckPod, "it is of the node %.253q", node)
	}
	account := strings.Join([]string{"system", "serviceaccount", claim(e.Claims, "kubernetes.io", "namespace"),
		claim(e.Claims, "kubernetes.io", "serviceaccount", "name")}, ":")
	if sub := claim(e.Claims, "sub"); sub != account {
		return rejected(CheckClaim, "its sub %.300q is not its service account %.300q", sub, account)
	}
	e.Subject = account
	return nil
}

// claim is the text at a path of claims, empty where there is none.
func claim(claims map[string]any, path ...string) string {
	var at any = claims
	for _, name := range path {
		inner, _ := at.(map[string]any)
		at = inner[name]
	}
	text, _ := at.(string)
	return text
}

// audiencesOf reads the claim aud, which is a list or one text (RFC 7519, section 4.1.3).
func audiencesOf(claims map[string]any) (all []string) {
	switch aud := claims["aud"].(type) {
	case string:
		return []string{aud}
	case []any:
		for _, one := range aud {
			text, _ := one.(string)
			all = append(all, text)
		}
	}
	return all
}
