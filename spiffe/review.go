package spiffe

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
)

// ReviewOptions say how the API server is asked about tokens.
type ReviewOptions struct {
	Server string // the API server's address
	Remote Remote // with the node's own credentials, which may create tokenreviews (system:auth-delegator)
	// Every is how often a token is reviewed while a process with it is connected. The API server remembers a yes for
	// ten seconds, so a deleted pod's token counts for up to 10 s + 4/3 Every.
	Every time.Duration
	// MaxStale is for how long a reviewed token counts while the API server does not answer.
	MaxStale time.Duration
}

// Review asks the API server about service account tokens, for all processes together. Safe for concurrent use.
type Review struct {
	o ReviewOptions

	mu    sync.Mutex
	known map[reviewKey]*reviewed
}

type reviewKey struct {
	token    [sha256.Size]byte
	audience string
}

// reviewed is one question to the API server. What it says is set when done is closed.
type reviewed struct {
	at     time.Time
	done   chan struct{}
	status reviewStatus
	err    error
}

// reviewStatus is the part of a TokenReview's status that counts (authentication.k8s.io/v1).
type reviewStatus struct {
	Authenticated bool     `json:"authenticated"`
	Audiences     []string `json:"audiences"`
	Error         string   `json:"error"`
	User          struct {
		Username string              `json:"username"`
		Extra    map[string][]string `json:"extra"`
	} `json:"user"`
}

// extraPodUID is where the API server says to which pod it found a token bound.
const extraPodUID = "authentication.kubernetes.io/pod-uid"

// NewReview asks nobody yet.
func NewReview(o ReviewOptions) *Review { return &Review{o: o, known: map[reviewKey]*reviewed{}} }

// check fails with a *TokenError where the API server does not take the token for one of that account and pod, and with
// an unknownError where it does not answer.
func (r *Review) check(ctx context.Context, token, audience, account, podUID string) error {
	status, err := r.ask(ctx, token, audience)
	switch {
	case err != nil:
		return err
	case !status.Authenticated:
		why := strings.ReplaceAll(status.Error, token, "…")
		return rejected(CheckReview, "the API server does not accept it: %.300s", why)
	case !slices.Contains(status.Audiences, audience):
		return rejected(CheckReview, "the API server did not look at its audience")
	case status.User.Username != account:
		return rejected(CheckReview, "to the API server it is of %.300q, not of %q", status.User.Username, account)
	case !slices.Equal(status.User.Extra[extraPodUID], []string{podUID}):
		return rejected(CheckReview, "to the API server it is of the pod %.100q", status.User.Extra[extraPodUID])
	}
	return nil
}

// ask shares what was asked less than a third of Every ago.
func (r *Review) ask(ctx context.Context, token, audience string) (reviewStatus, error) {
	q := r.question(token, audience)
	select {
	case <-q.done:
		return q.status, q.err
	case <-ctx.Done():
		return reviewStatus{}, unknownError{fmt.Errorf("review the token at %s: %w", r.o.Server, context.Cause(ctx))}
	}
}

func (r *Review) question(token, audience string) *reviewed {
	key := reviewKey{sha256.Sum256([]byte(token)), audience}
	r.mu.Lock()
	defer r.mu.Unlock()
	for k, q := range r.known {
		if time.Since(q.at) > r.o.Every/3 {
			delete(r.known, k)
		}
	}
	if q := r.known[key]; q != nil {
		return q
	}
	q := &reviewed{at: time.Now(), done: make(chan struct{})}
	r.known[key] = q
	go func() {
		defer close(q.done)
		ctx, cancel := context.WithTimeout(context.Background(), attemptTimeout)
		defer cancel()
		q.status, q.err = r.send(ctx, token, audience)
	}()
	return q
}

func (r *Review) send(ctx context.Context, token, audience string) (reviewStatus, error) {
	body, err := json.Marshal(map[string]any{"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview",
		"spec": map[string]any{"token": token, "audiences": []string{audience}}})
	if err != nil {
		return reviewStatus{}, err
	}
	answer, err := r.o.Remote.ask(ctx, http.MethodPost,
		strings.TrimSuffix(r.o.Server, "/")+"/apis/authentication.k8s.io/v1/tokenreviews", body)
	if err != nil {
		return reviewStatus{}, unknownError{err}
	}
	return parseReview(answer)
}

func parseReview(answer []byte) (reviewStatus, error) {
	var review struct {
		Kind   string       `json:"kind"`
		Status reviewStatus `json:"status"`
	}
	if json.Unmarshal(answer, &review) != nil || review.Kind != "TokenReview" {
		return reviewStatus{}, unknownError{errors.New("the API server's answer is no TokenReview")}
	}
	return review.Status, nil
}

// Probe tells whether the node may ask for reviews, with a token that is none.
func (r *Review) Probe(ctx context.Context, audience string) error {
	status, err := r.send(ctx, "none", audience)
	if err == nil && status.Authenticated {
		return fmt.Errorf("the API server at %s accepts anything for a token", r.o.Server)
	}
	return err
}
