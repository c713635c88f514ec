package spiffe

import (
	"context"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

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
