package spiffe

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4"

	"klamm/test/bounds"
)

const (
	apiIssuer  = "https://kubernetes.default.svc.cluster.local"
	podAccount = "system:serviceaccount:shop:orders"
	tokenPath  = "/var/run/secrets/klamm/token"
	ownToken   = "TOKEN-OF-THE-NODE"
)

// podClaims are those of a projected token that kubelet has mounted into the pod podUID.
func podClaims(change func(claims)) claims {
	now := time.Now().Unix()
	c := claims{"iss": apiIssuer, "sub": podAccount, "aud": []string{"klamm"}, "iat": now, "nbf": now, "exp": now + 600,
		"jti": "one", "kubernetes.io": claims{
			"namespace": "shop", "pod": claims{"name": "orders-0", "uid": podUID},
			"node": claims{"name": "node1", "uid": "n"}, "serviceaccount": claims{"name": "orders", "uid": "s"}}}
	if change != nil {
		change(c)
	}
	return c
}

// apiServer reviews tokens.
type apiServer struct {
	*httptest.Server
	ca, bearer string // files
	reviews    atomic.Int32
	answer     atomic.Pointer[http.HandlerFunc] // in place of the review
	gone       atomic.Bool                      // the pod
	change     func(*reviewStatus)
}

func newAPIServer(t testing.TB) *apiServer {
	t.Helper()
	a := &apiServer{}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /apis/authentication.k8s.io/v1/tokenreviews", func(w http.ResponseWriter, r *http.Request) {
		a.reviews.Add(1)
		if f := a.answer.Load(); f != nil {
			(*f)(w, r)
			return
		}
		var asked struct {
			Spec struct {
				Token     string   `json:"token"`
				Audiences []string `json:"audiences"`
			} `json:"spec"`
		}
		err := json.NewDecoder(r.Body).Decode(&asked)
		if err != nil || r.Header.Get("Authorization") != "Bearer "+ownToken {
			http.Error(w, "SECRET", http.StatusUnauthorized)
			return
		}
		var s reviewStatus
		s.Authenticated, s.Audiences, s.User.Username = !a.gone.Load(), asked.Spec.Audiences, podAccount
		s.User.Extra = map[string][]string{extraPodUID: {podUID}}
		if a.gone.Load() {
			s = reviewStatus{Error: "service account token has been invalidated: " + asked.Spec.Token}
		}
		if a.change != nil {
			a.change(&s)
		}
		w.WriteHeader(http.StatusCreated)
		_ = json.NewEncoder(w).Encode(map[string]any{"kind": "TokenReview", "status": s})
	})
	a.Server = httptest.NewUnstartedServer(mux)
	a.Config.ErrorLog = log.New(io.Discard, "", 0)
	a.StartTLS()
	t.Cleanup(a.Close)
	dir := t.TempDir()
	a.ca, a.bearer = filepath.Join(dir, "ca.pem"), filepath.Join(dir, "token")
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.Certificate().Raw})
	if err := errors.Join(os.WriteFile(a.ca, ca, 0o600), os.WriteFile(a.bearer, []byte(ownToken), 0o600)); err != nil {
		t.Fatal(err)
	}
	return a
}

func (a *apiServer) answers(f http.HandlerFunc) { a.answer.Store(&f) }

// review shares what was asked less than a nanosecond ago.
func (a *apiServer) review(every, stale time.Duration) *Review {
	return NewReview(ReviewOptions{Server: a.URL, Remote: Remote{CA: a.ca, Bearer: a.bearer}, Every: every,
		MaxStale: stale})
}

