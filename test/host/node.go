package host

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"klamm/test/kafka"
)

// NodeOptions say what a node does. All without a remark are required.
type NodeOptions struct {
	Cgroup  string            // cgroup2 directory whose connects are redirected
	Runs    string            // the cgroup in it that the node itself runs in
	Dir     string            // where its files are written: klamm.yaml, policy.yaml, audit.log
	Brokers []string          // host:port of each
	UID     uint32            // whose processes are spiffe://example.test/workload
	Also    map[uint32]string // further users, with their SPIFFE IDs; optional
	Policy  string            // the text of the policy file
	Metrics string            // host:port of its metrics; optional
	More    string            // further sections of klamm.yaml; optional
	// Start starts the node with the path of its klamm.yaml.
	Start func(place kafka.Place, config string) (*Process, error)
}

// Workload is the SPIFFE ID of the processes of NodeOptions.UID.
const Workload = "spiffe://example.test/workload"

const readyTimeout = 15 * time.Second

// Binary starts the klamm binary at a path.
func Binary(path string) func(kafka.Place, string) (*Process, error) {
	return func(place kafka.Place, config string) (*Process, error) {
		return Start(place, path, "node", "-c", config)
	}
}

// StartNode starts a node and waits until it is ready. Its audit lines are in audit.log.
func StartNode(ctx context.Context, o NodeOptions) (*Process, error) {
	metrics := o.Metrics
	if metrics == "" {
		var err error
		if metrics, err = FreeAddr(); err != nil {
			return nil, err
		}
	}
	config, err := o.write(metrics)
	if err != nil {
		return nil, err
	}
	p, err := o.Start(kafka.Place{Cgroup: o.Runs}, config)
	if err != nil {
		return nil, err
	}
	if err := AwaitReady(ctx, "http://"+metrics+"/readyz"); err != nil {
		return nil, errors.Join(err, p.Terminate())
	}
	return p, nil
}

func (o *NodeOptions) write(metrics string) (config string, err error) {
	var bootstrap, ports []string
	for _, b := range o.Brokers {
		_, port, err := net.SplitHostPort(b)
		if err != nil {
			return "", err
		}
		bootstrap = append(bootstrap, strconv.Quote(b))
		if !slices.Contains(ports, port) {
			ports = append(ports, port)
		}
	}
	var also strings.Builder
	for uid, id := range o.Also {
		fmt.Fprintf(&also, ", {name: user-%d, spiffe-id: %q, uid: %d}", uid, id, uid)
	}
	config = filepath.Join(o.Dir, "klamm.yaml")
	text := fmt.Sprintf(`node: {name: node-1, cgroup: %s, pins: "", socket: ""}
intercept: {firewall: false, ports: [%s]}
clusters: [{name: main, bootstrap: [%s]}]
identities: [{name: workload, spiffe-id: "%s", uid: %d}%s]
policies: [policy.yaml]
audit: {file: audit.log}
metrics: {listen: "%s"}
%s`, o.Cgroup, strings.Join(ports, ", "), strings.Join(bootstrap, ", "), Workload, o.UID, also.String(),
		metrics, o.More)
	return config, errors.Join(os.WriteFile(config, []byte(text), 0o600),
		os.WriteFile(filepath.Join(o.Dir, "policy.yaml"), []byte(o.Policy), 0o600))
}

// FreeAddr is a TCP address of this host that nobody listens at.
func FreeAddr() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

// AwaitReady waits until the node answers "ready" at its /readyz, for at most 15 s.
func AwaitReady(ctx context.Context, url string) error {
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	for {
		resp, err := http.Get(url)
		if err == nil {
			_ = resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return nil
			}
			err = errors.New(resp.Status)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for %s: %w", url, err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}
