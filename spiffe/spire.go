package spiffe

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/status"
)

const (
	// firstAnswer is how long a connection waits for the agent before it counts as not identified by it; late after the
	// agent has not answered anybody for a while.
	firstAnswer = 2 * time.Second
	late        = 250 * time.Millisecond
	// maxStreams bounds the processes that are followed at a time, one stream each.
	maxStreams = 16_384
	// spread is the pause between two streams that come back to an agent, on average half of it.
	spread = 2 * time.Millisecond
)

// SPIREOptions say how to ask a SPIRE agent.
type SPIREOptions struct {
	API         string // APIBroker or APIDelegated
	Socket      string // path of the unix socket at which the agent serves that API
	WorkloadAPI string // path of the unix socket of the Workload API
	// Hint chooses among the SVIDs of a workload that has several SPIFFE IDs. Without it such a workload has none.
	Hint string
	// TrustDomains are those whose SVIDs are believed; none is the node's own alone.
	TrustDomains []spiffeid.TrustDomain
	Log          zerolog.Logger
}

// SPIRE is the source that knows workloads by the X509-SVIDs the SPIRE agent has for them, by pid. Safe for concurrent
// use.
type SPIRE struct {
	options   SPIREOptions
	processes *Processes
	agent     *Agent
	delegate  delegate
	streams   chan struct{}
	known     atomic.Int64 // processes with an SVID now
	stop      context.CancelFunc
	probed    chan struct{} // closed when the probe has ended
	heard     func()        // closes asked
	asked     chan struct{} // closed when the agent has answered the probe, or failed to

	mu       sync.Mutex
	err      error         // why the API does not serve the node; nil while it does
	since    time.Time     // of err, and of nil
	back     chan struct{} // closed when the agent serves the node again
	failures map[string]uint64
}

// NewSPIRE watches the agent, which may come later, until it is closed.
func NewSPIRE(o SPIREOptions, processes *Processes) (*SPIRE, error) {
	s := &SPIRE{options: o, processes: processes, agent: OpenAgent(o.WorkloadAPI, o.Log),
		streams: make(chan struct{}, maxStreams), probed: make(chan struct{}), asked: make(chan struct{}),
		since: time.Now(), back: make(chan struct{}), failures: map[string]uint64{}}
	s.heard = sync.OnceFunc(func() { close(s.asked) })
	s.err = s.error(errStarting)
	var err error
	switch o.API {
	case APIBroker:
		s.delegate, err = newOnBehalf(o.Socket, s.agent)
	case APIDelegated:
		s.delegate, err = newAdmin(o.Socket)
	default:
		err = fmt.Errorf("%q is no API of a SPIRE agent", o.API)
	}
	if err != nil {
		return nil, errors.Join(err, s.agent.Close())
	}
	ctx, stop := context.WithCancel(context.Background())
	s.stop = stop
	go func() {
		defer close(s.probed)
		s.probe(ctx)
	}()
	return s, nil
}

// Close ends all streams. Connections keep the evidence they have.
func (s *SPIRE) Close() error {
	s.stop()
	<-s.probed
	return errors.Join(s.delegate.close(), s.agent.Close())
}

// Name is SourceSPIRE.
func (s *SPIRE) Name() string { return SourceSPIRE }

// Agent is the node's own identity and bundles.
func (s *SPIRE) Agent() *Agent { return s.agent }

// probe follows the node's own process, only to know at any time whether the agent serves the node.
func (s *SPIRE) probe(ctx context.Context) {
	select {
	case <-s.agent.asked: // the Broker API wants to see the node's SVID
	case <-ctx.Done():
		return
	}
	retry := &retries{max: maxRetry}
	for {
		err := s.subscribe(ctx, int32(os.Getpid()), muteTimeout, func([]rawSVID) error {
			retry.Reset()
			s.is(nil)
			return nil
		})
		if ctx.Err() != nil {
			return
		}
		s.is(err)
		select {
		case <-time.After(retry.Next()):
		case <-ctx.Done():
			return
		}
	}
}

