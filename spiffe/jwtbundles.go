package spiffe

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// JWTBundles are the keys of JWT-SVIDs, of the trust domains that the node trusts, as the SPIRE agent of its host said
// last over the Workload API. It is a jwtbundle.Source. Safe for concurrent use.
type JWTBundles struct {
	socket string
	stop   context.CancelFunc
	done   chan struct{}

	mu      sync.Mutex
	bundles *jwtbundle.Set
	err     error     // since the last answer
	silent  time.Time // since then; zero while the stream is open
}

// OpenJWTBundles watches the Workload API at a unix socket. The agent may come later.
func OpenJWTBundles(socket string) *JWTBundles {
	ctx, stop := context.WithCancel(context.Background())
	b := &JWTBundles{socket: socket, stop: stop, done: make(chan struct{}), silent: time.Now(), err: errStarting}
	go func() {
		defer close(b.done)
		for retry := (&retries{max: maxRetry}); ctx.Err() == nil; {
			b.watch(ctx, retry)
			select {
			case <-time.After(retry.Next()):
			case <-ctx.Done():
			}
		}
	}()
	return b
}

// watch follows one client's stream until it ends for good, which go-spiffe lets it after InvalidArgument.
func (b *JWTBundles) watch(ctx context.Context, retry *retries) {
	client, err := workloadapi.New(ctx, workloadapi.WithAddr("unix://"+b.socket),
		workloadapi.WithBackoffStrategy(pace{retry}), workloadapi.WithDialOptions(dialOptions()...))
	if err != nil {
		b.OnJWTBundlesWatchError(err)
		return
	}
	defer func() { _ = client.Close() }()
	_ = client.WatchJWTBundles(ctx, b)
}

// Close ends the watch.
func (b *JWTBundles) Close() error {
	b.stop()
	<-b.done
	return nil
}

// OnJWTBundlesUpdate takes up what the agent says; see workloadapi.JWTBundleWatcher.
func (b *JWTBundles) OnJWTBundlesUpdate(bundles *jwtbundle.Set) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.bundles, b.err, b.silent = bundles, nil, time.Time{}
}

// OnJWTBundlesWatchError keeps what the agent said last, unless it says that the node has no identity.
func (b *JWTBundles) OnJWTBundlesWatchError(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.err = agentError(workloadAPI, b.socket, err)
	if b.silent.IsZero() {
		b.silent = time.Now()
	}
	if denied(b.err) {
		b.bundles = nil
	}
}

// GetJWTBundleForTrustDomain is the bundle by which JWT-SVIDs of a trust domain are verified; none where the node does
// not trust it, and where the agent has been silent for an hour.
func (b *JWTBundles) GetJWTBundleForTrustDomain(td spiffeid.TrustDomain) (*jwtbundle.Bundle, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.bundles == nil || !b.silent.IsZero() && time.Since(b.silent) > maxSilence {
		err := b.err
		if err == nil {
			err = errors.New("the agent gave none")
		}
		return nil, fmt.Errorf("no JWT bundle of %s is known: %w", td.IDString(), err)
	}
	bundle, ok := b.bundles.Get(td)
	if !ok {
		return nil, fmt.Errorf("%s is not trusted: the node's entry in SPIRE does not federate with it", td.IDString())
	}
	return bundle, nil
}

// State is how the keys of a trust domain are now.
func (b *JWTBundles) State(td spiffeid.TrustDomain) KeySetState {
	bundle, err := b.GetJWTBundleForTrustDomain(td)
	if err != nil {
		return KeySetState{Err: err}
	}
	return KeySetState{Keys: len(bundle.JWTAuthorities())}
}
