// Package stage sets up what a test of the whole node takes: the node in this process, redirecting a cgroup of its own
// for real; workloads in that cgroup; brokers outside it; and what the node leaves behind, its audit, counters and log.
// It takes root.
package stage

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"

	"klamm/node"
	"klamm/test/host"
	"klamm/test/kafka"
)

// Patience bounds every wait, so that a failure ends in a message.
const Patience = 30 * time.Second

// Users of workloads, and the identities that the default configuration gives them.
const (
	OrdersUID   = 61001
	ReportUID   = 61002
	StrangerUID = 61003

	Orders = "spiffe://example.test/orders"
	Report = "spiffe://example.test/report" // a stranger has none
)

// OrdersOnly lets orders read and write its topic, and nobody else do anything.
const OrdersOnly = `apiVersion: klamm/v1
rules:
  - {name: orders, principals: ["` + Orders + `"], allow: [{topic: orders, operations: [Read, Write]}]}
`

// Config are sections of a klamm.yaml, as YAML.
type Config map[string]string

// Node is a running node.
type Node struct {
	*node.Node
	Cgroup string // its workloads are in it
	Dir    string // of klamm.yaml, policy.yaml and audit.jsonl
	Log    *Text

	t       testing.TB
	metrics string // host:port
	stop    func() error
}