func kubernetes(t *testing.T, key signingKey, o KubernetesOptions) *Kubernetes {
	t.Helper()
	file := filepath.Join(t.TempDir(), "keys.json")
	keyFile(t, file, key)
	tokens, err := NewTokens(Issuer{Issuer: apiIssuer, Keys: fromFile(file), Skew: 30 * time.Second, MaxAge: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	o.Path, o.Audience = tokenPath, "klamm"
	k, err := NewKubernetes(tokens, NewProcesses(new(procTasks), "", nil), o)
	if err != nil {
		t.Fatal(err)
	}
	k.pace = time.Millisecond
	return k
}

func TestAServiceAccountTokenCountsOnlyForThePodItIsBoundTo(t *testing.T) {
	key, stranger := newSigningKey(t, jose.RS256, "k1"), newSigningKey(t, jose.RS256, "k1")
	api := newAPIServer(t)
	ways := map[string]*Kubernetes{
		"offline": kubernetes(t, key, KubernetesOptions{Issuer: apiIssuer, Node: "node1"}),
		"review":  kubernetes(t, key, KubernetesOptions{Review: api.review(3, time.Minute), Node: "node1"}),
		"both": kubernetes(t, key, KubernetesOptions{Issuer: apiIssuer, Review: api.review(3, time.Minute),
			Node: "node1"}),
	}
	within := func(path string, value any) func(claims) {
		return func(c claims) {
			at, inner := c, strings.Split(path, "/")
			for _, name := range inner[:len(inner)-1] {
				at, _ = at[name].(claims)
			}
			at[inner[len(inner)-1]] = value
		}
	}
	of := func(path string, value any) string { return key.sign(t, podClaims(within(path, value)), nil) }
	for name, test := range map[string]struct {
		token, check string
		offline      bool // says the rest otherwise: without a review the issuer's keys have to
	}{
		"a good one":            {key.sign(t, podClaims(nil), nil), "", false},
		"of another pod":        {of("kubernetes.io/pod/uid", staticUID), CheckPod, false},
		"of no pod":             {of("kubernetes.io/pod", nil), CheckPod, false},
		"a pod that is a text":  {of("kubernetes.io/pod", podUID), CheckPod, false},
		"nothing of Kubernetes": {of("kubernetes.io", nil), CheckPod, false},
		"of another node":       {of("kubernetes.io/node/name", "node2"), CheckPod, false},
		"of no node":            {of("kubernetes.io/node", nil), CheckPod, false},
		"another service account": {of("kubernetes.io/serviceaccount/name", "admin"),
			CheckClaim, false},
		"another subject":            {of("sub", "admin"), CheckClaim, false},
		"for somebody else":          {of("aud", "kafka"), CheckAudience, false},
		"for the API server too":     {of("aud", []string{"klamm", apiIssuer}), CheckAudience, false},
		"for the same twice":         {of("aud", []string{"klamm", "klamm"}), CheckAudience, false},
		"for a list of other things": {of("aud", []any{"klamm", 1}), CheckFormat, false},
		"expired":                    {of("exp", time.Now().Add(-time.Minute).Unix()), CheckExpiry, false},
		"unsigned":                   {"eyJhbGciOiJub25lIn0.e30.", CheckAlgorithm, false},
		"opaque":                     {"x", CheckFormat, false},
		"of another issuer":          {of("iss", "https://evil.test"), CheckIssuer, true},
		"forged":                     {stranger.sign(t, podClaims(nil), nil), CheckSignature, true},
	} {
		for way, k := range ways {
			if test.offline && way == "review" {
				continue // the real API server does this
			}
			before := api.reviews.Load()
			e, err := k.verify(t.Context(), test.token, podUID)
			if err == nil && (e.Subject != podAccount || e.Source != SourceKubernetes || e.Issuer != apiIssuer ||
				claim(e.Claims, "kubernetes.io", "pod", "name") != "orders-0" || e.Expires.IsZero()) {
				t.Errorf("%s, %s: %+v", name, way, e)
			}
			t.Run(name+", "+way, func(t *testing.T) { wantCheck(t, err, test.check, test.token) })
			if sent := api.reviews.Load() - before; sent > 0 && test.check != "" {
				t.Errorf("%s, %s: the token was sent to the API server", name, way)
			}
		}
	}
}

func TestWhatTheAPIServerSaysOfATokenIsComparedWithIt(t *testing.T) {
	key := newSigningKey(t, jose.ES256, "k1")
	token := key.sign(t, podClaims(nil), nil)
	for name, test := range map[string]struct {
		change func(*reviewStatus)
		check  string
	}{
		"it says yes":         {func(*reviewStatus) {}, ""},
		"it says no":          {func(s *reviewStatus) { s.Authenticated = false }, CheckReview},
		"another audience":    {func(s *reviewStatus) { s.Audiences = []string{"other"} }, CheckReview},
		"no audience":         {func(s *reviewStatus) { s.Audiences = nil }, CheckReview},
		"another account":     {func(s *reviewStatus) { s.User.Username = "admin" }, CheckReview},
		"another pod":         {func(s *reviewStatus) { s.User.Extra[extraPodUID] = []string{staticUID} }, CheckReview},
		"one more pod":        {func(s *reviewStatus) { s.User.Extra[extraPodUID] = []string{podUID, "x"} }, CheckReview},
		"no pod":              {func(s *reviewStatus) { s.User.Extra = nil }, CheckReview},
		"it quotes the token": {func(s *reviewStatus) { *s = reviewStatus{Error: "no: " + token} }, CheckReview},
	} {
		t.Run(name, func(t *testing.T) {
			api := newAPIServer(t)
			api.change = test.change
			k := kubernetes(t, key, KubernetesOptions{Review: api.review(time.Second, time.Minute)})
			_, err := k.verify(t.Context(), token, podUID)
			wantCheck(t, err, test.check, token)
		})
	}
}

func TestAnAPIServerThatDoesNotAnswerIsNoVerdict(t *testing.T) {
	text := func(code int, text string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(code)
			_, _ = w.Write([]byte(text))
		}
	}
	key := newSigningKey(t, jose.ES256, "k1")
	token := key.sign(t, podClaims(nil), nil)
	for name, answer := range map[string]http.HandlerFunc{
		"an outage":        text(http.StatusServiceUnavailable, "SECRET"),
		"no right":         text(http.StatusForbidden, "SECRET"),
		"another text":     text(http.StatusOK, "SECRET"),
		"another object":   text(http.StatusCreated, `{"kind":"Status","status":{"authenticated":true}}`),
		"a redirect":       func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/", http.StatusFound) },
		"a cut connection": func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) },
	} {
		api := newAPIServer(t)
		api.answers(answer)
		review := api.review(time.Second, time.Minute)
		err := review.check(t.Context(), token, "klamm", podAccount, podUID)
		if unknown := new(unknownError); !errors.As(err, unknown) || strings.Contains(err.Error(), "SECRET") {
			t.Errorf("%s: %v", name, err)
		}
		if err := review.Probe(t.Context(), "klamm"); err == nil {
			t.Errorf("%s: the probe found nothing", name)
		}
	}
	api := newAPIServer(t)
	api.gone.Store(true)
	if err := api.review(time.Second, time.Minute).Probe(t.Context(), "klamm"); err != nil {
		t.Errorf("a node that may ask: %v", err)
	}
}

