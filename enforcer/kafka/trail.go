package kafka

import (
	"time"

	"github.com/rs/zerolog"
	"github.com/twmb/franz-go/pkg/kerr"

	"klamm/enforcer/audit"
	"klamm/enforcer/kafka/authz"
)

// maxChecks is how many decisions one line lists; the rest is counted.
const maxChecks = 64

// auditChecks writes one line with the decisions a request took, and counts the request. What was decided in place has
// its lines by partition, and none here.
func (s *session) auditChecks(t *audit.Trail, p *pending, verdict audit.Verdict) {
	checks, verdict := p.checks(verdict)
	s.Metrics.decided[p.Key][verdict].Inc()
	if p.ctx == nil && p.kind != relay {
		return
	}
	operation(t, p, verdict, checks).Int64("latency_us", time.Since(p.started).Microseconds()).Send()
}

func operation(t *audit.Trail, p *pending, verdict audit.Verdict, checks checkList) *zerolog.Event {
	e := t.Line("operation", verdict).Str("api", apiName(p.Key)).Int16("version", p.Version).Str("client_id", p.clientID)
	if more := len(checks) - maxChecks; more > 0 {
		checks = checks[:maxChecks]
		e = e.Int("resources_omitted", more)
	}
	if len(checks) > 0 {
		e = e.Array("resources", checks)
	}
	return e
}

// auditUnknown tells of a request whose answer never came: nobody knows whether the broker carried it out.
func (s *session) auditUnknown(p *pending) {
	if p.kind == ours {
		return
	}
	s.upSpeaksOf(p.who)
	if p.kind == acked {
		s.auditUnanswered(s.upTrail, p)
		return
	}
	checks, verdict := p.checks(audit.Allow)
	operation(s.upTrail, p, verdict, checks).Str("outcome", "unknown").Send()
}

// checks are the decisions the request took, and the gravest of them and the given verdict.
func (p *pending) checks(verdict audit.Verdict) (checkList, audit.Verdict) {
	if p.ctx == nil {
		return nil, verdict
	}
	for i := range p.ctx.Checks {
		verdict = worse(verdict, verdictOf(p.ctx.Checks[i].Decision))
	}
	return p.ctx.Checks, verdict
}

type checkList []authz.Check

func (l checkList) MarshalZerologArray(a *zerolog.Array) {
	for i := range l {
		a.Object((*check)(&l[i]))
	}
}

type check authz.Check

func (c *check) MarshalZerologObject(e *zerolog.Event) {
	e.Str("type", c.Type.String()).Str("name", c.Name).Str("operation", c.Operation.String()).
		Str("verdict", string(verdictOf(c.Decision))).Str("rule", c.Rule)
}

// worse is the graver of two verdicts.
func worse(a, b audit.Verdict) audit.Verdict {
	switch {
	case a == audit.Deny || b == audit.Deny:
		return audit.Deny
	case a == audit.WouldDeny || b == audit.WouldDeny:
		return audit.WouldDeny
	}
	return audit.Allow
}

func errorName(code int16) string {
	if err := kerr.TypedErrorForCode(code); err != nil {
		return err.Message
	}
	return "NONE"
}
