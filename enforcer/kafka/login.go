package kafka

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/audit"
	"klamm/enforcer/kafka/authz"
	"klamm/enforcer/kafka/sasl"
	"klamm/enforcer/kafka/wire"
	"klamm/enforcer/policy"
	"klamm/spiffe"
)

const (
	// maxAuthFrame is the largest frame of a login, in bytes: what fits in a pipe's base buffer, so that no copy of a
	// password stays behind in an outgrown one. A Kerberos ticket has 48,000 bytes at most. (Kafka:
	// sasl.server.max.receive.size, 512 KiB.)
	maxAuthFrame  = wire.BaseBuffer - wire.SizePrefix
	verifyTimeout = 5 * time.Second
	renewTimeout  = 10 * time.Second // for a login that was due again and is under way
)

// login is a SASL login that the broker accepted. Immutable.
type login struct {
	policy.SASL
	audit    audit.Login
	decision policy.Decision
	renewBy  time.Time // the broker wants another login by then (KIP-368); zero: it does not
}

// expires is when the token ends; zero: never, or not known.
func (l *login) expires() time.Time {
	if l == nil || l.Token == nil {
		return time.Time{}
	}
	return l.Token.Expires
}

// ends is when no request may follow without another login; zero: never.
func (l *login) ends() time.Time {
	if l == nil {
		return time.Time{}
	}
	end := l.renewBy
	if token := l.expires(); end.IsZero() || !token.IsZero() && token.Before(end) {
		end = token
	}
	return end
}

func (l *login) over(now time.Time) bool {
	end := l.ends()
	return !end.IsZero() && !now.Before(end)
}

// attempt is an exchange that is under way.
type attempt struct {
	sasl.Exchange
	claimed login // counts once the broker has accepted it
}

func isLogin(key int16) bool {
	return key == int16(kmsg.SASLHandshake) || key == int16(kmsg.SASLAuthenticate)
}

// oversized refuses frames that a login must not have, by their size and their first two bytes: before they are read.
func (s *session) oversized(size int, key []byte) error {
	if key[0] == gssapiToken {
		return refuse(audit.BadFrame, "a GSSAPI token without SaslHandshake, as of Kafka 0.9")
	}
	if size > maxAuthFrame && (s.attempt != nil || isLogin(int16(binary.BigEndian.Uint16(key)))) {
		return refuse(audit.BadFrame, "a frame of %d bytes in a SASL login; the limit is %d", size, maxAuthFrame)
	}
	return nil
}

// gssapiToken begins a token of RFC 2743, section 3.1. An API key that begins so does not exist.
const gssapiToken = 0x60

// admit tells whether a request may come at this point of a login: as a broker, which closes the connection of an
// expired session without an answer, and takes nothing but SaslAuthenticate while an exchange is under way.
func (s *session) admit(b *binding, key int16, now time.Time) (legal bool, err error) {
	if s.attempt != nil {
		return key == int16(kmsg.SASLAuthenticate), nil
	}
	if b.login.over(now) && key != int16(kmsg.SASLHandshake) {
		return false, refuse(audit.SessionExpired, "%s after the session of %s ended at %s", apiName(key), b.login.Principal,
			utc(b.login.ends()))
	}
	return true, nil
}

// endsOpaque ends an exchange that only its parties can read: the client goes on to something else, and the broker,
// which knows whether it has accepted the client, judges that.
func (s *session) endsOpaque(key int16) {
	if a := s.attempt; a != nil && a.Opaque() && a.Begun() && key != int16(kmsg.SASLAuthenticate) {
		s.accepted(a, 0)
	}
}

// illegal refuses what may not come within an exchange, and ends the connection.
func (s *session) illegal(e entry, frame []byte) error {
	cause := refuse(audit.LoginRefused, "%s within a SASL exchange", apiName(e.V.Key))
	d, err := s.decodeRequest(e, frame)
	if err != nil {
		return errors.Join(cause, err)
	}
	defer d.shrink(0)
	return s.refuseWith(e, frame, authz.Refuse(d.req, kerr.IllegalSaslState, ""), cause)
}

// refuseWith gives our answer, if there is one, and ends the connection behind it.
func (s *session) refuseWith(e entry, frame []byte, resp kmsg.Response, cause error) error {
	e.V.ctx = &authz.Ctx{}
	if resp == nil {
		s.auditChecks(s.upTrail, &e.V, audit.Deny)
		return cause
	}
	if err := s.deny(e, frame, resp); err != nil {
		return err
	}
	if err := s.up.Flush(); err != nil {
		return err
	}
	if err := s.queue.WaitEmpty(); err != nil {
		return err
	}
	if closeWrite(s.conn.Client) == nil {
		s.linger()
	}
	return cause
}

