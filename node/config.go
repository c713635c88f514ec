package node

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"klamm/enforcer"
	"klamm/enforcer/policy/strict"
	"klamm/node/upstream"
	"klamm/spiffe"
)

// Config is klamm.yaml. Every key but clusters may be left out. Paths in it are relative to the file's directory.
type Config struct {
	Node      HostConfig      `yaml:"node"`
	Intercept InterceptConfig `yaml:"intercept"`
	// At least one. What belongs to none of them is refused.
	Clusters []ClusterConfig `yaml:"clusters" strict:"required"`
	// The first rule that matches wins. Default: none, every workload is unidentified.
	Identities Identities `yaml:"identities"`
	// The SPIRE agent of this host. Default: none is asked.
	SPIRE *SPIREConfig `yaml:"spire"`
	// Issuers whose tokens count. Default: none.
	OIDC []IssuerConfig `yaml:"oidc"`
	// Service account tokens of pods. Default: none counts.
	Kubernetes *KubernetesConfig `yaml:"kubernetes"`
	// Files of workloads with tokens; the first that a workload has counts. Default: none.
	TokenFiles []TokenFileConfig `yaml:"token-file"`
	// Which sources are asked who a workload is.
	Attestation AttestationConfig `yaml:"attestation"`
	// Policy files. Default: none, all is denied.
	Policies []string      `yaml:"policies"`
	Audit    AuditConfig   `yaml:"audit"`
	Limits   LimitsConfig  `yaml:"limits"`
	Metrics  MetricsConfig `yaml:"metrics"`
}

// HostConfig is the node itself.
type HostConfig struct {
	// In audit lines. Default: the host's name.
	Name string `yaml:"name"`
	// The cgroup2 directory whose processes are intercepted. Default: the root, that is all of the host.
	Cgroup string `yaml:"cgroup"`
	// A directory on a BPF file system, in which interception outlives the node: while it restarts, crashed or is
	// upgraded, brokers are refused or not as on-enforcer-down says. "" ends interception with the node. Default:
	// /sys/fs/bpf/klamm.
	Pins string `yaml:"pins"`
	// The unix socket at which the node answers klamm status and klamm hook, and hands over to the next; "" for none.
	// Default: /run/klamm/klamm.sock.
	Socket string `yaml:"socket"`
}

// InterceptConfig is which connections are taken.
type InterceptConfig struct {
	// TCP destination ports, at any address, 1 to 65535. Default: 9092. Ports that brokers advertise are added.
	Ports []uint16 `yaml:"ports"`
	// Processes left alone: a broker on this host, its own tools.
	Exempt []Exemption `yaml:"exempt"`
	// What becomes of broker-bound connects while the node does not run or hangs: refuse or pass. Default: refuse.
	OnEnforcerDown FailMode `yaml:"on-enforcer-down"`
	// And of those in a network namespace in which the node does not listen yet. Default: refuse.
	OnUnenrolled FailMode `yaml:"on-unenrolled"`
	// Connections to brokers that are older than the node.
	Established EstablishedConfig `yaml:"established"`
	// The NRI socket of the container runtime, which then tells of each pod before it starts: in containerd and CRI-O
	// /var/run/nri/nri.sock. Default: none, pods are enrolled when they first connect.
	NRI string `yaml:"nri"`
	// Drop what containers send to brokers past the hooks of sockets. Default: true.
	Firewall bool `yaml:"firewall"`
}

// FailMode is what becomes of a broker-bound connect that cannot be enforced.
type FailMode string

// The fail modes.
const (
	Refuse FailMode = "refuse" // with ECONNREFUSED, which Kafka clients retry
	Pass   FailMode = "pass"   // unseen; it is counted, and on record
)

var failModes = []string{string(Refuse), string(Pass)}

// EstablishedConfig is what becomes of connections to brokers that are older than the node.
type EstablishedConfig struct {
	// Default: take-over.
	Mode EstablishedMode `yaml:"mode"`
	// Connections ended per second, with jitter, on all of the host: 1 to 10000. Default: 50.
	Rate int `yaml:"rate"`
}

// EstablishedMode is one of the constants.
type EstablishedMode string

const (
	// TakeOver ends the connections: their clients connect again, through the node.
	TakeOver EstablishedMode = "take-over"
	// Observe reports the connections and leaves them.
	Observe EstablishedMode = "observe"
	// RefuseNewOnly does not look for them.
	RefuseNewOnly EstablishedMode = "refuse-new-only"
)

var establishedModes = []string{string(TakeOver), string(Observe), string(RefuseNewOnly)}

