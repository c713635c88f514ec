package node

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"

	"klamm/spiffe"
)

// openSPIRE begins to watch the agent, which may come later.
func (n *Node) openSPIRE(p *spiffe.Processes) (err error) {
	if n.config.SPIRE == nil {
		return nil
	}
	options := n.config.SPIRE.options()
	options.Log = n.log
	if n.spire, err = spiffe.NewSPIRE(options, p); err != nil {
		return err
	}
	n.closers = append(n.closers, n.spire)
	n.registry.MustRegister(spireMetrics{n.spire})
	return nil
}

// ProbeSPIRE asks the agent whether it serves this process, and tells how.
func ProbeSPIRE(ctx context.Context, c SPIREConfig) (SPIREStatus, error) {
	options := c.options()
	options.Log = zerolog.Nop()
	state, err := spiffe.ProbeSPIRE(ctx, options)
	return spireStatus(state), err
}

// SPIREStatus is how it stands with the SPIRE agent.
type SPIREStatus struct {
	API         string    `json:"api"`
	Socket      string    `json:"socket"`
	WorkloadAPI string    `json:"workloadAPI"`
	Serves      bool      `json:"serves"` // it tells who workloads are
	Since       time.Time `json:"since"`  // it does, or does not
	Error       string    `json:"error,omitempty"`
	// The node itself: its SPIFFE ID, the end of its X509-SVID, the trust domains whose SVIDs it can verify, and why
	// that is not kept current.
	ID         string    `json:"id,omitempty"`
	Expires    time.Time `json:"expires,omitzero"`
	TrustOf    []string  `json:"trustOf"`
	OwnError   string    `json:"ownError,omitempty"`
	Followed   int       `json:"followed"`   // processes
	Identified int       `json:"identified"` // those of them that have an SVID
}

func spireStatus(state spiffe.SPIREState) SPIREStatus {
	status := SPIREStatus{API: state.API, Socket: state.Socket, WorkloadAPI: state.WorkloadAPI, Serves: state.Err == nil,
		Since: state.Since, Expires: state.Expires, TrustOf: state.Bundles, Followed: state.Streams,
		Identified: state.Identified}
	if !state.ID.IsZero() {
		status.ID = state.ID.String()
	}
	if state.Err != nil {
		status.Error = state.Err.Error()
	}
	if state.OwnErr != nil {
		status.OwnError = state.OwnErr.Error()
	}
	return status
}

// spireMetrics are the numbers of the source.
type spireMetrics struct{ *spiffe.SPIRE }

var (
	spireServes = prometheus.NewDesc("klamm_spire_serves",
		"1 while the SPIRE agent tells who workloads are.", nil, nil)
	spireFollowed = prometheus.NewDesc("klamm_spire_processes",
		"Processes that the SPIRE agent is asked about.", nil, nil)
	spireIdentified = prometheus.NewDesc("klamm_spire_identified_processes",
		"Processes that have an SVID.", nil, nil)
	spireExpiry = prometheus.NewDesc("klamm_spire_own_svid_expiry_timestamp_seconds",
		"When the node's own X509-SVID ends; 0 while it has none.", nil, nil)
	spireFailures = prometheus.NewDesc("klamm_spire_failures_total",
		"Ends of streams and SVIDs that were not believed, by kind.", []string{"kind"}, nil)
)

// Describe is prometheus.Collector's.
func (m spireMetrics) Describe(out chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{spireServes, spireFollowed, spireIdentified, spireExpiry, spireFailures} {
		out <- d
	}
}

// Collect is prometheus.Collector's.
func (m spireMetrics) Collect(out chan<- prometheus.Metric) {
	state := m.State()
	expiry := 0.0
	if !state.Expires.IsZero() {
		expiry = float64(state.Expires.Unix())
	}
	for _, g := range []struct {
		desc  *prometheus.Desc
		value float64
	}{
		{spireServes, map[bool]float64{true: 1}[state.Err == nil]},
		{spireFollowed, float64(state.Streams)},
		{spireIdentified, float64(state.Identified)},
		{spireExpiry, expiry},
	} {
		out <- prometheus.MustNewConstMetric(g.desc, prometheus.GaugeValue, g.value)
	}
	for kind, n := range state.Failures {
		out <- prometheus.MustNewConstMetric(spireFailures, prometheus.CounterValue, float64(n), kind)
	}
}
