package node

import (
	"cmp"
	"maps"
	"slices"
	"time"

	"klamm/bpf"
	"klamm/spiffe"
)

// Status is what klamm status shows.
type Status struct {
	Node        string            `json:"node"`
	Running     bool              `json:"running"` // a node answers; else all is read from the pins
	Since       time.Time         `json:"since,omitzero"`
	Kernel      bpf.Inspection    `json:"kernel"`     // what is in force in the kernel
	Namespaces  []NamespaceStatus `json:"namespaces"` // in which the node listens
	Exempt      []ExemptStatus    `json:"exempt"`
	Clusters    []ClusterStatus   `json:"clusters"`
	NRI         *NRIStatus        `json:"nri,omitempty"`   // where intercept.nri is given
	SPIRE       *SPIREStatus      `json:"spire,omitempty"` // where spire is given
	Issuers     []IssuerStatus    `json:"issuers"`
	Attestation *spiffe.State     `json:"attestation,omitempty"` // of a node that runs
	Connections int               `json:"connections"`           // open now
	Counters    map[string]uint64 `json:"counters"`              // see bpf.Programs.Counters
}

// NamespaceStatus is a network namespace in which the node listens.
type NamespaceStatus struct {
	Inode  uint64 `json:"inode"` // as in /proc/PID/ns/net
	Cookie uint64 `json:"cookie"`
	Port   uint16 `json:"port"` // at 127.0.0.1 and ::1
	Host   bool   `json:"host"` // the node's own
}

// ExemptStatus is an exemption of the configuration.
type ExemptStatus struct {
	Cgroup   string `json:"cgroup,omitempty"` // in cgroup2
	Unit     string `json:"unit,omitempty"`
	ID       uint64 `json:"id"`       // 0 while there is no such cgroup
	Connects uint64 `json:"connects"` // to brokers, since the cgroup is there
}

// ClusterStatus is a configured cluster.
type ClusterStatus struct {
	Name    string   `json:"name"`
	Ready   bool     `json:"ready"` // its brokers answered the last time
	Error   string   `json:"error,omitempty"`
	Brokers []string `json:"brokers"`
}

// Status is the node's state now.
func (n *Node) Status() (Status, error) {
	s := Status{Node: n.config.Node.Name, Running: true, Since: n.started, Connections: len(n.slots),
		Namespaces: n.redirect.enrolled.status()}
	attestation := n.attest.State()
	s.Attestation = &attestation
	var err error
	if s.Kernel, err = n.redirect.programs.Inspect(); err != nil {
		return s, err
	}
	if s.Counters, err = n.redirect.Counters(); err != nil {
		return s, err
	}
	if n.nri != nil {
		nri := n.nri.status()
		s.NRI = &nri
	}
	if n.spire != nil {
		spire := spireStatus(n.spire.State())
		s.SPIRE = &spire
	}
	s.Issuers = n.issuers.status()
	n.mu.Lock()
	defer n.mu.Unlock()
	s.Exempt = n.exempted.status(s.Kernel.Exempt)
	for _, c := range n.clusters {
		state := c.State()
		status := ClusterStatus{Name: state.Name, Ready: state.Ready(), Brokers: state.Brokers}
		if state.Err != nil {
			status.Error = state.Err.Error()
		}
		s.Clusters = append(s.Clusters, status)
	}
	return s, nil
}

// PinnedStatus is what is in force though no node runs; fs.ErrNotExist where nothing is.
func PinnedStatus(pins string) (Status, error) {
	kernel, err := bpf.Inspect(pins)
	if err != nil {
		return Status{}, err
	}
	s := Status{Kernel: kernel, Counters: kernel.Counters}
	for _, id := range slices.Sorted(maps.Keys(kernel.Exempt)) {
		s.Exempt = append(s.Exempt, ExemptStatus{ID: id, Connects: kernel.Exempt[id]})
	}
	return s, nil
}

func (e *enrolments) status() (all []NamespaceStatus) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, n := range e.known {
		all = append(all, NamespaceStatus{n.inode, n.cookie, n.port, n.cookie == e.host})
	}
	slices.SortFunc(all, func(a, b NamespaceStatus) int { return cmp.Compare(a.Cookie, b.Cookie) })
	return all
}

func (e *exemptions) status(connects map[uint64]uint64) (all []ExemptStatus) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for i, w := range e.wanted {
		all = append(all, ExemptStatus{Cgroup: w.Cgroup, Unit: w.Unit, ID: e.ids[i],
			Connects: connects[e.ids[i]]})
	}
	return all
}
