// Package node is the host agent: it redirects, tells who connected, finds the cluster, dials the broker, and hands the
// connection to the enforcer.
package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"

	"klamm/bpf"
	"klamm/enforcer"
	"klamm/enforcer/audit"
	"klamm/enforcer/policy"
	"klamm/node/upstream"
	"klamm/spiffe"
)

// Node is one running agent.
type Node struct {
	config    Config
	log       zerolog.Logger
	redirect  *Redirect
	clusters  Clusters
	nri       *nri // nil where no container runtime is asked
	attest    *spiffe.Attestor
	attesting *prometheus.HistogramVec
	spire     *spiffe.SPIRE // nil where no SPIRE agent is asked
	issuers   *issuers
	started   time.Time
	manager   serviceManager
	taken     func() error  // tells the node before this one that it may end
	replaced  func()        // ends Run: the next node has taken over
	handing   atomic.Bool   // to the next node, at this moment
	more      chan struct{} // more has become broker-bound
	enforcer  *enforcer.Enforcer
	registry  *prometheus.Registry
	closers   []io.Closer // in the order they were opened

	mu       sync.Mutex // guards what is intercepted
	ports    []uint16
	networks map[string][]bpf.Network // by cluster
	kept     []uint16                 // by the node before, until all clusters are reached
	exempted *exemptions
	wall     wall

	ids   atomic.Uint64
	slots chan struct{}
	conns sync.WaitGroup
}

// Open sets everything up but redirects nothing yet: see Run. What it opened is closed again when it fails.
func Open(c Config, log zerolog.Logger) (*Node, error) {
	manager, kept := findServiceManager()
	return openNode(c, log, manager, inheritance{listeners: kept}, func() error { return nil })
}

// Replace is Open in the place of the node that runs, which goes on until this one accepts connections, and then drains
// and ends. ErrNobody if none answers at node.socket.
func Replace(ctx context.Context, c Config, log zerolog.Logger) (*Node, error) {
	before, taken, err := takeOverFrom(ctx, c.Node.Socket)
	if err != nil {
		return nil, err
	}
	manager, kept := findServiceManager()
	closeAll(kept) // the same ones
	return openNode(c, log, manager, before, taken)
}

func openNode(c Config, log zerolog.Logger, manager serviceManager, before inheritance, taken func() error) (
	_ *Node, err error) {
	n := &Node{config: c, log: log, registry: prometheus.NewRegistry(), slots: make(chan struct{}, c.Limits.Connections),
		started: time.Now(), manager: manager, taken: taken, replaced: func() {}, more: make(chan struct{}, 1),
		ports: c.Intercept.Ports, networks: map[string][]bpf.Network{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, n.Close())
		}
	}()
	if err := CheckCapabilities(); err != nil {
		return nil, err
	}
	rules, err := LoadPolicy(c.Policies)
	if err != nil {
		return nil, err
	}
	lines, file, err := audit.Open(c.Audit.File, c.Node.Name)
	if err != nil {
		return nil, err
	}
	n.closers = append(n.closers, file)
	if err := n.openIssuers(); err != nil {
		return nil, err
	}
	n.enforcer = enforcer.New(enforcer.Options{Policy: rules, Audit: lines, MaxFrame: int(c.Limits.MaxFrame),
		Memory: int64(c.Limits.Memory), Metrics: n.registry, Tokens: n.logins(),
		CloseOnLoss: c.Attestation.OnLoss == LossClose})
	if strings.HasPrefix(c.Node.Pins, BPFFS+"/") {
		if err := MountBPFFS(BPFFS); err != nil {
			return nil, err
		}
	}
	if n.redirect, err = OpenRedirect(RedirectOptions{CgroupPath: c.Node.Cgroup, Pins: c.Node.Pins,
		Ports: c.Intercept.Ports, Before: before, Manager: manager, OnEvent: n.noticed, Log: log}); err != nil {
		return nil, err
	}
	n.closers = append(n.closers, n.redirect)
	cgroups, err := Cgroup2Mount()
	if err != nil {
		return nil, err
	}
	var workloads spiffe.Workloads
	if c.Intercept.NRI != "" {
		n.nri = newNRI(c.Intercept.NRI, n.redirect.enrolled, n.registry, log)
		workloads = n.nri
	}
	processes := spiffe.NewProcesses(tasks{n.redirect}, cgroups, workloads)
	if err := n.openSPIRE(processes); err != nil {
		return nil, err
	}
	if err := n.openAttestor(processes); err != nil {
		return nil, err
	}
	n.registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		kernelCounters{n.redirect})
	if n.kept, err = n.redirect.Ports(); err != nil {
		return nil, err
	}
	return n, n.redirect.SetFailModes(bpf.FailModes{PassDown: c.Intercept.OnEnforcerDown == Pass,
		PassUnenrolled: c.Intercept.OnUnenrolled == Pass})
}

