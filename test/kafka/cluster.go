// Package kafka runs real Apache Kafka for tests: KRaft clusters of one or three brokers from Kafka's Maven artifacts
// (scripts/setup kafka), and Kafka's own Java tools.
package kafka

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// Versions of Apache Kafka that scripts/setup kafka installs, newest first.
const (
	Newest   = "4.4.0"
	Previous = "3.9.2"
)

// Ports of every broker, each on an address of the broker's own.
const (
	PlaintextPort  = 9092 // PLAINTEXT; the principal is User:ANONYMOUS
	SASLPort       = 9093 // SASL_PLAINTEXT with PLAIN, SCRAM-SHA-256, SCRAM-SHA-512, and OAUTHBEARER by Options.OAuth
	interPort      = 9094
	controllerPort = 9095
	TLSPort        = 9096 // SSL, by Options.TLS
	SASLTLSPort    = 9097 // SASL_SSL with the mechanisms of SASLPort, by Options.TLS
)

// Admin is the user that exists on every cluster and is a super user of its authorizer.
const Admin = "admin"

// AdminPassword is the password of [Admin].
const AdminPassword = "admin-secret"

const (
	startTimeout = 90 * time.Second
	stopTimeout  = 30 * time.Second
)

// Options describe a cluster. The zero value is one broker of the newest Kafka without an authorizer.
type Options struct {
	Version    string            // one of the versions above; empty: Newest
	Brokers    int               // 1 to 9; 0: 1
	Hosts      []string          // address of each broker, of this network namespace; nil: loopback addresses
	Users      map[string]string // name -> password, for PLAIN and SCRAM on SASLPort, beside Admin
	Authorizer bool              // StandardAuthorizer: nothing is allowed without an ACL, but to Admin and SuperUsers
	SuperUsers []string          // principals such as User:ANONYMOUS
	Config     map[string]string // more broker properties; they win over the harness' own
	TLS        *TLS              // nil: no listener with TLS
	OAuth      *OAuth            // nil: no OAUTHBEARER
	MaxReauth  time.Duration     // connections.max.reauth.ms of the SASL listeners (KIP-368); 0: sessions do not end
	Racks      bool              // each broker is a rack, and consumers may read from the replica of theirs (KIP-392)
	Decisions  bool              // the authorizer logs each decision, for Cluster.Decisions
	Telemetry  bool              // brokers ask clients for their metrics (KIP-714), and throw them away
	Heap       string            // of each broker, as -Xmx has it; empty: 256m
	Cgroup     string            // cgroup2 directory the brokers run in; empty: the caller's
	Dir        string            // where data and logs go; empty: a temporary directory that Stop removes
}

// Cluster is a running Kafka cluster. Its methods are not for concurrent use.
type Cluster struct {
	opts     Options
	classes  string // directory of jars
	receiver string // directory of the class that receives clients' metrics; empty: none does
	dir      string
	block    int // x of the brokers' addresses 127.92.x.y
	claim    net.Listener
	brokers  []*broker
	served   bool // all brokers were ready once
}

type broker struct {
	id   int
	host string
	name string // advertised on the listeners with TLS
	dir  string
	cmd  *exec.Cmd     // nil while stopped
	done chan struct{} // closed when cmd has ended
}

// Start starts a cluster and stops it at the end of the test. A failed start fails the test and shows the end of the
// brokers' logs.
func Start(t testing.TB, opts Options) *Cluster {
	t.Helper()
	c, err := New(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Stop(); err != nil {
			t.Error(err)
		}
	})
	return c
}

// New starts a cluster and returns when every broker is listed in the cluster's metadata. The caller stops it. The
// brokers are killed when this process ends, however it does.
func New(ctx context.Context, opts Options) (*Cluster, error) {
	if opts.Version == "" {
		opts.Version = Newest
	}
	opts.Brokers = max(opts.Brokers, 1)
	classes, err := installed("kafka", "broker-"+opts.Version)
	if err != nil {
		return nil, err
	}
	c := &Cluster{opts: opts, classes: classes, dir: opts.Dir}
	if opts.Telemetry {
		if c.receiver, err = installed("kafka", "telemetry-receiver"); err != nil {
			return nil, err
		}
	}
	if c.dir == "" {
		if c.dir, err = os.MkdirTemp("", "klamm-kafka-"); err != nil {
			return nil, fmt.Errorf("make a directory for Kafka: %w", err)
		}
	}
	if err := c.start(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("start Kafka %s: %w", opts.Version, err), c.tails(), c.Stop())
	}
	return c, nil
}

func (c *Cluster) start(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	hosts := c.opts.Hosts
	if hosts == nil {
		if err := c.claimAddresses(); err != nil {
			return err
		}
		for id := 1; id <= c.opts.Brokers; id++ {
			hosts = append(hosts, fmt.Sprintf("127.92.%d.%d", c.block, id))
		}
	}
	for i, host := range hosts {
		dir := filepath.Join(c.dir, fmt.Sprintf("broker-%d", i+1))
		b := &broker{id: i + 1, host: host, name: host, dir: dir}
		if c.opts.TLS != nil && c.opts.TLS.Names != nil {
			b.name = c.opts.TLS.Names[i]
		}
		c.brokers = append(c.brokers, b)
	}
	failures := make([]error, len(c.brokers))
	var all sync.WaitGroup
	for i, b := range c.brokers {
		all.Go(func() {
			if failures[i] = c.format(ctx, b); failures[i] == nil {
				failures[i] = c.run(b)
			}
		})
	}
	all.Wait()
	if err := errors.Join(failures...); err != nil {
		return err
	}
	if err := c.Await(ctx); err != nil {
		return err
	}
	c.served = true
	return nil
}

