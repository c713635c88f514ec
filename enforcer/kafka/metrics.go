package kafka

import (
	"strconv"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/audit"
)

// Metrics counts what sessions do. The counters of the data path are resolved once, so that counting is one atomic add.
type Metrics struct {
	refused map[audit.Reason]prometheus.Counter
	decided [kmsg.MaxKey + 1]map[audit.Verdict]prometheus.Counter
	bytes   [2]prometheus.Counter // to the broker, to the client
	open    prometheus.Gauge
}

// NewMetrics registers the counters.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	refused := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "klamm_refused_total",
		Help: "Connections and requests refused, by reason."}, []string{"reason"})
	decided := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "klamm_requests_total",
		Help: "Kafka requests decided, by API and verdict."}, []string{"api", "verdict"})
	relayed := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "klamm_record_bytes_total",
		Help: "Bytes of record batches forwarded, by direction."}, []string{"direction"})
	open := prometheus.NewGauge(prometheus.GaugeOpts{Name: "klamm_connections", Help: "Open client connections."})
	reg.MustRegister(refused, decided, relayed, open)

	m := &Metrics{refused: make(map[audit.Reason]prometheus.Counter), open: open,
		bytes: [2]prometheus.Counter{relayed.WithLabelValues("produce"), relayed.WithLabelValues("fetch")}}
	for r := range audit.Reasons {
		m.refused[r] = refused.WithLabelValues(string(r))
	}
	for key := range m.decided {
		api := apiName(int16(key))
		m.decided[key] = map[audit.Verdict]prometheus.Counter{}
		for _, v := range []audit.Verdict{audit.Allow, audit.Deny, audit.WouldDeny} {
			m.decided[key][v] = decided.WithLabelValues(api, string(v))
		}
	}
	return m
}

// Refuse counts a refusal.
func (m *Metrics) Refuse(r audit.Reason) { m.refused[r].Inc() }

var apiNames = func() (names [kmsg.MaxKey + 1]string) {
	for key := range names {
		names[key] = kmsg.NameForKey(int16(key))
	}
	return names
}()

func apiName(key int16) string {
	if key < 0 || key > kmsg.MaxKey || apiNames[key] == "" {
		return strconv.Itoa(int(key))
	}
	return apiNames[key]
}
