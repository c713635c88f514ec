package cases

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"klamm/spiffe"
	"klamm/test/ca"
	"klamm/test/kafka"
	"klamm/test/spire"
)

// All are the cases.
var All = []Case{
	{"each workload gets the SVID of its own user", ownIdentity},
	{"a workload without an entry is nobody, and not waited for", unknown},
	{"an identity that comes late needs no new connection", late},
	{"a revoked entry ends the identity", revocation},
	{"an entry that changes its SPIFFE ID changes the identity", otherID},
	{"of several SPIFFE IDs the hint chooses", hint},
	{"several SPIFFE IDs without the hint are nobody", ambiguous},
	{"an SVID of a domain that is not trusted is nobody", untrusted},
	{"SVIDs are rotated without a gap", rotation},
	{"an SVID ends on time while the agent is away", expiry},
	{"a killed and restarted agent is found again", restarted(syscall.SIGKILL)},
	{"an agent restarted in order is found again", restarted(syscall.SIGTERM)},
	{"an agent that starts after the node is found", lateAgent},
	{"a missing socket is named", missingSocket},
	{"the socket of another API is named", otherSocket},
	{"a mute socket is named, and no connection waits for it", muteSocket},
	{"a mute agent holds up no connection, and is heard again", muteAgent},
	{"a node without an entry is refused, and told what to do", unregistered},
	{"a node that is no delegate is refused, and told what to do", unlisted},
	{"a socket that the node cannot reach is named", unreachable},
	{"a removed federation is not trusted any more", federation},
	{"a process that is gone gets nothing", gone},
	{"a process that executed another program gets nothing", executed},
	{"a JWT-SVID is for its audience, and kept for half of its life", audiences},
	{"a JWT-SVID is given out while the agent is away", tokenWhileAway},
}

// Bounded are the cases with a bound that SPIRE's own intervals must not break.
var Bounded = []Case{
	{"a revoked entry ends the identity", revocation},
	{"a removed federation is not trusted any more", federation},
	{"SVIDs are rotated without a gap", rotation},
}

func ownIdentity(ctx context.Context, e *Env) error {
	_, a, err := e.serving(ctx)
	if err != nil {
		return err
	}
	for _, name := range []string{"orders", "billing"} {
		uid := user()
		if _, err := e.register(ctx, spire.Entry{ID: e.ID("/" + name), Selectors: selector(uid), Hint: "kafka"}); err != nil {
			return err
		}
		attested, err := e.connected(ctx, a, uid)
		if err != nil {
			return err
		}
		if err := is(ctx, attested, e.ID("/"+name), patience); err != nil {
			return err
		}
		svid, err := attested.X509SVID()
		if err != nil {
			return err
		}
		evidence := attested.Identity().Evidence[0]
		switch {
		case svid.ID.String() != e.ID("/"+name):
			return fmt.Errorf("the SVID is %s", svid.ID)
		case evidence.Source != spiffe.SourceSPIRE || attested.Identity().Source != spiffe.SourceSPIRE:
			return fmt.Errorf("the evidence is of %q", evidence.Source)
		case evidence.Hint != "kafka" || svid.Hint != "kafka":
			return fmt.Errorf("the hint is %q", evidence.Hint)
		case !evidence.Expires.Equal(svid.Certificates[0].NotAfter):
			return fmt.Errorf("the evidence ends at %s, the SVID at %s", evidence.Expires, svid.Certificates[0].NotAfter)
		}
	}
	return nil
}

func unknown(ctx context.Context, e *Env) error {
	_, a, err := e.serving(ctx)
	if err != nil {
		return err
	}
	begin := time.Now()
	attested, err := e.connected(ctx, a, user())
	if err != nil {
		return err
	}
	if took := time.Since(begin); took > time.Second {
		return fmt.Errorf("it took %v", took)
	}
	if _, err := attested.X509SVID(); !errors.Is(err, spiffe.ErrNoSVID) {
		return fmt.Errorf("X509SVID: %w", err)
	}
	if _, _, err := attested.JWTSVID(ctx, "kafka"); !errors.Is(err, spiffe.ErrNoSVID) {
		return fmt.Errorf("JWTSVID: %w", err)
	}
	return is(ctx, attested, "", 0)
}

