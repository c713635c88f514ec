// Package cases says how the SPIRE source of package spiffe behaves toward an agent. The same cases are run on the fake
// of package fake, in make test, and on a real SPIRE, in make verify-identity.
package cases

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/rs/zerolog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"klamm/spiffe"
	"klamm/test/kafka"
	"klamm/test/spire"
)

// World is a SPIRE agent with its server: spire.SPIRE or fake.Agent.
type World interface {
	ID(path string) string
	WorkloadAPI() string
	Socket(api string) string
	ShortTTL() time.Duration
	Register(context.Context, spire.Entry) (string, error)
	Update(ctx context.Context, id string, e spire.Entry) error
	Remove(ctx context.Context, id string) error
	NodeEntry(context.Context) (string, error)
	Federate(ctx context.Context, domain string, root *x509.Certificate) error
	Unfederate(ctx context.Context, domain string) error
	SetDelegates(ids ...string)
	StartAgent(context.Context) error
	StopAgent(how syscall.Signal) error
	Pause() error
	Resume() error
}

const (
	// patience is how long the agent may take to know what the server was told: twice what SPIRE may need by its
	// defaults. A rig whose revocations take longer than revoked is broken.
	patience = 30 * time.Second
	revoked  = 15 * time.Second
	look     = 10 * time.Millisecond
)

// Case is one thing that must hold. It leaves the world as it found it. Its own processes are of root, and of users
// from 30000 on.
type Case struct {
	Name string
	Run  func(ctx context.Context, e *Env) error
}

// On runs a case on a world by an API: spiffe.APIBroker or spiffe.APIDelegated.
func (c Case) On(ctx context.Context, w World, api string) (err error) {
	e := &Env{World: w, API: api}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	defer func() {
		for i := len(e.undo) - 1; i >= 0; i-- {
			err = errors.Join(err, e.undo[i]())
		}
	}()
	return c.Run(ctx, e)
}

// Env is what a case has.
type Env struct {
	World
	API  string
	undo []func() error
}

// finally has something done at the end of the case.
func (e *Env) finally(do func() error) { e.undo = append(e.undo, do) }

var users atomic.Uint32

// user is a user id that no other case has.
func user() uint32 { return 30_000 + users.Add(1) }

func selector(uid uint32) []string { return []string{fmt.Sprintf("unix:uid:%d", uid)} }

// register makes an entry for the case. The second result changes it.
func (e *Env) register(ctx context.Context, entry spire.Entry) (id string, err error) {
	if id, err = e.Register(ctx, entry); err != nil {
		return "", err
	}
	e.finally(func() error {
		if err := e.Remove(context.WithoutCancel(ctx), id); err != nil && !strings.Contains(err.Error(), "no") {
			return err
		}
		return nil
	})
	return id, nil
}

// options are of a source for the world's agent.
func (e *Env) options() spiffe.SPIREOptions {
	return spiffe.SPIREOptions{API: e.API, Socket: e.Socket(e.API), WorkloadAPI: e.WorkloadAPI(), Log: zerolog.Nop()}
}

// source opens a source with an attestor.
func (e *Env) source(o spiffe.SPIREOptions) (*spiffe.SPIRE, *spiffe.Attestor, error) {
	processes := spiffe.NewProcesses(tasks{}, "", nil)
	s, err := spiffe.NewSPIRE(o, processes)
	if err != nil {
		return nil, nil, err
	}
	e.finally(s.Close)
	a := spiffe.NewAttestor(processes, s)
	e.finally(a.Close)
	return s, a, nil
}

// serving is a source whose agent serves it.
func (e *Env) serving(ctx context.Context) (*spiffe.SPIRE, *spiffe.Attestor, error) {
	s, a, err := e.source(e.options())
	if err != nil {
		return nil, nil, err
	}
	return s, a, e.serves(ctx, s)
}

// serves waits until the agent serves the source.
func (e *Env) serves(ctx context.Context, s *spiffe.SPIRE) error {
	return until(ctx, patience, func() error {
		state := s.State()
		return errors.Join(state.Err, state.OwnErr)
	})
}

// until waits for a condition: nil, or what is missing.
func until(ctx context.Context, within time.Duration, met func() error) error {
	deadline := time.NewTimer(within)
	defer deadline.Stop()
	tick := time.NewTicker(look)
	defer tick.Stop()
	for {
		err := met()
		if err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-deadline.C:
			return fmt.Errorf("not within %v: %w", within, err)
		case <-ctx.Done():
			return errors.Join(ctx.Err(), err)
		}
	}
}

// workload starts a process of a user that does nothing.
func (e *Env) workload(uid uint32) (*exec.Cmd, spiffe.Peer, error) {
	cmd := exec.Command("sleep", "1000")
	if err := (kafka.Place{UID: uid, GID: uid}).Start(cmd); err != nil {
		return nil, spiffe.Peer{}, err
	}
	e.finally(func() error {
		err := kafka.Kill(cmd)
		_ = cmd.Wait() // killed
		return err
	})
	peer, err := peerOf(cmd.Process.Pid)
	return cmd, peer, err
}

// connected is a connection of a new process of a user.
func (e *Env) connected(ctx context.Context, a *spiffe.Attestor, uid uint32) (*spiffe.Attested, error) {
	_, peer, err := e.workload(uid)
	if err != nil {
		return nil, err
	}
	attested, err := e.attest(ctx, a, peer)
	return attested, err
}

// attestTimeout is what a node gives its sources.
const attestTimeout = 5 * time.Second

func (e *Env) attest(ctx context.Context, a *spiffe.Attestor, peer spiffe.Peer) (*spiffe.Attested, error) {
	ctx, cancel := context.WithTimeout(ctx, attestTimeout)
	defer cancel()
	attested, err := a.Attest(ctx, peer)
	if err != nil {
		return nil, err
	}
	e.finally(func() error {
		attested.Release()
		return nil
	})
	return attested, nil
}

// is waits for an identity; "" is none.
func is(ctx context.Context, a *spiffe.Attested, id string, within time.Duration) error {
	changed := make(chan struct{}, 1)
	stop := a.Watch(func() {
		select {
		case changed <- struct{}{}:
		default:
		}
	})
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	for a.Identity().ID.String() != id {
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("after %v the identity is %q, want %q", within, a.Identity().ID, id)
		}
	}
	return nil
}

// stays tells what ends something that must hold for a while.
func stays(ctx context.Context, during time.Duration, holds func() error) error {
	end := time.NewTimer(during)
	defer end.Stop()
	tick := time.NewTicker(look)
	defer tick.Stop()
	for {
		if err := holds(); err != nil {
			return err
		}
		select {
		case <-tick.C:
		case <-end.C:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// says tells whether an error names all of the words.
func says(err error, words ...string) error {
	if err == nil {
		return fmt.Errorf("no error, want one with %q", words)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			return fmt.Errorf("the message does not say %q: %w", w, err)
		}
	}
	return nil
}

// domain is a trust domain of the case's own.
func domain(name string) spiffeid.TrustDomain { return spiffeid.RequireTrustDomainFromString(name) }

// unreachable opens the directory of a socket to root alone, for the time of the case.
func (e *Env) unreachable(dir string) error {
	e.finally(func() error { return os.Chmod(dir, 0o755) })
	return os.Chmod(dir, 0o700)
}