// Exemption is a cgroup or systemd unit whose processes are never intercepted. Exactly one of the fields is given.
type Exemption struct {
	// Path in cgroup2, as in /proc/PID/cgroup: it and all below.
	Cgroup string `yaml:"cgroup"`
	// Full name, like kafka.service.
	Unit string `yaml:"unit"`
}

// ClusterConfig is one Kafka cluster.
type ClusterConfig struct {
	// As policies and the audit name it: letters, digits, dots, dashes, underscores.
	Name string `yaml:"name" strict:"required"`
	// host:port of one or more brokers.
	Bootstrap []string `yaml:"bootstrap" strict:"required"`
	// Networks in which every intercepted port is a broker's of this cluster, beside the addresses it advertises.
	CIDRs []netip.Prefix `yaml:"cidrs"`
	// How the node reaches the brokers on behalf of workloads. Default: in plaintext, without a login of its own.
	Upstream *UpstreamConfig `yaml:"upstream"`
	// How clients are met that speak TLS.
	Clients ClientsConfig `yaml:"clients"`
	// Of the node's own client. Default: as upstream.
	TLS *TLSConfig `yaml:"tls"`
	// Of the node's own client. Default: as upstream.
	Credentials *LoginConfig `yaml:"credentials"`
}

// AuditConfig is where audit lines go.
type AuditConfig struct {
	// The file they are appended to. "-", the default, is standard output.
	File string `yaml:"file"`
}

// LimitsConfig bounds what clients can make the node use.
type LimitsConfig struct {
	// The largest request, 1KiB to below 2GiB. Default: 100MiB, as Kafka's socket.request.max.bytes.
	MaxFrame strict.Size `yaml:"max-frame"`
	// For the frames of all connections that are held whole: 5/16 each for requests and answers, 4/16 for what is decoded
	// of them, 2/16 for what is kept of requests until they are answered. Default: 512MiB.
	Memory strict.Size `yaml:"memory"`
	// Open at a time, at least 1. Default: 10000.
	Connections int `yaml:"connections"`
	// For reaching a broker, over 0. Default: 5s.
	DialTimeout time.Duration `yaml:"dial-timeout"`
	// For open connections to get the answers they are owed when the node stops; what is left is cut. 0 cuts all at
	// once. Default: 30s.
	Drain time.Duration `yaml:"drain"`
}

// MetricsConfig is the HTTP endpoint: /metrics, /healthz and /readyz.
type MetricsConfig struct {
	// host:port; "" is off. Default: 127.0.0.1:9464.
	Listen string `yaml:"listen"`
}

// Identities are the rules of static attestation.
type Identities []spiffe.Rule

// Load reads and checks a klamm.yaml. What is wrong in it is a strict.Errors: all of it, by line and column.
func Load(file string) (Config, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return Config{}, fmt.Errorf("read the configuration: %w", err)
	}
	c := Config{
		Node: HostConfig{Pins: filepath.Join(BPFFS, "klamm"), Socket: "/run/klamm/klamm.sock"},
		Intercept: InterceptConfig{Ports: []uint16{9092}, OnEnforcerDown: Refuse, OnUnenrolled: Refuse,
			Established: EstablishedConfig{Mode: TakeOver, Rate: 50}, Firewall: true},
		Attestation: AttestationConfig{OnLoss: LossClose, Timeout: 5 * time.Second},
		Audit:       AuditConfig{File: "-"},
		Limits: LimitsConfig{MaxFrame: 100 << 20, Memory: 512 << 20, Connections: 10_000,
			DialTimeout: 5 * time.Second, Drain: 30 * time.Second},
		Metrics: MetricsConfig{Listen: "127.0.0.1:9464"},
	}
	if err = strict.Decode(file, data, &c); err != nil {
		return Config{}, err
	}
	if c.Node.Name == "" {
		if c.Node.Name, err = os.Hostname(); err != nil {
			return Config{}, fmt.Errorf("find the host's name: %w: give node.name in %s", err, file)
		}
	}
	c.Audit.File = cmp.Or(c.Audit.File, "-")
	for _, p := range c.paths() {
		if *p != "" && *p != "-" && !filepath.IsAbs(*p) {
			*p = filepath.Join(filepath.Dir(file), *p)
		}
	}
	return c, nil
}

func (c *Config) paths() []*string {
	paths := []*string{&c.Node.Cgroup, &c.Node.Pins, &c.Node.Socket, &c.Intercept.NRI, &c.Audit.File}
	if c.SPIRE != nil {
		paths = append(paths, &c.SPIRE.Socket, &c.SPIRE.WorkloadAPI)
	}
	paths = append(paths, c.tokenPaths()...)
	for i := range c.Policies {
		paths = append(paths, &c.Policies[i])
	}
	for _, cluster := range c.Clusters {
		paths = append(paths, cluster.Clients.paths()...)
		tls, logins := []*TLSConfig{cluster.TLS}, []*LoginConfig{cluster.Credentials}
		if u := cluster.Upstream; u != nil {
			tls, logins = append(tls, u.TLS), append(logins, u.Login)
		}
		for _, t := range tls {
			if t != nil {
				paths = append(paths, t.paths()...)
			}
		}
		for _, l := range logins {
			if l != nil {
				paths = append(paths, l.paths()...)
			}
		}
	}
	return paths
}