func late(ctx context.Context, e *Env) error {
	_, a, err := e.serving(ctx)
	if err != nil {
		return err
	}
	uid := user()
	attested, err := e.connected(ctx, a, uid)
	if err != nil {
		return err
	}
	if err := is(ctx, attested, "", 0); err != nil {
		return err
	}
	if _, err := e.register(ctx, spire.Entry{ID: e.ID("/late"), Selectors: selector(uid)}); err != nil {
		return err
	}
	return is(ctx, attested, e.ID("/late"), patience)
}

// known is a workload with an identity, with the id of its entry.
func (e *Env) known(ctx context.Context, a *spiffe.Attestor, name string, entry spire.Entry) (
	attested *spiffe.Attested, id string, err error) {
	uid := user()
	entry.ID, entry.Selectors = e.ID("/"+name), selector(uid)
	if id, err = e.register(ctx, entry); err != nil {
		return nil, "", err
	}
	if attested, err = e.connected(ctx, a, uid); err != nil {
		return nil, "", err
	}
	return attested, id, is(ctx, attested, e.ID("/"+name), patience)
}

func revocation(ctx context.Context, e *Env) error {
	_, a, err := e.serving(ctx)
	if err != nil {
		return err
	}
	attested, id, err := e.known(ctx, a, "revoked", spire.Entry{})
	if err != nil {
		return err
	}
	if err := e.Remove(ctx, id); err != nil {
		return err
	}
	if err := is(ctx, attested, "", revoked); err != nil {
		return err
	}
	if _, err := attested.X509SVID(); !errors.Is(err, spiffe.ErrNoSVID) {
		return fmt.Errorf("X509SVID: %w", err)
	}
	return nil
}

func otherID(ctx context.Context, e *Env) error {
	_, a, err := e.serving(ctx)
	if err != nil {
		return err
	}
	attested, id, err := e.known(ctx, a, "before", spire.Entry{})
	if err != nil {
		return err
	}
	uid := attested.Identity().Process.UID
	if err := e.Update(ctx, id, spire.Entry{ID: e.ID("/after"), Selectors: selector(uid)}); err != nil {
		return err
	}
	if err := is(ctx, attested, e.ID("/after"), patience); err != nil {
		return err
	}
	svid, err := attested.X509SVID()
	if err == nil && svid.ID.String() != e.ID("/after") {
		err = fmt.Errorf("the SVID is %s", svid.ID)
	}
	return err
}

// several registers two SPIFFE IDs for one user, with the hints "kafka" and "web".
func (e *Env) several(ctx context.Context) (uid uint32, err error) {
	uid = user()
	for _, hint := range []string{"web", "kafka"} {
		if _, err := e.register(ctx, spire.Entry{ID: e.ID("/" + hint), Selectors: selector(uid), Hint: hint}); err != nil {
			return 0, err
		}
	}
	return uid, nil
}

func hint(ctx context.Context, e *Env) error {
	o := e.options()
	o.Hint = "kafka"
	_, a, err := e.source(o)
	if err != nil {
		return err
	}
	uid, err := e.several(ctx)
	if err != nil {
		return err
	}
	attested, err := e.connected(ctx, a, uid)
	if err != nil {
		return err
	}
	if err := is(ctx, attested, e.ID("/kafka"), patience); err != nil {
		return err
	}
	token, _, err := attested.JWTSVID(ctx, "kafka")
	if err != nil {
		return err
	}
	claims, err := claimsOf(token)
	if err == nil && claims.Subject != e.ID("/kafka") {
		err = fmt.Errorf("the JWT-SVID is of %s", claims.Subject)
	}
	return err
}

