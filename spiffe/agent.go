package spiffe

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/rs/zerolog"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// maxSilence is how long the agent's bundles are trusted after it was last heard: whom it does not trust any more would
// stay trusted for as long.
const maxSilence = time.Hour

// Agent is the node's own standing with the SPIRE agent of its host, over the Workload API: its X509-SVID, and the
// bundles of the trust domains it trusts, its own and those its entry federates with. Both are what the agent said
// last. It is an x509svid.Source and an x509bundle.Source. Safe for concurrent use.
type Agent struct {
	socket string
	log    zerolog.Logger
	stop   context.CancelFunc
	done   chan struct{}
	heard  func()        // closes asked
	asked  chan struct{} // closed when the agent has answered, or failed to
	mute   *time.Timer   // until the agent's first word

	mu      sync.Mutex
	svid    *x509svid.SVID
	svids   []*x509svid.SVID // all of the node's, svid among them
	bundles *x509bundle.Set
	err     error         // since the last answer
	silent  time.Time     // since then; zero while the stream is open
	changed chan struct{} // closed when svid or bundles change
}

var errStarting = fmt.Errorf("%w yet", errMute)

// OpenAgent watches the Workload API at a unix socket. The agent may come later.
func OpenAgent(socket string, log zerolog.Logger) *Agent {
	ctx, stop := context.WithCancel(context.Background())
	a := &Agent{socket: socket, log: log, stop: stop, done: make(chan struct{}),
		err: agentError(workloadAPI, socket, errStarting), silent: wallClock(), changed: make(chan struct{}),
		asked: make(chan struct{})}
	a.heard = sync.OnceFunc(func() { close(a.asked) })
	a.mute = time.AfterFunc(muteTimeout, func() {
		a.OnX509ContextWatchError(fmt.Errorf("%w within %v", errMute, muteTimeout))
	})
	go func() {
		defer close(a.done)
		a.run(ctx)
	}()
	return a
}

func (a *Agent) run(ctx context.Context) {
	retry := &retries{max: maxRetry}
	for ctx.Err() == nil {
		a.watch(ctx, retry)
		select {
		case <-time.After(retry.Next()):
		case <-ctx.Done():
		}
	}
}

// watch follows one client's stream until it ends for good, which go-spiffe lets it after InvalidArgument.
func (a *Agent) watch(ctx context.Context, retry *retries) {
	client, err := workloadapi.New(ctx, workloadapi.WithAddr("unix://"+a.socket),
		workloadapi.WithBackoffStrategy(pace{retry}), workloadapi.WithDialOptions(dialOptions()...))
	if err != nil {
		a.OnX509ContextWatchError(err)
		return
	}
	defer func() { _ = client.Close() }()
	_ = client.WatchX509Context(ctx, a)
}

// pace makes go-spiffe keep to our pauses.
type pace struct{ *retries }

// NewBackoff is called once per watch.
func (p pace) NewBackoff() workloadapi.Backoff { return p.retries }

// Close ends the watch.
func (a *Agent) Close() error {
	a.stop()
	a.mute.Stop()
	<-a.done
	return nil
}

// OnX509ContextUpdate takes up what the agent says; see workloadapi.X509ContextWatcher.
func (a *Agent) OnX509ContextUpdate(c *workloadapi.X509Context) {
	a.mute.Stop()
	defer a.heard()
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.err != nil {
		a.log.Info().Stringer("id", c.DefaultSVID().ID).Str("socket", a.socket).Msg("the node has its X509-SVID")
	}
	a.svid, a.svids, a.bundles, a.err, a.silent = c.DefaultSVID(), c.SVIDs, c.Bundles, nil, time.Time{}
	a.tell()
}

// OnX509ContextWatchError keeps what the agent said last, unless it says that the node has no identity, or what nobody
// understands.
func (a *Agent) OnX509ContextWatchError(err error) {
	a.mute.Reset(muteTimeout)
	defer a.heard()
	a.mu.Lock()
	defer a.mu.Unlock()
	told := agentError(workloadAPI, a.socket, err)
	if a.err == nil || a.err.Error() != told.Error() {
		a.log.Error().Err(told).Msg("the node's X509-SVID and bundles are not kept current")
	}
	a.err = told
	if a.silent.IsZero() {
		a.silent = wallClock()
	}
	if denied(told) || garbled(err) {
		a.svid, a.svids, a.bundles = nil, nil, nil
		a.tell()
	}
}

// tell wakes who waits for a change. a.mu is held.
func (a *Agent) tell() {
	close(a.changed)
	a.changed = make(chan struct{})
}