// is takes up whether the agent serves the node, and logs when that changes.
func (s *SPIRE) is(err error) {
	defer s.heard()
	s.mu.Lock()
	defer s.mu.Unlock()
	same := err == nil && s.err == nil || err != nil && s.err != nil && err.Error() == s.err.Error()
	if (err == nil) != (s.err == nil) {
		s.since = time.Now()
	}
	s.err = err
	switch {
	case same:
	case err == nil:
		close(s.back)
		s.back = make(chan struct{})
		s.options.Log.Info().Str("api", s.options.API).Str("socket", s.options.Socket).
			Msg("the SPIRE agent tells who workloads are")
	default:
		s.options.Log.Error().Err(err).
			Msg("the SPIRE agent does not tell who workloads are; what it told before holds until it expires")
	}
}

// down is whether the agent has not served the node for a while.
func (s *SPIRE) down() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err != nil && time.Since(s.since) > firstAnswer
}

// subscribe is the delegate's x509, which ends as well when the agent does not say a first word in time, or when heard
// returns an error.
func (s *SPIRE) subscribe(ctx context.Context, pid int32, timeout time.Duration, heard func([]rawSVID) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	mute := time.AfterFunc(timeout, func() {
		cancel(s.error(fmt.Errorf("%w within %v", errMute, timeout)))
	})
	defer mute.Stop()
	err := s.delegate.x509(ctx, pid, func(svids []rawSVID) {
		mute.Stop()
		if err := heard(svids); err != nil {
			cancel(err)
		}
	})
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

func (s *SPIRE) error(err error) error {
	api := map[string]string{APIBroker: brokerAPI, APIDelegated: adminAPI}[s.options.API]
	return agentError(api, s.options.Socket, err)
}

// follower is what is known of one process.
type follower struct {
	*SPIRE
	subject
	tell func(*Evidence, error)

	mu       sync.Mutex
	told     bool      // anything
	svids    []rawSVID // what the agent said last
	heard    bool      // svids is set
	evidence bool      // the last that was told
}

// watch tells the process' SVID. The end of the agent's stream changes nothing before the SVID expires: the agent may
// only be restarted. Each word of the agent counts only if the process still is who it was; when it has exited the SVID
// stays as it is, as others may hold its connections.
func (s *SPIRE) watch(ctx context.Context, p subject, tell func(*Evidence, error)) error {
	f := &follower{SPIRE: s, subject: p, tell: tell}
	defer f.end()
	wait := firstAnswer
	if s.down() {
		wait = late
	}
	grace := time.AfterFunc(wait, func() { f.nothingYet(s.error(fmt.Errorf("%w within %v", errMute, wait))) })
	defer grace.Stop()
	select {
	case s.streams <- struct{}{}:
		defer func() { <-s.streams }()
	case <-ctx.Done():
		return nil
	}
	ctx, cancel := context.WithCancel(ctx)
	var judging sync.WaitGroup
	defer judging.Wait()
	defer cancel()
	judging.Go(func() { f.rejudge(ctx) })
	retry := &retries{max: maxFollow}
	for ctx.Err() == nil {
		if _, err := s.processes.check(p.peer); err != nil {
			return f.gone(err)
		}
		err := s.subscribe(ctx, int32(p.peer.TGID), answerTimeout, func(svids []rawSVID) error {
			if _, err := s.processes.check(p.peer); err != nil {
				return err
			}
			retry.Reset()
			f.hear(svids)
			return nil
		})
		if ctx.Err() != nil {
			return nil
		}
		if _, err := s.processes.check(p.peer); err != nil { // which may be all that the agent says
			return f.gone(err)
		}
		s.count(err)
		f.failed(err)
		s.pause(ctx, retry.Next())
	}
	return nil
}

// pause lasts until the agent is back at the latest, for all streams of the node not at once.
func (s *SPIRE) pause(ctx context.Context, d time.Duration) {
	s.mu.Lock()
	back := s.back
	s.mu.Unlock()
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return
	case <-back:
		apart := time.Duration(len(s.streams)) * spread
		timer.Reset(rand.N(min(apart, d))) //nolint:gosec // jitter needs no secrecy
	case <-ctx.Done():
		return
	}
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// rejudge looks again at what the agent said whenever the node's trust changes.
func (f *follower) rejudge(ctx context.Context) {
	for {
		changed := f.agent.next()
		f.mu.Lock()
		if f.heard {
			f.judge()
		}
		f.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

func (f *follower) hear(svids []rawSVID) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.svids, f.heard = svids, true
	f.judge()
}

// judge tells what the agent's last word is worth. f.mu is held.
func (f *follower) judge() {
	if len(f.svids) == 0 {
		f.say(nil, nil)
		return
	}
	svid, err := f.choose(f.svids)
	if err != nil {
		f.say(nil, fmt.Errorf("%s: %w", f.options.Socket, err))
		return
	}
	leaf := svid.Certificates[0]
	f.say(&Evidence{Source: SourceSPIRE, ID: svid.ID, Issuer: leaf.Issuer.String(), Subject: leaf.Subject.String(),
		Expires: leaf.NotAfter, Hint: svid.Hint, svid: svid}, nil)
}

// failed is about the end of a stream.
func (f *follower) failed(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if denied(err) {
		f.svids, f.heard = nil, false
		f.say(nil, err)
	}
}

// nothingYet is said where the agent does not answer, so that nobody waits for it.
func (f *follower) nothingYet(why error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.told {
		return
	}
	f.SPIRE.mu.Lock()
	if f.err != nil {
		why = f.err
	}
	f.SPIRE.mu.Unlock()
	f.say(nil, why)
}

// gone is the end of a watch whose process is not there any more. Before anything was said that is the connection's
// end.
func (f *follower) gone(err error) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.told && errors.Is(err, ErrGone) {
		return nil
	}
	return err
}

// say tells it and counts who is identified. f.mu is held.
func (f *follower) say(e *Evidence, why error) {
	if (e != nil) != f.evidence {
		f.evidence = e != nil
		f.known.Add(map[bool]int64{true: 1, false: -1}[f.evidence])
	}
	if why != nil {
		f.count(why)
	}
	f.told = true
	f.tell(e, why)
}

func (f *follower) end() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.evidence {
		f.known.Add(-1)
	}
}