func ambiguous(ctx context.Context, e *Env) error {
	s, a, err := e.serving(ctx)
	if err != nil {
		return err
	}
	uid, err := e.several(ctx)
	if err != nil {
		return err
	}
	attested, err := e.connected(ctx, a, uid)
	if err != nil {
		return err
	}
	if err := until(ctx, patience, func() error {
		if s.State().Failures["svid"] == 0 {
			return errors.New("nothing was refused")
		}
		return nil
	}); err != nil {
		return err
	}
	return is(ctx, attested, "", time.Second)
}

func untrusted(ctx context.Context, e *Env) error {
	o := e.options()
	o.TrustDomains = []spiffeid.TrustDomain{domain("other.test")}
	s, a, err := e.source(o)
	if err != nil {
		return err
	}
	uid := user()
	if _, err := e.register(ctx, spire.Entry{ID: e.ID("/untrusted"), Selectors: selector(uid)}); err != nil {
		return err
	}
	attested, err := e.connected(ctx, a, uid)
	if err != nil {
		return err
	}
	if err := until(ctx, patience, func() error {
		if s.State().Failures["svid"] == 0 {
			return errors.New("nothing was refused")
		}
		return nil
	}); err != nil {
		return err
	}
	return is(ctx, attested, "", 0)
}

func rotation(ctx context.Context, e *Env) error {
	_, a, err := e.serving(ctx)
	if err != nil {
		return err
	}
	attested, _, err := e.known(ctx, a, "rotated", spire.Entry{X509TTL: e.ShortTTL()})
	if err != nil {
		return err
	}
	serials := map[string]bool{}
	err = stays(ctx, 2*e.ShortTTL(), func() error {
		svid, err := attested.X509SVID()
		if err != nil {
			return err
		}
		serials[svid.Certificates[0].SerialNumber.String()] = true
		return is(ctx, attested, e.ID("/rotated"), 0)
	})
	if err == nil && len(serials) < 3 {
		err = fmt.Errorf("%d SVIDs in two lives of one", len(serials))
	}
	return err
}

// Roots is for a real SPIRE whose root lives for RootTTL.
var Roots = Case{"the root is replaced without a gap", func(ctx context.Context, e *Env) error {
	_, a, err := e.serving(ctx)
	if err != nil {
		return err
	}
	attested, _, err := e.known(ctx, a, "rooted", spire.Entry{X509TTL: e.ShortTTL()})
	if err != nil {
		return err
	}
	issuers := map[string]bool{}
	err = stays(ctx, RootTTL, func() error {
		svid, err := attested.X509SVID()
		if err != nil {
			return err
		}
		issuers[string(svid.Certificates[0].AuthorityKeyId)] = true
		return is(ctx, attested, e.ID("/rooted"), 0)
	})
	if err == nil && len(issuers) < 2 {
		err = errors.New("it was not replaced")
	}
	return err
}}

// RootTTL is a short life of a root that SPIRE keeps up with.
const RootTTL = 2 * time.Minute

func expiry(ctx context.Context, e *Env) error {
	s, a, err := e.serving(ctx)
	if err != nil {
		return err
	}
	attested, _, err := e.known(ctx, a, "expiring", spire.Entry{X509TTL: 2 * e.ShortTTL()})
	if err != nil {
		return err
	}
	if err := e.away(ctx, s); err != nil {
		return err
	}
	svid, err := attested.X509SVID()
	if err != nil {
		return err
	}
	end := svid.Certificates[0].NotAfter
	if err := stays(ctx, time.Until(end)-100*time.Millisecond, func() error {
		_, err := attested.X509SVID()
		return err
	}); err != nil {
		return fmt.Errorf("before its end: %w", err)
	}
	if err := is(ctx, attested, "", time.Until(end)+time.Second); err != nil {
		return err
	}
	if time.Now().Before(end) {
		return errors.New("it ended too early")
	}
	if _, err := attested.X509SVID(); !errors.Is(err, spiffe.ErrNoSVID) {
		return fmt.Errorf("X509SVID: %w", err)
	}
	return nil
}

