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
	var checks checkList
	if p.ctx != nil {
		checks = p.ctx.Checks
		for i := range checks {
			verdict = worse(verdict, verdictOf(checks[i].Decision))
		}
	}
	s.Metrics.decided[p.Key][verdict].Inc()
	if p.ctx == nil && p.kind != relay {
		return
	}
	e := t.Line("operation", verdict).Str("api", apiName(p.Key)).Int16("version", p.Version).Str("client_id", p.clientID)
	if more := len(checks) - maxChecks; more > 0 {
		checks = checks[:maxChecks]
		e = e.Int("resources_omitted", more)
	}
	if len(checks) > 0 {
		e = e.Array("resources", checks)
	}
	e.Int64("latency_us", time.Since(p.started).Microseconds()).Send()
}

// auditUnknown tells of a request whose answer never came: nobody knows whether the broker carried it out.
func (s *session) auditUnknown(p *pending) {
	if p.kind == acked {
		s.auditUnanswered(s.upTrail, p)
		return
	}
	s.upTrail.Line("operation", audit.Allow).Str("api", apiName(p.Key)).Int16("version", p.Version).
		Str("client_id", p.clientID).Str("outcome", "unknown").Send()
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
