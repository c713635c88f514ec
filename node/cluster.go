package node

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/bpf"
	"klamm/enforcer/hello"
	"klamm/enforcer/kafka/authz"
	"klamm/node/upstream"
	"klamm/spiffe"
)

// ErrNoCluster says that a destination belongs to none of the configured clusters: the connection must be refused. An
// insider's own broker on a broker's port is a way out for data, not a broker.
var ErrNoCluster = errors.New("destination belongs to no configured cluster")

const (
	// findTimeout is how long a connection to an unknown destination waits for the clusters' answers.
	findTimeout = 3 * time.Second
	// refreshTimeout bounds one look at a cluster.
	refreshTimeout = 10 * time.Second
	// holdAddress is how long an address stays a broker's after its name was last resolved to it: resolvers of large
	// services answer with another part of the addresses each time.
	holdAddress = 5 * time.Minute
)

// pace is how often a cluster is asked.
type pace struct {
	refresh time.Duration // between two looks at a cluster that answers, less up to a fifth
	retry   time.Duration // between two looks at one that does not
	demand  time.Duration // after a look, before the next on demand; one for an id that the cluster had, too
	lookups time.Duration // between two requests for topic ids
	unknown time.Duration // an id the cluster did not have is not asked for again
	absent  time.Duration // nor is a member its group did not have
	names   time.Duration // between two requests for the list of topics
}

var defaultPace = pace{refresh: 30 * time.Second, retry: 2 * time.Second, demand: time.Second,
	lookups: 50 * time.Millisecond, unknown: 5 * time.Second, absent: time.Minute, names: 5 * time.Second}

// ClusterOptions is what clusters need of the node.
type ClusterOptions struct {
	// Dial opens the connections of the node's own client, not redirected.
	Dial DialFunc
	// Ports are those intercepted by configuration. In a configured network each of them is a broker's.
	Ports []uint16
	// OnPorts is told further ports, once each, that brokers of the cluster listen on. They must be intercepted too:
	// what goes to them is unseen until then. It is called before OpenCluster returns, and later from other goroutines.
	OnPorts func([]uint16)
	// OnNetworks is told where ports that are not only brokers' (below 1024, and not configured) are, each time the
	// cluster's brokers are looked up: all of them, and none is not told.
	OnNetworks func([]bpf.Network)
	// Agent is the SPIRE agent; nil: there is none.
	Agent *spiffe.Agent
	// Log is told when a cluster's state changes.
	Log zerolog.Logger

	pace   *pace // tests are faster
	lookup func(ctx context.Context, host string) ([]netip.Addr, error)
}

// Cluster is one configured Kafka cluster as the node's own client sees it: which addresses are its brokers, which
// topic has which id. Safe for concurrent use.
type Cluster struct {
	*topics
	*members
	names   topicNames
	config  ClusterConfig
	opts    ClusterOptions
	client  *kgo.Client
	up      *upstream.Upstream
	clients *clients
	known   atomic.Pointer[brokers] // replaced whole

	autoCreate atomic.Pointer[bool] // nil until a broker has told

	ctx  context.Context // ends with Close
	stop context.CancelFunc
	done sync.WaitGroup

	mu     sync.Mutex
	flight chan struct{} // closed when the look that runs is over; nil when none runs
	last   time.Time     // when the last one was over
	state  ClusterState
}

// ClusterState is what the node knows of a cluster, for health checks.
type ClusterState struct {
	Name    string
	Reached time.Time // when its brokers last answered; zero when they never did
	Err     error     // why they did not answer the last time; nil when they did
	Brokers []string  // host:port as advertised, sorted
	// Unresolved are names of brokers that this host cannot resolve. Clients that can are refused there, unless the
	// brokers' network is configured.
	Unresolved []string
}

// Ready tells whether the cluster's brokers answered the last time.
func (s ClusterState) Ready() bool { return s.Err == nil && !s.Reached.IsZero() }

