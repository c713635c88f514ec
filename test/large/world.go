package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"

	"klamm/test/host"
	"klamm/test/kafka"
)

const (
	mib = 1 << 20

	maxFrame  = 100 * mib       // limits.max-frame, and socket.request.max.bytes: the default of both
	memory    = 512 * mib       // limits.memory: its default
	reauth    = 4 * time.Second // connections.max.reauth.ms; franz-go needs more than 2.5 s
	modestUID = 30_001
	greedyUID = 30_002
)

// Topics. The large one takes batches of 100 MiB.
const (
	orders = "orders"
	large  = "large"
	secret = "secret" // nobody may use it
)

const rules = `apiVersion: klamm/v1
rules:
  - name: modest
    principals: ["` + host.Workload + `", "User:alice"]
    allow:
      - {topic: "orders*", operations: [Read, Write]}
      - {topic: large, operations: [Read, Write]}
      - {group: "orders*", operations: [Read]}
  - name: greedy
    principals: ["spiffe://example.test/greedy"]
    allow:
      - {topic: large, operations: [Read, Write]}
`

// world is a broker, a node, and two workloads in its cgroup.
type world struct {
	cluster        *kafka.Cluster
	node           *host.Process
	modest, greedy *host.Dialer
	metrics, audit string
	dir, cgroup    string
	largest        int64 // offset of the largest batch in the large topic
}

func newWorld(ctx context.Context, klamm string, mutate bool) (w *world, err error) {
	w = new(world)
	defer func() {
		if err != nil {
			err = errors.Join(err, w.close())
		}
	}()
	if w.cluster, err = kafka.New(ctx, kafka.Options{Users: map[string]string{"alice": "wonder"}, MaxReauth: reauth,
		Heap: "1500m", Config: map[string]string{"message.max.bytes": fmt.Sprint(maxFrame)}}); err != nil {
		return w, err
	}
	for name, partitions := range map[string]int32{orders: 3, large: 1, secret: 1, throttledTopic: 1, renewTopic: 3} {
		if err := w.cluster.CreateTopic(ctx, name, partitions); err != nil {
			return w, err
		}
	}
	if w.largest, err = w.store(largest()); err != nil {
		return w, err
	}
	if w.cgroup, err = host.NewCgroup("klamm-large-", "node", "workload"); err != nil {
		return w, err
	}
	if w.dir, err = os.MkdirTemp("", "klamm-large-"); err != nil {
		return w, err
	}
	if w.metrics, err = host.FreeAddr(); err != nil {
		return w, err
	}
	w.audit = filepath.Join(w.dir, "audit.log")
	policy, limits := rules, fmt.Sprintf("limits: {max-frame: %d, memory: %d}", maxFrame, memory)
	if mutate {
		policy = strings.ReplaceAll(rules, `{group: "orders*"`, `{group: "others"`)
		limits = fmt.Sprintf("limits: {max-frame: %d, memory: %d}", maxFrame/20, memory/10)
	}
	if w.node, err = host.StartNode(ctx, host.NodeOptions{Cgroup: w.cgroup, Runs: filepath.Join(w.cgroup, "node"),
		Dir: w.dir, Brokers: append(w.cluster.Addrs(), w.cluster.SASLAddrs()...), UID: modestUID,
		Also:   map[uint32]string{greedyUID: "spiffe://example.test/greedy"},
		Policy: policy, Metrics: w.metrics, More: limits, Start: host.Binary(klamm)}); err != nil {
		return w, err
	}
	place := kafka.Place{Cgroup: filepath.Join(w.cgroup, "workload"), UID: modestUID, GID: modestUID}
	if w.modest, err = host.StartDialer(place, ""); err != nil {
		return w, err
	}
	place.UID, place.GID = greedyUID, greedyUID
	w.greedy, err = host.StartDialer(place, "")
	return w, err
}

