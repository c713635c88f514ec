package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"

	"klamm/test/kafka"
)

const (
	clientUID = 20092 // of every client: not root, and otherwise unused
	strangeID = 20093 // a user the node has no identity for

	forbidden      = "payouts" // topic that exists, holds one record, and that no client is permitted
	forbiddenGroup = "payouts-readers"
	secret         = "pay 1000000 to nobody"

	deadHost = 9 // last part of a broker address of the cluster at which nothing listens

	nodeTimeout = 30 * time.Second
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
			failures = append(failures, c.remove())
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
`

// startNode starts the node on the redirected cgroup. It is told of one live broker and learns the others.
func (r *rig) startNode(ctx context.Context, mutate bool) error {
	health, err := freeAddress()
	if err != nil {
		return err
	}
	config := fmt.Sprintf(`node: {name: verify-clients, cgroup: %q}
intercept: {ports: [%d]}
clusters:
  - {name: verify, bootstrap: [%q, %q]}
identities:
  - {name: clients, spiffe-id: "spiffe://clients.test/client", uid: %d}
policies: [policy.yaml]
audit: {file: %q}
metrics: {listen: %q}
`, r.redirected.path, kafka.PlaintextPort, r.cluster.Addrs()[0], r.deadBroker(), clientUID, r.auditFile(), health)
	rules := policy
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
	if err := awaitReady(ctx, "http://"+health+"/readyz"); err != nil {
		text, _ := os.ReadFile(log.Name())
		return fmt.Errorf("wait for the node: %w; it said:\n%s", err, text)
	}
	return nil
}

func (r *rig) auditFile() string { return filepath.Join(r.logs, "audit.jsonl") }

func freeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

func awaitReady(ctx context.Context, url string) error {
	ctx, cancel := context.WithTimeout(ctx, nodeTimeout)
	defer cancel()
	return poll(ctx, func() (bool, error) {
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
		if err != nil {
			return false, err
		}
		answer, err := http.DefaultClient.Do(request)
		if err != nil {
			return false, nil //nolint:nilerr // not listening yet; the deadline tells if it stays so
		}
		return answer.StatusCode == http.StatusOK, answer.Body.Close()
	})
}

// poll repeats done until it is true, fails, or the context ends.
func poll(ctx context.Context, done func() (bool, error)) error {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		if ok, err := done(); ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
}

// call is one call of a client.
type call struct {
	name    string  // of its log
	place   *cgroup // nil: redirected
	uid     uint32  // 0: clientUID
	command string  // see client
	brokers string  // "": all of the cluster
	topic   string
	group   string
	n       int
	lines   []string  // standard input, or the content of {lines}
	input   io.Reader // standard input, instead of lines
	limit   time.Duration
	until   *regexp.Regexp // the call is over as soon as its output matches
}

// outcome is how a call ended.
type outcome struct {
	out  string // standard output
	all  string // standard output and error
	took time.Duration
	err  error // nil: exit code 0
}

// run runs a client and returns how it ended. What it said is kept in the logs.
func (r *rig) run(ctx context.Context, c call) outcome {
	ctx, cancel := context.WithTimeout(ctx, c.limit)
	defer cancel()
	lines, err := r.writeLines(c)
	if err != nil {
		return outcome{err: err}
	}
	if c.brokers == "" {
		c.brokers = r.brokers()
	}
	command := strings.NewReplacer("{java}", strings.Join(kafka.JavaTool(filepath.Join(r.stage, "tools")), " "),
		"{stage}", r.stage, "{brokers}", c.brokers, "{topic}", c.topic, "{group}", c.group, "{n}", strconv.Itoa(c.n),
		"{lines}", lines).Replace(c.command)
	words := strings.Fields(command)
	if c.input == nil {
		c.input = strings.NewReader(joinLines(c.lines))
	}
	uid := cmp.Or(c.uid, clientUID)
	if c.place == nil {
		c.place = r.redirected
	}
	var out, all transcript
	cmd := exec.Command(words[0], words[1:]...)
	cmd.Dir = r.stage
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=" + r.stage,
		"PYTHONPATH=" + filepath.Join(r.stage, "confluent")}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = c.input, io.MultiWriter(&out, &all), &all
	cmd.WaitDelay = time.Second // a client that ended does not wait for its standard input
	began := time.Now()
	if err := (kafka.Place{Cgroup: c.place.path, UID: uid, GID: uid}).Start(cmd); err != nil {
		return outcome{err: err}
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	err = r.await(ctx, c, &all, ended)
	took := time.Since(began)
	if errors.Is(err, errStopped) || ctx.Err() != nil {
		_ = kafka.Kill(cmd)
		err = errors.Join(err, <-ended)
	}
	result := outcome{out.String(), all.String(), took, err}
	return result.logged(filepath.Join(r.logs, c.name+".log"), command)
}

var errStopped = errors.New("stopped: it said what was awaited")

func (r *rig) await(ctx context.Context, c call, all *transcript, ended <-chan error) error {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case err := <-ended:
			if errors.Is(err, exec.ErrWaitDelay) {
				return nil
			}
			return err
		case <-ctx.Done():
			return fmt.Errorf("it did not end within %v", c.limit)
		case <-tick.C:
			if c.until != nil && c.until.MatchString(all.String()) {
				return errStopped
			}
		}
	}
}

// writeLines writes the file for {lines}.
func (r *rig) writeLines(c call) (string, error) {
	if !strings.Contains(c.command, "{lines}") {
		return "", nil
	}
	file := filepath.Join(r.stage, c.name+".lines")
	// The tool takes the empty piece after the last line end for a record.
	return file, os.WriteFile(file, []byte(strings.TrimSuffix(joinLines(c.lines), "\n")), 0o644)
}

func joinLines(lines []string) string {
	var text strings.Builder
	for _, line := range lines {
		text.WriteString(line + "\n")
	}
	return text.String()
}

func (o outcome) logged(file, command string) outcome {
	end := "exit code 0"
	if o.err != nil {
		end = o.err.Error()
	}
	text := fmt.Sprintf("$ %s\n%s(%s after %v)\n", command, o.all, end, o.took.Round(time.Millisecond))
	return outcome{o.out, o.all, o.took, errors.Join(o.err, os.WriteFile(file, []byte(text), 0o644))}
}

// failure returns an error that also says how the call ended and what the client said last.
func (o outcome) failure(format string, args ...any) error {
	end := "exit code 0"
	if o.err != nil {
		end = o.err.Error()
	}
	return fmt.Errorf("%s (%s after %v)\n%s", fmt.Sprintf(format, args...), end, o.took.Round(time.Millisecond), o.tail())
}

// tail returns the end of what a client said.
func (o outcome) tail() string {
	const lines = 12
	var last []string
	scanner := bufio.NewScanner(strings.NewReader(o.all))
	scanner.Buffer(nil, 1<<20)
	for scanner.Scan() {
		if last = append(last, "  | "+scanner.Text()); len(last) > lines {
			last = last[1:]
		}
	}
	return strings.Join(last, "\n")
}

// transcript is a buffer that may be read while a process writes it.
type transcript struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (t *transcript) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.buf.Write(p)
}

func (t *transcript) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.buf.String()
}