func TestOneQuestionToTheAPIServerIsForAllProcessesOfAPod(t *testing.T) {
	api := newAPIServer(t)
	review := api.review(time.Hour, time.Hour)
	token := newSigningKey(t, jose.ES256, "k1").sign(t, podClaims(nil), nil)
	var all sync.WaitGroup
	for range 100 {
		all.Go(func() {
			if err := review.check(t.Context(), token, "klamm", podAccount, podUID); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if n := api.reviews.Load(); n != 1 {
		t.Errorf("%d reviews", n)
	}
	if err := review.check(t.Context(), token+"x", "klamm", podAccount, podUID); err != nil || api.reviews.Load() != 2 {
		t.Errorf("another token: %v, %d reviews", err, api.reviews.Load())
	}
}

// told is what a source has told, one after the other.
type told struct {
	e   *Evidence
	err error
}

// watched runs a source's watch until the test ends.
func watched(t *testing.T, s Source, p subject) (<-chan told, <-chan error) {
	t.Helper()
	all, ended := make(chan told), make(chan error, 1)
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		ended <- s.watch(ctx, p, func(e *Evidence, err error) {
			select {
			case all <- told{e, err}:
			case <-ctx.Done():
			}
		})
	}()
	t.Cleanup(func() {
		stop()
		<-done
	})
	return all, ended
}

func next(t *testing.T, all <-chan told) told {
	t.Helper()
	select {
	case now := <-all:
		return now
	case <-time.After(20 * time.Second):
		t.Fatal("nothing was told")
		return told{}
	}
}

func TestAPodsTokenIsFollowedForAsLongAsItsProcessLives(t *testing.T) {
	root, cmd := jailed(t)
	key := newSigningKey(t, jose.ES256, "k1")
	api := newAPIServer(t)
	k := kubernetes(t, key, KubernetesOptions{Issuer: apiIssuer, Review: api.review(3*time.Millisecond, time.Hour)})
	all, ended := watched(t, k, subjectOf(t, cmd.Process.Pid))
	if now := next(t, all); now.e != nil || now.err != nil {
		t.Fatalf("before there is a token: %+v", now)
	}
	laidOut(t, root, tokenPath, key.sign(t, podClaims(nil), nil)+"\n")
	if now := next(t, all); now.e == nil || now.e.Subject != podAccount {
		t.Fatalf("the token has come: %+v", now)
	}
	laidOut(t, root, tokenPath, key.sign(t, podClaims(func(c claims) { c["jti"] = "two" }), nil))
	if now := next(t, all); now.e == nil || now.e.Claims["jti"] != "two" {
		t.Fatalf("kubelet has rotated it: %+v", now)
	}
	laidOut(t, root, tokenPath, "no token")
	if now := next(t, all); now.e != nil || now.err == nil {
		t.Fatalf("it has become another text: %+v", now)
	}
	laidOut(t, root, tokenPath, key.sign(t, podClaims(nil), nil))
	if now := next(t, all); now.e == nil {
		t.Fatalf("it is back: %+v", now)
	}
	api.answers(func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "", http.StatusServiceUnavailable) })
	reviews := api.reviews.Load()
	for api.reviews.Load() < reviews+3 {
		select {
		case now := <-all:
			t.Fatalf("the API server is away: %+v", now)
		case <-time.After(time.Millisecond):
		}
	}
	api.answer.Store(nil)
	kill(t, cmd) // others may hold its connection
	reviews = api.reviews.Load()
	for api.reviews.Load() < reviews+3 {
		select {
		case now := <-all:
			t.Fatalf("the process has exited: %+v", now)
		case err := <-ended:
			t.Fatal(err)
		case <-time.After(time.Millisecond):
		}
	}
	api.gone.Store(true)
	if now := next(t, all); now.e != nil || now.err == nil || !strings.Contains(now.err.Error(), "invalidated") {
		t.Fatalf("the pod was deleted: %+v", now)
	}
}