// claimAddresses takes a block of loopback addresses for as long as the cluster lives: test packages run in parallel,
// and an abstract socket is a claim that ends with its process.
func (c *Cluster) claimAddresses() error {
	for block := range 256 {
		l, err := net.Listen("unix", fmt.Sprintf("@klamm-test-kafka-%d", block))
		switch {
		case err == nil:
			c.block, c.claim = block, l
			return nil
		case !errors.Is(err, syscall.EADDRINUSE):
			return fmt.Errorf("claim loopback addresses: %w", err)
		}
	}
	return errors.New("claim loopback addresses: all 256 blocks are in use")
}

// format writes the broker's configuration and formats its log directory (KIP-631), SCRAM users included (KIP-900).
func (c *Cluster) format(ctx context.Context, b *broker) error {
	if err := os.MkdirAll(b.dir, 0o755); err != nil {
		return fmt.Errorf("make the directory of broker %d: %w", b.id, err)
	}
	properties := c.properties(b)
	if err := c.addTLS(b, properties); err != nil {
		return fmt.Errorf("set up TLS of broker %d: %w", b.id, err)
	}
	maps.Copy(properties, c.opts.Config)
	var text strings.Builder
	for _, key := range slices.Sorted(maps.Keys(properties)) {
		fmt.Fprintf(&text, "%s=%s\n", key, properties[key])
	}
	if err := os.WriteFile(b.config(), []byte(text.String()), 0o600); err != nil {
		return fmt.Errorf("write the configuration of broker %d: %w", b.id, err)
	}
	args := []string{"kafka.tools.StorageTool", "format", "--cluster-id", "klammtestclusteridAAAA", "--config", b.config()}
	for name, password := range c.users() {
		for _, mechanism := range []string{"SCRAM-SHA-256", "SCRAM-SHA-512"} {
			args = append(args, "--add-scram", fmt.Sprintf("%s=[name=%s,password=%s]", mechanism, name, password))
		}
	}
	out, err := java(ctx, jars(c.classes), toolHeap, quiet, args).CombinedOutput()
	if err != nil {
		return fmt.Errorf("format the storage of broker %d: %w\n%s", b.id, err, out)
	}
	return nil
}

var quiet = []string{"-Dorg.slf4j.simpleLogger.defaultLogLevel=warn"}

func (c *Cluster) users() map[string]string {
	users := map[string]string{Admin: AdminPassword}
	maps.Copy(users, c.opts.Users)
	return users
}

func (b *broker) config() string { return filepath.Join(b.dir, "server.properties") }
func (b *broker) log() string    { return filepath.Join(b.dir, "server.log") }

