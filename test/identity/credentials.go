package main

import (
	"context"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"

	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/test/ca"
	"klamm/test/kafka"
	"klamm/test/spire"
)

// Users at the brokers.
const (
	heldUser     = "held" // by the node, for workloads
	heldPassword = "held-secret"
	alice, bob   = "alice", "bob" // by workloads
	secretOf     = "%s-secret"

	svidAudience = "kafka" // of JWT-SVIDs
)

// mapping makes a principal of the common name of an SVID, which is the first DNS name of its entry.
const mapping = `RULE:^CN=([^,]+),O=SPIRE,C=US$/$1/,RULE:^CN=([^,]+)$/$1/,DEFAULT`

// nobodyUID is a user whose entry has no DNS name: its certificate has the subject of all others of that kind.
const (
	namelessUID = 61106
	namelessID  = trustDomain + "nameless"
)

const connectionRules = identified + `
  - name: nameless
    principals: ["` + namelessID + `"]
    allow: [{topic: orders, operations: [Read, Write, Describe]}]
connections:
  - {name: orders is alice, cluster: sasl, principals: ["` + ordersID + `"], sasl: ["User:alice"]}
  - {name: billing is bob, cluster: sasl, principals: ["` + billingID + `"], sasl: ["User:bob"]}
`

// provingWorld is a world whose brokers want to be shown who it is, in one way for each cluster of the node:
// mtls takes the workload's X509-SVID, jwt its JWT-SVID, held the node's password, and sasl what clients log in with.
type provingWorld struct {
	*attested
	other *kafka.Cluster
}

func named(uid int, id, dns string) spire.Entry {
	e := user(uid, id)
	e.DNSNames = []string{dns}
	return e
}

func (p provingWorld) sections() (sections, error) {
	root, err := p.written("ca.pem", p.authority.PEM())
	if err != nil {
		return nil, err
	}
	own, err := p.authority.Issue(ca.Leaf{Subject: commonName("klamm")})
	if err != nil {
		return nil, err
	}
	if err := ca.Write(own, p.file("klamm.crt"), p.file("klamm.key")); err != nil {
		return nil, err
	}
	admin, err := p.written("admin-password", []byte(kafka.AdminPassword))
	if err != nil {
		return nil, err
	}
	held, err := p.written("held-password", []byte(heldPassword))
	if err != nil {
		return nil, err
	}
	asAdmin := fmt.Sprintf("{mechanism: SCRAM-SHA-512, username: %s, password-file: %q}", kafka.Admin, admin)
	return sections{
		"spire": p.section("broker"),
		"clusters": fmt.Sprintf(`
  - name: mtls
    bootstrap: [%q]
    tls: {ca: %q, cert: %q, key: %q}
    upstream: {tls: {ca: %[2]q, certificate: workload}}
  - name: jwt
    bootstrap: [%[5]q]
    credentials: %[6]s
    upstream: {tls: {ca: %[2]q}, login: {jwt-svid: {audience: %[7]s}}}
  - name: sasl
    bootstrap: [%[8]q]
    credentials: %[6]s
  - name: held
    bootstrap: [%[9]q]
    credentials: %[6]s
    upstream: {login: {mechanism: SCRAM-SHA-512, username: %[10]s, password-file: %[11]q}, cleartext: true}
  - name: open
    bootstrap: [%[12]q]`,
			p.cluster.TLSAddrs()[0], root, p.file("klamm.crt"), p.file("klamm.key"), p.cluster.SASLTLSAddrs()[0], asAdmin,
			svidAudience, p.cluster.SASLAddrs()[0], p.held(), heldUser, held, p.other.Addrs()[0]),
	}, nil
}

// held is a broker of another cluster, to which the node logs in for workloads.
func (p provingWorld) held() string { return p.other.SASLAddrs()[0] }

func credentials(ctx context.Context, tell tell) {
	p, err := newProvingWorld(ctx)
	if err != nil {
		tell("SPIRE, Kafka and the node start", "", err)
		return
	}
	tell = p.noting(tell)
	defer func() { tell("it leaves nothing behind", "", p.close()) }()
	runAll(ctx, tell, []check{
		{"brokers see the principal of each workload's X509-SVID, not the node's", p.certificateShown},
		{"brokers see the principal of each workload's JWT-SVID, not the node's", p.tokenShown},
		{"a workload without an SVID reaches no broker that wants one", p.strangerRefused},
		{"workloads need no secret where the node holds it", p.nodeLogsIn},
		{"a direct connect without the node's credentials is refused by the broker", p.directRefused},
		{"SVID x may log in as user y only", p.agreement},
		{"doctor broker tells SVIDs without DNS names, which look the same to brokers", p.sharedSubject},
		{"doctor broker proves that a direct connect is refused, and finds where it is not", p.doctorBroker},
	})
}

