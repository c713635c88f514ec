package node

import (
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
	"github.com/twmb/franz-go/pkg/sasl/oauth"
	"golang.org/x/sync/errgroup"

	"klamm/node/upstream"
	"klamm/spiffe"
)

// Finding is the result of one check.
type Finding struct {
	Check  string `json:"check"`
	OK     bool   `json:"ok"`
	Detail string `json:"detail"`           // what was found
	Remedy string `json:"remedy,omitempty"` // what to do when it is not ok, or could be better
}

const (
	// strangerTimeout bounds one attempt to get past the node.
	strangerTimeout = 5 * time.Second
	// checkPath is where the node that runs checks brokers: this host's other processes are redirected.
	checkPath = "/v1/check-brokers"
)

// BrokerCheck says what to check.
type BrokerCheck struct {
	Cluster string // its name; empty: all
	PID     int32  // of the workload whose SVID is looked at; 0: the node's own
}

// CheckBrokers tells whether a cluster's brokers refuse who comes without the node, how they know a workload, and
// whether the configured upstream works. The node that runs does it, else this process, which then must not be
// redirected.
func CheckBrokers(ctx context.Context, c Config, what BrokerCheck) ([]Finding, error) {
	named := func(c ClusterConfig) bool { return c.Name == what.Cluster }
	if what.Cluster != "" && !slices.ContainsFunc(c.Clusters, named) {
		return nil, fmt.Errorf("there is no cluster %q in the configuration", what.Cluster)
	}
	var findings []Finding
	err := ErrNobody
	if c.Node.Socket != "" {
		query := url.Values{"cluster": {what.Cluster}, "pid": {strconv.Itoa(int(what.PID))}}
		err = Ask(ctx, c.Node.Socket, checkPath+"?"+query.Encode(), &findings)
	}
	if !errors.Is(err, ErrNobody) {
		return findings, err
	}
	check := brokerCheck{BrokerCheck: what, ports: c.Intercept.Ports, dial: new(net.Dialer).DialContext}
	spire, end, err := c.openSPIRE()
	if err != nil {
		return nil, err
	}
	defer end()
	check.spire = spire
	return check.run(ctx, c.Clusters), nil
}

// serveCheck is CheckBrokers for who asks at the control socket.
func (n *Node) serveCheck(w http.ResponseWriter, r *http.Request) {
	pid, err := strconv.ParseInt(r.URL.Query().Get("pid"), 10, 32)
	if err != nil {
		http.Error(w, "pid: "+err.Error(), http.StatusBadRequest)
		return
	}
	check := brokerCheck{BrokerCheck: BrokerCheck{Cluster: r.URL.Query().Get("cluster"), PID: int32(pid)},
		ports: n.config.Intercept.Ports, dial: n.redirect.Dialer().DialContext, spire: n.spire}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(check.run(r.Context(), n.config.Clusters))
}

// brokerCheck is a check with what it takes.
type brokerCheck struct {
	BrokerCheck
	ports []uint16 // that are intercepted
	dial  DialFunc
	spire *spiffe.SPIRE // nil: there is none
}

func (b *brokerCheck) run(ctx context.Context, clusters []ClusterConfig) (findings []Finding) {
	for _, c := range clusters {
		if b.Cluster == "" || b.Cluster == c.Name {
			findings = append(findings, b.cluster(ctx, c)...)
		}
	}
	return findings
}

// who is on whose behalf brokers are tried.
func (b *brokerCheck) who(ctx context.Context) (upstream.Identity, error) {
	switch {
	case b.spire == nil && b.PID != 0:
		return nil, errors.New("there is no section spire by which the workload's SVID could be asked for")
	case b.spire == nil:
		return nil, nil
	case b.PID != 0:
		return b.spire.OfProcess(ctx, b.PID)
	}
	return b.spire.Agent(), nil
}

const (
	notReached = "see whether this host reaches the cluster, and tls and credentials of the node's own client"
	letsIn     = "have the listener ask for what only the node has (ssl.client.auth=required, or SASL), take " +
		"User:ANONYMOUS out of super.users and ACLs, or keep workloads from the port by the network"
	sameForAll = "one of: give the workloads' SPIRE entries DNS names (-dns), of which the first is the CN, and map it " +
		"with ssl.principal.mapping.rules; put a SPIFFE principal builder (principal.builder.class) on the brokers; or let " +
		"upstream.login use jwt-svid, whose principal is the SPIFFE ID"
	mapsWrong = "mend ssl.principal.mapping.rules of the brokers, such as RULE:^CN=([^,]+),O=SPIRE,C=US$/$1/"
)

