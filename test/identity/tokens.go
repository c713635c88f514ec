package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/test/kafka"
	"klamm/test/oidc"
)

// byLogin lets who logged in as orders use its topic.
const byLogin = `apiVersion: klamm/v1
rules:
  - {name: orders, principals: ["User:orders"], allow: [{topic: orders, operations: [Read, Write, Describe]}]}
  - {name: billing, principals: ["User:billing"], allow: [{topic: billing, operations: [Read, Write, Describe]}]}
`

const tokenAudience = "kafka"

// issued is a world with an OIDC issuer, brokers that believe it for another audience too, and a node that is stricter.
type issued struct {
	*world
	issuer  *oidc.Provider
	cluster *kafka.Cluster
	node    *node
}

func (i *issued) broker() string { return i.cluster.SASLAddrs()[0] }

// tokens checks logins by SASL/OAUTHBEARER.
func tokens(ctx context.Context, tell tell) {
	i, err := newIssued(ctx)
	if err != nil {
		tell("the issuer, Kafka and the node start", "", err)
		return
	}
	tell = i.noting(tell)
	defer func() { tell("it leaves nothing behind", "", i.close()) }()
	checks := []check{{"a good token counts, and the audit says whose it is", i.goodCounts}}
	for _, f := range i.forgeries() {
		checks = append(checks, check{f.name + " is refused by the node, before a broker sees it", f.refused})
	}
	runAll(ctx, tell, append(checks,
		check{"a token for another audience is one that the broker would take", i.brokerIsLenient},
		check{"what cannot be verified gives no rights: opaque tokens, and those of other issuers", i.unverified},
		check{"the end of a token ends the rights of an open connection", i.expiryEnds},
		check{"a new token of the same principal keeps the connection", i.renewed},
		check{"a token of another principal does not", i.otherPrincipal},
		check{"a storm of unknown keys is few fetches at the issuer", i.storm}))
	for _, c := range oidc.Checks() { // last: they replace the issuer's keys
		measured, err := c.Run(ctx, i.issuer)
		tell("by itself: "+c.Name, measured, err)
	}
}

func newIssued(ctx context.Context) (_ *issued, err error) {
	i := &issued{}
	if i.world, err = newWorld("tokens"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, i.close())
		}
	}()
	if err = os.Mkdir(i.file("issuer"), 0o755); err != nil {
		return nil, err
	}
	if i.issuer, err = oidc.Start(ctx, i.file("issuer")); err != nil {
		return nil, err
	}
	i.onClose(i.issuer.Stop)
	i.cluster, err = i.startKafka(ctx, kafka.Options{
		OAuth: &kafka.OAuth{KeySet: i.issuer.KeysURL(), Issuer: i.issuer.URL(),
			Audience: tokenAudience + ",somebody-else"},
		SuperUsers: []string{"User:orders", "User:billing"},
	})
	if err != nil {
		return nil, err
	}
	password, err := i.written("admin-password", []byte(kafka.AdminPassword))
	if err != nil {
		return nil, err
	}
	i.node, err = i.newNode(ctx, "tokens", []int{kafka.SASLPort}, byLogin, sections{
		"clusters": fmt.Sprintf("[{name: main, bootstrap: [%q],"+
			" credentials: {mechanism: PLAIN, username: %s, password-file: %q}}]", i.broker(), kafka.Admin, password),
		"oidc": fmt.Sprintf("[{issuer: %q, audiences: [%s], skew: 0s, required-claims: [team]}]", i.issuer.URL(),
			tokenAudience),
	})
	if err != nil {
		return nil, err
	}
	return i, i.node.ready(ctx)
}

// token is one of the issuer's for the node.
func (i *issued) token(ctx context.Context, client string, life time.Duration) (string, error) {
	return i.issuer.Token(ctx, oidc.Ask{Client: client, Audience: tokenAudience, Algorithm: "ES256", Life: life})
}