func newProvingWorld(ctx context.Context) (p provingWorld, err error) {
	p.attested, err = newAttested(ctx, "credentials", kafka.Options{
		TLS:        &kafka.TLS{ClientAuth: "required", Mapping: mapping},
		OAuth:      &kafka.OAuth{Audience: svidAudience},
		Users:      map[string]string{alice: fmt.Sprintf(secretOf, alice), bob: fmt.Sprintf(secretOf, bob)},
		SuperUsers: []string{"User:klamm"},
	}, named(ordersUID, ordersID, "orders.shop"), named(billingUID, billingID, "billing.shop"),
		user(namelessUID, namelessID))
	if err != nil {
		return p, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.close())
		}
	}()
	p.other, err = p.startKafka(ctx, kafka.Options{Users: map[string]string{heldUser: heldPassword},
		SuperUsers: []string{"User:" + heldUser}})
	if err != nil {
		return p, err
	}
	for principal, topic := range map[string]string{"orders.shop": "orders", "billing.shop": "billing", ordersID: "orders",
		billingID: "billing", alice: "orders", bob: "orders"} {
		for _, operation := range []kmsg.ACLOperation{kmsg.ACLOperationRead, kmsg.ACLOperationWrite} {
			if err = p.cluster.Allow(ctx, "User:"+principal, kmsg.ACLResourceTypeTopic, topic, operation); err != nil {
				return p, err
			}
		}
	}
	more, err := p.sections()
	if err != nil {
		return p, err
	}
	ports := []int{kafka.TLSPort, kafka.SASLTLSPort, kafka.SASLPort, kafka.PlaintextPort}
	p.node, err = p.newNode(ctx, "credentials", ports, connectionRules, more)
	if err != nil {
		return p, err
	}
	if err = p.node.ready(ctx); err != nil {
		return p, err
	}
	return p, until(ctx, "the agent to know the entries", waitLimit, func() (bool, error) {
		return p.runClient(ordersUID, client{Broker: p.cluster.TLSAddrs()[0], Topic: "orders"}) == nil, nil
	})
}

// writers are how often the authorizers have let a principal write to a topic, as "PRINCIPAL TOPIC".
func writers(c *kafka.Cluster) (map[string]int, error) {
	decisions, err := c.Decisions()
	found := map[string]int{}
	for _, d := range decisions {
		if topic, is := strings.CutPrefix(d.Resource, "Topic:LITERAL:"); is && d.Operation == "WRITE" && d.Allowed {
			found[d.Principal+" "+topic]++
		}
	}
	return found, err
}

// write has both workloads write their topic by an address, and tells which principals the brokers saw.
func (p provingWorld) write(broker string) ([]string, error) {
	before, err := writers(p.cluster)
	if err != nil {
		return nil, err
	}
	for uid, topic := range map[uint32]string{ordersUID: "orders", billingUID: "billing"} {
		if err := p.runClient(uid, client{Broker: broker, Topic: topic}); err != nil {
			return nil, fmt.Errorf("user %d: %w", uid, err)
		}
	}
	after, err := writers(p.cluster)
	maps.DeleteFunc(after, func(who string, n int) bool { return n == before[who] })
	return slices.Sorted(maps.Keys(after)), err
}

func (p provingWorld) seen(broker string, want ...string) (string, error) {
	saw, err := p.write(broker)
	slices.Sort(want)
	if err == nil && !slices.Equal(saw, want) {
		err = fmt.Errorf("who writes to which topic is %q, want %q", saw, want)
	}
	return strings.Join(saw, ", "), err
}

func (p provingWorld) certificateShown(context.Context) (string, error) {
	return p.seen(p.cluster.TLSAddrs()[0], "User:orders.shop orders", "User:billing.shop billing")
}

func (p provingWorld) tokenShown(context.Context) (string, error) {
	return p.seen(p.cluster.SASLTLSAddrs()[0], "User:"+ordersID+" orders", "User:"+billingID+" billing")
}

func (p provingWorld) strangerRefused(context.Context) (string, error) {
	for _, broker := range []string{p.cluster.TLSAddrs()[0], p.cluster.SASLTLSAddrs()[0]} {
		if err := p.runClient(strangerUID, client{Broker: broker, Topic: "orders"}); err == nil {
			return "", fmt.Errorf("it wrote by %s", broker)
		}
	}
	return "", nil
}

func (p provingWorld) nodeLogsIn(context.Context) (string, error) {
	if err := p.runClient(ordersUID, client{Broker: p.held(), Topic: "orders"}); err != nil {
		return "", err
	}
	saw, err := writers(p.other)
	if err == nil && saw["User:"+heldUser+" orders"] == 0 {
		err = fmt.Errorf("the brokers saw write: %v", saw)
	}
	return "", err
}