func finding(check, remedy, detail string, err error) Finding {
	if err != nil {
		return Finding{Check: check, Detail: err.Error(), Remedy: remedy}
	}
	return Finding{Check: check, OK: true, Detail: detail}
}

// cluster checks one cluster.
func (b *brokerCheck) cluster(ctx context.Context, c ClusterConfig) (findings []Finding) {
	own, err := newClient(c, agentOf(b.spire), b.dial)
	if err != nil {
		return []Finding{finding("cluster "+c.Name, notReached, "", err)}
	}
	defer own.Close()
	if agent := agentOf(b.spire); agent != nil {
		agent.Asked(ctx) // else the first handshake would come too early
	}
	req := kmsg.NewPtrMetadataRequest()
	req.Topics = []kmsg.MetadataRequestTopic{}
	brokers, err := req.RequestWith(ctx, own)
	if err != nil {
		return []Finding{finding("cluster "+c.Name, notReached, "", err)}
	}
	told := describe(ctx, own, brokers.Brokers)
	if told == nil {
		findings = append(findings, Finding{Check: "listeners of " + c.Name, OK: true,
			Detail: "the node's own client may not read the brokers' configuration: what they advertise to it, and the " +
				"intercepted ports, are all that is tried",
			Remedy: "allow its principal to DescribeConfigs on the cluster"})
	}
	findings = append(findings, b.strangers(ctx, b.listeners(brokers.Brokers, told))...)
	who, err := b.who(ctx)
	if err != nil {
		return append(findings, finding(fmt.Sprint("SVID of ", b.PID), "see the workload's entry in SPIRE", "", err))
	}
	findings = append(findings, b.upstream(ctx, c, brokers.Brokers, who)...)
	u := c.Upstream
	if u != nil && u.TLS != nil && u.TLS.Certificate == upstream.Workload && u.Login == nil && who != nil {
		findings = append(findings, subject(c.Name, who, told))
	}
	if u != nil && u.Cleartext || u == nil && c.Credentials != nil && c.TLS == nil {
		findings = append(findings, Finding{Check: "login of " + c.Name, OK: true, Detail: "it goes in cleartext: who sees " +
			"the network can log in with what he sees", Remedy: "let the brokers speak TLS, and give tls"})
	}
	return findings
}

// settings are those of a broker's that are of interest.
var settings = []string{"advertised.listeners", "listeners", "ssl.principal.mapping.rules", "principal.builder.class"}

// describe reads settings of all brokers; nil where the client may not.
func describe(ctx context.Context, client *kgo.Client, brokers []kmsg.MetadataResponseBroker) map[string][]string {
	told := map[string][]string{}
	for _, b := range brokers {
		resource := kmsg.NewDescribeConfigsRequestResource()
		resource.ResourceType, resource.ResourceName = kmsg.ConfigResourceTypeBroker, strconv.Itoa(int(b.NodeID))
		resource.ConfigNames = settings
		req := kmsg.NewPtrDescribeConfigsRequest()
		req.Resources = append(req.Resources, resource)
		resp, err := client.Broker(int(b.NodeID)).Request(ctx, req)
		answer, is := resp.(*kmsg.DescribeConfigsResponse)
		if err != nil || !is || len(answer.Resources) != 1 || answer.Resources[0].ErrorCode != 0 {
			return nil
		}
		for _, s := range answer.Resources[0].Configs {
			if s.Value != nil {
				told[s.Name] = append(told[s.Name], *s.Value)
			}
		}
	}
	return told
}