// login logs in by OAUTHBEARER over the held connection, which must not be open or must be logged in.
func (p *workload) login(token string) error {
	return p.authenticate("OAUTHBEARER", []byte("n,,\x01auth=Bearer "+token+"\x01\x01"))
}

// authenticate is a login of one message.
func (p *workload) authenticate(mechanism string, message []byte) error {
	handshake := kmsg.NewPtrSASLHandshakeRequest()
	handshake.Version, handshake.Mechanism = 1, mechanism
	resp, err := p.ask(handshake)
	if err != nil {
		return err
	}
	offered := resp.(*kmsg.SASLHandshakeResponse) //nolint:forcetypeassert // its kind
	if err := kerr.ErrorForCode(offered.ErrorCode); err != nil {
		return err
	}
	authenticate := kmsg.NewPtrSASLAuthenticateRequest()
	authenticate.Version, authenticate.SASLAuthBytes = 1, message
	resp, err = p.ask(authenticate)
	if err != nil {
		return err
	}
	answer := resp.(*kmsg.SASLAuthenticateResponse) //nolint:forcetypeassert // its kind
	if err := kerr.ErrorForCode(answer.ErrorCode); err != nil {
		return fmt.Errorf("%w: %s", err, *answer.ErrorMessage)
	}
	return nil
}

// connected is a workload that has a connection.
func (i *issued) connected() (*workload, error) {
	p, err := i.startWorkload(ordersUID)
	if err != nil {
		return nil, err
	}
	return p, p.connect(i.broker())
}

// loggedIn is a workload with a connection and a login that is good for a time.
func (i *issued) loggedIn(ctx context.Context, client string, life time.Duration) (*workload, error) {
	token, err := i.token(ctx, client, life)
	if err != nil {
		return nil, err
	}
	p, err := i.connected()
	if err != nil {
		return nil, err
	}
	return p, p.login(token)
}

func (i *issued) goodCounts(ctx context.Context) (string, error) {
	p, err := i.loggedIn(ctx, "orders", time.Minute)
	if err != nil {
		return "", err
	}
	if err := p.sees("orders"); err != nil {
		return "", err
	}
	l, err := i.node.awaitAudit(ctx, "the login", func(l auditLine) bool {
		return l.PID == uint32(p.pid()) && l.Principal == "User:orders"
	})
	if err == nil && !strings.Contains(l.text, i.issuer.URL()) {
		err = fmt.Errorf("the audit does not name the issuer: %s", l.text)
	}
	return "", errors.Join(err, p.end())
}

// forgery is a token that must not count.
type forgery struct {
	name string
	make func(ctx context.Context) (string, error)
	of   *issued
}

func (i *issued) forgeries() []forgery {
	good := func(ctx context.Context) ([]string, error) {
		token, err := i.token(ctx, "orders", time.Minute)
		return strings.Split(token, "."), err
	}
	return []forgery{
		{"an expired token", func(ctx context.Context) (string, error) {
			token, err := i.token(ctx, "orders", time.Second)
			time.Sleep(1500 * time.Millisecond) // its life
			return token, err
		}, i},
		{"a token for another audience", func(ctx context.Context) (string, error) {
			return i.issuer.Token(ctx, oidc.Ask{Audience: "somebody-else", Algorithm: "ES256", Life: time.Minute})
		}, i},
		{"a token with changed claims", func(ctx context.Context) (string, error) {
			parts, err := good(ctx)
			if err != nil {
				return "", err
			}
			claims, err := base64.RawURLEncoding.DecodeString(parts[1])
			changed := bytes.Replace(claims, []byte(`"sub":"orders"`), []byte(`"sub":"billing"`), 1)
			if bytes.Equal(changed, claims) {
				return "", fmt.Errorf("there is no subject in %s", claims)
			}
			parts[1] = base64.RawURLEncoding.EncodeToString(changed)
			return strings.Join(parts, "."), err
		}, i},
		{"a token of alg none", func(ctx context.Context) (string, error) {
			parts, err := good(ctx)
			if err != nil {
				return "", err
			}
			return base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none","typ":"at+jwt"}`)) + "." + parts[1] + ".", nil
		}, i},
		{"a token signed by somebody else", func(context.Context) (string, error) {
			return i.forged("forged", i.issuer.URL())
		}, i},
	}
}

