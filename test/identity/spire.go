package main

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"klamm/test/ca"
	"klamm/test/host"
	"klamm/test/kafka"
	"klamm/test/spire"
)

// The bounds within which rights end.
const (
	revokedBound = 15 * time.Second // after an entry is deleted, SPIRE's own intervals included
	expiredBound = time.Second      // after an SVID or token has expired
)

// SPIFFE IDs.
const (
	trustDomain = "spiffe://" + spire.TrustDomain + "/"
	ordersID    = trustDomain + "ns/shop/sa/orders"
	billingID   = trustDomain + "ns/shop/sa/billing"
	lateID      = trustDomain + "late"
	briefID     = trustDomain + "brief"
)

const briefLife = 20 * time.Second // of the SVIDs of brief: the shortest of which none is missed

// identified lets each workload use its topic, and nobody else do anything.
const identified = `apiVersion: klamm/v1
rules:
  - {name: orders, principals: ["` + ordersID + `"], allow: [{topic: orders, operations: [Read, Write, Describe]}]}
  - {name: billing, principals: ["` + billingID + `"], allow: [{topic: billing, operations: [Read, Write, Describe]}]}
  - {name: late, principals: ["` + lateID + `"], allow: [{topic: orders, operations: [Describe]}]}
  - {name: brief, principals: ["` + briefID + `"], allow: [{topic: orders, operations: [Describe]}]}
`

// attested is a world with SPIRE, brokers that believe its SVIDs, and a node that asks it.
type attested struct {
	*world
	spire     *spire.SPIRE
	authority *ca.Authority // of the brokers
	cluster   *kafka.Cluster
	node      *node
	late      string // the entry that comes late
}

// syncInterval is SPIRE's own default, for its agent and for its server.
const syncInterval = 5 * time.Second

// newAttested starts SPIRE with these entries, and brokers.
func newAttested(
	ctx context.Context, name string, opts kafka.Options, entries ...spire.Entry,
) (_ *attested, err error) {
	a := &attested{}
	if a.world, err = newWorld(name); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, a.close())
		}
	}()
	if a.authority, err = ca.New("klamm identity"); err != nil {
		return nil, err
	}
	binary, err := klammBinary(ctx)
	if err != nil {
		return nil, err
	}
	if err := os.Mkdir(a.file("spire"), 0o755); err != nil {
		return nil, err
	}
	a.spire, err = spire.New(ctx, spire.Options{Dir: a.file("spire"), Discovery: true, SyncInterval: syncInterval,
		CacheInterval: syncInterval, NodeSelectors: []string{"unix:uid:0", "unix:path:" + binary}})
	if err != nil {
		return nil, err
	}
	a.onClose(a.spire.Stop)
	for _, e := range entries {
		if _, err := a.spire.Register(ctx, e); err != nil {
			return nil, err
		}
	}
	if err := a.trust(ctx, &opts); err != nil {
		return nil, err
	}
	a.cluster, err = a.startKafka(ctx, opts)
	return a, err
}

// trust has the brokers believe SVIDs.
func (a *attested) trust(ctx context.Context, opts *kafka.Options) error {
	if opts.TLS != nil {
		bundle, err := a.spire.Bundle(ctx)
		if err != nil {
			return err
		}
		clients, err := certificates(bundle)
		if err != nil {
			return err
		}
		opts.TLS.CA, opts.TLS.Clients = a.authority, append(clients, a.authority.Certificate)
	}
	if opts.OAuth == nil {
		return nil
	}
	root, err := os.ReadFile(a.spire.IssuerCA())
	opts.OAuth.KeySet, opts.OAuth.CA, opts.OAuth.Issuer = a.spire.Issuer()+"/keys", root, a.spire.Issuer()
	return err
}

func certificates(pemText []byte) (all []*x509.Certificate, err error) {
	for block, rest := pem.Decode(pemText); block != nil; block, rest = pem.Decode(rest) {
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		all = append(all, c)
	}
	return all, nil
}

// user is an entry of the processes of a user.
func user(uid int, id string) spire.Entry {
	return spire.Entry{ID: id, Selectors: []string{"unix:uid:" + strconv.Itoa(uid)}}
}

// section is the section spire of a klamm.yaml.
func (a *attested) section(api string) string {
	return fmt.Sprintf("{api: %s, socket: %q, workload-api: %q}", api, a.spire.Socket(api), a.spire.WorkloadAPI())
}

// expiry is when the X509-SVID ends that the agent has now for the processes of a user.
func (a *attested) expiry(uid uint32) (time.Time, error) {
	p, err := host.StartSelf(kafka.Place{UID: uid, GID: uid}, "svid", a.spire.WorkloadAPI())
	if err != nil {
		return time.Time{}, err
	}
	line, err := p.Line()
	if err = errors.Join(err, p.Wait()); err != nil {
		return time.Time{}, err
	}
	return time.Parse(time.RFC3339Nano, line)
}