// brokers is where a cluster's brokers are. Immutable.
type brokers struct {
	names      []string                    // bootstrap and advertised host:port
	advertised []string                    // by the cluster, sorted
	unresolved []string                    // of names
	addrs      map[netip.AddrPort][]broker // resolved: all that have the address, the last one counts
	ports      []uint16                    // configured, of bootstrap, and advertised
}

type broker struct {
	name string    // host:port that resolved to the address
	seen time.Time // when it last did
}

// OpenCluster starts to follow a cluster. It fails only for what is wrong on this host: a certificate or password that
// cannot be read. Brokers that do not answer are asked again until Close, see State.
func OpenCluster(config ClusterConfig, opts ClusterOptions) (*Cluster, error) {
	client, err := newClient(config, opts.Agent, opts.Dial)
	if err != nil {
		return nil, fmt.Errorf("cluster %s: %w", config.Name, err)
	}
	met, err := openClients(config.Clients, opts.Agent, opts.Log.With().Str("cluster", config.Name).Logger())
	if err != nil {
		return nil, fmt.Errorf("cluster %s: clients: %w", config.Name, err)
	}
	up, err := config.Upstream.open(opts.Agent, opts.Dial)
	if err != nil {
		return nil, fmt.Errorf("cluster %s: upstream: %w", config.Name, err)
	}
	if opts.pace == nil {
		opts.pace = &defaultPace
	}
	if opts.lookup == nil {
		opts.lookup = func(ctx context.Context, host string) ([]netip.Addr, error) {
			return net.DefaultResolver.LookupNetIP(ctx, "ip", host)
		}
	}
	opts.Log = opts.Log.With().Str("cluster", config.Name).Logger()
	c := &Cluster{topics: newTopics(*opts.pace, opts.Log), members: newMembers(*opts.pace, opts.Log),
		config: config, opts: opts, client: client, up: up, clients: met,
		state: ClusterState{Name: config.Name, Err: errors.New("not asked yet")}}
	c.names.pace, c.names.log = *opts.pace, opts.Log
	c.names.ask = func(ctx context.Context) ([]string, error) { return askTopicNames(ctx, client, c.learn) }
	c.known.Store(&brokers{ports: opts.Ports})
	c.ctx, c.stop = context.WithCancel(context.Background())
	c.publish(brokers{names: c.config.Bootstrap})
	c.done.Go(c.follow)
	return c, nil
}

// Close stops following the cluster.
func (c *Cluster) Close() {
	c.mu.Lock() // no look begins from here on
	c.stop()
	c.mu.Unlock()
	c.done.Wait()
	c.client.Close()
	if err := c.clients.close(); err != nil {
		c.opts.Log.Warn().Err(err).Msg("closing the issuer")
	}
}

// Config is what was configured.
func (c *Cluster) Config() ClusterConfig { return c.config }

// State is the cluster's state now.
func (c *Cluster) State() ClusterState {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.state
}

// Resolve looks topic ids up in the cluster with the node's own client, also such as are known. Those that it does not
// have become unknown and are not asked for again for some seconds, others for one. It waits until ctx ends at the
// latest.
func (c *Cluster) Resolve(ctx context.Context, ids [][16]byte) error {
	return c.resolve(ctx, c.ctx, c.client, ids)
}

// TopicNames are the names of all topics, as far as is known; see [authz.Groups].
func (c *Cluster) TopicNames() (names []string, edition uint64) { return c.names.current(c.background) }

// Relist returns when TopicNames has a list that the cluster gave after the call.
func (c *Cluster) Relist(ctx context.Context) error { return c.names.renew(ctx, c.background) }

// Recall has a member of a consumer group looked up, for its next heartbeat.
func (c *Cluster) Recall(m authz.MemberName) { c.want(m, c.background, c.client) }

// background runs f until Close, which waits for its end.
func (c *Cluster) background(f func(context.Context)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ctx.Err() != nil {
		return
	}
	c.done.Go(func() { f(c.ctx) })
}

