// Package fake is a SPIRE agent with its server in one process: entries, and the three APIs over unix sockets that give
// processes their SVIDs. It attests by the real uid alone (selectors unix:uid:N). What it answers is what SPIRE 1.15.3
// answers, or, where that is asked for, what SPIFFE's specification of the Broker API says.
package fake

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"

	"klamm/test/ca"
	"klamm/test/spire"
)

// Options describe a fake. The zero value behaves as SPIRE does.
type Options struct {
	TTL time.Duration // of X509-SVIDs; 0: an hour
	// Conforms has the Broker API answer as its specification says: NotFound for no process, PermissionDenied for one
	// without identity, and the end of a stream with its process.
	Conforms bool
	// Impostor serves the Broker API with this SPIFFE ID; empty: an agent's.
	Impostor string
}

// Agent is a fake. Safe for concurrent use.
type Agent struct {
	opts Options
	dir  string
	root *ca.Authority
	key  *ecdsa.PrivateKey // of JWT-SVIDs

	mu        sync.Mutex
	entries   map[string]*entry
	federated map[string]*x509.Certificate
	delegates []string
	changed   chan struct{} // closed at the next change
	paused    chan struct{} // closed while it is not paused
	servers   []*grpc.Server
	made      int
}

// entry is a registered one with its current SVID.
type entry struct {
	spire.Entry
	svid svid
}

// svid is an X509-SVID.
type svid struct {
	chain, key []byte // DER
	renew, end time.Time
}

// New starts a fake. The caller stops it.
func New(opts Options) (*Agent, error) {
	if opts.TTL == 0 {
		opts.TTL = time.Hour
	}
	root, rerr := ca.New("SPIRE")
	key, kerr := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	dir, derr := os.MkdirTemp("", "spire-")
	if err := errors.Join(rerr, kerr, derr, os.Chmod(dir, 0o755)); err != nil {
		return nil, err
	}
	a := &Agent{opts: opts, dir: dir, root: root, key: key, entries: map[string]*entry{},
		federated: map[string]*x509.Certificate{}, delegates: []string{spire.Node}, changed: make(chan struct{}),
		paused: make(chan struct{})}
	close(a.paused)
	node := spire.Entry{ID: spire.Node, Selectors: []string{"unix:uid:0"}}
	if _, err := a.Register(context.Background(), node); err != nil {
		return nil, err
	}
	return a, a.StartAgent(context.Background())
}

// ID is a SPIFFE ID of the fake's trust domain.
func (a *Agent) ID(path string) string { return "spiffe://" + spire.TrustDomain + path }

// WorkloadAPI is the path of the public socket.
func (a *Agent) WorkloadAPI() string { return filepath.Join(a.dir, "public", "api.sock") }

// Socket is the path of the socket of an API: "broker" or "delegated".
func (a *Agent) Socket(api string) string { return filepath.Join(a.dir, api, "api.sock") }

// ShortTTL is the shortest life of an X509-SVID that can be asked for.
func (a *Agent) ShortTTL() time.Duration { return 3 * time.Second }

// StartAgent serves the APIs.
func (a *Agent) StartAgent(context.Context) error {
	for path, server := range map[string]*grpc.Server{
		a.WorkloadAPI(): a.workloadServer(), a.Socket("delegated"): a.adminServer(), a.Socket("broker"): a.brokerServer(),
	} {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		_ = os.Remove(path) // a killed one's
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			return err
		}
		l.SetUnlinkOnClose(false)
		if path == a.WorkloadAPI() {
			err = os.Chmod(path, 0o777)
		} else {
			err = os.Chmod(path, 0o770)
		}
		if err != nil {
			return err
		}
		a.mu.Lock()
		a.servers = append(a.servers, server)
		a.mu.Unlock()
		go func() { _ = server.Serve(l) }()
	}
	return nil
}

// StopAgent ends all streams. The sockets stay behind where it is killed.
func (a *Agent) StopAgent(how syscall.Signal) error {
	a.mu.Lock()
	servers := a.servers
	a.servers = nil
	a.mu.Unlock()
	var stopped sync.WaitGroup
	for _, s := range servers {
		stopped.Go(s.Stop)
	}
	stopped.Wait()
	if how == syscall.SIGKILL {
		return nil
	}
	return errors.Join(os.Remove(a.WorkloadAPI()), os.Remove(a.Socket("delegated")), os.Remove(a.Socket("broker")))
}

// Stop ends the fake.
func (a *Agent) Stop() error {
	return errors.Join(a.Resume(), a.StopAgent(syscall.SIGKILL), os.RemoveAll(a.dir))
}

// Pause makes the agent mute: it answers nothing until Resume.
func (a *Agent) Pause() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.paused = make(chan struct{})
	return nil
}

// Resume ends Pause.
func (a *Agent) Resume() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	select {
	case <-a.paused:
	default:
		close(a.paused)
	}
	return nil
}

// gate holds an answer for as long as the agent is mute. Its error is that of ctx.
func (a *Agent) gate(ctx context.Context) error {
	a.mu.Lock()
	paused := a.paused
	a.mu.Unlock()
	select {
	case <-paused:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// SetDelegates has others ask on behalf of workloads.
func (a *Agent) SetDelegates(ids ...string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.delegates = ids
	a.tell()
}

// tell wakes all streams. a.mu is held.
func (a *Agent) tell() {
	close(a.changed)
	a.changed = make(chan struct{})
}

// Register makes an entry and returns its own id.
func (a *Agent) Register(_ context.Context, e spire.Entry) (string, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.made++
	id := fmt.Sprintf("entry-%03d", a.made)
	a.entries[id] = &entry{Entry: e}
	a.tell()
	return id, nil
}

// Update changes an entry.
func (a *Agent) Update(_ context.Context, id string, e spire.Entry) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.entries[id] == nil {
		return fmt.Errorf("no entry %s", id)
	}
	a.entries[id] = &entry{Entry: e}
	a.tell()
	return nil
}

// Remove revokes an entry.
func (a *Agent) Remove(_ context.Context, id string) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.entries[id] == nil {
		return fmt.Errorf("no entry %s", id)
	}
	delete(a.entries, id)
	a.tell()
	return nil
}