// check is one rule for what a section holds.
type check struct {
	ok      bool
	at      *yaml.Node
	message string
}

// section decodes a section into out, a pointer to a type without methods, and then checks it.
func section(node *yaml.Node, out any, checks func() []check) error {
	if err := strict.Node(node, out); err != nil {
		return err
	}
	var errs []error
	for _, c := range checks() {
		if !c.ok {
			errs = append(errs, strict.Errorf(c.at, "%s", c.message))
		}
	}
	return strict.Join(node, errs...)
}

// key is the node of a key's value, the section itself when the key is absent.
func key(section *yaml.Node, name string) *yaml.Node {
	for i := 0; i+1 < len(section.Content); i += 2 {
		if section.Content[i].Value == name {
			return section.Content[i+1]
		}
	}
	return section
}

// UnmarshalYAML checks what concerns more than one section.
func (c *Config) UnmarshalYAML(node *yaml.Node) error {
	type plain Config
	return section(node, (*plain)(c), func() []check {
		clusters := key(node, "clusters")
		checks := append(slices.Concat(c.sources(node), c.issuers(node)), check{len(c.Clusters) > 0, clusters,
			"no cluster: give name and bootstrap of at least one"})
		checks = append(checks, slices.Concat(c.upstreams(clusters), c.clients(clusters))...)
		for i, b := range c.Clusters {
			for _, a := range c.Clusters[:i] {
				at := clusters.Content[i]
				checks = append(checks,
					check{a.Name != b.Name, key(at, "name"), fmt.Sprintf("a second cluster %q", b.Name)})
				checks = append(checks, disjoint(at, a, b)...)
			}
		}
		return checks
	})
}

// disjoint: a destination belongs to one cluster, or its audit and its policy would be those of whichever came first.
func disjoint(at *yaml.Node, a, b ClusterConfig) (checks []check) {
	for i, broker := range b.Bootstrap {
		checks = append(checks, check{!slices.Contains(a.Bootstrap, broker), key(at, "bootstrap").Content[i],
			fmt.Sprintf("%s is already of cluster %q", broker, a.Name)})
	}
	for i, network := range b.CIDRs {
		checks = append(checks, check{!slices.ContainsFunc(a.CIDRs, network.Overlaps), key(at, "cidrs").Content[i],
			fmt.Sprintf("%s overlaps with a network of cluster %q", network, a.Name)})
	}
	return checks
}

// UnmarshalYAML checks the ports.
func (c *InterceptConfig) UnmarshalYAML(node *yaml.Node) error {
	type plain InterceptConfig
	return section(node, (*plain)(c), func() []check {
		ports := key(node, "ports")
		checks := []check{{len(c.Ports) > 0, ports, "no port: leave the key out for 9092"}}
		for name, mode := range map[string]FailMode{"on-enforcer-down": c.OnEnforcerDown, "on-unenrolled": c.OnUnenrolled} {
			checks = append(checks, check{slices.Contains(failModes, string(mode)), key(node, name),
				strict.Unknown("mode", string(mode), failModes)},
				check{mode != Pass || !c.Firewall, key(node, name),
					"what passes the connect of a container the firewall drops: give firewall: false too"})
		}
		for i, p := range c.Ports {
			checks = append(checks,
				check{p != 0, at(ports, i), "0 is not a port: want 1 to 65535"},
				check{!slices.Contains(c.Ports[:i], p), at(ports, i), fmt.Sprintf("port %d is given twice", p)})
		}
		return checks
	})
}

// UnmarshalYAML checks mode and rate.
func (c *EstablishedConfig) UnmarshalYAML(node *yaml.Node) error {
	type plain EstablishedConfig
	return section(node, (*plain)(c), func() []check {
		return []check{
			{slices.Contains(establishedModes, string(c.Mode)), key(node, "mode"),
				strict.Unknown("mode", string(c.Mode), establishedModes)},
			{c.Rate >= 1 && c.Rate <= 10_000, key(node, "rate"), "want 1 to 10000 connections per second"},
		}
	})
}

// at is an item of a list, the list itself when it is not written out (a default).
func at(list *yaml.Node, i int) *yaml.Node {
	if list.Kind == yaml.SequenceNode {
		return list.Content[i]
	}
	return list
}

