package upstream

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
	"github.com/twmb/franz-go/pkg/sasl"
	"github.com/twmb/franz-go/pkg/sasl/oauth"
	"github.com/twmb/franz-go/pkg/sasl/plain"
	"github.com/twmb/franz-go/pkg/sasl/scram"
)

// Credentials say how the node logs in at brokers. Files are read anew at each login.
type Credentials struct {
	// Audience makes it SASL/OAUTHBEARER with the workload's JWT-SVID for this audience. All below but Extensions is
	// for other mechanisms then.
	Audience string
	// Mechanism is one of Mechanisms.
	Mechanism string

	Username, PasswordFile string // PLAIN, SCRAM

	// Client credentials (RFC 6749, section 4.4) for OAUTHBEARER.
	TokenURL, ClientID, ClientSecretFile string
	Scopes                               []string
	CA                                   string // PEM file with the CAs of TokenURL; empty: those the host trusts

	Extensions map[string]string // SASL extensions of OAUTHBEARER (KIP-342)
}

// bearer is the mechanism of tokens.
const bearer = "OAUTHBEARER"

// mechanisms make what a mechanism takes of credentials.
var mechanisms = map[string]func(c *Credentials, t *tokens) sasl.Mechanism{
	"PLAIN": func(c *Credentials, _ *tokens) sasl.Mechanism {
		return plain.Plain(func(context.Context) (plain.Auth, error) {
			pass, err := secret("password-file", c.PasswordFile)
			return plain.Auth{User: c.Username, Pass: pass}, err
		})
	},
	"SCRAM-SHA-256": func(c *Credentials, _ *tokens) sasl.Mechanism { return scram.Sha256(c.scram) },
	"SCRAM-SHA-512": func(c *Credentials, _ *tokens) sasl.Mechanism { return scram.Sha512(c.scram) },
	bearer: func(c *Credentials, t *tokens) sasl.Mechanism {
		return oauth.Oauth(func(ctx context.Context) (oauth.Auth, error) {
			token, err := t.get(ctx)
			return oauth.Auth{Token: token, Extensions: c.Extensions}, err
		})
	},
}

// Mechanisms are the mechanisms of logins by credentials, sorted.
func Mechanisms() []string { return slices.Sorted(maps.Keys(mechanisms)) }

func (c *Credentials) scram(context.Context) (scram.Auth, error) {
	pass, err := secret("password-file", c.PasswordFile)
	return scram.Auth{User: c.Username, Pass: pass}, err
}

// check reads the files.
func (c *Credentials) check() error {
	for key, file := range map[string]string{"password-file": c.PasswordFile, "client-secret-file": c.ClientSecretFile} {
		if file == "" {
			continue
		}
		if _, err := secret(key, file); err != nil {
			return err
		}
	}
	_, err := readCA(c.CA)
	return err
}

// secret is what the file of a key of the configuration holds, without the line's end.
func secret(key, file string) (string, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("read %s: %w", key, err)
	}
	b = bytes.TrimSuffix(bytes.TrimSuffix(b, []byte("\n")), []byte("\r"))
	if len(b) == 0 {
		return "", fmt.Errorf("read %s: %s is empty", key, file)
	}
	return string(b), nil
}

// mechanism logs in on behalf of who.
func (c *Credentials) mechanism(who Identity, t *tokens) sasl.Mechanism {
	if c.Audience == "" {
		return mechanisms[c.Mechanism](c, t)
	}
	return oauth.Oauth(func(ctx context.Context) (oauth.Auth, error) {
		if who == nil {
			return oauth.Auth{}, ErrNoSVID
		}
		token, _, err := who.JWTSVID(ctx, c.Audience)
		if err != nil {
			return oauth.Auth{}, fmt.Errorf("%w: %w", ErrNoSVID, err)
		}
		return oauth.Auth{Token: token, Extensions: c.Extensions}, nil
	})
}

// Mechanism is the login as franz-go's clients take it, on behalf of who.
func (u *Upstream) Mechanism(who Identity) sasl.Mechanism { return u.login.mechanism(who, u.tokens) }