// Learn takes up the topic ids of an answer by one of the cluster's confirmed brokers. A broker named there that the
// cluster did not name to the node itself is no reason to trust it, only to ask the cluster again.
func (c *Cluster) Learn(m *kmsg.MetadataResponse) {
	c.learn(m)
	names := c.known.Load().names
	for _, b := range m.Brokers {
		if !slices.Contains(names, brokerName(b)) {
			c.refresh()
			return
		}
	}
}

func brokerName(b kmsg.MetadataResponseBroker) string {
	return net.JoinHostPort(b.Host, strconv.Itoa(int(b.Port)))
}

func (c *Cluster) follow() {
	for {
		select {
		case <-c.refresh():
		case <-c.ctx.Done():
			return
		}
		wait := c.opts.pace.retry
		if c.State().Ready() {
			wait = c.opts.pace.refresh - rand.N(c.opts.pace.refresh/5+1) //nolint:gosec // jitter needs no secrecy
		}
		select {
		case <-time.After(wait):
		case <-c.ctx.Done():
			return
		}
	}
}

// over is a look that is already done.
var over = func() chan struct{} { c := make(chan struct{}); close(c); return c }()

// refresh starts a look at the cluster, joins the one that runs, or does nothing when the last one has just been. The
// channel is closed when there is nothing more to wait for.
func (c *Cluster) refresh() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.flight != nil {
		return c.flight
	}
	if c.ctx.Err() != nil || time.Since(c.last) < c.opts.pace.demand {
		return over
	}
	flight := make(chan struct{})
	c.flight = flight
	c.done.Go(func() {
		defer close(flight)
		err := c.look()
		c.mu.Lock()
		defer c.mu.Unlock()
		c.flight, c.last = nil, time.Now()
		c.changed(err)
	})
	return flight
}

// changed takes up the outcome of a look. c.mu is held.
func (c *Cluster) changed(err error) {
	before, known := c.state, c.known.Load()
	c.state.Err, c.state.Brokers, c.state.Unresolved = err, known.advertised, known.unresolved
	if err == nil {
		c.state.Reached = time.Now()
	}
	switch {
	case c.ctx.Err() != nil:
		return
	case err == nil && !before.Ready():
		c.opts.Log.Info().Strs("brokers", known.advertised).Msg("cluster reached")
	case err != nil && (before.Err == nil || before.Err.Error() != err.Error()):
		c.opts.Log.Warn().Err(err).Msg("cluster not reached; asking again")
	}
	if len(known.unresolved) > 0 && !slices.Equal(known.unresolved, before.Unresolved) {
		c.opts.Log.Warn().Strs("brokers", known.unresolved).
			Msg("cannot resolve names of brokers; their last addresses stay, clients elsewhere are refused")
	}
}

// look resolves the names known so far, which needs no broker, then asks the cluster for its brokers.
func (c *Cluster) look() error {
	ctx, cancel := context.WithTimeout(c.ctx, refreshTimeout)
	defer cancel()
	next := *c.known.Load()
	c.resolveNames(ctx, &next)
	c.publish(next)

	req := kmsg.NewPtrMetadataRequest()
	req.Topics = []kmsg.MetadataRequestTopic{} // none; null would be all
	m, err := req.RequestWith(ctx, c.client)
	if err != nil {
		return fmt.Errorf("ask %s for the cluster's brokers: %w", strings.Join(c.config.Bootstrap, ", "), err)
	}
	if len(m.Brokers) == 0 {
		return fmt.Errorf("ask %s for the cluster's brokers: it named none", strings.Join(c.config.Bootstrap, ", "))
	}
	next.names, next.advertised = slices.Clone(c.config.Bootstrap), nil
	for _, b := range m.Brokers {
		name := brokerName(b)
		if _, _, err = splitBroker(name); err != nil {
			return fmt.Errorf("broker %d advertises an address: %w", b.NodeID, err)
		}
		next.advertised = append(next.advertised, name)
		if !slices.Contains(next.names, name) {
			next.names = append(next.names, name)
		}
	}
	slices.Sort(next.advertised)
	c.resolveNames(ctx, &next)
	c.publish(next)
	c.autoCreate.CompareAndSwap(nil, askAutoCreate(ctx, c.client, m.Brokers[0].NodeID))
	return nil
}