// fetchSVID prints when the X509-SVID ends that the agent at a socket has for this process.
func fetchSVID(args []string) int {
	ctx, cancel := context.WithTimeout(context.Background(), waitLimit)
	defer cancel()
	svid, err := workloadapi.FetchX509SVID(ctx, workloadapi.WithAddr("unix://"+args[0]))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	fmt.Println(svid.Certificates[0].NotAfter.Format(time.RFC3339Nano))
	return 0
}

func spireSuite(ctx context.Context, tell tell) {
	brief := user(briefUID, briefID)
	brief.X509TTL, brief.JWTTTL = briefLife, briefLife
	a, err := newAttested(ctx, "spire", kafka.Options{}, user(ordersUID, ordersID), user(billingUID, billingID), brief)
	if err != nil {
		tell("SPIRE and Kafka start", "", err)
		return
	}
	tell = a.noting(tell)
	defer func() { tell("it leaves nothing behind", "", a.close()) }()
	for _, api := range []string{"broker", "delegated"} {
		tell := func(name, measured string, err error) { tell(api+" API: "+name, measured, err) }
		a.node, err = a.newNode(ctx, api, []int{kafka.PlaintextPort}, identified, sections{
			"clusters": fmt.Sprintf("[{name: main, bootstrap: [%q]}]", a.cluster.Addrs()[0]),
			"spire":    a.section(api),
		})
		if err == nil {
			err = a.node.ready(ctx)
		}
		if err == nil {
			_, err = a.identifies(ctx) // once the agent knows the entries
		}
		if err != nil {
			tell("the node starts", "", err)
			continue
		}
		runAll(ctx, tell, []check{
			{"users have identities of their own, and the audit says so", a.eachHasItsOwn},
			{"a stranger has none, and no rights", a.strangerHasNone},
			{"an entry that comes late counts without a reconnect", a.lateEntryCounts},
			{"a revoked entry ends the rights of an open connection", a.revokedEntryEnds},
			{"the agent is killed: it is told which socket, and why", a.agentIsMissed},
			{"the agent is back: the same node identifies again", a.agentIsBack},
			{"the server is down: workloads keep their identity, and others get theirs from the agent", a.serverIsDown},
			{"an SVID that expires ends the rights of an open connection", a.expiryEnds},
			{"the server is back: the next SVID restores them", a.serverIsBack},
			{"the node starts without a socket and identifies once there is one", a.socketComesLate},
		})
		tell("the node ends", "", a.node.stop())
	}
}

// holding is a workload of a user with a connection.
func (a *attested) holding(uid uint32) (*workload, error) {
	p, err := a.startWorkload(uid)
	if err != nil {
		return nil, err
	}
	if err := p.connect(a.cluster.Addrs()[0]); err != nil {
		return nil, errors.Join(err, p.end())
	}
	return p, nil
}

func (a *attested) eachHasItsOwn(ctx context.Context) (string, error) {
	for _, who := range []struct {
		uid       uint32
		id, topic string
	}{{ordersUID, ordersID, "orders"}, {billingUID, billingID, "billing"}} {
		p, err := a.holding(who.uid)
		if err != nil {
			return "", err
		}
		if err := p.sees(who.topic); err != nil {
			return "", fmt.Errorf("user %d: %w", who.uid, err)
		}
		l, err := a.node.awaitAudit(ctx, who.id, func(l auditLine) bool { return l.PID == uint32(p.pid()) })
		if err != nil {
			return "", err
		}
		if l.SPIFFE != who.id || l.UID != who.uid {
			return "", fmt.Errorf("the audit does not say user %d and %s: %s", who.uid, who.id, l.text)
		}
		if err := p.end(); err != nil {
			return "", err
		}
	}
	return "", nil
}

func (a *attested) strangerHasNone(ctx context.Context) (string, error) {
	p, err := a.holding(strangerUID)
	if err != nil {
		return "", err
	}
	if err := p.sees(); err != nil {
		return "", err
	}
	l, err := a.node.awaitAudit(ctx, "the stranger", func(l auditLine) bool { return l.PID == uint32(p.pid()) })
	if err == nil && l.SPIFFE != "" {
		return "", fmt.Errorf("the audit gives it an identity: %s", l.text)
	}
	return "", err
}

func (a *attested) lateEntryCounts(ctx context.Context) (string, error) {
	p, err := a.holding(lateUID)
	if err != nil {
		return "", err
	}
	if err := p.sees(); err != nil {
		return "", err
	}
	if a.late, err = a.spire.Register(ctx, user(lateUID, lateID)); err != nil {
		return "", err
	}
	began := time.Now()
	err = until(ctx, "the identity to arrive", waitLimit, func() (bool, error) {
		topics, err := p.topics()
		return len(topics) > 0, err
	})
	return fmt.Sprintf("%.1f s after the entry was made", time.Since(began).Seconds()), err
}

// rightsEnd waits until the held connection has no rights, or is closed.
func rightsEnd(ctx context.Context, p *workload, limit time.Duration) (time.Time, error) {
	err := until(ctx, "the end of rights", limit, func() (bool, error) {
		topics, err := p.topics()
		return err != nil || len(topics) == 0, nil //nolint:nilerr // a closed connection has no rights
	})
	return time.Now(), err
}