// LoadPolicy reads policy files. All that is wrong with them is reported together, by file, line and column.
func LoadPolicy(files []string) (*policy.Policy, error) {
	var sets []*policy.Set
	var errs []error
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			errs = append(errs, fmt.Errorf("reading the policy: %w", err))
			continue
		}
		set, err := policy.Parse(file, data)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		sets = append(sets, set)
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return policy.New(sets...), nil
}

// ReloadPolicy reads the policy files again. A bad file keeps the policy that is in force.
func (n *Node) ReloadPolicy() error {
	rules, err := LoadPolicy(n.config.Policies)
	if err != nil {
		return fmt.Errorf("the policy in force is kept: %w", err)
	}
	n.enforcer.SetPolicy(rules)
	return nil
}

// Run redirects and enforces until ctx ends, then drains the open connections. Ready is called once, when broker-bound
// connects are redirected.
func (n *Node) Run(ctx context.Context, ready func()) error {
	ctx, stop := context.WithCancel(ctx)
	handedOver := false
	n.replaced = sync.OnceFunc(func() {
		handedOver = true
		stop()
	})
	serving, cut := context.WithCancel(context.WithoutCancel(ctx))
	defer n.conns.Wait()
	defer cut()
	defer stop()

	// Before the clusters: their brokers' ports are intercepted as soon as they are known.
	if err := n.exempt(ctx); err != nil {
		return err
	}
	defer func() {
		for _, c := range n.clusters {
			c.Close()
		}
	}()
	for _, c := range n.config.Clusters {
		cluster, err := OpenCluster(c, ClusterOptions{Dial: n.redirect.Dialer().DialContext, Ports: n.config.Intercept.Ports,
			Agent:   n.agent(),
			OnPorts: n.interceptAlso, OnNetworks: func(networks []bpf.Network) { n.interceptAt(c.Name, networks) },
			Log: n.log})
		if err != nil {
			return err
		}
		n.clusters = append(n.clusters, cluster)
	}
	if err := n.raise(); err != nil {
		return err
	}
	failed := make(chan error, 2)
	if err := errors.Join(n.serveMetrics(ctx, failed), n.serveControl(ctx, failed)); err != nil {
		return err
	}
	if err := n.redirect.Begin(); err != nil {
		return err
	}
	n.conns.Go(func() { n.watch(ctx) })
	n.conns.Go(func() { n.guard(ctx) })
	n.conns.Go(func() { n.issuers.Run(ctx) })
	n.conns.Go(func() { n.followMemory(ctx) })
	if n.nri != nil {
		n.conns.Go(func() { n.nri.run(ctx) })
	}
	accepting := make(chan struct{})
	go func() {
		defer close(accepting)
		n.accept(serving)
	}()
	if err := errors.Join(n.taken(), n.manager.tell("READY=1")); err != nil {
		n.log.Warn().Err(err).Msg("nobody was told that the node is up")
	}
	n.conns.Go(func() { n.takeOver(ctx) })
	ready()

	var err error
	select {
	case <-ctx.Done():
	case err = <-failed:
	}
	_ = n.manager.tell("STOPPING=1") // it sees that without being told
	stop()
	if !handedOver && !n.manager.keeps() {
		err = errors.Join(err, n.redirect.End())
	}
	err = errors.Join(err, n.redirect.Stop())
	<-accepting
	n.drain(serving)
	return err
}