// Login is the node's login at one broker, for one connection.
type Login struct {
	mechanism sasl.Mechanism
	broker    string
	due       atomic.Int64 // Unix time in ns; 0: never
}

// Due is when the login must be renewed (KIP-368); zero: never. What is left of the session's life then is for a broker
// that is at work on earlier requests.
func (l *Login) Due() time.Time {
	if ns := l.due.Load(); ns != 0 {
		return time.Unix(0, ns)
	}
	return time.Time{}
}

// maxRounds bounds the messages of one login: SCRAM takes two.
const maxRounds = 8

// maxLifetime bounds what a broker says of the session's life.
const maxLifetime = 365 * 24 * time.Hour

// Exchange logs in: call sends a request and returns its answer. Calls follow one another.
func (l *Login) Exchange(ctx context.Context, call func(kmsg.Request) (kmsg.Response, error)) error {
	if err := l.exchange(ctx, call); err != nil {
		if !errors.Is(err, ErrNoSVID) {
			err = fmt.Errorf("%w: %w", ErrLogin, err)
		}
		return fmt.Errorf("%s at %s: %w", l.mechanism.Name(), l.broker, err)
	}
	return nil
}

func (l *Login) exchange(ctx context.Context, call func(kmsg.Request) (kmsg.Response, error)) error {
	session, message, err := l.mechanism.Authenticate(ctx, l.broker)
	if err != nil {
		return err
	}
	if err := l.handshake(call); err != nil {
		return err
	}
	for range maxRounds {
		sent := time.Now()
		answer, err := authenticate(call, message)
		if err != nil {
			return err
		}
		var done bool
		if done, message, err = session.Challenge(answer.SASLAuthBytes); err != nil {
			return fmt.Errorf("the broker says %.200q: %w", answer.SASLAuthBytes, err)
		}
		if done {
			l.renew(sent, time.Duration(answer.SessionLifetimeMillis)*time.Millisecond)
			return nil
		}
	}
	return fmt.Errorf("the broker wants more than %d messages", maxRounds)
}

func (l *Login) handshake(call func(kmsg.Request) (kmsg.Response, error)) error {
	req := kmsg.NewPtrSASLHandshakeRequest()
	req.Version, req.Mechanism = 1, l.mechanism.Name()
	resp, err := call(req)
	if err != nil {
		return err
	}
	answer, is := resp.(*kmsg.SASLHandshakeResponse)
	if !is {
		return fmt.Errorf("the handshake's answer is a %T", resp)
	}
	if err := kerr.ErrorForCode(answer.ErrorCode); err != nil {
		return fmt.Errorf("the broker takes %s: %w", strings.Join(answer.SupportedMechanisms, ", "), err)
	}
	return nil
}

func authenticate(call func(kmsg.Request) (kmsg.Response, error), message []byte) (
	*kmsg.SASLAuthenticateResponse, error) {
	req := kmsg.NewPtrSASLAuthenticateRequest()
	req.Version, req.SASLAuthBytes = 1, message
	resp, err := call(req)
	if err != nil {
		return nil, err
	}
	answer, is := resp.(*kmsg.SASLAuthenticateResponse)
	if !is {
		return nil, fmt.Errorf("the login's answer is a %T", resp)
	}
	if err := kerr.ErrorForCode(answer.ErrorCode); err != nil {
		var said string
		if answer.ErrorMessage != nil {
			said = *answer.ErrorMessage
		}
		return nil, fmt.Errorf("the broker says %.200q: %w", said, err)
	}
	return answer, nil
}

// renew plans the next login for 75 to 85 % of the session's life, so that connections do not come all at once. A
// broker takes no second login within a second.
func (l *Login) renew(from time.Time, life time.Duration) {
	if life <= 0 {
		l.due.Store(0)
		return
	}
	life = min(life, maxLifetime)
	part := 0.75 + 0.1*rand.Float64() //nolint:gosec // jitter needs no secrecy
	l.due.Store(from.Add(max(time.Duration(part*float64(life)), time.Second)).UnixNano())
}