// forged is a token as the issuer would make it, signed with a key of our own that has this id.
func (i *issued) forged(kid, issuer string) (string, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return "", err
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: kid}},
		new(jose.SignerOptions).WithType("at+jwt"))
	if err != nil {
		return "", err
	}
	now := time.Now()
	return jwt.Signed(signer).Claims(map[string]any{"iss": issuer, "sub": "orders", "aud": tokenAudience,
		"team": "payments", "iat": now.Unix(), "exp": now.Add(time.Minute).Unix()}).Serialize()
}

// refusedLogins is how often the brokers have refused a login, by their own word.
func (i *issued) refusedLogins() (int, error) {
	log, err := os.ReadFile(i.cluster.Log(0))
	return strings.Count(strings.ToLower(string(log)), "failed authentication"), err
}

func (f forgery) refused(ctx context.Context) (string, error) {
	token, err := f.make(ctx)
	if err != nil {
		return "", err
	}
	before, err := f.of.refusedLogins()
	if err != nil {
		return "", err
	}
	p, err := f.of.connected()
	if err != nil {
		return "", err
	}
	said := p.login(token)
	if !errors.Is(said, kerr.SaslAuthenticationFailed) {
		return "", fmt.Errorf("its login ended with %s, not SASL_AUTHENTICATION_FAILED", fmt.Sprint(said))
	}
	_, err = f.of.node.awaitAudit(ctx, "the refusal", func(l auditLine) bool {
		return l.PID == uint32(p.pid()) && l.Event == "refusal"
	})
	if err != nil {
		return said.Error(), err
	}
	after, err := f.of.refusedLogins()
	if err == nil && after != before {
		err = fmt.Errorf("%d logins came to the broker", after-before)
	}
	for _, name := range []string{"audit.jsonl", "node.log"} {
		text, rerr := os.ReadFile(f.of.node.file(name))
		if err = errors.Join(err, rerr); strings.Contains(string(text), token) {
			err = errors.Join(err, fmt.Errorf("the token is in %s", name))
		}
	}
	return said.Error(), errors.Join(err, p.end())
}

// brokerIsLenient: else it would not be known who refused.
func (i *issued) brokerIsLenient(ctx context.Context) (string, error) {
	token, err := i.issuer.Token(ctx, oidc.Ask{Audience: "somebody-else", Algorithm: "ES256", Life: time.Minute})
	if err != nil {
		return "", err
	}
	return "", runClientAt(kafka.Place{},
		client{Broker: i.broker(), Topic: "orders", Mechanism: "OAUTHBEARER", Secret: token})
}

// unverified tokens are the broker's business, and nothing that a rule could name.
func (i *issued) unverified(ctx context.Context) (string, error) {
	opaque, err := i.issuer.Token(ctx, oidc.Ask{Audience: tokenAudience, Algorithm: "opaque", Life: time.Minute})
	if err != nil {
		return "", err
	}
	foreign, err := i.forged("forged", "https://issuer.test")
	if err != nil {
		return "", err
	}
	for name, token := range map[string]string{"an opaque token": opaque, "a token of another issuer": foreign} {
		p, err := i.connected()
		if err != nil {
			return "", err
		}
		if err := p.login(token); err != nil {
			continue
		}
		if topics, err := p.topics(); err == nil && len(topics) > 0 {
			return "", fmt.Errorf("by %s it sees %q", name, topics)
		}
	}
	return "", nil
}

const briefToken = 8 * time.Second

func (i *issued) expiryEnds(ctx context.Context) (string, error) {
	token, err := i.token(ctx, "orders", briefToken)
	if err != nil {
		return "", err
	}
	expiry, err := expiryOf(token)
	if err != nil {
		return "", err
	}
	p, err := i.connected()
	if err != nil {
		return "", err
	}
	if err := errors.Join(p.login(token), p.sees("orders")); err != nil {
		return "", err
	}
	end, err := rightsEnd(ctx, p, briefToken+waitLimit)
	if err != nil {
		return "", err
	}
	return within(expiry, end)
}