// AutoCreate tells whether the brokers create topics that a Metadata request names. It is Kafka's default, and assumed
// where the node's own client may not ask.
func (c *Cluster) AutoCreate() bool {
	v := c.autoCreate.Load()
	return v == nil || *v
}

// askAutoCreate reads a broker's auto.create.topics.enable; nil where it does not tell.
func askAutoCreate(ctx context.Context, client *kgo.Client, broker int32) *bool {
	res := kmsg.NewDescribeConfigsRequestResource()
	res.ResourceType, res.ResourceName = kmsg.ConfigResourceTypeBroker, strconv.Itoa(int(broker))
	res.ConfigNames = []string{"auto.create.topics.enable"}
	req := kmsg.NewPtrDescribeConfigsRequest()
	req.Resources = append(req.Resources, res)
	resp, err := req.RequestWith(ctx, client)
	if err != nil || len(resp.Resources) != 1 {
		return nil
	}
	for _, c := range resp.Resources[0].Configs {
		if c.Name == res.ConfigNames[0] && c.Value != nil {
			enabled := *c.Value == "true"
			return &enabled
		}
	}
	return nil
}

// resolveNames finds the addresses of each of b's names. One that cannot be resolved keeps those it had.
func (c *Cluster) resolveNames(ctx context.Context, b *brokers) {
	found := make([][]netip.AddrPort, len(b.names))
	var each sync.WaitGroup
	for i, name := range b.names {
		each.Go(func() { found[i] = c.resolveName(ctx, name) })
	}
	each.Wait()
	now, old := time.Now(), b.addrs
	b.addrs, b.unresolved = map[netip.AddrPort][]broker{}, nil
	for i, name := range b.names {
		for addr, all := range old {
			for _, o := range all {
				if o.name == name && (found[i] == nil || now.Sub(o.seen) < holdAddress) {
					b.addrs[addr] = append(b.addrs[addr], o)
				}
			}
		}
		if found[i] == nil {
			b.unresolved = append(b.unresolved, name)
		}
	}
	for i, name := range b.names {
		for _, addr := range found[i] {
			others := slices.DeleteFunc(b.addrs[addr], func(o broker) bool { return o.name == name })
			b.addrs[addr] = append(others, broker{name, now})
		}
	}
}

var loopbacks = []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()}

// resolveName is every address of a host:port, nil when there is no answer.
func (c *Cluster) resolveName(ctx context.Context, name string) (addrs []netip.AddrPort) {
	host, port, err := splitBroker(name)
	var ips []netip.Addr
	switch ip, perr := netip.ParseAddr(host); {
	case err != nil:
	case perr == nil:
		ips = []netip.Addr{ip}
	case host == "localhost": // RFC 6761: both, whatever /etc/hosts has
		ips = loopbacks
	default:
		ips, err = c.opts.lookup(ctx, host)
	}
	if err != nil {
		return nil
	}
	for _, ip := range ips {
		addrs = append(addrs, destination(netip.AddrPortFrom(ip, port)))
	}
	return addrs
}

// nat64 is the well-known prefix of RFC 6052: its last 32 bits are an IPv4 address.
var nat64 = netip.MustParsePrefix("64:ff9b::/96")

// destination is the one form of an address: IPv4 neither mapped into IPv6 nor behind NAT64, without a zone, and the
// unspecified address as loopback, where Linux connects it to.
func destination(a netip.AddrPort) netip.AddrPort {
	ip := a.Addr().Unmap().WithZone("")
	switch {
	case nat64.Contains(ip):
		wide := ip.As16()
		ip = netip.AddrFrom4([4]byte(wide[12:]))
	case ip == netip.IPv4Unspecified():
		ip = loopbacks[0]
	case ip == netip.IPv6Unspecified():
		ip = loopbacks[1]
	}
	return netip.AddrPortFrom(ip, a.Port())
}

