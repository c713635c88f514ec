package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"time"

	"klamm/test/ca"
	"klamm/test/kafka"
)

// The bounds within which rights end.
const (
	revokedBound = 15 * time.Second // after an entry is deleted, SPIRE's own intervals included
	expiredBound = time.Second      // after an SVID or token has expired
)

// identified lets each workload use its topic, and nobody else do anything.
const identified = `apiVersion: klamm/v1
rules:
  - {name: orders, principals: ["` + ordersID + `"], allow: [{topic: orders, operations: [Read, Write, Describe]}]}
  - {name: billing, principals: ["` + billingID + `"], allow: [{topic: billing, operations: [Read, Write, Describe]}]}
  - {name: late, principals: ["` + lateID + `"], allow: [{topic: orders, operations: [Describe]}]}
  - {name: brief, principals: ["` + briefID + `"], allow: [{topic: orders, operations: [Describe]}]}
`

const (
	lateID  = trustDomain + "late"
	briefID = trustDomain + "brief"

	briefUID  = 61105
	briefLife = time.Minute
)

// attested is a world with SPIRE, brokers that believe its SVIDs, and a node that asks it.
type attested struct {
	*world
	programs *programs
	spire    *spire
	cluster  *kafka.Cluster
	node     *node
}

func newAttested(ctx context.Context, name string, opts kafka.Options, entries ...entry) (_ *attested, err error) {
	a := &attested{}
	if a.world, err = newWorld(name); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, a.close())
		}
	}()
	authority, err := ca.New("klamm identity")
	if err != nil {
		return nil, err
	}
	binary, err := klammBinary(ctx)
	if err != nil {
		return nil, err
	}
	a.programs = a.world.programs()
	a.spire, err = startSPIRE(ctx, a.dir, a.programs, authority, "", append(entries, klammEntry(binary))...)
	if err != nil {
		return nil, err
	}
	if opts.TLS != nil {
		opts.TLS.CA = authority
		if opts.TLS.Clients, err = a.spire.bundle(); err != nil {
			return nil, err
		}
		opts.TLS.Clients = append(opts.TLS.Clients, authority.Certificate)
	}
	if opts.OAuth != nil {
		opts.OAuth.KeySet, opts.OAuth.CA, opts.OAuth.Issuer = a.spire.keySet(), authority.PEM(), a.spire.issuer
	}
	a.cluster, err = a.startKafka(ctx, opts)
	return a, err
}

func spireSuite(ctx context.Context, tell tell) {
	a, err := newAttested(ctx, "spire", kafka.Options{}, unix(ordersID, ordersUID).named("orders.shop"),
		unix(billingID, billingUID), unix(briefID, briefUID).lasting(briefLife))
	if err != nil {
		tell("SPIRE and Kafka start", "", err)
		return
	}
	defer func() { tell("it leaves nothing behind", "", a.close()) }()
	for _, api := range []string{"broker", "delegated"} {
		tell := func(name, measured string, err error) { tell(api+" API: "+name, measured, err) }
		a.node, err = a.newNode(ctx, api, []int{kafka.PlaintextPort}, identified, sections{
			"clusters": fmt.Sprintf("[{name: main, bootstrap: [%q]}]", a.cluster.Addrs()[0]),
			"spire":    a.spire.section(api),
		})
		if err == nil {
			err = a.node.ready(ctx)
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
	return p, p.connect(a.cluster.Addrs()[0])
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
	if err := a.spire.create(unix(lateID, lateUID)); err != nil {
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
		return err != nil || len(topics) == 0, nil
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
	if err := a.spire.delete(lateID); err != nil {
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
	if err == nil {
		var topics []string
		if topics, err = p.topics(); err == nil && len(topics) > 0 {
			return fmt.Errorf("it sees %q", topics)
		}
	}
	return nil
}

func (a *attested) agentIsMissed(ctx context.Context) (string, error) {
	if err := a.programs.Stop("spire-agent", syscall.SIGKILL); err != nil {
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
		return a.node.logged(a.spire.dir, "connect")
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
	if err := a.spire.startAgent(ctx, ""); err != nil {
		return "", err
	}
	return a.identifies(ctx)
}

func (a *attested) serverIsDown(ctx context.Context) (string, error) {
	if err := a.programs.Stop("spire-server", syscall.SIGTERM); err != nil {
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
	expiry, err := a.spire.expiry(briefUID)
	if err != nil {
		return "", err
	}
	end, err := rightsEnd(ctx, p, time.Until(expiry)+waitLimit)
	if err != nil {
		return "", err
	}
	after := end.Sub(expiry)
	measured := fmt.Sprintf("%.0f ms after its expiry", after.Seconds()*1000)
	if after < -expiredBound || after > expiredBound {
		return measured, fmt.Errorf("want at most %v", expiredBound)
	}
	return measured, nil
}

func (a *attested) serverIsBack(ctx context.Context) (string, error) {
	if err := a.spire.startServer(ctx); err != nil {
		return "", err
	}
	began := time.Now()
	err := until(ctx, "a new SVID", waitLimit, func() (bool, error) {
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
	err := errors.Join(a.node.stop(), a.programs.Stop("spire-agent", syscall.SIGTERM))
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
	if err == nil && !strings.Contains(out, a.spire.dir) {
		err = fmt.Errorf("klamm status does not name the socket:\n%s", out)
	}
	if err := errors.Join(err, a.spire.startAgent(ctx, "")); err != nil {
		return "", err
	}
	return a.identifies(ctx)
}