func (w *world) close() error {
	var errs []error
	for _, d := range []*host.Dialer{w.modest, w.greedy} {
		if d != nil {
			errs = append(errs, d.End())
		}
	}
	if w.node != nil {
		errs = append(errs, w.node.Terminate())
	}
	if w.cluster != nil {
		errs = append(errs, w.cluster.Stop())
	}
	if w.cgroup != "" {
		errs = append(errs, host.RemoveCgroup(w.cgroup))
	}
	if w.dir != "" {
		errs = append(errs, os.RemoveAll(w.dir))
	}
	return errors.Join(errs...)
}

// store writes a batch into the large topic, past the node, and tells its offset.
func (w *world) store(batch []byte) (int64, error) {
	socket, err := net.Dial("tcp", w.cluster.Addrs()[0])
	if err != nil {
		return 0, err
	}
	defer func() { _ = socket.Close() }()
	c, err := open(socket)
	if err != nil {
		return 0, err
	}
	return c.write(large, batch)
}

// client is a Kafka client of a workload.
func (w *world) client(d *host.Dialer, broker string, opts ...kgo.Opt) (*kgo.Client, error) {
	return kgo.NewClient(append([]kgo.Opt{kgo.SeedBrokers(broker), kgo.DisableClientMetrics(),
		kgo.Dialer(func(_ context.Context, _, to string) (net.Conn, error) { return d.Dial("", to) })}, opts...)...)
}

// metric is the value of a series of the node.
func (w *world) metric(series string) (float64, error) {
	resp, err := http.Get("http://" + w.metrics + "/metrics")
	if err != nil {
		return 0, err
	}
	defer func() { _ = resp.Body.Close() }()
	for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
		if digits, is := strings.CutPrefix(lines.Text(), series+" "); is {
			return strconv.ParseFloat(digits, 64)
		}
	}
	return 0, nil
}

// refusedMemory is how many connections were refused for want of memory.
func (w *world) refusedMemory() (float64, error) {
	return w.metric(`klamm_refused_total{reason="memory"}`)
}

// open waits until the node has so many sessions.
func (w *world) open(ctx context.Context, want int) error {
	return until(ctx, fmt.Sprintf("%d sessions are open", want), func() (bool, error) {
		n, err := w.metric("klamm_connections")
		return int(n) == want, err
	})
}

// gaveWay waits until more connections than before are refused for want of memory, all of them the greedy one's and on
// record, and tells how many. That is due at once, before those who wait for memory in vain are refused as well (10 s).
func (w *world) gaveWay(ctx context.Context, before float64) (n float64, err error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	err = until(ctx, "somebody gave way, and is on record", func() (bool, error) {
		after, err := w.refusedMemory()
		if n = after - before; n == 0 || err != nil {
			return false, err
		}
		recorded, err := w.onlyGreedy()
		return recorded >= int(after), err
	})
	return n, err
}

// until waits until something is so.
func until(ctx context.Context, what string, so func() (bool, error)) error {
	const pause = 50 * time.Millisecond
	for {
		if is, err := so(); is || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("it did not come to pass that %s: %w", what, ctx.Err())
		case <-time.After(pause):
		}
	}
}

// resident is the node's resident memory now, and the most since the last call of forget, in bytes.
func (w *world) resident() (now, most int64, err error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", w.node.Cmd.Process.Pid))
	if err != nil {
		return 0, 0, err
	}
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		if len(f) < 2 || f[0] != "VmRSS:" && f[0] != "VmHWM:" {
			continue
		}
		kb, err := strconv.ParseInt(f[1], 10, 64)
		if err != nil {
			return 0, 0, err
		}
		if f[0] == "VmRSS:" {
			now = kb << 10
		} else {
			most = kb << 10
		}
	}
	return now, most, nil
}

// forget begins a new measurement of the most resident memory (proc_pid_clear_refs(5)).
func (w *world) forget() error {
	return os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", w.node.Cmd.Process.Pid), []byte("5"), 0o200)
}

// grown runs something, and tells by how much the node's resident memory grew at most meanwhile, and to what.
func (w *world) grown(do func() error) (by, to int64, err error) {
	if err := w.forget(); err != nil {
		return 0, 0, err
	}
	before, _, err := w.resident()
	if err != nil {
		return 0, 0, err
	}
	if err := do(); err != nil {
		return 0, 0, err
	}
	_, to, err = w.resident()
	return max(0, to-before), to, err
}
