package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/twmb/franz-go/pkg/kgo"

	"klamm/test/host"
	"klamm/test/kafka"
)

const (
	clientUID = 20092 // of every client: not root, and otherwise unused
	strangeID = 20093 // a user the node has no identity for

	forbidden      = "payouts" // topic that exists, holds one record, and that no client is permitted
	forbiddenGroup = "payouts-readers"
	secret         = "pay 1000000 to nobody"

	deadHost = 9 // last part of a broker address of the cluster at which nothing listens

)

// rig is what the clients run on: a cluster, a node, and two cgroups of which the node redirects one.
type rig struct {
	cluster    *kafka.Cluster
	node       *exec.Cmd // nil with DIRECT=1
	admin      *kgo.Client
	stage      string // clients and configuration, readable by clientUID
	logs       string
	redirected *cgroup
	direct     *cgroup
	meters     map[string]*meter // by path
	tools      func() error      // stages Kafka's Java tools, once
	counted    []int64           // where the words of the application whose turn it is begin, see wordTurn
}

func newRig(ctx context.Context, direct, mutate bool) (_ *rig, err error) {
	r := &rig{meters: map[string]*meter{}}
	r.tools = sync.OnceValue(func() error { return r.stageTools(ctx) })
	defer func() {
		if err != nil {
			err = errors.Join(err, r.close())
		}
	}()
	if r.stage, err = os.MkdirTemp("", "klamm-clients-"); err != nil {
		return nil, err
	}
	if err = os.Chmod(r.stage, 0o755); err != nil {
		return nil, err
	}
	if err = makeDir(filepath.Join(r.stage, "tmp"), 0o777|os.ModeSticky); err != nil {
		return nil, err
	}
	if r.logs, err = os.MkdirTemp("", "klamm-clients-logs-"); err != nil {
		return nil, err
	}
	if r.redirected, err = newCgroup("redirected"); err != nil {
		return nil, err
	}
	if r.direct, err = newCgroup("direct"); err != nil {
		return nil, err
	}
	for path, place := range r.paths() {
		if r.meters[path], err = newMeter(place); err != nil {
			return nil, err
		}
	}
	if r.cluster, err = kafka.New(ctx, kafka.Options{Brokers: 3}); err != nil {
		return nil, err
	}
	if r.admin, err = r.cluster.Admin(kgo.RecordPartitioner(kgo.RoundRobinPartitioner())); err != nil {
		return nil, err
	}
	if err = r.fillCluster(ctx); err != nil {
		return nil, err
	}
	if direct {
		return r, nil
	}
	return r, r.startNode(ctx, mutate)
}

// close ends all that the rig started and removes all but the logs.
func (r *rig) close() error {
	var failures []error
	for _, c := range []*cgroup{r.redirected, r.direct} {
		if c != nil {
			failures = append(failures, c.kill())
		}
	}
	if r.node != nil {
		failures = append(failures, r.node.Process.Signal(syscall.SIGTERM))
		_ = r.node.Wait() // its exit code is in no check: its log is kept
	}
	for _, m := range r.meters {
		if m != nil {
			failures = append(failures, m.close())
		}
	}
	for _, c := range []*cgroup{r.redirected, r.direct} {
		if c != nil {
			failures = append(failures, host.RemoveCgroup(c.path))
		}
	}
	if r.admin != nil {
		r.admin.Close()
	}
	if r.cluster != nil {
		failures = append(failures, r.cluster.Stop())
	}
	return errors.Join(append(failures, os.RemoveAll(r.stage))...)
}

func (r *rig) brokers() string { return strings.Join(r.cluster.Addrs(), ",") }

// deadBroker is the address of a broker of the cluster, as far as anyone was told, that is down.
func (r *rig) deadBroker() string {
	host, port, _ := net.SplitHostPort(r.cluster.Addrs()[0]) // it has both by construction
	return net.JoinHostPort(host[:strings.LastIndexByte(host, '.')+1]+strconv.Itoa(deadHost), port)
}