func TestAProcessOutsideOfPodsHasNoServiceAccount(t *testing.T) {
	_, cmd := jailed(t)
	k := kubernetes(t, newSigningKey(t, jose.ES256, "k1"), KubernetesOptions{Issuer: apiIssuer})
	p := subjectOf(t, cmd.Process.Pid)
	p.PodUID = ""
	all, ended := watched(t, k, p)
	if now := next(t, all); now.e != nil || now.err != nil {
		t.Errorf("%+v", now)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func TestAProcessThatIsGoneBeforeItsTokenIsReadIsRefused(t *testing.T) {
	_, cmd := jailed(t)
	k := kubernetes(t, newSigningKey(t, jose.ES256, "k1"), KubernetesOptions{Issuer: apiIssuer})
	p := subjectOf(t, cmd.Process.Pid)
	kill(t, cmd)
	if err := k.watch(t.Context(), p, nil); !errors.Is(err, ErrGone) {
		t.Error(err)
	}
}

func TestEvidenceEndsWhenItCannotBeLookedAtForTooLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var away atomic.Bool
		r := tokenReader{pace: 3 * time.Second, keep: 15 * time.Second,
			read: func(context.Context) (string, error) { return "x", nil },
			verify: func(context.Context, string) (*Evidence, error) {
				if away.Load() {
					return nil, unknownError{errors.New("away")}
				}
				return &Evidence{Subject: "x"}, nil
			}}
		ctx, stop := context.WithCancel(t.Context())
		told := make(chan *Evidence, 10)
		var running sync.WaitGroup
		running.Go(func() { _ = r.follow(ctx, func(e *Evidence, _ error) { told <- e }) })
		for _, step := range []struct {
			away  bool
			after time.Duration
			told  int
			known bool
		}{
			{false, time.Minute, 1, true},
			{true, 11 * time.Second, 0, true},
			{true, 4 * time.Second, 1, false},
			{false, 4 * time.Second, 1, true},
		} {
			away.Store(step.away)
			time.Sleep(step.after)
			synctest.Wait()
			if len(told) != step.told {
				t.Fatalf("%+v: %d times", step, len(told))
			}
			for len(told) > 0 {
				if e := <-told; (e != nil) != step.known {
					t.Errorf("%+v: %+v", step, e)
				}
			}
		}
		stop()
		running.Wait()
	})
}

func TestATokenIsReadAnewBeforeItEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		var looks []time.Duration
		r := tokenReader{pace: time.Hour, read: func(context.Context) (string, error) {
			looks = append(looks, time.Since(began))
			return fmt.Sprint(len(looks)), nil
		}, verify: func(context.Context, string) (*Evidence, error) {
			return &Evidence{Expires: began.Add(time.Minute * time.Duration(len(looks)))}, nil
		}}
		ctx, stop := context.WithTimeout(t.Context(), 150*time.Second)
		defer stop()
		if err := r.follow(ctx, func(*Evidence, error) {}); err != nil {
			t.Error(err)
		}
		if want := []time.Duration{0, 59 * time.Second, 119 * time.Second}; fmt.Sprint(looks) != fmt.Sprint(want) {
			t.Errorf("looked at %v, want %v", looks, want)
		}
	})
}

func TestATokenFileIsWhoseeverMayReadIt(t *testing.T) {
	root, cmd := jailed(t)
	key := newSigningKey(t, jose.ES256, "k1")
	tokens := trusted(t, key)
	s, err := NewTokenFile(tokens, NewProcesses(new(procTasks), "", nil),
		TokenFileOptions{"/gone/token", testIssuer, testAudience}, TokenFileOptions{"/token", testIssuer, testAudience})
	if err != nil {
		t.Fatal(err)
	}
	s.pace = time.Millisecond
	laidOut(t, root, "/token", key.sign(t, goodClaims(nil), nil))
	all, _ := watched(t, s, subjectOf(t, cmd.Process.Pid))
	if now := next(t, all); now.e == nil || now.e.Subject != "orders" || now.e.Source != SourceTokenFile {
		t.Fatalf("%+v", now)
	}
	for _, private := range []bool{true, false} {
		mode := map[bool]os.FileMode{true: 0o600, false: 0o644}[private]
		if err := os.Chmod(filepath.Join(root, "token"), mode); err != nil { // root's
			t.Fatal(err)
		}
		if now := next(t, all); (now.e == nil) != private {
			t.Fatalf("mode %v: %+v", mode, now)
		}
	}
	laidOut(t, root, "/token", key.sign(t, goodClaims(claims{"aud": "other"}), nil))
	if now := next(t, all); now.e != nil {
		t.Fatalf("a token for somebody else: %+v", now)
	}
	laidOut(t, root, "/gone/token", key.sign(t, goodClaims(claims{"sub": "first"}), nil))
	if now := next(t, all); now.e == nil || now.e.Subject != "first" {
		t.Fatalf("the first file has come: %+v", now)
	}
}

func TestSourcesOfUnknownIssuersAreRefused(t *testing.T) {
	tokens := trusted(t, newSigningKey(t, jose.ES256, "k1"))
	if _, err := NewTokenFile(tokens, nil, TokenFileOptions{"/token", "https://evil.test", "x"}); err == nil {
		t.Error("token file")
	}
	for _, o := range []KubernetesOptions{{}, {Issuer: "https://evil.test"}} {
		if _, err := NewKubernetes(tokens, nil, o); err == nil {
			t.Errorf("%+v", o)
		}
	}
}

func FuzzParseReview(f *testing.F) {
	f.Add([]byte(`{"kind":"TokenReview","status":{"authenticated":true,"audiences":["a"],"user":{"extra":{"a":["b"]}}}}`))
	f.Add([]byte(`{"kind":"Status"}`))
	f.Fuzz(func(t *testing.T, answer []byte) {
		var status reviewStatus
		var err error
		bounds.Check(t, len(answer), 1<<10, func() { status, err = parseReview(answer) })
		if err != nil && status.Authenticated {
			t.Errorf("authenticated, with %v", err)
		}
	})
}

// FuzzBind: whatever claims a token has, it is evidence for one pod alone.
func FuzzBind(f *testing.F) {
	good, err := json.Marshal(podClaims(nil))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`{"aud":"klamm","sub":"system:serviceaccount::","kubernetes.io":{"pod":{"uid":""}}}`))
	k := &Kubernetes{KubernetesOptions: KubernetesOptions{Audience: "klamm"}}
	f.Fuzz(func(t *testing.T, text []byte) {
		var all map[string]any
		if json.Unmarshal(text, &all) != nil {
			return
		}
		e := &Evidence{Claims: all}
		if k.bind(e, podUID) == nil && k.bind(&Evidence{Claims: all}, staticUID) == nil {
			t.Errorf("evidence for two pods: %s", text)
		}
	})
}