// beforeLogin judges a frame of a login before the broker gets it. It tells whether it is answered already.
func (s *session) beforeLogin(e entry, frame []byte, req kmsg.Request, b *binding) (answered bool, err error) {
	switch req := req.(type) {
	case *kmsg.SASLHandshakeRequest:
		if s.conn.Login != nil {
			return true, s.deny(e, frame, authz.Refuse(req, kerr.IllegalSaslState, ""))
		}
		e.V.kind, s.offered = greeted, req.Mechanism
		s.renewing.Store(true)
	case *kmsg.SASLAuthenticateRequest:
		if s.attempt == nil && s.login.Load() == nil && s.conn.Login == nil {
			e.V.kind = authenticated // no broker accepts it; one that wants a login closes, another says why
			return false, nil
		}
		if s.attempt == nil { // as a broker outside of an exchange
			const msg = "SaslAuthenticate request received after successful authentication"
			return true, s.deny(e, frame, authz.Refuse(req, kerr.IllegalSaslState, msg))
		}
		e.V.kind = authenticated
		claim, err := s.attempt.Client(req.SASLAuthBytes)
		if err == nil && claim != nil {
			err = s.judge(claim, b)
		}
		if err != nil {
			return true, s.refuseWith(e, frame, authz.Refuse(req, kerr.SaslAuthenticationFailed, s.safely(err)),
				&Error{audit.LoginRefused, err})
		}
	}
	return false, nil
}

// refusal is why a login is refused, in words that may be said to who is nobody yet.
type refusal struct {
	public string
	err    error // for the operator
}

func (r *refusal) Error() string { return r.err.Error() }
func (r *refusal) Unwrap() error { return r.err }

// safely is the message of the answer that refuses a login; where there is nothing else to say, that of a broker.
func (s *session) safely(err error) string {
	var said *refusal
	if errors.As(err, &said) {
		return said.public
	}
	return fmt.Sprintf("Authentication failed during %s due to invalid credentials with SASL mechanism %s",
		s.stage(), s.attempt.Mechanism)
}

func (s *session) stage() string {
	if s.login.Load() != nil {
		return "re-authentication"
	}
	return "authentication"
}

// judge decides whether the client may make this claim to the broker.
func (s *session) judge(claim *sasl.Claim, b *binding) error {
	l := login{SASL: policy.SASL{Mechanism: s.attempt.Mechanism, Principal: claim.Principal}}
	if claim.Token != nil {
		token, err := s.verify(claim)
		if err != nil {
			return err
		}
		if token != nil {
			l.Token, l.Principal = token, "User:"+token.Subject
		}
	}
	if before := s.login.Load(); before != nil {
		if before.Mechanism != l.Mechanism {
			text := fmt.Sprintf("SASL mechanism '%s' requested by client is not supported for re-authentication of "+
				"mechanism '%s'", l.Mechanism, before.Mechanism)
			return &refusal{text, errors.New(text)}
		}
		if before.Principal != l.Principal {
			text := fmt.Sprintf("Cannot change principals during re-authentication from %s: %s", before.Principal,
				l.Principal)
			return &refusal{text, errors.New(text)}
		}
	}
	asking := b.subject
	asking.Facts = &policy.Facts{Identity: b.identity, SASL: l.SASL}
	l.decision = b.policy.Login(asking, l.Principal)
	if !l.decision.Allowed {
		as := l.Principal
		if as == "" {
			as = "a principal that " + l.Mechanism + " does not show"
		}
		text := fmt.Sprintf("the policy does not let this workload log in as %s", as)
		return &refusal{"Authentication failed: " + text, errors.New(text)}
	}
	l.audit = audit.Login{Mechanism: l.Mechanism, Token: l.Token, DelegationToken: claim.DelegationToken,
		AccessKeyID: claim.AccessKeyID, Region: claim.Region}
	s.attempt.claimed = l
	return nil
}

// verify is what the token says. It is nil where the token is not for us to read: opaque, or of an issuer that is not
// ours; then no principal is known, whatever the broker accepts.
func (s *session) verify(claim *sasl.Claim) (*spiffe.Evidence, error) {
	if s.Tokens == nil {
		return nil, nil
	}
	ctx, cancel := context.WithTimeout(s.life, verifyTimeout)
	defer cancel()
	token, err := s.Tokens.Verify(ctx, string(claim.Token))
	var rejected *spiffe.TokenError
	switch {
	case errors.As(err, &rejected) && (rejected.Check == spiffe.CheckFormat || rejected.Check == spiffe.CheckIssuer):
		return nil, nil
	case errors.As(err, &rejected):
		return nil, &refusal{"Authentication failed: " + rejected.Public(), err}
	case err != nil:
		return nil, &refusal{"Authentication failed: the token could not be verified", err}
	case claim.AuthzID != "" && claim.AuthzID != token.Subject:
		return nil, &refusal{"Authentication failed: the authorization id is not the token's principal",
			fmt.Errorf("authorization id %q with a token of %q", claim.AuthzID, token.Subject)}
	}
	return token, nil
}

