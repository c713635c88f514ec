package node

import (
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"

	"klamm/spiffe"
	spirefake "klamm/test/spire/fake"
)

func TestTheSocketsOfSPIREAreFoundAsSPIFFEHasThemFound(t *testing.T) {
	for name, test := range map[string]struct {
		endpoint, broker string // environment
		text             string
		want             SPIREConfig
	}{
		"nothing but the API and its socket": {"", "", "{api: delegated, socket: /a.sock}",
			SPIREConfig{API: "delegated", Socket: "/a.sock", WorkloadAPI: "/tmp/spire-agent/public/api.sock"}},
		"the environment's": {"unix:///e.sock", "unix:///b.sock", "{api: broker}",
			SPIREConfig{API: "broker", Socket: "/b.sock", WorkloadAPI: "/e.sock"}},
		"the file's before the environment's": {"unix:///e.sock", "unix:///b.sock",
			"{api: broker, socket: 'unix:/c/../c.sock', workload-api: 'unix:///d.sock'}",
			SPIREConfig{API: "broker", Socket: "/c.sock", WorkloadAPI: "/d.sock"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("SPIFFE_ENDPOINT_SOCKET", test.endpoint)
			t.Setenv("SPIFFE_BROKER_SOCKET", test.broker)
			c, err := load(t, smallest+"spire: "+test.text)
			if err != nil {
				t.Fatal(err)
			}
			got := *c.SPIRE
			if got.API != test.want.API || got.Socket != test.want.Socket || got.WorkloadAPI != test.want.WorkloadAPI {
				t.Errorf("got %+v, want %+v", got, test.want)
			}
		})
	}
}

func TestWhatIsWrongWithSPIREIsSaidWithLineAndColumn(t *testing.T) {
	t.Setenv("SPIFFE_ENDPOINT_SOCKET", "")
	t.Setenv("SPIFFE_BROKER_SOCKET", "unix:///b.sock")
	for name, test := range map[string]struct{ text, want string }{
		"no API":               {"{socket: /a.sock}", `2:8: the key "api" is missing`},
		"an API that is none":  {"{api: brokers, socket: /a}", `2:14: unknown API "brokers", did you mean "broker"?`},
		"no socket":            {"{api: delegated}", `2:8: give socket: where the agent serves the API`},
		"a socket over TCP":    {"{api: broker, socket: 'tcp://127.0.0.1:1'}", `2:30: "tcp://127.0.0.1:1" is not the path`},
		"a relative URI":       {"{api: broker, socket: 'unix:a.sock'}", `2:30: "unix:a.sock" is not the path`},
		"a Workload API's URL": {"{api: broker, workload-api: 'http://a'}", `2:36: "http://a" is not the path`},
		"no trust domains":     {"{api: broker, trust-domains: []}", `2:37: no trust domain: leave the key out`},
		"a trust domain as ID": {"{api: broker, trust-domains: ['spiffe://a']}", `2:38: "spiffe://a" is no trust domain`},
		"a trust domain twice": {"{api: broker, trust-domains: [a, a]}", `2:41: a is given twice`},
		"an unknown key":       {"{api: broker, hints: a}", `2:22: unknown key "hints", did you mean "hint"?`},
		"selectors":            {"{api: broker, selectors: [unix:uid:0]}", `2:22: unknown key "selectors"`},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := load(t, smallest+"spire: "+test.text)
			if err == nil || !strings.HasPrefix(err.Error(), "klamm.yaml:"+test.want) {
				t.Errorf("got  %v\nwant klamm.yaml:%s", err, test.want)
			}
		})
	}
}

func served(t *testing.T) (*spirefake.Agent, SPIREConfig) {
	t.Helper()
	agent, err := spirefake.New(spirefake.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := agent.Stop(); err != nil {
			t.Error(err)
		}
	})
	return agent, SPIREConfig{API: spiffe.APIBroker, Socket: agent.Socket("broker"), WorkloadAPI: agent.WorkloadAPI()}
}

func TestAProbeTellsHowItStandsWithTheAgent(t *testing.T) {
	agent, c := served(t)
	for _, api := range spiffe.APIs {
		c.API, c.Socket = api, agent.Socket(api)
		s, err := ProbeSPIRE(t.Context(), c)
		if err != nil || !s.Serves || s.ID != "spiffe://example.test/klamm" || len(s.TrustOf) != 1 ||
			time.Until(s.Expires) < time.Minute || s.Error+s.OwnError != "" {
			t.Errorf("%s: got %+v, %v", api, s, err)
		}
	}
	c.Socket += ".none"
	s, err := ProbeSPIRE(t.Context(), c)
	if err == nil || s.Serves || s.Error != err.Error() || !strings.Contains(s.Error, c.Socket) || s.ID == "" {
		t.Errorf("without a socket: got %+v, %v", s, err)
	}
}

func TestMetricsTellHowItStandsWithTheAgent(t *testing.T) {
	agent, c := served(t)
	options := c.options()
	options.Log = zerolog.Nop()
	s, err := spiffe.NewSPIRE(options, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}()
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(spireMetrics{s})
	value := func(name string) float64 {
		families, err := registry.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			if f.GetName() == name {
				return f.GetMetric()[0].GetGauge().GetValue()
			}
		}
		t.Fatalf("there is no %s", name)
		return 0
	}
	until(t, "the agent serves", func() bool { return value("klamm_spire_serves") == 1 })
	if end := time.Unix(int64(value("klamm_spire_own_svid_expiry_timestamp_seconds")), 0); time.Until(end) < time.Minute {
		t.Errorf("the SVID ends at %v", end)
	}
	id, err := agent.NodeEntry(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := agent.Remove(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	until(t, "the node has no SVID", func() bool { return value("klamm_spire_own_svid_expiry_timestamp_seconds") == 0 })
}