func (p provingWorld) directRefused(context.Context) (string, error) {
	for _, broker := range []string{p.held(), p.cluster.TLSAddrs()[0]} {
		err := runClientAt(kafka.Place{UID: ordersUID, GID: ordersUID}, client{Broker: broker, Topic: "orders"})
		if err == nil {
			return "", fmt.Errorf("it wrote by %s", broker)
		}
	}
	return "", nil
}

func (p provingWorld) agreement(context.Context) (string, error) {
	broker := p.cluster.SASLAddrs()[0]
	for _, c := range []struct {
		uid     uint32
		user    string
		allowed bool
	}{{ordersUID, alice, true}, {ordersUID, bob, false}, {billingUID, alice, false}, {billingUID, bob, true}} {
		for _, mechanism := range []string{"PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"} {
			held, err := p.logsIn(c.uid, client{Broker: broker, Topic: "orders", Mechanism: mechanism, User: c.user,
				Secret: fmt.Sprintf(secretOf, c.user)})
			if err != nil {
				return "", err
			}
			if held != c.allowed {
				return "", fmt.Errorf("user %d logs in as %s by %s: %t, want %t", c.uid, c.user, mechanism, held, c.allowed)
			}
		}
	}
	text, err := os.ReadFile(p.node.file("audit.jsonl"))
	if strings.Contains(string(text), fmt.Sprintf(secretOf, alice)) {
		err = errors.Join(err, errors.New("a password is in the audit"))
	}
	return "", err
}

// logsIn tells whether a login is accepted. Billing's may not use the topic: then it is told so in Kafka's terms.
func (p provingWorld) logsIn(uid uint32, c client) (bool, error) {
	err := p.runClient(uid, c)
	switch {
	case err == nil, strings.Contains(err.Error(), "TOPIC_AUTHORIZATION_FAILED"):
		return true, nil
	case strings.Contains(err.Error(), "SASL_AUTHENTICATION_FAILED"):
		return false, nil
	}
	return false, err
}

// doctor runs klamm doctor broker for a cluster on behalf of a workload, and returns its findings: "ok CHECK WHERE" or
// "FAIL CHECK WHERE".
func (p provingWorld) doctor(
	ctx context.Context, cluster string, uid uint32,
) (findings []string, said string, err error) {
	w, err := p.startWorkload(uid)
	if err != nil {
		return nil, "", err
	}
	cmd := exec.CommandContext(ctx, p.node.binary, "doctor", "broker", "-c", p.node.file("klamm.yaml"),
		"--cluster", cluster, "--pid", strconv.Itoa(w.pid()))
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == 1 {
		err = nil
	}
	for line := range strings.Lines(string(out)) {
		if f := strings.Fields(line); len(f) > 3 && (f[0] == "ok" || f[0] == "FAIL") {
			findings = append(findings, strings.Join(f[:3], " "))
		}
	}
	return findings, string(out), errors.Join(err, w.end())
}

// finds fails unless the doctor has all of these findings.
func (p provingWorld) finds(ctx context.Context, cluster string, uid uint32, want ...string) error {
	findings, said, err := p.doctor(ctx, cluster, uid)
	for _, w := range want {
		if err == nil && !slices.Contains(findings, w) {
			err = fmt.Errorf("cluster %s on behalf of user %d: no finding %q in\n%s", cluster, uid, w, said)
		}
	}
	return err
}

// sharedSubject: without a DNS name in its entry a workload's certificate has the subject of all others of that kind.
func (p provingWorld) sharedSubject(ctx context.Context) (string, error) {
	return "", errors.Join(p.finds(ctx, "mtls", ordersUID, "ok principal at"),
		p.finds(ctx, "mtls", namelessUID, "FAIL principal at"))
}

// doctorBroker: the plaintext listener, which all brokers here have, serves anybody.
func (p provingWorld) doctorBroker(ctx context.Context) (string, error) {
	host, _, err := net.SplitHostPort(p.cluster.Addrs()[0])
	if err != nil {
		return "", err
	}
	return "", errors.Join(
		p.finds(ctx, "mtls", ordersUID, fmt.Sprintf("ok direct %s:%d", host, kafka.TLSPort),
			fmt.Sprintf("ok direct %s:%d", host, kafka.SASLTLSPort), fmt.Sprintf("FAIL direct %s:%d", host, kafka.PlaintextPort),
			fmt.Sprintf("ok upstream %s:%d", host, kafka.TLSPort)),
		p.finds(ctx, "jwt", ordersUID, fmt.Sprintf("ok upstream %s:%d", host, kafka.SASLTLSPort)),
		p.finds(ctx, "held", ordersUID, "ok direct "+p.held(), "ok upstream "+p.held()),
		p.finds(ctx, "open", ordersUID, "FAIL direct "+p.other.Addrs()[0]))
}

func commonName(name string) pkix.Name { return pkix.Name{CommonName: name} }
