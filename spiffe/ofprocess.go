package spiffe

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// OfProcess are the SVIDs that the agent has for a process at one moment. They are for diagnosis alone: nothing proves
// that the pid stays that process.
type OfProcess struct {
	source *SPIRE
	pid    int32
	svid   *x509svid.SVID
}

// OfProcess asks the agent for a process. ErrNoSVID where it does not know it. It takes no longer than ctx.
func (s *SPIRE) OfProcess(ctx context.Context, pid int32) (*OfProcess, error) {
	s.agent.Asked(ctx) // the Broker API wants to see the node's SVID
	o := &OfProcess{source: s, pid: pid}
	enough := errors.New("it is known")
	err := s.subscribe(ctx, pid, answerTimeout, func(raw []rawSVID) error {
		if len(raw) == 0 {
			return fmt.Errorf("%w: the agent has no entry that fits pid %d", ErrNoSVID, pid)
		}
		svid, err := s.choose(raw)
		if err != nil {
			return err
		}
		o.svid = svid
		return enough
	})
	if !errors.Is(err, enough) {
		return nil, err
	}
	return o, nil
}

// X509SVID is what the process had when it was asked for.
func (o *OfProcess) X509SVID() (*x509svid.SVID, error) { return o.svid, nil }

// JWTSVID asks for one.
func (o *OfProcess) JWTSVID(ctx context.Context, audience string) (token string, expires time.Time, err error) {
	tokens, err := o.source.delegate.jwt(ctx, o.pid, audience)
	if err != nil {
		return "", time.Time{}, err
	}
	t, err := pickJWT(tokens, o.svid.ID, audience)
	return t.token, t.expires, err
}