func (a *attested) revokedEntryEnds(ctx context.Context) (string, error) {
	p, err := a.holding(lateUID)
	if err != nil {
		return "", err
	}
	if err := p.sees("orders"); err != nil {
		return "", err
	}
	if err := a.spire.Remove(ctx, a.late); err != nil {
		return "", err
	}
	began := time.Now()
	end, err := rightsEnd(ctx, p, waitLimit)
	if err != nil {
		return "", err
	}
	measured := fmt.Sprintf("%.1f s after the entry was deleted", end.Sub(began).Seconds())
	if end.Sub(began) > revokedBound {
		return measured, fmt.Errorf("it took longer than %v", revokedBound)
	}
	if err := p.connect(a.cluster.Addrs()[0]); err != nil {
		return measured, err
	}
	return measured, p.sees() // a new connection has no rights either
}

// noIdentity fails when a new connection of orders has rights. It may be refused.
func (a *attested) noIdentity() error {
	p, err := a.holding(ordersUID)
	if err != nil {
		return nil
	}
	defer func() { _ = p.end() }()
	if topics, err := p.topics(); err == nil && len(topics) > 0 {
		return fmt.Errorf("it sees %q", topics)
	}
	return nil
}

func (a *attested) agentIsMissed(ctx context.Context) (string, error) {
	if err := a.spire.StopAgent(syscall.SIGKILL); err != nil {
		return "", err
	}
	began := time.Now()
	err := until(ctx, "new connections to be without rights", waitLimit, func() (bool, error) {
		return a.noIdentity() == nil, nil
	})
	if err != nil {
		return "", err
	}
	measured := fmt.Sprintf("new connections are without rights after %.1f s", time.Since(began).Seconds())
	return measured, a.tellsOfSocket(ctx)
}

// tellsOfSocket waits for the log to name the socket that does not answer.
func (a *attested) tellsOfSocket(ctx context.Context) error {
	return until(ctx, "the log to name the socket", waitLimit, func() (bool, error) {
		return a.node.logged(a.file("spire"))
	})
}

// identifies waits until a new connection of orders has its rights.
func (a *attested) identifies(ctx context.Context) (string, error) {
	began := time.Now()
	err := until(ctx, "a new connection to be identified", waitLimit, func() (bool, error) {
		p, err := a.holding(ordersUID)
		if err != nil {
			return false, nil // refused
		}
		defer func() { _ = p.end() }()
		return p.sees("orders") == nil, nil
	})
	return fmt.Sprintf("after %.1f s", time.Since(began).Seconds()), err
}

func (a *attested) agentIsBack(ctx context.Context) (string, error) {
	if err := a.spire.StartAgent(ctx); err != nil {
		return "", err
	}
	return a.identifies(ctx)
}

func (a *attested) serverIsDown(ctx context.Context) (string, error) {
	if err := a.spire.StopServer(syscall.SIGTERM); err != nil {
		return "", err
	}
	return a.identifies(ctx)
}

func (a *attested) expiryEnds(ctx context.Context) (string, error) {
	p, err := a.holding(briefUID)
	if err != nil {
		return "", err
	}
	if err := p.sees("orders"); err != nil {
		return "", err
	}
	expiry, err := a.expiry(briefUID)
	if err != nil {
		return "", err
	}
	end, err := rightsEnd(ctx, p, time.Until(expiry)+waitLimit)
	if err != nil {
		return "", err
	}
	return within(expiry, end)
}

func (a *attested) serverIsBack(ctx context.Context) (string, error) {
	if err := a.spire.StartServer(ctx); err != nil {
		return "", err
	}
	began := time.Now()
	err := until(ctx, "a new SVID", 2*waitLimit, func() (bool, error) {
		p, err := a.holding(briefUID)
		if err != nil {
			return false, nil // refused
		}
		defer func() { _ = p.end() }()
		return p.sees("orders") == nil, nil
	})
	return fmt.Sprintf("after %.1f s", time.Since(began).Seconds()), err
}

func (a *attested) socketComesLate(ctx context.Context) (string, error) {
	err := errors.Join(a.node.stop(), a.spire.StopAgent(syscall.SIGTERM))
	if err != nil {
		return "", err
	}
	if err := os.Truncate(a.node.file("node.log"), 0); err != nil {
		return "", err
	}
	if err := a.node.start(ctx); err != nil {
		return "", err
	}
	if err := errors.Join(a.noIdentity(), a.tellsOfSocket(ctx)); err != nil {
		return "", err
	}
	out, err := a.node.klamm("status")
	if err == nil && !strings.Contains(out, a.file("spire")) {
		err = fmt.Errorf("klamm status does not name the socket:\n%s", out)
	}
	if err := errors.Join(err, a.spire.StartAgent(ctx)); err != nil {
		return "", err
	}
	return a.identifies(ctx)
}
