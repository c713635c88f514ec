package spiffe

import (
	"context"
	"crypto/x509"
	"errors"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"klamm/test/bounds"
	"klamm/test/ca"
)

var here = spiffeid.RequireTrustDomainFromString("example.test")

func authority(t testing.TB, name string) *ca.Authority {
	t.Helper()
	a, err := ca.New(name)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// issued is an SVID as an agent sends it.
func issued(t testing.TB, a *ca.Authority, l ca.Leaf) rawSVID {
	t.Helper()
	c, err := a.Issue(l)
	if err != nil {
		t.Fatal(err)
	}
	key, err := x509.MarshalPKCS8PrivateKey(c.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	return rawSVID{chain: c.Certificate[0], key: key, bundle: a.Certificate.Raw}
}

func parsed(t testing.TB, r rawSVID) *x509svid.SVID {
	t.Helper()
	s, err := x509svid.ParseRaw(r.chain, r.key)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// trusting is a source whose node has an identity and trusts the authority.
func trusting(t testing.TB, a *ca.Authority, o SPIREOptions) *SPIRE {
	t.Helper()
	own := parsed(t, issued(t, a, ca.Leaf{ID: "spiffe://example.test/klamm"}))
	bundles := x509bundle.NewSet(x509bundle.FromX509Authorities(here, []*x509.Certificate{a.Certificate}))
	return &SPIRE{options: o, agent: &Agent{svid: own, svids: []*x509svid.SVID{own}, bundles: bundles}}
}

func TestWhatTheAgentGivesIsBelievedOnlyIfItIsRight(t *testing.T) {
	root, stranger := authority(t, "root"), authority(t, "stranger")
	good := issued(t, root, ca.Leaf{ID: orders})
	over := issued(t, root, ca.Leaf{ID: orders, Expires: time.Now().Add(-time.Second)})
	others := issued(t, root, ca.Leaf{ID: orders}).key
	with := func(change func(*rawSVID)) rawSVID {
		r := good
		change(&r)
		return r
	}
	for name, test := range map[string]struct {
		svid rawSVID
		want string // in the error; empty: none
	}{
		"as it should be":               {good, ""},
		"no certificate":                {with(func(r *rawSVID) { r.chain = nil }), "X509-SVID"},
		"no key":                        {with(func(r *rawSVID) { r.key = nil }), "X509-SVID"},
		"another's key":                 {with(func(r *rawSVID) { r.key = others }), "X509-SVID"},
		"garbage for a certificate":     {with(func(r *rawSVID) { r.chain = []byte("garbage") }), "X509-SVID"},
		"a certificate without an ID":   {issued(t, root, ca.Leaf{Names: []string{"orders"}}), "X509-SVID"},
		"the ID of a trust domain":      {issued(t, root, ca.Leaf{ID: "spiffe://example.test"}), "X509-SVID"},
		"an ID that is none":            {issued(t, root, ca.Leaf{ID: "https://example.test/orders"}), "X509-SVID"},
		"another trust domain's":        {issued(t, root, ca.Leaf{ID: "spiffe://other.test/orders"}), "trust-domains"},
		"one that has expired":          {over, "expired"},
		"one that somebody else issued": {issued(t, stranger, ca.Leaf{ID: orders}), "not issued by its trust domain"},
		"the issuer's own certificate":  {rawSVID{chain: root.Certificate.Raw, key: good.key}, "X509-SVID"},
	} {
		t.Run(name, func(t *testing.T) {
			svid, err := trusting(t, root, SPIREOptions{}).choose([]rawSVID{test.svid})
			if test.want == "" && (err != nil || svid.ID.String() != orders) {
				t.Errorf("got %v, %v", svid, err)
			}
			if test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
				t.Errorf("got %v, want an error with %q", err, test.want)
			}
		})
	}
}

func TestWithoutTheNodesOwnBundleTheAgentsIsUsed(t *testing.T) {
	root, stranger := authority(t, "root"), authority(t, "stranger")
	s := trusting(t, root, SPIREOptions{TrustDomains: []spiffeid.TrustDomain{here}})
	s.agent.bundles, s.agent.svid = nil, nil
	s.agent.err = errStarting
	good := issued(t, root, ca.Leaf{ID: orders})
	if _, err := s.choose([]rawSVID{good}); err != nil {
		t.Error(err)
	}
	good.bundle = stranger.Certificate.Raw
	if _, err := s.choose([]rawSVID{good}); err == nil {
		t.Error("it was believed against the agent's bundle")
	}
	good.bundle = nil // of the Delegated Identity API
	if _, err := s.choose([]rawSVID{good}); err != nil {
		t.Error(err)
	}
	s.options.TrustDomains = nil
	if _, err := s.choose([]rawSVID{good}); err == nil {
		t.Error("it was believed though the node does not know its own trust domain")
	}
}

func TestTheHintChoosesAmongSeveralIDs(t *testing.T) {
	type one struct{ id, hint string }
	for name, test := range map[string]struct {
		svids []one
		hint  string
		want  int // the place of the chosen; -1: none
	}{
		"one":                                        {[]one{{"a", ""}}, "", 0},
		"one with a hint that was not asked for":     {[]one{{"a", "web"}}, "", 0},
		"one with another hint":                      {[]one{{"a", "web"}}, "kafka", 0},
		"two of the same ID":                         {[]one{{"a", ""}, {"a", ""}}, "", 0},
		"two of the same ID, one with the hint":      {[]one{{"a", ""}, {"a", "kafka"}}, "kafka", 1},
		"two IDs without a hint asked for":           {[]one{{"a", "web"}, {"b", "kafka"}}, "", -1},
		"two IDs, one with the hint":                 {[]one{{"a", "web"}, {"b", "kafka"}}, "kafka", 1},
		"two IDs, none with the hint":                {[]one{{"a", "web"}, {"b", ""}}, "kafka", -1},
		"two IDs with the same hint":                 {[]one{{"a", "kafka"}, {"b", "kafka"}}, "kafka", -1},
		"three of which two with the hint are one":   {[]one{{"a", ""}, {"b", "kafka"}, {"b", "kafka"}}, "kafka", 1},
		"two IDs without any hint, none asked for":   {[]one{{"a", ""}, {"b", ""}}, "", -1},
		"two IDs without any hint, one is asked for": {[]one{{"a", ""}, {"b", ""}}, "kafka", -1},
	} {
		t.Run(name, func(t *testing.T) {
			var svids []*x509svid.SVID
			for _, s := range test.svids {
				svids = append(svids, &x509svid.SVID{ID: spiffeid.RequireFromPath(here, "/"+s.id), Hint: s.hint})
			}
			got, err := pick(svids, test.hint)
			if test.want >= 0 && (err != nil || got != test.want) {
				t.Errorf("got %d, %v", got, err)
			}
			if test.want < 0 && (err == nil || !strings.Contains(err.Error(), "several SPIFFE IDs") ||
				!strings.Contains(err.Error(), "hint")) {
				t.Errorf("got %d, %v", got, err)
			}
		})
	}
}

func FuzzChoose(f *testing.F) {
	root := authority(f, "root")
	good := issued(f, root, ca.Leaf{ID: orders})
	s := trusting(f, root, SPIREOptions{})
	f.Add(good.chain, good.key, good.bundle, "kafka")
	f.Add(append(slices.Clone(good.chain), root.Certificate.Raw...), good.key, []byte(nil), "")
	f.Fuzz(func(t *testing.T, chain, key, bundle []byte, hint string) {
		var svid *x509svid.SVID
		var err error
		bounds.Check(t, len(chain)+len(key)+len(bundle), 1<<12, func() {
			svid, err = s.choose([]rawSVID{{chain: chain, key: key, hint: hint, bundle: bundle}})
		})
		if err == nil && (!svid.ID.MemberOf(here) || svid.ID.Path() == "" ||
			time.Now().After(svid.Certificates[0].NotAfter)) {
			t.Errorf("%s was believed", svid.ID)
		}
	})
}

// token is a JWT with claims, signed by nobody.
func token(t testing.TB, claims jwt.Claims) string {
	t.Helper()
	key := jose.SigningKey{Algorithm: jose.ES256, Key: key(t)}
	signer, err := jose.NewSigner(key, nil)
	if err != nil {
		t.Fatal(err)
	}
	out, err := jwt.Signed(signer).Claims(claims).Serialize()
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func key(t testing.TB) any {
	t.Helper()
	c, err := authority(t, "jwt").Issue(ca.Leaf{ID: orders})
	if err != nil {
		t.Fatal(err)
	}
	return c.PrivateKey
}

func TestOnlyTheTokenOfTheWorkloadsIDIsGivenOut(t *testing.T) {
	id := spiffeid.RequireFromString(orders)
	of := func(subject, audience string, life time.Duration) string {
		return token(t, jwt.Claims{Subject: subject, Audience: jwt.Audience{audience},
			Expiry: jwt.NewNumericDate(time.Now().Add(life))})
	}
	other, good := of("spiffe://example.test/other", "kafka", time.Hour), of(orders, "kafka", time.Hour)
	for name, test := range map[string]struct {
		tokens []string
		want   bool
	}{
		"its own":                        {[]string{good}, true},
		"its own after another's":        {[]string{other, good}, true},
		"another's":                      {[]string{other}, false},
		"none":                           {nil, false},
		"for another audience":           {[]string{of(orders, "other", time.Hour)}, false},
		"one that has expired":           {[]string{of(orders, "kafka", -time.Second)}, false},
		"one that is about no SPIFFE ID": {[]string{of("orders", "kafka", time.Hour)}, false},
		"garbage":                        {[]string{"garbage"}, false},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := pickJWT(test.tokens, id, "kafka")
			if test.want != (err == nil) || test.want && got.token != good {
				t.Errorf("got %v", err)
			}
			for _, secret := range test.tokens {
				if err != nil && strings.Contains(err.Error(), secret) && secret != "garbage" {
					t.Errorf("the error holds the token: %v", err)
				}
			}
		})
	}
}

func FuzzPickJWT(f *testing.F) {
	id := spiffeid.RequireFromString(orders)
	f.Add(token(f, jwt.Claims{Subject: orders, Audience: jwt.Audience{"kafka"},
		Expiry: jwt.NewNumericDate(time.Now().Add(time.Hour))}))
	f.Fuzz(func(t *testing.T, s string) {
		var got jwtToken
		var err error
		bounds.Check(t, len(s), 1<<10, func() { got, err = pickJWT([]string{s}, id, "kafka") })
		if err == nil && !time.Now().Before(got.expires) {
			t.Error("an expired token was taken")
		}
	})
}

func TestATokenIsFetchedAnewAfterHalfOfItsLife(t *testing.T) {
	unavailable := agentError(adminAPI, "/s", status.Error(codes.Unavailable, "away"))
	refused := agentError(adminAPI, "/s", status.Error(codes.PermissionDenied, "no identity issued"))
	old := func(age, life time.Duration) jwtAt { return jwtAt{age, life} }
	for name, test := range map[string]struct {
		had     jwtAt // zero: none
		answer  error
		fetched bool
		want    string // the token; empty: an error
	}{
		"none is there":                           {jwtAt{}, nil, true, "new"},
		"none is there and the agent is away":     {jwtAt{}, unavailable, true, ""},
		"one in its first half":                   {old(4*time.Minute, 10*time.Minute), nil, false, "old"},
		"one in its second half":                  {old(6*time.Minute, 10*time.Minute), nil, true, "new"},
		"one in its second half, the agent away":  {old(6*time.Minute, 10*time.Minute), unavailable, true, "old"},
		"one in its second half, but refused now": {old(6*time.Minute, 10*time.Minute), refused, true, ""},
		"one that is gone in the meantime":        {old(6*time.Minute, 10*time.Minute), ErrGone, true, ""},
		"an expired one, the agent away":          {old(11*time.Minute, 10*time.Minute), unavailable, true, ""},
	} {
		t.Run(name, func(t *testing.T) {
			k := tokenKey{spiffeid.RequireFromString(orders), "kafka"}
			all := newTokens()
			if test.had.life != 0 {
				fetched := time.Now().Add(-test.had.age)
				all.put(k, jwtToken{"old", fetched, fetched.Add(test.had.life)})
			}
			fetched := false
			got, err := all.get(t.Context(), k, func() (jwtToken, error) {
				fetched = true
				return jwtToken{"new", time.Now(), time.Now().Add(time.Hour)}, test.answer
			})
			if fetched != test.fetched || got.token != test.want || (err == nil) != (test.want != "") {
				t.Errorf("fetched: %v, got %q, %v", fetched, got.token, err)
			}
		})
	}
}

type jwtAt struct{ age, life time.Duration }

func TestWhoWaitsForATokenThatAnotherFetchesWaitsNoLongerThanItsContext(t *testing.T) {
	all := newTokens()
	all.turn <- struct{}{}
	why := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(why)
	if _, err := all.get(ctx, tokenKey{audience: "kafka"}, nil); !errors.Is(err, why) {
		t.Error(err)
	}
}

func TestTheNodesOwnStandingEndsWithTheAgentsSilence(t *testing.T) {
	root := authority(t, "root")
	for name, test := range map[string]struct {
		silent, expires time.Duration // from now; silent 0: the stream is open
		svid, bundle    bool
	}{
		"the stream is open":                  {0, time.Hour, true, true},
		"the agent is away for a while":       {-59 * time.Minute, time.Hour, true, true},
		"the agent is away for long":          {-61 * time.Minute, time.Hour, true, false},
		"the agent is away, the SVID is over": {-59 * time.Minute, -time.Minute, false, true},
		"the agent hangs":                     {0, -59 * time.Minute, false, true},
		"the agent hangs for long":            {0, -61 * time.Minute, false, false},
	} {
		t.Run(name, func(t *testing.T) {
			a := trusting(t, root, SPIREOptions{}).agent
			a.svid = parsed(t, issued(t, root, ca.Leaf{ID: orders, Expires: time.Now().Add(test.expires)}))
			if test.silent != 0 {
				a.silent = wallClock().Add(test.silent)
			}
			_, serr := a.GetX509SVID()
			_, berr := a.GetX509BundleForTrustDomain(here)
			if (serr == nil) != test.svid || (berr == nil) != test.bundle {
				t.Errorf("SVID: %v, bundle: %v", serr, berr)
			}
		})
	}
}

func TestPausesDoubleUpToTheirBoundAndAreSpread(t *testing.T) {
	r := retries{max: time.Second}
	for i := range 40 {
		full := min(minRetry<<min(i, 10), time.Second)
		if d := r.Next(); d < full/2 || d > full {
			t.Errorf("pause %d is %v, want %v to %v", i, d, full/2, full)
		}
	}
	r.Reset()
	if d := r.Next(); d > minRetry {
		t.Errorf("after a success it is %v", d)
	}
}

// agreeable is an agent that gives everybody the same, and during is what happens while it makes a token.
type agreeable struct {
	svid   rawSVID
	token  string
	during func()
}

func (a *agreeable) x509(ctx context.Context, _ int32, tell func([]rawSVID)) error {
	tell([]rawSVID{a.svid})
	<-ctx.Done()
	return ctx.Err()
}

func (a *agreeable) jwt(context.Context, int32, string) ([]string, error) {
	a.during()
	return []string{a.token}, nil
}

func (a *agreeable) close() error { return nil }

func TestAJWTSVIDIsOnlyForWhoIsProvenBeforeAndAfter(t *testing.T) {
	root := authority(t, "root")
	good := token(t, jwt.Claims{Subject: orders, Audience: jwt.Audience{"kafka"},
		Expiry: jwt.NewNumericDate(time.Now().Add(time.Hour))})
	var changed atomic.Bool
	change := func() { changed.Store(true) }
	for name, test := range map[string]struct {
		kept           bool // one is there already
		before, during func()
		want           error
	}{
		"nothing changes":             {false, func() {}, func() {}, nil},
		"it changed before":           {false, change, func() {}, ErrChanged},
		"it changes while it is made": {false, func() {}, change, ErrChanged},
		"one is kept":                 {true, func() {}, change, nil}, // none is made
		"one is kept, it changed":     {true, change, func() {}, ErrChanged},
	} {
		t.Run(name, func(t *testing.T) {
			changed.Store(false)
			tasks := &procTasks{change: func(_ int32, f *TaskFacts) {
				if changed.Load() {
					f.ExecID++
				}
			}}
			agent := &agreeable{issued(t, root, ca.Leaf{ID: orders}), good, func() {}}
			s := trusting(t, root, SPIREOptions{})
			s.processes, s.delegate = NewProcesses(tasks, "", nil), agent
			s.streams, s.back, s.failures = make(chan struct{}, 1), make(chan struct{}), map[string]uint64{}
			s.agent.changed = make(chan struct{})
			// Without what follows processes, which would tell as well.
			a := &Attestor{processes: s.processes, sources: []Source{s}}
			r := &record{subject: subject{peer: peerOf(t, os.Getpid())}, tokens: newTokens()}
			r.current.Store(&Identity{Evidence: []Evidence{{Source: SourceSPIRE, Expires: time.Now().Add(time.Hour),
				svid: parsed(t, agent.svid)}}})
			h := &Attested{attestor: a}
			h.record.Store(r)
			if test.kept {
				if _, _, err := h.JWTSVID(t.Context(), "kafka"); err != nil {
					t.Fatal(err)
				}
			}
			test.before()
			agent.during = test.during
			got, _, err := h.JWTSVID(t.Context(), "kafka")
			if !errors.Is(err, test.want) || (got == good) != (test.want == nil) {
				t.Errorf("got %q, %v", got, err)
			}
		})
	}
}