// NewCgroup makes a cgroup, and those below it, that last as long as the test.
func NewCgroup(t testing.TB, below ...string) string {
	t.Helper()
	dir, err := host.NewCgroup("klamm-test-", below...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := host.RemoveCgroup(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// Clusters is the section clusters with one that has these brokers.
func Clusters(brokers ...string) string {
	var bootstrap []string
	for _, b := range brokers {
		bootstrap = append(bootstrap, strconv.Quote(b))
	}
	return "[{name: main, bootstrap: [" + strings.Join(bootstrap, ", ") + "]}]"
}

// Load writes a configuration into dir and loads it: c, and for what it leaves out a cluster named main at broker,
// whose port is intercepted in the cgroup, and the identities above.
func Load(t testing.TB, dir, cgroup, broker, policy string, c Config) node.Config {
	t.Helper()
	_, port, err := net.SplitHostPort(broker)
	if err != nil {
		t.Fatal(err)
	}
	sections := Config{
		"node":      "{name: node-1, cgroup: " + cgroup + ", pins: \"\", socket: \"\"}",
		"intercept": "{firewall: false, ports: [" + port + "]}",
		"clusters":  Clusters(broker),
		"identities": fmt.Sprintf("[{name: orders, spiffe-id: %q, uid: %d}, {name: report, spiffe-id: %q, uid: %d}]",
			Orders, OrdersUID, Report, ReportUID),
		"policies": "[policy.yaml]",
		"audit":    "{file: audit.jsonl}",
		"metrics":  "{listen: \"" + freeAddr(t) + "\"}",
	}
	maps.Copy(sections, c)
	var text strings.Builder
	for _, key := range slices.Sorted(maps.Keys(sections)) {
		fmt.Fprintf(&text, "%s: %s\n", key, sections[key])
	}
	file := filepath.Join(dir, "klamm.yaml")
	WriteFile(t, file, text.String())
	WriteFile(t, filepath.Join(dir, "policy.yaml"), policy)
	loaded, err := node.Load(file)
	if err != nil {
		t.Fatal(err)
	}
	return loaded
}

// WriteFile writes a file that only its owner can read.
func WriteFile(t testing.TB, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// freeAddr is an address nobody listens on, of a host that no other process uses: their ports do not come in between.
func freeAddr(t testing.TB) string {
	t.Helper()
	pid := os.Getpid() // below 1<<22
	l, err := net.Listen("tcp", fmt.Sprintf("127.%d.%d.%d:0", 128+pid>>16, pid>>8&0xff, pid&0xff))
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	return l.Addr().String()
}

// DownAddr is an address that refuses connections until the test ends: a socket has it, and does not listen.
func DownAddr(t testing.TB) string {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	name, err := unix.Getsockname(fd)
	at, ok := name.(*unix.SockaddrInet4)
	if err != nil || !ok {
		t.Fatalf("the socket is at %v, %v", name, err)
	}
	return netip.AddrPortFrom(netip.AddrFrom4(at.Addr), uint16(at.Port)).String()
}

// Start runs a node with the configuration that Load makes until the test ends. It redirects when Start returns; that
// it has reached its clusters is another matter: see AwaitReady.
func Start(t testing.TB, broker, policy string, c Config) *Node {
	t.Helper()
	n := &Node{Cgroup: NewCgroup(t, "exempt"), Dir: t.TempDir(), Log: new(Text), t: t}
	config := Load(t, n.Dir, n.Cgroup, broker, policy, c)
	n.metrics = config.Metrics.Listen
	var err error
	if n.Node, err = node.Open(config, zerolog.New(n.Log)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- n.Run(ctx, func() { close(ready) }) }()
	n.stop = sync.OnceValue(func() error {
		cancel()
		select {
		case err := <-done:
			return errors.Join(err, n.Close())
		case <-time.After(Patience):
			return fmt.Errorf("the node did not end within %v", Patience)
		}
	})
	t.Cleanup(n.Stop)
	select {
	case <-ready:
	case err := <-done:
		t.Fatal(err)
	}
	return n
}

// In is the same node for a subtest, which then is the one that fails.
func (n *Node) In(t testing.TB) *Node {
	in := *n
	in.t = t
	return &in
}

// Stop ends the node; the end of the test does so too.
func (n *Node) Stop() {
	if err := n.stop(); err != nil {
		n.t.Error(err)
	}
}

// AwaitReady waits until the node has reached its clusters.
func (n *Node) AwaitReady() {
	n.t.Helper()
	Await(n.t, "the node's being ready", func() bool {
		code, _ := n.Get("/readyz")
		return code == http.StatusOK
	})
}

// Workload starts a workload of a user in the node's cgroup.
func (n *Node) Workload(uid uint32) *Workload {
	n.t.Helper()
	return StartWorkload(n.t, kafka.Place{Cgroup: n.Cgroup, UID: uid, GID: uid}, "")
}

// Get is what the node's HTTP endpoint answers: status and body.
func (n *Node) Get(path string) (int, string) {
	n.t.Helper()
	resp, err := http.Get("http://" + n.metrics + path)
	if err != nil {
		n.t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		n.t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

// Metric is the value of a series, like klamm_refused_total{reason="tls"}; 0 when there is none.
func (n *Node) Metric(series string) int {
	n.t.Helper()
	_, text := n.Get("/metrics")
	for line := range strings.Lines(text) {
		if digits, is := strings.CutPrefix(line, series+" "); is {
			v, err := strconv.ParseFloat(strings.TrimSpace(digits), 64)
			if err != nil {
				n.t.Fatal(err)
			}
			return int(v)
		}
	}
	return 0
}

// Refused is how many connections and requests were refused for a reason.
func (n *Node) Refused(reason string) int {
	n.t.Helper()
	return n.Metric(`klamm_refused_total{reason="` + reason + `"}`)
}

// Kernel is a counter of the eBPF programs.
func (n *Node) Kernel(reason string) int {
	n.t.Helper()
	return n.Metric(`klamm_kernel_total{reason="` + reason + `"}`)
}

// Open is how many sessions there are.
func (n *Node) Open() int {
	n.t.Helper()
	return n.Metric("klamm_connections")
}

// Line is an audit line.
type Line struct {
	Event, Verdict, State, Reason, Error, Hint string
	Conn, Cluster, Destination, Principal      string
	API, Topic, Outcome, Rule                  string
	ClientID                                   string `json:"client_id"`
	SPIFFE                                     string `json:"spiffe_id"`
	Exe                                        string
	ExeSHA256                                  string `json:"exe_sha256"`
	ContainerID                                string `json:"container_id"`
	PodUID                                     string `json:"pod_uid"`
	Namespace                                  string `json:"pod_namespace"`
	Pod, Container                             string
	PID, UID                                   uint32
	Count                                      int
	Opaque                                     bool
	SNI                                        string
	Evidence                                   []struct{ Source, ID, Issuer, Subject string }
	Resources                                  []struct{ Type, Name, Operation, Verdict string }
	Batches                                    []struct{ SHA256 string }
}

// Audit is every whole line so far that matches.
func (n *Node) Audit(match func(Line) bool) []Line {
	n.t.Helper()
	file, err := os.Open(filepath.Join(n.Dir, "audit.jsonl"))
	if err != nil {
		n.t.Fatal(err)
	}
	defer func() { _ = file.Close() }()
	var found []Line
	for r := bufio.NewReader(file); ; {
		text, err := r.ReadBytes('\n')
		if err != nil {
			return found // a line without its end is still being written
		}
		var l Line
		if err := json.Unmarshal(text, &l); err != nil {
			n.t.Fatalf("an audit line is no JSON: %v\n%s", err, text)
		}
		if match(l) {
			found = append(found, l)
		}
	}
}

// AwaitAudit waits for as many lines that match, and fails when there are more.
func (n *Node) AwaitAudit(want int, what string, match func(Line) bool) []Line {
	n.t.Helper()
	var found []Line
	Await(n.t, fmt.Sprintf("%d audit lines: %s", want, what), func() bool {
		found = n.Audit(match)
		return len(found) >= want
	})
	if len(found) > want {
		n.t.Errorf("%d audit lines, not %d: %s", len(found), want, what)
	}
	return found
}

// Refusal matches the audit line of a connection or request that was refused for a reason.
func Refusal(reason string) func(Line) bool {
	return func(l Line) bool {
		return l.Event == "refusal" && l.Reason == reason && l.Verdict == "deny" && l.Error != "" && l.Hint != ""
	}
}

// AwaitRefusals waits until so many were refused for a reason, as both the audit and the counter say.
func (n *Node) AwaitRefusals(want int, reason string) []Line {
	n.t.Helper()
	lines := n.AwaitAudit(want, "refused for "+reason, Refusal(reason))
	Await(n.t, "the counter of what is refused for "+reason, func() bool { return n.Refused(reason) >= want })
	if got := n.Refused(reason); got != want {
		n.t.Errorf("%d are counted as refused for %s, not %d", got, reason, want)
	}
	return lines
}

// Await waits for a condition.
func Await(t testing.TB, what string, condition func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(Patience); !condition(); <-tick.C {
		if time.Now().After(end) {
			t.Fatalf("waited %v in vain for %s", Patience, what)
		}
	}
}

// Text is a log that may be read while it is written.
type Text struct {
	mu   sync.Mutex
	text bytes.Buffer
}

// Write implements io.Writer.
func (t *Text) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.text.Write(b)
}

// String is all of it.
func (t *Text) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.text.String()
}