// within checks that rights ended when evidence expired.
func within(expiry, end time.Time) (string, error) {
	after := end.Sub(expiry)
	measured := fmt.Sprintf("%d ms after its expiry", after.Milliseconds())
	if after < 0 || after > expiredBound {
		return measured, fmt.Errorf("want at most %v, and not before", expiredBound)
	}
	return measured, nil
}

func expiryOf(token string) (time.Time, error) {
	parsed, err := jwt.ParseSigned(token, []jose.SignatureAlgorithm{jose.ES256, jose.RS256})
	if err != nil {
		return time.Time{}, err
	}
	var claims jwt.Claims
	err = parsed.UnsafeClaimsWithoutVerification(&claims)
	return claims.Expiry.Time(), err
}

func (i *issued) renewed(ctx context.Context) (string, error) {
	p, err := i.loggedIn(ctx, "orders", briefToken)
	if err != nil {
		return "", err
	}
	old := time.Now().Add(briefToken)
	if err := p.sees("orders"); err != nil {
		return "", err
	}
	time.Sleep(briefToken / 2) // Kafka refuses to be asked again within a second
	token, err := i.token(ctx, "orders", time.Minute)
	if err != nil {
		return "", err
	}
	if err := p.login(token); err != nil {
		return "", fmt.Errorf("the login with a new token: %w", err)
	}
	requests := 0
	for time.Since(old) < 2*time.Second {
		if err := p.sees("orders"); err != nil {
			return "", fmt.Errorf("%v after the old token ended: %w", time.Since(old), err)
		}
		requests++
		time.Sleep(10 * time.Millisecond)
	}
	return fmt.Sprintf("%d requests, until 2 s after the old token ended", requests), p.end()
}

func (i *issued) otherPrincipal(ctx context.Context) (string, error) {
	p, err := i.loggedIn(ctx, "orders", time.Minute)
	if err != nil {
		return "", err
	}
	time.Sleep(1500 * time.Millisecond) // Kafka refuses to be asked again within a second
	token, err := i.token(ctx, "billing", time.Minute)
	if err != nil {
		return "", err
	}
	said := p.login(token)
	if said == nil {
		return "", errors.New("the login was accepted")
	}
	if _, err := p.topics(); err == nil {
		return "", errors.New("the connection is still open")
	}
	return said.Error(), p.end()
}

func (i *issued) storm(ctx context.Context) (string, error) {
	const workers, each = 4, 50
	before, err := i.issuer.Fetches(ctx)
	if err != nil {
		return "", err
	}
	began := time.Now()
	failures := make([]error, workers)
	var all sync.WaitGroup
	for w := range failures {
		p, err := i.startWorkload(ordersUID)
		if err != nil {
			return "", err
		}
		all.Go(func() {
			for n := range each {
				token, err := i.forged(fmt.Sprintf("unknown-%d-%d", w, n), i.issuer.URL())
				if err == nil {
					err = p.connect(i.broker())
				}
				if err == nil {
					err = p.login(token)
				}
				if !errors.Is(err, kerr.SaslAuthenticationFailed) {
					failures[w] = fmt.Errorf("login %d: %w", n, errors.Join(errors.New("it was not refused"), err))
					return
				}
			}
		})
	}
	all.Wait()
	took := time.Since(began)
	after, err := i.issuer.Fetches(ctx)
	fetches := after - before
	if allowed := 1 + int(took/(10*time.Second)); err == nil && fetches > allowed {
		err = fmt.Errorf("%d fetches of the key set, more than %d", fetches, allowed)
	}
	return fmt.Sprintf("%d logins in %.1f s, %d fetches", workers*each, took.Seconds(), fetches),
		errors.Join(errors.Join(failures...), err)
}