// count adds to the failures of its kind.
func (s *SPIRE) count(err error) {
	kind := "svid" // the agent's, which is not believed
	if agent := (*AgentError)(nil); errors.As(err, &agent) {
		kind = map[bool]string{true: "mute", false: status.Code(agent.Err).String()}[errors.Is(err, errMute)]
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failures[kind]++
}

// SPIREState is how the source is.
type SPIREState struct {
	API, Socket, WorkloadAPI string
	Err                      error       // why the agent does not tell who workloads are; nil while it does
	Since                    time.Time   // of Err, or of its absence
	ID                       spiffeid.ID // the node's own; zero without
	Expires                  time.Time   // of the node's X509-SVID
	OwnErr                   error       // the Workload API's last error; nil while its stream is open
	Bundles                  []string    // trust domains whose SVIDs the node can verify, in order
	Streams, Identified      int         // processes followed, and those with an SVID
	// Failures by kind: a gRPC code, "mute", or "svid" for SVIDs that were not believed.
	Failures map[string]uint64
}

// ProbeSPIRE tells how a source would be. Its error is that of the API, or else of the Workload API.
func ProbeSPIRE(ctx context.Context, o SPIREOptions) (SPIREState, error) {
	s, err := NewSPIRE(o, nil)
	if err != nil {
		return SPIREState{}, err
	}
	defer func() { _ = s.Close() }()
	for _, asked := range []chan struct{}{s.agent.asked, s.asked} {
		select {
		case <-asked:
		case <-ctx.Done():
		}
	}
	state := s.State()
	return state, cmp.Or(state.Err, state.OwnErr)
}

// State is how the source is now.
func (s *SPIRE) State() SPIREState {
	s.mu.Lock()
	state := SPIREState{API: s.options.API, Socket: s.options.Socket, WorkloadAPI: s.options.WorkloadAPI, Err: s.err,
		Since: s.since, Streams: len(s.streams), Identified: int(s.known.Load()), Failures: maps.Clone(s.failures)}
	s.mu.Unlock()
	a := s.agent
	a.mu.Lock()
	defer a.mu.Unlock()
	state.OwnErr = a.err
	if a.svid != nil {
		state.ID, state.Expires = a.svid.ID, a.svid.Certificates[0].NotAfter
	}
	if a.bundles != nil {
		for _, b := range a.bundles.Bundles() {
			state.Bundles = append(state.Bundles, b.TrustDomain().Name())
		}
		slices.Sort(state.Bundles)
	}
	return state
}
