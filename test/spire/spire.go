// Package spire runs a real SPIRE server and agent for tests (scripts/setup spire), with an OIDC discovery provider
// where one is wanted.
package spire

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"klamm/test/ca"
	"klamm/test/kafka"
)

const (
	startTimeout = 60 * time.Second
	stopTimeout  = 20 * time.Second
	lookInterval = 20 * time.Millisecond
)

// TrustDomain is of all that a rig without another one issues.
const TrustDomain = "example.test"

// Node is the SPIFFE ID that may ask on behalf of workloads, in the default trust domain. It is registered for all
// processes of root.
const Node = "spiffe://" + TrustDomain + "/klamm"

// Options describe a rig. The zero value is quick to notice what changes.
type Options struct {
	TrustDomain string // empty: TrustDomain
	// Delegates may ask on behalf of workloads, by both APIs; nil: /klamm in the trust domain.
	Delegates []string
	// NodeSelectors are of the entry of the first delegate; nil: unix:uid:0. Empty: there is none.
	NodeSelectors []string
	// SyncInterval is how often the agent asks the server for changes, and CacheInterval how often that looks for
	// them; 0: a second, where SPIRE's defaults are 5 s each.
	SyncInterval, CacheInterval time.Duration
	X509TTL, JWTTTL             time.Duration // of entries without their own; 0: an hour, five minutes
	CATTL                       time.Duration // of the server's root, whose next one signs from 5/6 of it on; 0: a day
	JWTIssuer                   string        // the claim iss; empty: none, or the discovery provider's
	// Discovery runs the OIDC discovery provider, with a certificate of Discovery's root.
	Discovery bool
	// AgentPlugins is HCL for the agent's plugins section, beside join_token, disk and unix.
	AgentPlugins string
	// WithoutUnix leaves the workload attestor unix out.
	WithoutUnix bool
	Place       kafka.Place // where the agent runs
	Env         []string    // of the agent, beside the caller's
	Dir         string      // where data and logs go; empty: a temporary directory that Stop removes
}

// SPIRE is a running server with one agent. Its methods are not for concurrent use.
type SPIRE struct {
	opts               Options
	bin, dir           string
	port, oidcPort     int
	server, agent, dns *program
	conn               *grpc.ClientConn
}

// program is a process of the rig.
type program struct {
	name string
	log  string
	cmd  *exec.Cmd     // nil while stopped
	done chan struct{} // closed when cmd has ended
}