func (c *Cluster) run(b *broker) error {
	log, err := os.OpenFile(b.log(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return fmt.Errorf("open the log of broker %d: %w", b.id, err)
	}
	defer func() { _ = log.Close() }()
	options := append(c.archive(b), "-Dorg.slf4j.simpleLogger.showDateTime=true")
	if c.opts.Decisions {
		options = append(options, "-Dorg.slf4j.simpleLogger.log.kafka.authorizer.logger=debug")
	}
	if c.opts.OAuth != nil {
		options = append(options, "-Dorg.apache.kafka.sasl.oauthbearer.allowed.urls="+c.opts.OAuth.KeySet)
	}
	// The broker outlives the context of the call that started it.
	heap := "-Xmx" + cmp.Or(c.opts.Heap, brokerHeap)
	classPath := jars(c.classes)
	if c.receiver != "" {
		classPath += ":" + c.receiver
	}
	cmd := java(context.Background(), classPath, heap, options, []string{"kafka.Kafka", b.config()})
	cmd.Stdout, cmd.Stderr = log, log
	if err := (Place{Cgroup: c.opts.Cgroup}).Start(cmd); err != nil {
		return fmt.Errorf("run broker %d: %w", b.id, err)
	}
	b.cmd, b.done = cmd, make(chan struct{})
	go func(done chan<- struct{}) {
		_ = cmd.Wait() // how it ended is seen in its log
		close(done)
	}(b.done)
	return nil
}

// Await returns when each running broker lists all running brokers and no others in its metadata.
func (c *Cluster) Await(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for _, b := range c.brokers {
		if b.cmd == nil {
			continue
		}
		if err := c.awaitBroker(ctx, b); err != nil {
			return fmt.Errorf("wait for broker %d at %s: %w", b.id, b.host, err)
		}
	}
	return nil
}

func (c *Cluster) awaitBroker(ctx context.Context, b *broker) error {
	client, err := kgo.NewClient(kgo.SeedBrokers(b.addr(PlaintextPort)), kgo.DialTimeout(time.Second))
	if err != nil {
		return err
	}
	defer client.Close()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	request := kmsg.NewPtrMetadataRequest()
	request.Topics = []kmsg.MetadataRequestTopic{}
	for {
		answer, err := client.SeedBrokers()[0].Request(ctx, request)
		if metadata, ok := answer.(*kmsg.MetadataResponse); ok && len(metadata.Brokers) == c.Running() {
			return nil
		}
		select {
		case <-b.done:
			return errors.New("it has ended")
		case <-ctx.Done():
			return errors.Join(ctx.Err(), err)
		case <-tick.C:
		}
	}
}

// Stop ends all brokers and removes the data of a temporary directory. Brokers whose data stays end in an orderly way.
func (c *Cluster) Stop() error {
	how := syscall.SIGTERM
	if c.opts.Dir == "" && useArchive(c.classes) != nil {
		how = syscall.SIGKILL // nothing to keep, neither data nor archive
	}
	var failures []error
	for _, b := range c.brokers {
		if b.cmd != nil {
			failures = append(failures, b.signal(how))
		}
	}
	for _, b := range c.brokers {
		if b.cmd != nil {
			failures = append(failures, b.awaitEnd())
			failures = append(failures, c.keepArchive(b))
		}
	}
	if c.claim != nil {
		failures = append(failures, c.claim.Close())
	}
	if c.opts.Dir == "" {
		failures = append(failures, os.RemoveAll(c.dir))
	}
	return errors.Join(failures...)
}

// StopBroker ends broker i, counted from 0: by SIGTERM, after which it hands over its partitions and closes its
// connections, or by SIGKILL as a crash would. It returns when the process is gone; see [Cluster.Await] for when the
// others have noticed.
func (c *Cluster) StopBroker(i int, how syscall.Signal) error {
	b := c.brokers[i]
	if b.cmd == nil {
		return fmt.Errorf("stop broker %d: it is not running", b.id)
	}
	if err := b.signal(how); err != nil {
		return err
	}
	return b.awaitEnd()
}

// StartBroker starts broker i again, with its data, and returns when all running brokers list all running brokers.
func (c *Cluster) StartBroker(ctx context.Context, i int) error {
	b := c.brokers[i]
	if b.cmd != nil {
		return fmt.Errorf("start broker %d: it is running", b.id)
	}
	if err := c.run(b); err != nil {
		return err
	}
	return c.Await(ctx)
}

func (b *broker) signal(how syscall.Signal) error {
	if err := b.cmd.Process.Signal(how); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("end broker %d: %w", b.id, err)
	}
	return nil
}

// awaitEnd returns when the process is gone, by force if need be.
func (b *broker) awaitEnd() error {
	defer func() { b.cmd = nil }()
	select {
	case <-b.done:
		return nil
	case <-time.After(stopTimeout):
	}
	if err := Kill(b.cmd); err != nil {
		return fmt.Errorf("kill broker %d: %w", b.id, err)
	}
	<-b.done
	return fmt.Errorf("broker %d did not end within %v and was killed", b.id, stopTimeout)
}

// Running returns the number of running brokers.
func (c *Cluster) Running() int {
	n := 0
	for _, b := range c.brokers {
		if b.cmd != nil {
			n++
		}
	}
	return n
}

// Addrs returns the plaintext addresses of all brokers, also of stopped ones.
func (c *Cluster) Addrs() []string { return c.addrs(PlaintextPort) }

// SASLAddrs returns the SASL_PLAINTEXT addresses of all brokers, also of stopped ones.
func (c *Cluster) SASLAddrs() []string { return c.addrs(SASLPort) }

// TLSAddrs returns the SSL addresses of all brokers, also of stopped ones.
func (c *Cluster) TLSAddrs() []string { return c.addrs(TLSPort) }

// SASLTLSAddrs returns the SASL_SSL addresses of all brokers, also of stopped ones.
func (c *Cluster) SASLTLSAddrs() []string { return c.addrs(SASLTLSPort) }

func (c *Cluster) addrs(port int) []string {
	var all []string
	for _, b := range c.brokers {
		all = append(all, b.addr(port))
	}
	return all
}

func (b *broker) addr(port int) string { return net.JoinHostPort(b.host, strconv.Itoa(port)) }

// Log returns the path of the log of broker i, counted from 0.
func (c *Cluster) Log(i int) string { return c.brokers[i].log() }

// PID returns the process id of broker i, counted from 0, or 0 while it is stopped.
func (c *Cluster) PID(i int) int {
	if c.brokers[i].cmd == nil {
		return 0
	}
	return c.brokers[i].cmd.Process.Pid
}

// tails returns the ends of the brokers' logs as an error, for a failed start.
func (c *Cluster) tails() error {
	const tail = 2000
	var all []error
	for _, b := range c.brokers {
		text, err := os.ReadFile(b.log())
		if err != nil {
			continue // it never ran
		}
		all = append(all, fmt.Errorf("the log of broker %d ends:\n%s", b.id, text[max(0, len(text)-tail):]))
	}
	return errors.Join(all...)
}