// away kills the agent, which is started again at the end of the case.
func (e *Env) away(ctx context.Context, s *spiffe.SPIRE) error {
	e.finally(func() error { return e.StartAgent(context.WithoutCancel(ctx)) })
	if err := e.StopAgent(syscall.SIGKILL); err != nil {
		return err
	}
	return until(ctx, patience, func() error {
		return says(s.State().Err, e.Socket(e.API))
	})
}

func restarted(how syscall.Signal) func(context.Context, *Env) error {
	return func(ctx context.Context, e *Env) error {
		s, a, err := e.serving(ctx)
		if err != nil {
			return err
		}
		attested, id, err := e.known(ctx, a, "restarted", spire.Entry{})
		if err != nil {
			return err
		}
		var lapses atomic.Int32
		stop := attested.Watch(func() {
			if attested.Identity().ID.IsZero() {
				lapses.Add(1)
			}
		})
		defer stop()
		if err := e.StopAgent(how); err != nil {
			return err
		}
		if err := until(ctx, patience, func() error { return says(s.State().Err, e.Socket(e.API)) }); err != nil {
			return errors.Join(err, e.StartAgent(ctx))
		}
		if err := e.StartAgent(ctx); err != nil {
			return err
		}
		if err := e.serves(ctx, s); err != nil {
			return err
		}
		if err := is(ctx, attested, e.ID("/restarted"), 0); err != nil || lapses.Load() > 0 {
			return errors.Join(err, fmt.Errorf("%d lapses", lapses.Load()))
		}
		if err := e.Remove(ctx, id); err != nil { // the stream is there again, and not only the SVID
			return err
		}
		return is(ctx, attested, "", revoked)
	}
}

func lateAgent(ctx context.Context, e *Env) error {
	uid := user()
	if _, err := e.register(ctx, spire.Entry{ID: e.ID("/early"), Selectors: selector(uid)}); err != nil {
		return err
	}
	if err := e.StopAgent(syscall.SIGTERM); err != nil {
		return err
	}
	attested, err := func() (*spiffe.Attested, error) {
		s, a, err := e.source(e.options())
		if err != nil {
			return nil, err
		}
		attested, err := e.connected(ctx, a, uid)
		if err != nil {
			return nil, err
		}
		return attested, errors.Join(is(ctx, attested, "", 0), until(ctx, patience, func() error {
			return says(s.State().Err, e.Socket(e.API))
		}))
	}()
	if err := errors.Join(err, e.StartAgent(ctx)); err != nil {
		return err
	}
	return is(ctx, attested, e.ID("/early"), patience)
}

func missingSocket(ctx context.Context, e *Env) error {
	o := e.options()
	o.Socket = filepath.Join(os.TempDir(), "no-such-agent.sock")
	s, a, err := e.source(o)
	if err != nil {
		return err
	}
	if err := until(ctx, patience, func() error {
		return says(s.State().Err, o.Socket, "no such file or directory", "start the SPIRE agent")
	}); err != nil {
		return err
	}
	attested, err := e.connected(ctx, a, user())
	if err != nil {
		return err
	}
	return is(ctx, attested, "", 0)
}

func otherSocket(ctx context.Context, e *Env) error {
	o := e.options()
	o.Socket = e.WorkloadAPI()
	s, a, err := e.source(o)
	if err != nil {
		return err
	}
	words := map[string]string{spiffe.APIBroker: "agent.experimental.broker", spiffe.APIDelegated: "admin_socket_path"}
	if err := until(ctx, patience, func() error { return says(s.State().Err, o.Socket, words[e.API]) }); err != nil {
		return err
	}
	attested, err := e.connected(ctx, a, user())
	if err != nil {
		return err
	}
	return is(ctx, attested, "", 0)
}