// UnmarshalYAML checks that one thing is named.
func (e *Exemption) UnmarshalYAML(node *yaml.Node) error {
	type plain Exemption
	return section(node, (*plain)(e), func() []check {
		return []check{
			{(e.Cgroup == "") != (e.Unit == ""), node, "give either cgroup or unit"},
			{e.Cgroup != "/", key(node, "cgroup"), "the root cgroup would exempt every process"},
			{e.Cgroup == "" || filepath.IsAbs(e.Cgroup) && filepath.Clean(e.Cgroup) == e.Cgroup, key(node, "cgroup"),
				"want a path in cgroup2 like /system.slice/kafka.service"},
			{e.Unit == "" || strings.Contains(e.Unit, ".") && !strings.Contains(e.Unit, "/"), key(node, "unit"),
				"want a unit's full name like kafka.service"},
		}
	})
}

var clusterName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]*$`)

// UnmarshalYAML checks name and addresses.
func (c *ClusterConfig) UnmarshalYAML(node *yaml.Node) error {
	type plain ClusterConfig
	return section(node, (*plain)(c), func() []check {
		bootstrap, cidrs := key(node, "bootstrap"), key(node, "cidrs")
		checks := []check{
			{clusterName.MatchString(c.Name), key(node, "name"), "want letters, digits, dots, dashes and underscores"},
			{len(c.Bootstrap) > 0, bootstrap, "no broker: give host:port of at least one"},
			{c.TLS == nil || c.TLS.Certificate != upstream.Workload, key(key(node, "tls"), "certificate"),
				"the node's own client has no workload: want node"},
		}
		for i, b := range c.Bootstrap {
			_, _, err := splitBroker(b)
			checks = append(checks, check{err == nil, at(bootstrap, i), fmt.Sprint(err)})
		}
		for i, n := range c.CIDRs {
			checks = append(checks,
				check{n == n.Masked(), at(cidrs, i),
					fmt.Sprintf("%s has bits set behind its mask: write %s", n, n.Masked())},
				check{n.Bits() > 0, at(cidrs, i), "it covers every address: name the brokers' networks"},
				check{!n.Addr().Is4In6(), at(cidrs, i), "write it as an IPv4 network"})
		}
		return checks
	})
}

// splitBroker parses host:port. IPv6 addresses stand in brackets.
func splitBroker(s string) (host string, port uint16, err error) {
	host, digits, err := net.SplitHostPort(s)
	n, nerr := strconv.ParseUint(digits, 10, 16)
	if err != nil || nerr != nil || host == "" || n == 0 {
		return "", 0, fmt.Errorf("%q is not host:port, like broker-1.example:9092 or [2001:db8::1]:9092", s)
	}
	return host, uint16(n), nil
}

// UnmarshalYAML checks ranges.
func (c *LimitsConfig) UnmarshalYAML(node *yaml.Node) error {
	type plain LimitsConfig
	return section(node, (*plain)(c), func() []check {
		return []check{
			{c.MaxFrame >= 1<<10 && c.MaxFrame <= math.MaxInt32, key(node, "max-frame"), "want 1KiB to below 2GiB"},
			{int64(c.Memory) >= enforcer.MinMemory(int64(c.MaxFrame)), key(node, "memory"), fmt.Sprintf(
				"want at least %dMiB, or a request of max-frame never fits", (enforcer.MinMemory(int64(c.MaxFrame))+1<<20-1)>>20)},
			{c.Connections > 0, key(node, "connections"), "want at least 1"},
			{c.DialTimeout > 0, key(node, "dial-timeout"), "want a duration over 0, like 5s"},
			{c.Drain >= 0, key(node, "drain"), "want a duration like 30s, or 0s to cut all at once"},
		}
	})
}

// UnmarshalYAML checks the address.
func (c *MetricsConfig) UnmarshalYAML(node *yaml.Node) error {
	type plain MetricsConfig
	return section(node, (*plain)(c), func() []check {
		_, _, err := splitBroker(c.Listen)
		return []check{{c.Listen == "" || err == nil, key(node, "listen"),
			`want host:port like 127.0.0.1:9464, or "" for none`}}
	})
}

// UnmarshalYAML checks each rule.
func (ids *Identities) UnmarshalYAML(node *yaml.Node) error {
	type plain Identities
	return section(node, (*plain)(ids), func() (checks []check) {
		for i, rule := range *ids {
			var wrong *spiffe.FieldError
			if errors.As(rule.Validate(), &wrong) {
				checks = append(checks, check{at: key(node.Content[i], wrong.Field), message: wrong.Error()})
			}
		}
		return checks
	})
}