// publish makes the brokers known, and new ports of theirs first: a client told of a broker must not get past us.
func (c *Cluster) publish(next brokers) {
	next.ports = slices.Clone(c.known.Load().ports)
	before := len(next.ports)
	for _, name := range next.names {
		if _, port, err := splitBroker(name); err == nil && !slices.Contains(next.ports, port) {
			next.ports = append(next.ports, port)
		}
	}
	fresh := slices.DeleteFunc(slices.Clone(next.ports[before:]), c.isShared)
	if len(fresh) > 0 && c.opts.OnPorts != nil {
		c.opts.OnPorts(fresh)
	}
	if networks := c.networks(&next); len(networks) > 0 && c.opts.OnNetworks != nil {
		c.opts.OnNetworks(networks)
	}
	c.known.Store(&next)
}

// isShared tells of a port that the whole world uses, like 443. Intercepted at any address it would stop what is no
// business of ours. One that is configured is meant as it is.
func (c *Cluster) isShared(port uint16) bool {
	return port < 1024 && !slices.Contains(c.opts.Ports, port)
}

// networks are where b's shared ports are brokers': at their addresses, and in the configured networks.
func (c *Cluster) networks(b *brokers) (networks []bpf.Network) {
	for _, port := range b.ports {
		if !c.isShared(port) {
			continue
		}
		for _, n := range c.config.CIDRs {
			networks = append(networks, bpf.Network{Prefix: n, Port: port})
		}
	}
	for addr := range b.addrs {
		if c.isShared(addr.Port()) {
			host := netip.PrefixFrom(addr.Addr(), addr.Addr().BitLen())
			networks = append(networks, bpf.Network{Prefix: host, Port: addr.Port()})
		}
	}
	slices.SortFunc(networks, func(a, b bpf.Network) int {
		return cmp.Or(a.Prefix.Addr().Compare(b.Prefix.Addr()), a.Prefix.Bits()-b.Prefix.Bits(), int(a.Port)-int(b.Port))
	})
	return networks
}

// Lookup tells whether an address is one of the cluster's brokers: a resolved bootstrap or advertised address, or an
// intercepted port in a configured network.
func (c *Cluster) Lookup(addr netip.AddrPort) (verified bool) {
	_, confirmed, inside := c.lookup(addr)
	return confirmed || inside
}

func (c *Cluster) lookup(addr netip.AddrPort) (name string, confirmed, inside bool) {
	addr = destination(addr)
	known := c.known.Load()
	if all := known.addrs[addr]; len(all) > 0 {
		name, confirmed = all[len(all)-1].name, true
	} else {
		name = addr.String()
	}
	inside = slices.Contains(known.ports, addr.Port()) &&
		slices.ContainsFunc(c.config.CIDRs, func(n netip.Prefix) bool { return n.Contains(addr.Addr()) })
	return name, confirmed, inside
}

// Destination is a broker of a configured cluster.
type Destination struct {
	*Cluster
	Broker  string // host:port as configured or advertised, for the audit; the address where only its network is known
	Address netip.AddrPort
	// Confirmed: the cluster itself, or its bootstrap, names this address. Where only its network is configured, who
	// listens there is not known well enough to believe its topic ids.
	Confirmed bool
}

// Names are those by which the cluster has the broker: all that resolve to its address. Where only its network is known
// it may be any of the cluster's.
func (d Destination) Names() hello.Names {
	known, names := d.known.Load(), hello.Names{Aside: d.config.Clients.Names, ByAddress: !d.Confirmed}
	all := known.names
	if d.Confirmed {
		all = nil
		for _, b := range known.addrs[d.Address] {
			all = append(all, b.name)
		}
	}
	for _, name := range all {
		host, _, err := splitBroker(name)
		host = strings.TrimSuffix(strings.ToLower(host), ".")
		if err == nil && !slices.Contains(names.Known, host) {
			names.Known = append(names.Known, host)
		}
	}
	return names
}