func muteSocket(ctx context.Context, e *Env) error {
	dir, err := os.MkdirTemp("", "mute-")
	if err != nil {
		return err
	}
	e.finally(func() error { return os.RemoveAll(dir) })
	o := e.options()
	o.Socket = filepath.Join(dir, "api.sock")
	l, err := net.Listen("unix", o.Socket)
	if err != nil {
		return err
	}
	e.finally(l.Close)
	s, a, err := e.source(o)
	if err != nil {
		return err
	}
	begin := time.Now()
	attested, err := e.connected(ctx, a, user())
	if took := time.Since(begin); err != nil || took > 3*time.Second {
		return errors.Join(err, fmt.Errorf("it took %v", took))
	}
	if err := until(ctx, patience, func() error {
		return says(s.State().Err, o.Socket, "no answer within", "hangs")
	}); err != nil {
		return err
	}
	return is(ctx, attested, "", 0)
}

func muteAgent(ctx context.Context, e *Env) error {
	_, a, err := e.serving(ctx)
	if err != nil {
		return err
	}
	uid := user()
	if _, err := e.register(ctx, spire.Entry{ID: e.ID("/muted"), Selectors: selector(uid)}); err != nil {
		return err
	}
	attested, err := e.connected(ctx, a, uid)
	if err != nil {
		return err
	}
	if err := is(ctx, attested, e.ID("/muted"), patience); err != nil {
		return err
	}
	if err := e.Pause(); err != nil {
		return err
	}
	begin := time.Now()
	meanwhile, err := e.connected(ctx, a, uid)
	took := time.Since(begin)
	if err := errors.Join(err, e.Resume()); err != nil {
		return err
	}
	if took > 3*time.Second {
		return fmt.Errorf("it took %v", took)
	}
	if _, err := attested.X509SVID(); err != nil {
		return err
	}
	return is(ctx, meanwhile, e.ID("/muted"), patience)
}

func unregistered(ctx context.Context, e *Env) error {
	s, a, err := e.serving(ctx)
	if err != nil {
		return err
	}
	attested, _, err := e.known(ctx, a, "of-nobody", spire.Entry{})
	if err != nil {
		return err
	}
	return errors.Join(e.withoutEntry(ctx, s, attested), e.serves(ctx, s))
}

func (e *Env) withoutEntry(ctx context.Context, s *spiffe.SPIRE, attested *spiffe.Attested) (err error) {
	id, err := e.NodeEntry(ctx)
	if err != nil {
		return err
	}
	if err := e.Remove(ctx, id); err != nil {
		return err
	}
	defer func() {
		_, rerr := e.Register(ctx, spire.Entry{ID: spire.Node, Selectors: selector(0)})
		err = errors.Join(err, rerr)
	}()
	if err := until(ctx, patience, func() error {
		return says(s.State().OwnErr, e.WorkloadAPI(), "no identity issued", "register the node")
	}); err != nil {
		return err
	}
	if _, err := s.Agent().GetX509SVID(); err == nil {
		return errors.New("the node still has an SVID")
	}
	return is(ctx, attested, "", time.Second)
}

func unlisted(ctx context.Context, e *Env) error {
	s, a, err := e.serving(ctx)
	if err != nil {
		return err
	}
	return errors.Join(e.notListed(ctx, s, a), e.relist(ctx), e.serves(ctx, s))
}

func (e *Env) relist(ctx context.Context) error {
	if err := e.StopAgent(syscall.SIGTERM); err != nil {
		return err
	}
	e.SetDelegates(spire.Node)
	return e.StartAgent(ctx)
}