// NodeEntry is the entry of the node.
func (a *Agent) NodeEntry(context.Context) (string, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for id, e := range a.entries {
		if e.ID == spire.Node {
			return id, nil
		}
	}
	return "", errors.New("the node has no entry")
}

// Federate sets the bundle of another trust domain.
func (a *Agent) Federate(_ context.Context, domain string, root *x509.Certificate) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.federated[domain] = root
	a.tell()
	return nil
}

// Unfederate removes the bundle of another trust domain, also from the entries.
func (a *Agent) Unfederate(_ context.Context, domain string) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.federated, domain)
	for _, e := range a.entries {
		e.FederatesWith = slices.DeleteFunc(e.FederatesWith, func(d string) bool { return d == domain })
	}
	a.tell()
	return nil
}

// matching are the entries of a user with SVIDs that are not about to expire, in the order they were made, and how long
// that is so. a.mu is held.
func (a *Agent) matching(uid uint32) (found []*entry, renew time.Time, err error) {
	selector := fmt.Sprintf("unix:uid:%d", uid)
	renew = time.Now().Add(time.Hour)
	for _, id := range slices.Sorted(maps.Keys(a.entries)) {
		e := a.entries[id]
		if !slices.Contains(e.Selectors, selector) {
			continue
		}
		if !time.Now().Before(e.svid.renew) {
			if e.svid, err = a.issue(e.Entry); err != nil {
				return nil, renew, err
			}
		}
		if e.svid.renew.Before(renew) {
			renew = e.svid.renew
		}
		found = append(found, e)
	}
	return found, renew, nil
}

func (a *Agent) issue(e spire.Entry) (svid, error) {
	ttl := a.opts.TTL
	if e.X509TTL != 0 {
		ttl = e.X509TTL
	}
	now := time.Now()
	subject := pkix.Name{Organization: []string{"SPIRE"}, Country: []string{"US"}}
	if len(e.DNSNames) > 0 {
		subject.CommonName = e.DNSNames[0]
	}
	leaf, err := a.root.Issue(ca.Leaf{ID: e.ID, Subject: subject, Names: e.DNSNames, Expires: now.Add(ttl)})
	if err != nil {
		return svid{}, err
	}
	key, err := x509.MarshalPKCS8PrivateKey(leaf.PrivateKey)
	return svid{chain: leaf.Certificate[0], key: key, renew: now.Add(ttl / 2), end: leaf.Leaf.NotAfter}, err
}

// token is a JWT-SVID of an entry.
func (a *Agent) token(e *entry, audience []string) (string, time.Time, error) {
	ttl := 5 * time.Minute
	if e.JWTTTL != 0 {
		ttl = e.JWTTTL
	}
	key := jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: a.key, KeyID: keyID}}
	signer, err := jose.NewSigner(key, nil)
	if err != nil {
		return "", time.Time{}, err
	}
	now := time.Now()
	token, err := jwt.Signed(signer).Claims(jwt.Claims{Subject: e.ID, Audience: audience,
		IssuedAt: jwt.NewNumericDate(now), Expiry: jwt.NewNumericDate(now.Add(ttl))}).Serialize()
	return token, now.Add(ttl), err
}

// follow sends what a user has, at once and at every change, until it fails or the stream ends.
func (a *Agent) follow(ctx context.Context, uid uint32, send func([]*entry) error) error {
	for a.gate(ctx) == nil {
		a.mu.Lock()
		found, renew, err := a.matching(uid)
		copies := make([]*entry, len(found))
		for i, e := range found {
			c := *e
			copies[i] = &c
		}
		changed := a.changed
		a.mu.Unlock()
		if err == nil {
			err = send(copies)
		}
		if err != nil {
			return err
		}
		timer := time.NewTimer(time.Until(renew))
		select {
		case <-changed:
		case <-timer.C:
		case <-ctx.Done():
		}
		timer.Stop()
	}
	return nil // SPIRE ends streams so
}

// bundles are the federated ones of entries, by trust domain.
func (a *Agent) bundles(entries []*entry) map[string][]byte {
	a.mu.Lock()
	defer a.mu.Unlock()
	all := map[string][]byte{}
	for _, e := range entries {
		for _, d := range e.FederatesWith {
			if root := a.federated[d]; root != nil {
				all["spiffe://"+d] = root.Raw
			}
		}
	}
	return all
}

// authorized tells whether a user is one that may ask on behalf of others.
func (a *Agent) authorized(uid uint32) (known, listed bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	found, _, _ := a.matching(uid)
	for _, e := range found {
		listed = listed || slices.Contains(a.delegates, e.ID)
	}
	return len(found) > 0, listed
}

// uidOf is the real user id of a process.
func uidOf(pid int32) (uint32, error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	var uid uint32
	_, rest, _ := strings.Cut(string(status), "\nUid:")
	_, err = fmt.Sscan(rest, &uid)
	return uid, err
}

func parseIDs(ids []string) (parsed []spiffeid.ID) {
	for _, id := range ids {
		parsed = append(parsed, spiffeid.RequireFromString(id))
	}
	return parsed
}