// afterLogin takes the broker's answer to a frame of a login, which is passed on as it is returned. The request loop
// waits for it, so nothing else looks at the attempt meanwhile.
func (s *session) afterLogin(p *pending, frame []byte) ([]byte, error) {
	answer, weight, err := s.decode(p, frame)
	s.memory.decoding.Release(weight)
	if err != nil {
		return nil, err
	}
	switch answer := answer.(type) {
	case *kmsg.SASLHandshakeResponse:
		if answer.ErrorCode != 0 {
			s.renewing.Store(false)
			break
		}
		s.attempt = &attempt{Exchange: sasl.Exchange{Mechanism: s.offered}}
	case *kmsg.SASLAuthenticateResponse:
		if s.attempt == nil {
			if answer.ErrorCode == 0 {
				return nil, refuse(audit.LoginRefused, "the broker accepts a login without a handshake")
			}
			return frame, nil
		}
		if answer.ErrorCode != 0 {
			return frame, s.refused(p, frame, answer.ErrorCode)
		}
		a := s.attempt
		life := time.Duration(answer.SessionLifetimeMillis) * time.Millisecond
		if !a.Answered(answer.SASLAuthBytes) && (!a.Opaque() || life <= 0) {
			break
		}
		s.accepted(a, life)
		p.who = s.who(time.Now())
		// Only where the broker lets it log in again.
		if life > 0 && !a.claimed.expires().IsZero() {
			answer.SessionLifetimeMillis = max(1, told(min(life, time.Until(a.claimed.expires()))).Milliseconds())
			return wire.AppendResponse(nil, p.Correlation, answer), nil
		}
	}
	return frame, nil
}

// told is how long a client hears that its token lasts. It logs in again before its next request once most of that is
// over (KIP-368; franz-go some 3 s before, Java at 85 to 95 %), but a fetch may wait at the broker by then, with
// franz-go for 5 s, and we close at the token's end, where a broker would wait for the next request.
func told(left time.Duration) time.Duration { return left - min(left/6, 30*time.Second) }

// refused takes the broker's refusal of a login. One that was to renew another ends the connection, as it does at the
// broker; the client gets the answer first.
func (s *session) refused(p *pending, frame []byte, code int16) error {
	s.attempt = nil
	s.renewing.Store(false)
	if s.login.Load() == nil {
		return nil
	}
	s.auditChecks(s.downTrail, p, audit.Allow)
	s.down.Pass(len(frame))
	return errors.Join(s.down.Flush(),
		refuse(audit.LoginRefused, "the broker refused to renew the login: %s", errorName(code)))
}

// accepted makes a login count. The broker wants another one within life; 0: it does not.
func (s *session) accepted(a *attempt, life time.Duration) {
	l := a.claimed
	if life > 0 {
		l.renewBy = time.Now().Add(life)
	}
	s.attempt = nil
	s.mu.Lock()
	s.login.Store(&l)
	s.arm(&l, time.Until(l.ends()))
	s.mu.Unlock()
	s.renewing.Store(false)
}

// arm makes a login expire also where no frame comes.
func (s *session) arm(l *login, in time.Duration) {
	if s.expiry != nil {
		s.expiry.Stop()
	}
	if !l.ends().IsZero() {
		s.expiry = time.AfterFunc(in, func() { s.expired(l) })
	}
}

// expired ends a connection whose login was not renewed in time, where it must not go on without: at the end of a token
// at once. Where only the broker's session has ended what it owes may still come, as from a broker itself.
func (s *session) expired(l *login) {
	now := time.Now()
	b := s.who(now)
	if b.login != l || !s.CloseOnLoss {
		return
	}
	waits := s.renewing.Load() && now.Before(l.ends().Add(renewTimeout)) || b.lost == nil && s.queue.Owes()
	if !l.over(now) || waits {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.login.Load() == l && !s.over {
			s.arm(l, time.Second/2)
		}
		return
	}
	s.end(&Error{audit.SessionExpired, fmt.Errorf("the session of %s ended at %s", l.Principal, utc(l.ends()))})
}