func (e *Env) notListed(ctx context.Context, s *spiffe.SPIRE, a *spiffe.Attestor) error {
	if err := e.StopAgent(syscall.SIGTERM); err != nil {
		return err
	}
	e.SetDelegates(e.ID("/another"))
	if err := e.StartAgent(ctx); err != nil {
		return err
	}
	words := map[string]string{spiffe.APIBroker: "agent.experimental.broker.brokers",
		spiffe.APIDelegated: "agent.authorized_delegates"}
	if err := until(ctx, patience, func() error {
		return says(s.State().Err, e.Socket(e.API), words[e.API])
	}); err != nil {
		return err
	}
	attested, err := e.connected(ctx, a, user())
	if err != nil {
		return err
	}
	return is(ctx, attested, "", 0)
}

func unreachable(ctx context.Context, e *Env) error {
	if err := e.unreachable(filepath.Dir(e.Socket(e.API))); err != nil {
		return err
	}
	said, err := e.probeAs(ctx, user())
	if err != nil {
		return err
	}
	return says(errors.New(said), e.Socket(e.API), "permission denied", "2750")
}

func federation(ctx context.Context, e *Env) error {
	s, _, err := e.serving(ctx)
	if err != nil {
		return err
	}
	partner := domain("partner.test")
	if _, err := s.Agent().GetX509BundleForTrustDomain(partner); err == nil {
		return errors.New("it is trusted before")
	}
	root, err := ca.New("partner")
	if err != nil {
		return err
	}
	if err := e.Federate(ctx, partner.Name(), root.Certificate); err != nil {
		return err
	}
	id, err := e.NodeEntry(ctx)
	if err != nil {
		return err
	}
	federating := spire.Entry{ID: spire.Node, Selectors: selector(0), FederatesWith: []string{partner.Name()}}
	if err := e.Update(ctx, id, federating); err != nil {
		return err
	}
	if err := until(ctx, patience, func() error {
		bundle, err := s.Agent().GetX509BundleForTrustDomain(partner)
		if err == nil && !bundle.HasX509Authority(root.Certificate) {
			err = errors.New("the bundle has another root")
		}
		return err
	}); err != nil {
		return err
	}
	if err := e.Unfederate(ctx, partner.Name()); err != nil {
		return err
	}
	return until(ctx, revoked, func() error {
		if _, err := s.Agent().GetX509BundleForTrustDomain(partner); err == nil {
			return errors.New("it is trusted after")
		}
		return nil
	})
}

// vouched attests a process of which the agent gives both kinds of SVID.
func (e *Env) vouched(
	ctx context.Context, a *spiffe.Attestor, peer spiffe.Peer, name string,
) (*spiffe.Attested, error) {
	attested, err := e.attest(ctx, a, peer)
	if err != nil {
		return nil, err
	}
	if err := is(ctx, attested, e.ID("/"+name), patience); err != nil {
		return nil, err
	}
	_, _, err = attested.JWTSVID(ctx, "kafka")
	return attested, err
}

func gone(ctx context.Context, e *Env) error {
	_, a, err := e.serving(ctx)
	if err != nil {
		return err
	}
	uid := user()
	if _, err := e.register(ctx, spire.Entry{ID: e.ID("/gone"), Selectors: selector(uid)}); err != nil {
		return err
	}
	cmd, peer, err := e.workload(uid)
	if err != nil {
		return err
	}
	attested, err := e.vouched(ctx, a, peer, "gone")
	if err != nil {
		return err
	}
	if err := kafka.Kill(cmd); err != nil {
		return err
	}
	if err := until(ctx, patience, func() error {
		if _, _, err := attested.JWTSVID(ctx, "kafka"); !errors.Is(err, spiffe.ErrGone) {
			return fmt.Errorf("want that it is gone: %w", err)
		}
		return nil
	}); err != nil {
		return err
	}
	if _, err := e.attest(ctx, a, peer); !errors.Is(err, spiffe.ErrGone) {
		return fmt.Errorf("a connection after the end: %w", err)
	}
	return nil
}