// drain gives the open connections limits.drain to end in order.
func (n *Node) drain(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, n.config.Limits.Drain)
	defer cancel()
	if cut := n.enforcer.Drain(ctx, 0); cut > 0 {
		n.log.Warn().Int("connections", cut).Dur("drain", n.config.Limits.Drain).
			Msg("connections were cut that still owed answers; their clients send these requests again")
	}
}

// Close detaches the redirect and closes what Open opened.
func (n *Node) Close() error {
	var errs []error
	for _, c := range slices.Backward(n.closers) {
		errs = append(errs, c.Close())
	}
	n.closers = nil
	return errors.Join(errs...)
}

// bound is what is broker-bound now. n.mu is held.
func (n *Node) bound() (ports []uint16, networks []bpf.Network) {
	ports = slices.Concat(n.ports, n.kept)
	slices.Sort(ports)
	for _, of := range n.networks {
		networks = append(networks, of...)
	}
	return slices.Compact(ports), networks
}

// intercept redirects it. n.mu is held.
func (n *Node) intercept() error {
	ports, networks := n.bound()
	err := n.redirect.SetDestinations(ports, networks)
	if n.wall.firewall != nil {
		err = errors.Join(err, n.wall.SetDestinations(ports, refined(networks)))
	}
	return err
}

// interceptAlso adds ports that a cluster's brokers advertise.
func (n *Node) interceptAlso(ports []uint16) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.ports = append(n.ports, ports...)
	defer n.moreIsBound()
	if err := n.intercept(); err != nil {
		n.log.Error().Err(err).Uints16("ports", ports).Msg("these broker ports may not be intercepted")
	}
}

// interceptAt replaces the networks in which ports that others use too are a cluster's.
func (n *Node) interceptAt(cluster string, networks []bpf.Network) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if slices.Equal(networks, n.networks[cluster]) {
		return
	}
	n.networks[cluster] = networks
	defer n.moreIsBound()
	if err := n.intercept(); err != nil {
		n.log.Error().Err(err).Str("cluster", cluster).Msg("brokers on ports below 1024 may not be intercepted")
	}
}

// settle lets go of the ports that the node before this one had learned, once the clusters have told of theirs.
func (n *Node) settle() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.kept == nil || slices.ContainsFunc(n.clusters, func(c *Cluster) bool { return !c.State().Ready() }) {
		return nil
	}
	n.kept = nil
	return n.intercept()
}

// exempt lets the exempt processes go before anything is redirected, and follows them until ctx ends.
func (n *Node) exempt(ctx context.Context) error {
	root, err := Cgroup2Mount()
	if err != nil {
		return err
	}
	wanted := n.config.Intercept.Exempt
	n.exempted = &exemptions{redirect: n.redirect, root: root, log: n.log, wanted: wanted,
		ids: make([]uint64, len(wanted))}
	if err := n.exempted.refresh(); err != nil {
		return err
	}
	n.conns.Go(func() { n.exempted.follow(ctx) })
	return nil
}

// accept serves connections until the redirect is closed.
func (n *Node) accept(ctx context.Context) {
	for {
		conn, record, err := n.redirect.Accept()
		if err != nil {
			return
		}
		n.conns.Go(func() { n.serve(ctx, conn, record) })
	}
}

// serve takes one redirected connection from accept to end.
func (n *Node) serve(ctx context.Context, conn net.Conn, r bpf.Record) {
	client := newClientOf(n.ids.Add(1), r)
	select {
	case n.slots <- struct{}{}:
		defer func() { <-n.slots }()
	default:
		n.turnAway(conn, client, audit.TooManyConnections,
			fmt.Errorf("%d connections are open, the limit", cap(n.slots)))
		return
	}
	workload, err := n.identify(ctx, r)
	if err != nil {
		n.turnAway(conn, client, audit.NoIdentity, err)
		return
	}
	defer workload.Release()
	if carry := n.reach(ctx, conn, r, client, workload); carry != nil {
		carry()
	}
}