func (c *client) topic() string { return "orders-" + c.name }

func (r *rig) fillCluster(ctx context.Context) error {
	topics := []string{forbidden}
	for i := range clients {
		c := &clients[i]
		topics = append(topics, c.topic(), c.topic()+"-redirected", c.topic()+"-direct")
	}
	for i := range applications {
		topics = append(topics, applications[i].topics...)
	}
	ids, err := r.createTopics(ctx, topics)
	if err != nil {
		return err
	}
	record := kgo.KeyStringRecord("", secret)
	record.Topic = forbidden
	if err := r.admin.ProduceSync(ctx, record).FirstErr(); err != nil {
		return fmt.Errorf("fill topic %s: %w", forbidden, err)
	}
	for group, topic := range map[string]string{forbiddenGroup: forbidden, "orders-java-groups": "orders-java-groups"} {
		if err := r.commit(ctx, group, topic, ids[topic], committed); err != nil {
			return fmt.Errorf("commit offsets of group %s: %w", group, err)
		}
	}
	return nil
}

const policy = `apiVersion: klamm/v1
rules:
  - name: clients use their topics
    principals: ["spiffe://clients.test/client"]
    allow:
      - {topic: "orders-*", operations: [Read, Write, Describe]}
      - {group: "orders-*", operations: [Read, Describe]}
      - {transactional-id: "orders-*", operations: [Write, Describe]}
`

// mutation is the rule that MUTATE=1 adds.
const mutation = `  - name: a mistake
    principals: ["spiffe://clients.test/client"]
    allow:
      - {topic: payouts, operations: [Read, Write, Describe]}
  - name: another mistake
    principals: ["spiffe://clients.test/share-without-*"]
    allow:
      - {topic: share, operations: [Read, Write]}
      - {group: "*", operations: [Read]}
`

// startNode starts the node on the redirected cgroup. It is told of one live broker and learns the others.
func (r *rig) startNode(ctx context.Context, mutate bool) error {
	health, err := host.FreeAddr()
	if err != nil {
		return err
	}
	config := fmt.Sprintf(`node: {name: verify-clients, cgroup: %q, pins: "", socket: ""}
intercept: {firewall: false, ports: [%d]}
clusters:
  - {name: verify, bootstrap: [%q, %q]}
identities:
  - {name: clients, spiffe-id: "spiffe://clients.test/client", uid: %d}
%spolicies: [policy.yaml]
audit: {file: %q}
metrics: {listen: %q}
`, r.redirected.path, kafka.PlaintextPort, r.cluster.Addrs()[0], r.deadBroker(), clientUID, actorIdentities(),
		r.auditFile(), health)
	rules := policy + actorRules()
	if mutate {
		rules += mutation
	}
	for name, text := range map[string]string{"klamm.yaml": config, "policy.yaml": rules} {
		if err := os.WriteFile(filepath.Join(r.logs, name), []byte(text), 0o600); err != nil {
			return err
		}
	}
	log, err := os.Create(filepath.Join(r.logs, "node.log"))
	if err != nil {
		return err
	}
	defer func() { _ = log.Close() }()
	node := exec.Command("bin/klamm", "node", "-c", filepath.Join(r.logs, "klamm.yaml"))
	node.Stdout, node.Stderr = log, log
	if err := (kafka.Place{}).Start(node); err != nil {
		return fmt.Errorf("start the node: %w: run make build", err)
	}
	r.node = node
	if err := host.AwaitReady(ctx, "http://"+health+"/readyz"); err != nil {
		text, _ := os.ReadFile(log.Name())
		return fmt.Errorf("wait for the node: %w; it said:\n%s", err, text)
	}
	return nil
}

func (r *rig) auditFile() string { return filepath.Join(r.logs, "audit.jsonl") }