func executed(ctx context.Context, e *Env) error {
	_, a, err := e.serving(ctx)
	if err != nil {
		return err
	}
	uid := user()
	if _, err := e.register(ctx, spire.Entry{ID: e.ID("/exec"), Selectors: selector(uid)}); err != nil {
		return err
	}
	peer, exec, err := e.shell(uid)
	if err != nil {
		return err
	}
	attested, err := e.vouched(ctx, a, peer, "exec")
	if err != nil {
		return err
	}
	if err := exec(); err != nil {
		return err
	}
	return until(ctx, patience, func() error {
		if _, _, err := attested.JWTSVID(ctx, "kafka"); !errors.Is(err, spiffe.ErrChanged) {
			return fmt.Errorf("want that it has changed: %w", err)
		}
		return nil
	})
}

// claims are those of a JWT-SVID.
type claims struct {
	Subject  string `json:"sub"`
	Audience any    `json:"aud"`
	Expires  int64  `json:"exp"`
}

func claimsOf(token string) (c claims, err error) {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return c, errors.New("it is no JWT")
	}
	body, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return c, err
	}
	return c, json.Unmarshal(body, &c)
}

func audiences(ctx context.Context, e *Env) error {
	_, a, err := e.serving(ctx)
	if err != nil {
		return err
	}
	ttl := 2 * e.ShortTTL()
	attested, _, err := e.known(ctx, a, "audiences", spire.Entry{JWTTTL: ttl})
	if err != nil {
		return err
	}
	tokens := map[string]string{}
	for _, audience := range []string{"kafka://one", "kafka://two"} {
		token, expires, err := attested.JWTSVID(ctx, audience)
		if err != nil {
			return err
		}
		c, err := claimsOf(token)
		if err != nil {
			return err
		}
		if c.Subject != e.ID("/audiences") || fmt.Sprint(c.Audience) != fmt.Sprint([]string{audience}) &&
			c.Audience != audience || c.Expires != expires.Unix() {
			return fmt.Errorf("for %s until %s it is %+v", audience, expires, c)
		}
		tokens[audience] = token
	}
	for audience, token := range tokens {
		if again, _, err := attested.JWTSVID(ctx, audience); err != nil || again != token {
			return errors.Join(err, errors.New("it is another one at once"))
		}
	}
	var lives []time.Duration
	err = until(ctx, ttl, func() error {
		token, expires, err := attested.JWTSVID(ctx, "kafka://one")
		lives = append(lives, time.Until(expires))
		if err == nil && token == tokens["kafka://one"] {
			err = errors.New("it is still the same")
		}
		return err
	})
	if shortest := slices.Min(lives); err == nil && shortest < ttl/4 {
		err = fmt.Errorf("one was given out %v before its end", shortest)
	}
	return err
}

func tokenWhileAway(ctx context.Context, e *Env) error {
	s, a, err := e.serving(ctx)
	if err != nil {
		return err
	}
	ttl := 2 * e.ShortTTL()
	attested, _, err := e.known(ctx, a, "away", spire.Entry{JWTTTL: ttl})
	if err != nil {
		return err
	}
	token, expires, err := attested.JWTSVID(ctx, "kafka")
	if err != nil {
		return err
	}
	if err := e.away(ctx, s); err != nil {
		return err
	}
	if _, _, err := attested.JWTSVID(ctx, "another"); err == nil {
		return errors.New("there is one for a new audience")
	} else if err := says(err, e.Socket(e.API)); err != nil {
		return err
	}
	if err := stays(ctx, time.Until(expires)-200*time.Millisecond, func() error {
		same, _, err := attested.JWTSVID(ctx, "kafka")
		if err == nil && same != token {
			err = errors.New("it is another one")
		}
		return err
	}); err != nil {
		return err
	}
	return until(ctx, time.Second, func() error {
		if _, _, err := attested.JWTSVID(ctx, "kafka"); err == nil {
			return errors.New("it is given out after its end")
		}
		return nil
	})
}