// next is closed when the identity or the bundles change next.
func (a *Agent) next() <-chan struct{} {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.changed
}

// GetX509SVID is the node's own X509-SVID, which has not expired.
func (a *Agent) GetX509SVID() (*x509svid.SVID, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.svid == nil {
		return nil, fmt.Errorf("the node has no X509-SVID: %w", a.why())
	}
	if end := a.svid.Certificates[0].NotAfter; !time.Now().Before(end) {
		return nil, fmt.Errorf("the node's X509-SVID %s expired at %s: %w", a.svid.ID, end.Format(time.RFC3339), a.why())
	}
	return a.svid, nil
}

// GetX509BundleForTrustDomain is the bundle by which SVIDs of a trust domain are verified; none where the node does not
// trust it, and where the agent has been silent for an hour.
func (a *Agent) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.bundles == nil || wallClock().Sub(a.since()) > maxSilence {
		return nil, fmt.Errorf("no bundle of %s is known: %w", td.IDString(), a.why())
	}
	bundle, ok := a.bundles.Get(td)
	if !ok {
		return nil, fmt.Errorf("%s is not trusted: the node's entry in SPIRE does not federate with it", td.IDString())
	}
	return bundle, nil
}

// since is until when the agent was heard for certain. An agent that hangs shows in that it renews no SVID. a.mu is
// held.
func (a *Agent) since() time.Time {
	if !a.silent.IsZero() {
		return a.silent
	}
	if end := a.svid.Certificates[0].NotAfter; wallClock().After(end) {
		return end
	}
	return wallClock()
}

// wallClock goes on while the host is suspended, as certificates do.
func wallClock() time.Time { return time.Now().Round(0) }

// trustDomain is the node's own, which it keeps for as long as the agent does not say otherwise.
func (a *Agent) trustDomain() (spiffeid.TrustDomain, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.svid == nil {
		return spiffeid.TrustDomain{}, fmt.Errorf("the node has no X509-SVID: %w", a.why())
	}
	return a.svid.ID.TrustDomain(), nil
}

// why is the last error. a.mu is held.
func (a *Agent) why() error {
	if a.err != nil {
		return a.err
	}
	return agentError(workloadAPI, a.socket, errors.New("the agent gave none"))
}

// Asked waits for the agent's first answer, or the end of ctx.
func (a *Agent) Asked(ctx context.Context) {
	select {
	case <-a.asked:
	case <-ctx.Done():
	}
}

// X509SVID is GetX509SVID, under the name Attested has it by.
func (a *Agent) X509SVID() (*x509svid.SVID, error) { return a.GetX509SVID() }

// JWTSVID is a JWT-SVID of the node itself for an audience, and when it expires. The error is an *AgentError. It takes
// no longer than ctx.
func (a *Agent) JWTSVID(ctx context.Context, audience string) (token string, expires time.Time, err error) {
	svid, err := workloadapi.FetchJWTSVID(ctx, jwtsvid.Params{Audience: audience},
		workloadapi.WithAddr("unix://"+a.socket))
	if err != nil {
		return "", time.Time{}, agentError(workloadAPI, a.socket, err)
	}
	return svid.Marshal(), svid.Expiry, nil
}

// Hinted finds, each time it is asked, the node's own X509-SVID that SPIRE gives a hint to: the first of those with it,
// or of all where the hint is empty.
func (a *Agent) Hinted(hint string) func() (*x509svid.SVID, error) {
	if hint == "" {
		return a.GetX509SVID
	}
	return func() (*x509svid.SVID, error) {
		a.mu.Lock()
		defer a.mu.Unlock()
		i := slices.IndexFunc(a.svids, func(s *x509svid.SVID) bool { return s.Hint == hint })
		if i < 0 {
			return nil, fmt.Errorf("the node has no X509-SVID with the hint %q: %w", hint, a.why())
		}
		svid := a.svids[i]
		if end := svid.Certificates[0].NotAfter; !time.Now().Before(end) {
			return nil, fmt.Errorf("the node's X509-SVID %s expired at %s: %w", svid.ID, end.Format(time.RFC3339), a.why())
		}
		return svid, nil
	}
}

// Authorities are those of all bundles by which SVIDs are verified now.
func (a *Agent) Authorities() (all []*x509.Certificate) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.bundles == nil || !a.silent.IsZero() && time.Since(a.silent) > maxSilence {
		return nil
	}
	for _, b := range a.bundles.Bundles() {
		all = append(all, b.X509Authorities()...)
	}
	return all
}
