package kafka

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"klamm/enforcer/audit"
	"klamm/enforcer/policy"
	"klamm/spiffe"
)

// binding is who the client is at a moment, and what that may do by the policy of that moment. Immutable.
type binding struct {
	policy   *policy.Policy
	identity *spiffe.Identity
	login    *login    // nil: none was accepted
	until    time.Time // the view holds no longer; zero: for as long as the three above are what they are
	subject  policy.Subject
	view     *policy.View
	audit    audit.Subject
	lost     *Error // why nobody has rights on this connection; nil: somebody has
}

// who is the client now, by the policy, the identity and the login of this moment.
func (s *session) who(now time.Time) *binding {
	if b := s.bound.Load(); s.holds(b, now) {
		return b
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if b := s.bound.Load(); s.over || s.holds(b, now) {
		return b
	}
	return s.bind(now)
}

func (s *session) holds(b *binding, now time.Time) bool {
	return b != nil && b.policy == s.Policy.Load() && b.identity == s.conn.Workload.Identity() &&
		b.login == s.login.Load() && (b.until.IsZero() || now.Before(b.until))
}

// view is what the client may do now.
func (s *session) view() *policy.View { return s.who(time.Now()).view }

// own is the principal by which the broker knows the client because it logged in itself; see authz.Ctx.
func (b *binding) own() string {
	if b.login == nil || b.lost != nil {
		return ""
	}
	return b.login.Principal
}

// bind takes up what has changed, puts it on record, and ends the connection where its rights end with it.
func (s *session) bind(now time.Time) *binding {
	was := s.bound.Load()
	b := &binding{policy: s.Policy.Load(), identity: s.conn.Workload.Identity(), login: s.login.Load(),
		subject: s.conn.Policy, audit: s.conn.Subject}
	b.lost = s.holder.missing(b.identity)
	if id := b.identity.ID; !id.IsZero() && b.lost == nil {
		b.subject.SPIFFE = id.String()
	}
	b.audit.Identity = *b.identity
	facts := policy.Facts{Identity: b.identity}
	if b.login != nil {
		facts.SASL = b.login.SASL
		b.subject.Principal, b.audit.Principal, b.audit.Login = b.login.Principal, b.login.Principal, b.login.audit
		b.until = b.login.expires()
	}
	b.subject.Facts = &facts
	if was != nil && was.identity == b.identity && was.login == b.login {
		b.subject.Facts = was.subject.Facts
	}
	if b.lost == nil && !b.until.IsZero() && !now.Before(b.until) {
		b.lost = &Error{audit.SessionExpired, fmt.Errorf("the token of %s ended at %s", b.subject.Principal, utc(b.until))}
	}
	if b.lost == nil && b.login != nil && !b.policy.Login(b.subject, b.login.Principal).Allowed {
		b.lost = &Error{audit.LoginRefused, errors.New("the policy does not let the workload be logged in as it is any more")}
	}
	if b.lost == nil {
		b.view = b.policy.For(b.subject)
	} else {
		b.until, b.view = time.Time{}, b.policy.Nobody(b.subject)
	}
	s.bound.Store(b)
	s.tell(was, b)
	if b.lost != nil && (was == nil || was.lost == nil) {
		s.lose(b)
	}
	return b
}

// lose ends the connection of a client that has no right any more, where it must not go on without. An expired login
// that is just being renewed does not end it.
func (s *session) lose(b *binding) {
	expired := b.lost.Reason == audit.SessionExpired
	switch {
	case !expired && (s.conn.AsWorkload || s.conn.Login != nil):
		s.end(b.lost)
	case s.CloseOnLoss && (!expired || !s.renewing.Load()):
		s.end(b.lost)
	default:
		s.Metrics.Refuse(b.lost.Reason)
	}
}

// tell puts on record how who the client is has changed. A renewal, with which only the end of the evidence changes,
// has no line: those that follow show it.
func (s *session) tell(was, b *binding) {
	if was == nil {
		was = &binding{identity: &s.conn.Subject.Identity} // as the line of the opened connection has it
	}
	lost := b.lost != nil && was.lost == nil
	other := !sameEvidence(was.identity, b.identity)
	login := b.login != nil && (was.login == nil || was.login.Principal != b.login.Principal)
	if !lost && !other && !login {
		return
	}
	trail := s.conn.Audit.Trail(b.audit)
	switch {
	case lost:
		trail.Line("identity", audit.Deny).Str("change", string(b.lost.Reason)).Str("from", named(was.identity)).
			Str("to", named(b.identity)).Str("why", b.lost.Error()).Str("hint", audit.Reasons[b.lost.Reason]).Send()
	case other:
		verdict := audit.Allow
		if b.lost != nil {
			verdict = audit.Deny
		}
		trail.Line("identity", verdict).Str("change", "identity").Str("from", named(was.identity)).
			Str("to", named(b.identity)).Str("source", b.identity.Source).Send()
	case login:
		trail.Line("identity", verdictOf(b.login.decision)).Str("change", "login").
			Str("from", was.subject.Principal).Str("to", b.subject.Principal).Str("source", spiffe.SourceSASL).
			Str("rule", b.login.decision.Rule).Send()
	}
	if err := onRecord(trail)(); err != nil {
		s.end(err)
	}
}

// changed takes up a new identity at once, also where no frame comes.
func (s *session) changed() { s.who(time.Now()) }

// holder is whom a connection was given to: the first SPIFFE ID it was seen with, and for as long as it has none, the
// first subject of a token or certificate.
type holder struct {
	id              spiffeid.ID
	issuer, subject string
}

// missing tells why the holder is not behind the connection any more; nil where it is, or there was none yet.
func (h *holder) missing(id *spiffe.Identity) *Error {
	switch {
	case id.Lost != nil:
		return &Error{audit.IdentityLost, id.Lost}
	case h.id.IsZero() && !id.ID.IsZero():
		h.id = id.ID
		return nil
	case h.id != id.ID && !id.ID.IsZero():
		return &Error{audit.IdentityChanged, fmt.Errorf("the workload was %s and is %s", h.id, id.ID)}
	case h.id != id.ID:
		return &Error{audit.IdentityLost, fmt.Errorf("no source knows the workload as %s any more", h.id)}
	case !h.id.IsZero():
		return nil
	}
	first := slices.IndexFunc(id.Evidence, func(e spiffe.Evidence) bool { return e.Subject != "" })
	switch {
	case h.subject == "" && first >= 0:
		h.issuer, h.subject = id.Evidence[first].Issuer, id.Evidence[first].Subject
	case h.subject == "" || slices.ContainsFunc(id.Evidence, h.is):
	case first >= 0:
		return &Error{audit.IdentityChanged, fmt.Errorf("the workload was %s and is %s", h.subject, named(id))}
	default:
		return &Error{audit.IdentityLost, fmt.Errorf("no source knows the workload as %s any more", h.subject)}
	}
	return nil
}

func (h *holder) is(e spiffe.Evidence) bool { return e.Issuer == h.issuer && e.Subject == h.subject }

// named is what an identity is called: its SPIFFE ID, or the first subject of its evidence; empty where it has neither.
func named(id *spiffe.Identity) string {
	if !id.ID.IsZero() {
		return id.ID.String()
	}
	for i := range id.Evidence {
		if id.Evidence[i].Subject != "" {
			return id.Evidence[i].Subject
		}
	}
	return ""
}

// sameEvidence tells whether two identities are of the same sources that say the same, but perhaps until another time.
func sameEvidence(a, b *spiffe.Identity) bool {
	return a == b || a.ID == b.ID && slices.EqualFunc(a.Evidence, b.Evidence, func(a, b spiffe.Evidence) bool {
		return a.Source == b.Source && a.ID == b.ID && a.Rule == b.Rule && a.Issuer == b.Issuer && a.Subject == b.Subject
	})
}

func utc(t time.Time) string { return t.UTC().Format(time.RFC3339) }