// Open makes a dialled connection one to this broker, on behalf of who; see upstream.Upstream.
func (d Destination) Open(ctx context.Context, conn net.Conn, who upstream.Identity) (*upstream.Broker, error) {
	return d.up.Open(ctx, conn, d.Broker, who)
}

// Learn is Cluster.Learn for confirmed brokers; others teach nothing.
func (d Destination) Learn(m *kmsg.MetadataResponse) {
	if d.Confirmed {
		d.Cluster.Learn(m)
	}
}

// Clusters are all configured clusters.
type Clusters []*Cluster

// Find tells which cluster a destination belongs to. One that belongs to none is looked for in the clusters' present
// metadata, for at most 3 s and as often as once a second, and is then ErrNoCluster.
func (cs Clusters) Find(ctx context.Context, addr netip.AddrPort) (Destination, error) {
	if d, ok := cs.find(addr); ok {
		return d, nil
	}
	ctx, cancel := context.WithTimeout(ctx, findTimeout)
	defer cancel()
	looks := make([]<-chan struct{}, len(cs))
	for i, c := range cs {
		looks[i] = c.refresh()
	}
	for _, look := range looks {
		select {
		case <-look:
		case <-ctx.Done():
		}
	}
	if d, ok := cs.find(addr); ok {
		return d, nil
	}
	return Destination{}, cs.noCluster(destination(addr))
}

// FindByNetwork is Find for a loopback address in another network namespace than the node's: what the clusters' names
// resolve to here says nothing about it, so only a network that is configured does.
func (cs Clusters) FindByNetwork(addr netip.AddrPort) (Destination, error) {
	for _, c := range cs {
		if name, _, inside := c.lookup(addr); inside {
			return Destination{Cluster: c, Broker: name, Address: destination(addr)}, nil
		}
	}
	return Destination{}, cs.noCluster(destination(addr))
}

// find prefers the cluster that names the address to one that has its network.
func (cs Clusters) find(addr netip.AddrPort) (d Destination, ok bool) {
	for _, c := range cs {
		switch name, confirmed, inside := c.lookup(addr); {
		case confirmed:
			return Destination{Cluster: c, Broker: name, Address: destination(addr), Confirmed: true}, true
		case inside && !ok:
			d, ok = Destination{Cluster: c, Broker: name, Address: destination(addr)}, true
		}
	}
	return d, ok
}

func (cs Clusters) noCluster(addr netip.AddrPort) error {
	var b strings.Builder
	for _, c := range cs {
		if s := c.State(); !s.Ready() {
			fmt.Fprintf(&b, "; cluster %s is not reached (%v)", s.Name, s.Err)
		}
	}
	return fmt.Errorf("%w: %s: if it is a broker of one, add its name to the cluster's bootstrap, "+
		"or its network to the cluster's cidrs in klamm.yaml%s", ErrNoCluster, addr, &b)
}

// ProbeCluster asks a cluster once with the node's own client, for as long as ctx lasts, and tells what it found.
func ProbeCluster(ctx context.Context, config ClusterConfig, log zerolog.Logger) (string, error) {
	c, err := OpenCluster(config, ClusterOptions{Dial: new(net.Dialer).DialContext, Log: log})
	if err != nil {
		return "", err
	}
	defer c.Close()
	for {
		select {
		case <-c.refresh():
		case <-ctx.Done():
		}
		switch s := c.State(); {
		case len(s.Unresolved) > 0:
			return "", fmt.Errorf("this host cannot resolve %s", strings.Join(s.Unresolved, ", "))
		case s.Ready():
			return fmt.Sprintf("%d brokers: %s", len(s.Brokers), strings.Join(s.Brokers, ", ")), nil
		case ctx.Err() != nil:
			return "", s.Err
		}
		select {
		case <-time.After(c.opts.pace.demand):
		case <-ctx.Done():
		}
	}
}
