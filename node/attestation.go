package node

import (
	"fmt"

	"github.com/prometheus/client_golang/prometheus"

	"klamm/bpf"
	"klamm/spiffe"
)

// source is where evidence of processes comes from.
type source struct {
	name       string // one of spiffe's
	section    string // of klamm.yaml
	configured func(*Config) bool
	// open gets it ready; what is to be closed with the node it adds to closers.
	open func(*Node, *spiffe.Processes) (spiffe.Source, error)
}

// sources are in the order in which their evidence counts by default.
func sources() []source {
	return []source{
		{spiffe.SourceSPIRE, "spire", func(c *Config) bool { return c.SPIRE != nil },
			func(n *Node, _ *spiffe.Processes) (spiffe.Source, error) { return n.spire, nil }},
		{spiffe.SourceKubernetes, "kubernetes", func(c *Config) bool { return c.Kubernetes != nil },
			(*Node).openKubernetes},
		{spiffe.SourceTokenFile, "token-file", func(c *Config) bool { return len(c.TokenFiles) > 0 },
			(*Node).openTokenFiles},
		{spiffe.SourceStatic, "identities", func(c *Config) bool { return len(c.Identities) > 0 },
			func(n *Node, p *spiffe.Processes) (spiffe.Source, error) {
				return spiffe.NewStatic(n.config.Identities, p)
			}},
	}
}

func sourceNames() (names []string) {
	for _, s := range sources() {
		names = append(names, s.name)
	}
	return names
}

func sourceNamed(name string) (source, bool) {
	for _, s := range sources() {
		if s.name == name {
			return s, true
		}
	}
	return source{}, false
}

// asked are the sources that the configuration names, or all it has a section for.
func (c *Config) asked() (asked []source) {
	if c.Attestation.Sources == nil {
		for _, s := range sources() {
			if s.configured(c) {
				asked = append(asked, s)
			}
		}
		return asked
	}
	for _, name := range c.Attestation.Sources {
		if s, ok := sourceNamed(name); ok {
			asked = append(asked, s)
		}
	}
	return asked
}

// openAttestor opens the sources, and follows the processes they tell of in the kernel.
func (n *Node) openAttestor(p *spiffe.Processes) error {
	var opened []spiffe.Source
	for _, s := range n.config.asked() {
		source, err := s.open(n, p)
		if err != nil {
			return fmt.Errorf("open the identity source %s: %w", s.name, err)
		}
		opened = append(opened, source)
	}
	n.attest = spiffe.NewAttestor(p, opened...)
	n.closers = append(n.closers, n.attest)
	n.attest.Follow(kernel{n.redirect.programs})
	n.redirect.followExecve(n.attest.Executed)
	if err := n.redirect.programs.Unnoticed(); err != nil {
		n.log.Warn().Err(err).Msg("a process that executes another program is noticed up to a second late")
	}
	n.attesting = prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "klamm_attestation_seconds",
		Help:    "Time to tell who connected, by whether its process was known.",
		Buckets: prometheus.ExponentialBuckets(16e-6, 4, 10),
	}, []string{"cached"})
	n.registry.MustRegister(identities{n.attest}, n.attesting)
	return nil
}

// kernel lets package spiffe follow processes.
type kernel struct{ *bpf.Programs }

func (k kernel) Watched() (map[uint32]spiffe.TaskFacts, error) {
	all, err := k.Programs.Watched()
	now := make(map[uint32]spiffe.TaskFacts, len(all))
	for _, f := range all {
		now[f.TGID] = facts(f)
	}
	return now, err
}

func (k kernel) Holders(sockets []uint64) ([]spiffe.Holder, error) {
	all, err := k.Programs.Holders(sockets)
	var holders []spiffe.Holder
	for _, h := range all {
		holders = append(holders, spiffe.Holder{Socket: h.Socket, PID: h.TGID, TaskFacts: facts(h.TaskFacts)})
	}
	return holders, err
}

func facts(f bpf.TaskFacts) spiffe.TaskFacts {
	return spiffe.TaskFacts{StartBoottime: f.StartBoottime, ExecID: f.ExecID, PidInode: f.PidInode, ExeInode: f.ExeInode,
		ExeDev: f.ExeDev, UID: f.UID, GID: f.GID, CgroupID: f.CgroupID}
}

// identities exports what an attestor knows.
type identities struct{ *spiffe.Attestor }

var (
	processesDesc = prometheus.NewDesc("klamm_processes",
		"Processes whose identity is known, by whether they have a connection: open or lingering.", []string{"state"}, nil)
	identitiesDesc = prometheus.NewDesc("klamm_identities", "Processes by source that has evidence of them.",
		[]string{"source"}, nil)
	unidentifiedDesc = prometheus.NewDesc("klamm_unidentified_processes", "Processes without a SPIFFE ID.", nil, nil)
	identityDesc     = prometheus.NewDesc("klamm_identity_events_total", "What became of identities: evidence_changed; "+
		"process_changed (exec, ids, cgroup); connection_lost (its process exited); connection_inherited (by a process "+
		"that has its socket); unseen (it could not be told what became of processes).", []string{"event"}, nil)
	failuresDesc = prometheus.NewDesc("klamm_identity_failures_total",
		"Processes refused because a source could not say who they are.", []string{"source"}, nil)
)

// Describe names the metrics.
func (i identities) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{processesDesc, identitiesDesc, unidentifiedDesc, identityDesc, failuresDesc} {
		ch <- d
	}
}

// Collect reads the attestor's state.
func (i identities) Collect(ch chan<- prometheus.Metric) {
	s := i.State()
	gauge := func(d *prometheus.Desc, v int, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, float64(v), labels...)
	}
	counter := func(d *prometheus.Desc, v uint64, label string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), label)
	}
	gauge(processesDesc, s.Processes-s.Lingering, "open")
	gauge(processesDesc, s.Lingering, "lingering")
	gauge(unidentifiedDesc, s.Identified[""])
	for source, n := range s.Evidence {
		gauge(identitiesDesc, n, source)
		counter(failuresDesc, s.Failures[source], source)
	}
	for event, n := range map[string]uint64{"evidence_changed": s.Changes, "process_changed": s.Changed,
		"connection_lost": s.Gone, "connection_inherited": s.Inherited, "unseen": s.Blind} {
		counter(identityDesc, n, event)
	}
}
