package cases

import (
	"context"
	"errors"
	"strings"

	"klamm/test/spire"
)

// Impostor is for a fake that serves the Broker API as who is no agent.
var Impostor = Case{"a Broker API that is no agent's is not asked", func(ctx context.Context, e *Env) error {
	s, a, err := e.source(e.options())
	if err != nil {
		return err
	}
	if err := until(ctx, patience, func() error {
		return says(s.State().Err, e.Socket(e.API), "want an agent of spiffe://example.test")
	}); err != nil {
		return err
	}
	uid := user()
	if _, err := e.register(ctx, spire.Entry{ID: e.ID("/orders"), Selectors: selector(uid)}); err != nil {
		return err
	}
	attested, err := e.connected(ctx, a, uid)
	if err != nil {
		return err
	}
	return is(ctx, attested, "", 0)
}}

// Flood is for a fake, which takes a hint of any length.
var Flood = Case{"an answer larger than the bound is not taken", func(ctx context.Context, e *Env) error {
	s, a, err := e.serving(ctx)
	if err != nil {
		return err
	}
	uid := user()
	if _, err := e.register(ctx, spire.Entry{ID: e.ID("/flood"), Selectors: selector(uid),
		Hint: strings.Repeat("x", 5<<20)}); err != nil {
		return err
	}
	attested, err := e.connected(ctx, a, uid)
	if err != nil {
		return err
	}
	if err := until(ctx, patience, func() error {
		if s.State().Failures["ResourceExhausted"] == 0 {
			return errors.New("nothing was refused")
		}
		return nil
	}); err != nil {
		return err
	}
	return is(ctx, attested, "", 0)
}}