// Start starts a rig and stops it at the end of the test. A failed start fails the test and shows the end of the logs.
func Start(t testing.TB, opts Options) *SPIRE {
	t.Helper()
	s, err := New(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Stop(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// New starts a rig and returns when the agent serves all its APIs. The caller stops it. Its processes are killed when
// this process ends, however it does.
func New(ctx context.Context, opts Options) (*SPIRE, error) {
	s := &SPIRE{opts: opts, dir: opts.Dir}
	if s.opts.TrustDomain == "" {
		s.opts.TrustDomain = TrustDomain
	}
	if s.opts.Delegates == nil {
		s.opts.Delegates = []string{s.ID("/klamm")}
	}
	if s.opts.NodeSelectors == nil {
		s.opts.NodeSelectors = []string{"unix:uid:0"}
	}
	for _, d := range []struct {
		of *time.Duration
		to time.Duration
	}{{&s.opts.SyncInterval, time.Second}, {&s.opts.CacheInterval, time.Second}, {&s.opts.X509TTL, time.Hour},
		{&s.opts.JWTTTL, 5 * time.Minute}, {&s.opts.CATTL, 24 * time.Hour}} {
		if *d.of == 0 {
			*d.of = d.to
		}
	}
	if err := s.prepare(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if err := s.start(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("start SPIRE: %w", err), errors.New(s.Logs()), s.Stop())
	}
	return s, nil
}

// ID is a SPIFFE ID of the rig's trust domain.
func (s *SPIRE) ID(path string) string { return "spiffe://" + s.opts.TrustDomain + path }

// WorkloadAPI is the path of the agent's public socket.
func (s *SPIRE) WorkloadAPI() string { return filepath.Join(s.dir, "public", "api.sock") }

// Socket is the path of the socket of an API: "broker" or "delegated".
func (s *SPIRE) Socket(api string) string {
	return map[string]string{"broker": filepath.Join(s.dir, "broker", "broker.sock"),
		"delegated": filepath.Join(s.dir, "admin", "admin.sock")}[api]
}

// ServerSocket is the path of the socket of the server's own API, which root can use.
func (s *SPIRE) ServerSocket() string { return filepath.Join(s.dir, "server", "api.sock") }

// Issuer is the URL of the discovery provider, which is the claim iss of JWT-SVIDs.
func (s *SPIRE) Issuer() string {
	if s.opts.Discovery {
		return fmt.Sprintf("https://127.0.0.1:%d", s.oidcPort)
	}
	return s.opts.JWTIssuer
}

// IssuerCA is a PEM file with the root of the discovery provider's certificate.
func (s *SPIRE) IssuerCA() string { return filepath.Join(s.dir, "issuer-ca.pem") }

func (s *SPIRE) prepare() error {
	cache, err := kafka.Cache()
	if err != nil {
		return err
	}
	s.bin = filepath.Join(cache, "spire", "current")
	if _, err := os.Stat(filepath.Join(s.bin, "spire-agent")); err != nil {
		return fmt.Errorf("find SPIRE: %w: run scripts/setup spire", err)
	}
	if s.dir == "" {
		if s.dir, err = os.MkdirTemp("", "spire-"); err != nil {
			return fmt.Errorf("make a directory for SPIRE: %w", err)
		}
	}
	errs := []error{os.Chmod(s.dir, 0o755)} // workloads of other users find the public socket
	for _, d := range []string{"server", "public", "admin", "broker", "agent"} {
		errs = append(errs, os.MkdirAll(filepath.Join(s.dir, d), 0o755))
	}
	var perr error
	s.port, perr = freePort()
	errs = append(errs, perr)
	s.oidcPort, perr = freePort()
	s.server = &program{name: "spire-server", log: filepath.Join(s.dir, "server.log")}
	s.agent = &program{name: "spire-agent", log: filepath.Join(s.dir, "agent.log")}
	s.dns = &program{name: "oidc-discovery-provider", log: filepath.Join(s.dir, "oidc.log")}
	return errors.Join(append(errs, perr)...)
}

// freePort is a TCP port at loopback that nobody has at this moment.
func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, fmt.Errorf("find a free port: %w", err)
	}
	return l.Addr().(*net.TCPAddr).Port, l.Close()
}

func (s *SPIRE) start(ctx context.Context) error {
	if err := s.StartServer(ctx); err != nil {
		return err
	}
	var err error
	s.conn, err = grpc.NewClient("unix:"+s.ServerSocket(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	bundle, err := s.Bundle(ctx)
	if err != nil {
		return err
	}
	token, err := s.joinToken(ctx)
	if err != nil {
		return err
	}
	if len(s.opts.NodeSelectors) > 0 {
		if _, err := s.Register(ctx, Entry{ID: s.opts.Delegates[0], Selectors: s.opts.NodeSelectors}); err != nil {
			return err
		}
	}
	if err := os.WriteFile(filepath.Join(s.dir, "bootstrap.pem"), bundle, 0o600); err != nil {
		return err
	}
	if err := s.startAgent(ctx, "-joinToken", token); err != nil {
		return err
	}
	if s.opts.Discovery {
		return s.startDiscovery(ctx)
	}
	return nil
}

// StartServer starts the server, again, with its data, and returns when it answers.
func (s *SPIRE) StartServer(ctx context.Context) error {
	return s.run(ctx, s.server, kafka.Place{}, nil, s.serverConfig(), []string{s.ServerSocket()}, "run")
}

// StartAgent starts the agent again, with its data, and returns when it serves all its APIs.
func (s *SPIRE) StartAgent(ctx context.Context) error { return s.startAgent(ctx) }

func (s *SPIRE) startAgent(ctx context.Context, args ...string) error {
	sockets := []string{s.WorkloadAPI(), s.Socket("delegated")}
	if len(s.opts.Delegates) > 0 {
		sockets = append(sockets, s.Socket("broker"))
	}
	return s.run(ctx, s.agent, s.opts.Place, s.opts.Env, s.agentConfig(), sockets, append([]string{"run"}, args...)...)
}

func (s *SPIRE) startDiscovery(ctx context.Context) error {
	leaf, err := s.discoveryCA()
	if err != nil {
		return err
	}
	if err := ca.Write(leaf, filepath.Join(s.dir, "oidc.crt"), filepath.Join(s.dir, "oidc.key")); err != nil {
		return err
	}
	return s.run(ctx, s.dns, kafka.Place{}, nil, s.discoveryConfig(), []string{fmt.Sprintf("127.0.0.1:%d", s.oidcPort)})
}

// run starts a program and returns when it accepts connections at all addresses: host:port, or paths of unix sockets.
func (s *SPIRE) run(ctx context.Context, p *program, place kafka.Place, env []string, config string, addresses []string,
	args ...string) error {
	if p.cmd != nil {
		return fmt.Errorf("start %s: it is running", p.name)
	}
	file := filepath.Join(s.dir, p.name+".conf")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		return err
	}
	log, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer func() { _ = log.Close() }()
	// It outlives the context of the call that started it.
	cmd := exec.Command(filepath.Join(s.bin, p.name), append(args, "-config", file)...)
	cmd.Stdout, cmd.Stderr, cmd.Env = log, log, append(os.Environ(), env...)
	if err := place.Start(cmd); err != nil {
		return fmt.Errorf("run %s: %w", p.name, err)
	}
	p.cmd, p.done = cmd, make(chan struct{})
	go func(done chan<- struct{}) {
		_ = cmd.Wait() // how it ended is seen in its log
		close(done)
	}(p.done)
	for _, a := range addresses {
		if err := p.await(ctx, a); err != nil {
			return fmt.Errorf("wait for %s at %s: %w", p.name, a, err)
		}
	}
	return nil
}

// await returns when an address accepts connections.
func (p *program) await(ctx context.Context, address string) error {
	network := "tcp"
	if filepath.IsAbs(address) {
		network = "unix"
	}
	tick := time.NewTicker(lookInterval)
	defer tick.Stop()
	for {
		c, err := net.Dial(network, address)
		if err == nil {
			return c.Close()
		}
		select {
		case <-p.done:
			return errors.New("it has ended")
		case <-ctx.Done():
			return errors.Join(ctx.Err(), err)
		case <-tick.C:
		}
	}
}

// StopAgent ends the agent: by SIGTERM in an orderly way, or by SIGKILL as a crash would.
func (s *SPIRE) StopAgent(how syscall.Signal) error { return s.agent.end(how) }

// StopServer ends the server as StopAgent does the agent.
func (s *SPIRE) StopServer(how syscall.Signal) error { return s.server.end(how) }

// Pause makes the agent mute: it accepts what is sent and answers nothing until Resume.
func (s *SPIRE) Pause() error { return s.agent.cmd.Process.Signal(syscall.SIGSTOP) }

// Resume ends Pause.
func (s *SPIRE) Resume() error { return s.agent.cmd.Process.Signal(syscall.SIGCONT) }

// SetDelegates has others ask on behalf of workloads from the agent's next start on.
func (s *SPIRE) SetDelegates(ids ...string) { s.opts.Delegates = ids }

func (p *program) end(how syscall.Signal) error {
	if p == nil || p.cmd == nil {
		return nil
	}
	for _, sig := range []syscall.Signal{how, syscall.SIGCONT} {
		if err := p.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
			return fmt.Errorf("end %s: %w", p.name, err)
		}
	}
	select {
	case <-p.done:
	case <-time.After(stopTimeout):
		_ = p.cmd.Process.Kill()
		<-p.done
		return fmt.Errorf("end %s: it had to be killed after %v", p.name, stopTimeout)
	}
	p.cmd = nil
	return nil
}

// Stop ends all processes and removes a temporary directory.
func (s *SPIRE) Stop() error {
	how := syscall.SIGTERM
	if s.opts.Dir == "" {
		how = syscall.SIGKILL // nothing to keep
	}
	errs := []error{s.dns.end(how), s.agent.end(how), s.server.end(how)}
	if s.conn != nil {
		errs = append(errs, s.conn.Close())
	}
	if s.opts.Dir == "" {
		errs = append(errs, os.RemoveAll(s.dir))
	}
	return errors.Join(errs...)
}

// Logs are the ends of the programs' logs.
func (s *SPIRE) Logs() string {
	var all strings.Builder
	for _, p := range []*program{s.server, s.agent, s.dns} {
		log, err := os.ReadFile(p.log)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		fmt.Fprintf(&all, "%s:\n%s\n", p.name, log[max(0, len(log)-4000):])
	}
	return all.String()
}

// ShortTTL is the shortest life of an X509-SVID that works: the agent looks only every SyncInterval what is due.
func (s *SPIRE) ShortTTL() time.Duration { return 10 * s.opts.SyncInterval }