func newClientOf(id uint64, r bpf.Record) *enforcer.Client {
	client := &enforcer.Client{ID: strconv.FormatUint(id, 36), Destination: r.Destination()}
	client.Identity.Process = spiffe.Process{PID: r.TGID, UID: r.UID, GID: r.GID, Comm: r.Comm.String()}
	return client
}

// turnAway refuses a connection before a byte of it is read.
func (n *Node) turnAway(conn net.Conn, client *enforcer.Client, reason audit.Reason, err error) {
	reset(conn)
	n.refuse(*client, reason, err)
}

// reach dials the broker and meets the client as it speaks. What it returns carries the connection to its end, or is
// nil: it is called by serve, because what stands on the stack until then stands on that of every idle connection.
func (n *Node) reach(ctx context.Context, conn net.Conn, r bpf.Record, client *enforcer.Client,
	workload *spiffe.Attested) (carry func()) {
	client.Identity = *workload.Identity()
	destination, err := n.find(ctx, r)
	if err != nil {
		n.turnAway(conn, client, audit.NoCluster, err)
		return nil
	}
	client.Cluster = destination.Config().Name
	dialled, cancel := context.WithTimeout(ctx, n.config.Limits.DialTimeout)
	defer cancel()
	broker, err := n.redirect.Dial(dialled, r, conn.RemoteAddr(), destination.Config().Upstream.fromClient())
	if err != nil {
		if ctx.Err() != nil {
			n.turnAway(conn, client, audit.BrokerUnreachable, fmt.Errorf("the node ends: %w", err))
			return nil
		}
		if err := n.redirect.Down(r); err != nil {
			n.log.Warn().Err(err).Msg("clients see a reset instead")
		}
		n.turnAway(conn, client, audit.BrokerUnreachable, err)
		return nil
	}
	tcp, _ := conn.(*net.TCPConn) // as is all that is accepted
	o, err := destination.clients.listen(ctx, tcp)
	switch {
	case err != nil:
		_ = broker.Close()
		n.turnAway(conn, client, audit.TLSHandshake, err)
		return nil
	case o == nil:
		c := &enforcer.Conn{Client: *client, Downstream: conn, Workload: workload}
		return func() { n.enforce(ctx, destination, broker, c, workload) }
	case destination.clients.mode == TLSPassthrough:
		return func() { n.pass(ctx, *client, tcp, broker, workload, destination, o) }
	}
	return func() { n.terminate(ctx, *client, tcp, broker, workload, destination, o) }
}

// enforce opens the way to the broker that was dialled, and enforces policy on c until it ends. It closes all.
func (n *Node) enforce(ctx context.Context, d Destination, broker net.Conn, c *enforcer.Conn,
	workload *spiffe.Attested) {
	bounded, cancel := context.WithTimeout(ctx, n.config.Limits.DialTimeout)
	opened, err := d.Open(bounded, broker, workload)
	cancel()
	if err != nil {
		reset(c.Downstream)
		n.refuse(c.Client, upstreamReason(err), err)
		return
	}
	c.Upstream, c.Kafka, c.AutoCreate, c.AsWorkload = opened.Conn, d, d.AutoCreate(), opened.AsWorkload()
	if opened.Login != nil {
		c.Login = opened.Login
	}
	ctx, stop := whileCurrent(ctx, opened, workload)
	defer stop()
	err = n.enforcer.Serve(ctx, c)
	cause := context.Cause(ctx)
	switch {
	case err == nil && errors.Is(cause, upstream.ErrNoSVID):
		n.refuse(c.Client, audit.NoSVID, cause)
	case errors.Is(err, upstream.ErrTLS):
		n.refuse(c.Client, audit.UpstreamTLS, err)
	}
	if err != nil {
		n.log.Debug().Err(err).Str("conn", c.ID).Msg("connection ended")
	}
}