// listeners are host:port of all that may be a way to the brokers, sorted.
func (b *brokerCheck) listeners(brokers []kmsg.MetadataResponseBroker, told map[string][]string) (all []string) {
	for _, broker := range brokers {
		all = append(all, brokerName(broker))
		for _, port := range b.ports {
			all = append(all, net.JoinHostPort(broker.Host, strconv.Itoa(int(port))))
		}
	}
	for _, list := range slices.Concat(told["advertised.listeners"], told["listeners"]) {
		for one := range strings.SplitSeq(list, ",") {
			_, address, _ := strings.Cut(one, "://")
			if _, _, err := splitBroker(address); err == nil {
				all = append(all, address)
			}
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// ways are those by which a stranger tries to use a listener. An unsigned token is taken by brokers on which
// OAUTHBEARER is as Kafka has it by default (KIP-255).
var ways = []struct {
	name     string
	tls      bool
	unsigned bool // token
}{
	{"plaintext", false, false},
	{"plaintext with an unsigned token", false, true},
	{"TLS without a certificate", true, false},
	{"TLS with an unsigned token", true, true},
}

// strangers tries all listeners, some at a time.
func (b *brokerCheck) strangers(ctx context.Context, addresses []string) []Finding {
	findings := make([]Finding, len(addresses))
	var all errgroup.Group
	all.SetLimit(16)
	for i, address := range addresses {
		all.Go(func() error {
			detail, err := b.stranger(ctx, address)
			findings[i] = finding("direct "+address, letsIn, detail, err)
			return nil
		})
	}
	_ = all.Wait()
	return findings
}

// stranger tries to use a listener without any credentials. The error says what it gave.
func (b *brokerCheck) stranger(ctx context.Context, address string) (string, error) {
	var said []string
	for _, way := range ways {
		harmless, err := b.try(ctx, address, way.tls, way.unsigned)
		switch {
		case errors.Is(err, syscall.ECONNREFUSED):
			return "nobody listens", nil
		case errors.Is(err, errNotKnown):
			return "", fmt.Errorf("%s: %w", way.name, err)
		case err == nil && !harmless:
			return "", fmt.Errorf("%s: a client without any credentials is served", way.name)
		case err == nil:
			said = append(said, way.name+": a client without credentials is let in, and its principal has no right")
		default:
			said = append(said, way.name+": "+brief(err))
		}
	}
	return strings.Join(said, "; "), nil
}

// errNotKnown says that a listener neither served nor refused.
var errNotKnown = fmt.Errorf("no answer within %v, so whether it refuses is not known", strangerTimeout)

// brief is the first line of an error.
func brief(err error) string {
	text, _, _ := strings.Cut(err.Error(), "\n")
	return text
}

// unsigned is an unsecured JWS (RFC 7515, appendix A.5) of anybody's.
func unsigned() string {
	now := time.Now().Unix()
	encode := base64.RawURLEncoding.EncodeToString
	return encode([]byte(`{"alg":"none"}`)) + "." +
		encode(fmt.Appendf(nil, `{"sub":"klamm-doctor","iat":%d,"exp":%d}`, now, now+60)) + "."
}

// try asks a listener for metadata. Harmless tells that a stranger who is served sees no topic, and may not even be
// told that there is none of some name: he has no right on any. He does not verify whom he talks to, and tells nothing.
func (b *brokerCheck) try(ctx context.Context, address string, secure, token bool) (harmless bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, strangerTimeout)
	defer cancel()
	var failed atomic.Pointer[error] // of the last dial, of which kgo keeps the text alone
	dial := func(ctx context.Context, network, to string) (net.Conn, error) {
		conn, err := b.dial(ctx, network, to)
		if err != nil {
			failed.Store(&err)
		}
		if err != nil || !secure {
			return conn, err
		}
		return tls.Client(conn, &tls.Config{MinVersion: tls.VersionTLS12,
			InsecureSkipVerify: true}), nil //nolint:gosec // a stranger's look at what anybody gets
	}
	opts := []kgo.Opt{kgo.ClientID("klamm-doctor"), kgo.SeedBrokers(address), kgo.Dialer(dial), kgo.RequestRetries(0),
		kgo.DisableClientMetrics(), kgo.RequestTimeoutOverhead(strangerTimeout)}
	if token {
		opts = append(opts, kgo.SASL(oauth.Auth{Token: unsigned()}.AsMechanism()))
	}
	client, err := kgo.NewClient(opts...)
	if err != nil {
		return false, err
	}
	defer client.Close()
	all, named := kmsg.NewPtrMetadataRequest(), kmsg.NewPtrMetadataRequest()
	none := "klamm-doctor-asks-whether-it-may-see-this"
	named.Topics, named.AllowAutoTopicCreation = []kmsg.MetadataRequestTopic{{Topic: &none}}, false
	var topics [2][]kmsg.MetadataResponseTopic
	for i, req := range []*kmsg.MetadataRequest{all, named} {
		resp, err := client.SeedBrokers()[0].Request(ctx, req)
		answer, is := resp.(*kmsg.MetadataResponse)
		switch {
		case failed.Load() != nil:
			return false, *failed.Load()
		case ctx.Err() != nil:
			return false, errNotKnown
		case err != nil:
			return false, err
		case is:
			topics[i] = answer.Topics
		}
	}
	return len(topics[0]) == 0 && len(topics[1]) == 1 &&
		topics[1][0].ErrorCode == kerr.TopicAuthorizationFailed.Code, nil
}

// upstream opens the configured way to every broker, on behalf of who.
func (b *brokerCheck) upstream(ctx context.Context, c ClusterConfig, brokers []kmsg.MetadataResponseBroker,
	who upstream.Identity) (findings []Finding) {
	way, err := c.Upstream.open(agentOf(b.spire), b.dial)
	if err != nil {
		return []Finding{finding("upstream of "+c.Name, "mend upstream in klamm.yaml", "", err)}
	}
	for _, broker := range brokers {
		name := brokerName(broker)
		detail, err := b.open(ctx, way, name, who)
		findings = append(findings, finding("upstream "+name, "the message says what is wrong: see upstream in klamm.yaml, "+
			"the broker's listener, and its log", detail, err))
	}
	return findings
}

func (b *brokerCheck) open(ctx context.Context, way *upstream.Upstream, name string, who upstream.Identity) (
	string, error) {
	ctx, cancel := context.WithTimeout(ctx, strangerTimeout)
	defer cancel()
	conn, err := b.dial(ctx, "tcp", name)
	if err != nil {
		return "", err
	}
	broker, err := way.Open(ctx, conn, name, who)
	if err != nil {
		return "", err
	}
	if err := broker.Probe(ctx); err != nil {
		return "", errors.Join(fmt.Errorf("the broker ends it after the handshake: %w", err), broker.Close())
	}
	return "the configured way works: " + broker.String(), broker.Close()
}

// subject judges by what brokers will know a workload that shows its SVID.
func subject(cluster string, who upstream.Identity, told map[string][]string) Finding {
	check := "principal at " + cluster
	svid, err := who.X509SVID()
	if err != nil {
		return finding(check, "see the workload's entry in SPIRE", "", err)
	}
	name := svid.Certificates[0].Subject.String()
	for _, class := range told["principal.builder.class"] {
		if !strings.HasSuffix(class, ".DefaultKafkaPrincipalBuilder") {
			return finding(check, "", fmt.Sprintf("the brokers' %s makes it of the certificate of %s", class, svid.ID), nil)
		}
	}
	rules := slices.Compact(slices.Sorted(slices.Values(told["ssl.principal.mapping.rules"])))
	if len(rules) > 1 {
		return finding(check, mapsWrong, "", fmt.Errorf("the brokers have different ssl.principal.mapping.rules: %q", rules))
	}
	var m mapping
	if len(rules) == 1 {
		if m, err = parseMapping(rules[0]); err != nil {
			return finding(check, "see by the authorizer's log as whom the broker knows "+name, "",
				fmt.Errorf("ssl.principal.mapping.rules cannot be judged: %w", err))
		}
	}
	principal, err := m.principal(name)
	switch other, oerr := m.principal(unnamed); {
	case name == unnamed:
		return finding(check, sameForAll, "", fmt.Errorf("the subject of %s is %s, that of every SVID without a DNS name: "+
			"stock Kafka knows all these workloads as one", svid.ID, name))
	case err != nil:
		return finding(check, mapsWrong, "", fmt.Errorf("brokers refuse %s: %w", svid.ID, err))
	case oerr == nil && other == principal:
		return finding(check, mapsWrong, "",
			fmt.Errorf("the rules make User:%s of %s, and of every other workload", principal, svid.ID))
	}
	return finding(check, "", fmt.Sprintf("%s is User:%s", svid.ID, principal), nil)
}