// find tells to which cluster the broker belongs that a client connected to.
func (n *Node) find(ctx context.Context, r bpf.Record) (Destination, error) {
	if to := r.Destination(); to.Addr().IsLoopback() && !n.redirect.IsHost(r.NetnsCookie) {
		return n.clusters.FindByNetwork(to)
	}
	return n.clusters.Find(ctx, r.Destination())
}

func (n *Node) identify(ctx context.Context, r bpf.Record) (*spiffe.Attested, error) {
	ctx, cancel := context.WithTimeout(ctx, n.config.Attestation.Timeout)
	defer cancel()
	if n.nri != nil {
		select { // a node that has just started does not know yet what the pods are called that were there before
		case <-n.nri.first:
		case <-ctx.Done():
		}
	}
	begin := time.Now()
	workload, err := n.attest.Attest(ctx, peerOf(r))
	if err == nil {
		n.attesting.WithLabelValues(strconv.FormatBool(workload.Cached())).Observe(time.Since(begin).Seconds())
	}
	return workload, err
}

// peerOf is who made the connect.
func peerOf(r bpf.Record) spiffe.Peer {
	return spiffe.Peer{TGID: r.TGID, UID: r.UID, GID: r.GID, StartBoottime: r.StartBoottime, ExecID: r.ExecID,
		PidInode: r.PidInode, ExeInode: r.ExeInode, ExeDev: r.ExeDev, CgroupID: r.CgroupID, Comm: r.Comm.String(),
		Socket: r.ClientCookie}
}

// reset closes with RST: connect(2) has succeeded already, and this is how a refusal after it looks to every client.
func reset(conn net.Conn) {
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0) // without it the client reads an end instead of a reset
	}
	_ = conn.Close()
}

// tasks lets package spiffe read processes in the kernel.
type tasks struct{ *Redirect }

func (t tasks) Task(pid uint32) (spiffe.TaskFacts, error) {
	f, err := t.Redirect.Task(pid)
	if errors.Is(err, bpf.ErrNoTask) {
		err = unix.ESRCH
	}
	return facts(f), err
}

// kernelCounters exports the counters of the eBPF programs.
type kernelCounters struct{ *Redirect }

var kernelDesc = prometheus.NewDesc("klamm_kernel_total", "What the eBPF programs decided, by reason.",
	[]string{"reason"}, nil)

// Describe names the one metric.
func (k kernelCounters) Describe(ch chan<- *prometheus.Desc) { ch <- kernelDesc }

// Collect reads the counters.
func (k kernelCounters) Collect(ch chan<- prometheus.Metric) {
	counters, err := k.Counters()
	if err != nil {
		ch <- prometheus.NewInvalidMetric(kernelDesc, err)
		return
	}
	for reason, v := range counters {
		ch <- prometheus.MustNewConstMetric(kernelDesc, prometheus.CounterValue, float64(v), reason)
	}
}

// serveMetrics serves /metrics, /healthz (the process runs) and /readyz (every cluster was reached, and every issuer's
// keys are there).
func (n *Node) serveMetrics(ctx context.Context, failed chan<- error) error {
	if n.config.Metrics.Listen == "" {
		return nil
	}
	l, err := net.Listen("tcp", n.config.Metrics.Listen)
	if err != nil {
		return fmt.Errorf("metrics.listen: %w: choose another address in klamm.yaml, or \"\" for none", err)
	}
	mux := http.NewServeMux()
	mux.Handle("/metrics", promhttp.HandlerFor(n.registry, promhttp.HandlerOpts{}))
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok\n") })
	mux.HandleFunc("/readyz", n.readyz)
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	go func() {
		if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			failed <- fmt.Errorf("serving metrics: %w", err)
		}
	}()
	context.AfterFunc(ctx, func() { _ = server.Close() })
	return nil
}

func (n *Node) readyz(w http.ResponseWriter, _ *http.Request) {
	for _, c := range n.clusters {
		if s := c.State(); !s.Ready() {
			http.Error(w, fmt.Sprintf("cluster %s: %v", s.Name, s.Err), http.StatusServiceUnavailable)
			return
		}
	}
	if err := n.issuers.ready(); err != nil {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	_, _ = io.WriteString(w, "ready\n")
}
