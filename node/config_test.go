package node

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"klamm/enforcer/policy/strict"
	"klamm/node/upstream"
	"klamm/spiffe"
	"klamm/test/bounds"
)

func load(t testing.TB, text string) (Config, error) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "klamm.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := Load(file)
	if err != nil {
		err = errors.New(strings.ReplaceAll(err.Error(), file, "klamm.yaml"))
	}
	return c, err
}

// upstreamIs is the beginning of a configuration, up to that section.
const upstreamIs = "clusters: [{name: a, bootstrap: ['b:1'], upstream: "

const smallest = "clusters: [{name: payments, bootstrap: ['broker-1.example:9092']}]\n"

func TestTheSmallestConfigurationHasSafeDefaults(t *testing.T) {
	got, err := load(t, smallest)
	if err != nil {
		t.Fatal(err)
	}
	host, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	want := Config{
		Node: HostConfig{Name: host, Pins: "/sys/fs/bpf/klamm", Socket: "/run/klamm/klamm.sock"},
		Intercept: InterceptConfig{Ports: []uint16{9092}, OnEnforcerDown: Refuse, OnUnenrolled: Refuse,
			Established: EstablishedConfig{Mode: TakeOver, Rate: 50}, Firewall: true},
		Clusters:    []ClusterConfig{{Name: "payments", Bootstrap: []string{"broker-1.example:9092"}}},
		Attestation: AttestationConfig{OnLoss: LossClose, Timeout: 5 * time.Second},
		Audit:       AuditConfig{File: "-"},
		Limits: LimitsConfig{MaxFrame: 100 << 20, Memory: 512 << 20, Connections: 10000,
			DialTimeout: 5 * time.Second, Drain: 30 * time.Second},
		Metrics: MetricsConfig{Listen: "127.0.0.1:9464"},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

func TestEveryKeyIsReadAndPathsAreRelativeToTheFile(t *testing.T) {
	file := filepath.Join("testdata", "full.yaml")
	got, err := Load(file)
	if err != nil {
		t.Fatal(err)
	}
	uid := uint32(1000)
	want := Config{
		Node: HostConfig{Name: "host-1", Cgroup: "/sys/fs/cgroup/unified/klamm", Pins: "/sys/fs/bpf/other",
			Socket: "testdata/run/klamm.sock"},
		Intercept: InterceptConfig{Ports: []uint16{9092, 9094},
			Exempt:         []Exemption{{Cgroup: "/system.slice/kafka.service"}, {Unit: "kafka.service"}},
			OnEnforcerDown: Pass, OnUnenrolled: Pass, Established: EstablishedConfig{Mode: Observe, Rate: 5},
			NRI: "/var/run/nri/nri.sock"},
		Clusters: []ClusterConfig{
			{
				Name:      "payments",
				Bootstrap: []string{"broker-1.example:9092", "[2001:db8::1]:9092"},
				CIDRs: []netip.Prefix{
					netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("2001:db8::/64")},
				TLS: &TLSConfig{CA: "/etc/klamm/ca.pem", Cert: "testdata/tls/cert.pem", Key: "testdata/tls/key.pem",
					ServerName: "kafka.example"},
				Credentials: &LoginConfig{Mechanism: "SCRAM-SHA-512", Username: "klamm",
					PasswordFile: "testdata/secret/password"},
			},
			{Name: "logs", Bootstrap: []string{"logs.example:9092"},
				Upstream: &UpstreamConfig{
					TLS: &TLSConfig{CA: "testdata/ca.pem", Certificate: upstream.Workload,
						SPIFFEIDs: []spiffeid.ID{spiffeid.RequireFromString("spiffe://example.test/kafka")}},
					Login: &LoginConfig{Mechanism: "OAUTHBEARER", TokenURL: "https://issuer.example/token", ClientID: "klamm",
						ClientSecretFile: "testdata/secret", Scopes: []string{"kafka"}, CA: "/etc/klamm/issuer.pem",
						Extensions: map[string]string{"logicalCluster": "lkc-1"}},
					From: FromClient},
				Credentials: &LoginConfig{JWTSVID: &JWTSVIDConfig{Audience: "kafka"}}},
		},
		OIDC: []IssuerConfig{
			{Issuer: "https://sso.example", Audiences: []string{"kafka", "other"}, Algorithms: []string{"ES384"},
				Skew: 5 * time.Second, PrincipalClaim: "email", RequiredClaims: []string{"team"},
				JWKS: &JWKSConfig{URL: "https://keys.example/jwks"}, CA: "testdata/sso.pem",
				BearerFile: "testdata/secret/bearer", Refresh: time.Minute, MaxStale: time.Hour},
		},
		Kubernetes: &KubernetesConfig{Token: "/run/token", Audience: "brokers", Issuer: "https://sso.example",
			Review: &ReviewConfig{Server: "https://10.96.0.1", CA: "testdata/k8s.pem", Cert: "testdata/k8s.crt",
				Key: "testdata/k8s.key", Every: 5 * time.Second, MaxStale: time.Minute}, Node: "node-1"},
		TokenFiles: []TokenFileConfig{{Path: "/run/oidc", Issuer: "https://sso.example", Audience: "kafka"}},
		Identities: Identities{
			{Name: "orders service", SPIFFEID: "spiffe://example.test/ns/shop/sa/orders", UID: &uid,
				Exe: "/usr/bin/orders", ExeSHA256: strings.Repeat("ab", 32), Cgroup: "/system.slice/*", Unit: "orders.service"},
			{SPIFFEID: "spiffe://example.test/ns/shop/sa/report", Namespace: "shop", Pod: "report-*", Container: "app"},
		},
		Attestation: AttestationConfig{Sources: []string{"static", "spire"}, OnLoss: LossDeny, Timeout: 2 * time.Second},
		SPIRE: &SPIREConfig{API: spiffe.APIDelegated, Socket: "testdata/admin.sock",
			WorkloadAPI: "/run/spire/agent.sock", Hint: "kafka", TrustDomains: []string{"example.test", "partner.test"}},
		Policies: []string{"testdata/policy.yaml", "/etc/klamm/more.yaml"},
		Audit:    AuditConfig{File: "testdata/audit.jsonl"},
		Limits: LimitsConfig{MaxFrame: 1 << 20, Memory: 64 << 20, Connections: 100,
			DialTimeout: 1500 * time.Millisecond, Drain: time.Minute},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	if _, err = spiffe.NewStatic(got.Identities, nil); err != nil {
		t.Error(err)
	}
}

func TestWhatIsWrongIsSaidWithLineAndColumn(t *testing.T) {
	for name, test := range map[string]struct{ text, want string }{
		"an unknown section": {
			smallest + "limit: {}", `2:1: unknown key "limit", did you mean "limits"?`},
		"a pod without its namespace": {
			smallest + "identities:\n- {spiffe-id: 'spiffe://a/b', pod: x}", `3:36: pod: give namespace as well`},
		"an unknown key": {
			smallest + "limits:\n  max-fram: 1MiB", `3:3: unknown key "max-fram", did you mean "max-frame"?`},
		"a duplicate key": {
			smallest + "audit: {}\naudit: {}", `3:1: the key "audit" is given twice, first in line 2`},
		"a wrong type": {
			smallest + "intercept: {ports: 9092}", `2:20: want a list, not a number`},
		"no clusters": {
			"audit: {}", `1:1: the key "clusters" is missing`},
		"an empty list of clusters": {
			"clusters: []", `1:11: no cluster: give name and bootstrap of at least one`},
		"a cluster without a name": {
			"clusters: [{bootstrap: ['a:1']}]", `1:12: the key "name" is missing`},
		"a cluster without brokers": {
			"clusters: [{name: a, bootstrap: []}]", `1:33: no broker: give host:port of at least one`},
		"a cluster's name with a space": {
			"clusters: [{name: a b, bootstrap: ['a:1']}]", `1:19: want letters, digits, dots, dashes and underscores`},
		"a broker without a port": {
			"clusters: [{name: a, bootstrap: [b]}]", `1:34: "b" is not host:port`},
		"a broker's port of 0": {
			"clusters: [{name: a, bootstrap: ['b:0']}]", `1:34: "b:0" is not host:port`},
		"a broker's port of 65536": {
			"clusters: [{name: a, bootstrap: ['b:65536']}]", `1:34: "b:65536" is not host:port`},
		"a broker's port in words": {
			"clusters: [{name: a, bootstrap: ['b:kafka']}]", `1:34: "b:kafka" is not host:port`},
		"an IPv6 broker without brackets": {
			"clusters: [{name: a, bootstrap: ['::1:9092']}]", `1:34: "::1:9092" is not host:port`},
		"two clusters of one name": {
			"clusters:\n- {name: a, bootstrap: ['b:1']}\n- {name: a, bootstrap: ['c:1']}", `3:10: a second cluster "a"`},
		"two clusters with one broker": {
			"clusters:\n- {name: a, bootstrap: ['b:1']}\n- {name: c, bootstrap: ['d:1', 'b:1']}",
			`3:32: b:1 is already of cluster "a"`},
		"two clusters in one network": {
			"clusters:\n- {name: a, bootstrap: ['b:1'], cidrs: [10.0.0.0/8]}\n" +
				"- {name: c, bootstrap: ['d:1'], cidrs: [10.1.0.0/16]}",
			`3:41: 10.1.0.0/16 overlaps with a network of cluster "a"`},
		"a network that is none": {
			"clusters: [{name: a, bootstrap: ['b:1'], cidrs: [10.0.0.1]}]",
			`1:50: netip.ParsePrefix("10.0.0.1"): no '/'`},
		"a network with host bits": {
			"clusters: [{name: a, bootstrap: ['b:1'], cidrs: [10.0.0.1/8]}]",
			`1:50: 10.0.0.1/8 has bits set behind its mask: write 10.0.0.0/8`},
		"a network of everything": {
			"clusters: [{name: a, bootstrap: ['b:1'], cidrs: [0.0.0.0/0]}]", `1:50: it covers every address`},
		"a certificate without key": {
			"clusters: [{name: a, bootstrap: ['b:1'], tls: {cert: c}}]",
			`1:47: cert and key are given together or not at all`},
		"an unknown mechanism": {
			"clusters: [{name: a, bootstrap: ['b:1'], credentials: {mechanism: SCRAM-SHA-521, username: u, password-file: p}}]",
			`1:67: unknown mechanism "SCRAM-SHA-521", did you mean "SCRAM-SHA-512"? (allowed: OAUTHBEARER, PLAIN, `},
		"credentials without a password": {
			"clusters: [{name: a, bootstrap: ['b:1'], credentials: {mechanism: PLAIN, username: u}}]",
			`1:55: PLAIN needs password-file`},
		"a password in the file": {
			"clusters: [{name: a, bootstrap: ['b:1'], " +
				"credentials: {mechanism: PLAIN, username: u, password-file: f, password: p}}]",
			`1:105: unknown key "password" (allowed: jwt-svid, mechanism, username, password-file`},
		"a workload's certificate for the node's own client": {
			"clusters: [{name: a, bootstrap: ['b:1'], tls: {certificate: workload}}]",
			`1:61: the node's own client has no workload: want node`},
		"a certificate of nobody": {
			upstreamIs + "{tls: {certificate: pod}}}]", `1:72: unknown certificate "pod" (allowed: workload, node)`},
		"two certificates": {
			upstreamIs + "{tls: {certificate: node, cert: c, key: k}}}]", `1:72: give it, or cert and key`},
		"TLS without verification": {
			upstreamIs + "{tls: {insecure: true}}}]", `1:59: unknown key "insecure"`},
		"a broker without a SPIFFE ID": {
			upstreamIs + "{tls: {spiffe-ids: []}}}]", `1:71: no SPIFFE ID: leave the key out`},
		"a trust domain as SPIFFE ID": {
			upstreamIs + "{tls: {spiffe-ids: ['spiffe://a']}}}]", `1:72: want the SPIFFE ID of a broker`},
		"one bundle for two trust domains": {
			upstreamIs + "{tls: {ca: f, spiffe-ids: ['spiffe://a/k', 'spiffe://b/k']}}}]",
			`1:95: ca is the bundle of one trust domain`},
		"a login that all can see": {
			upstreamIs + "{login: {mechanism: PLAIN, username: u, password-file: p}}}]",
			`1:60: without tls who sees the network sees the login`},
		"cleartext of nothing": {
			upstreamIs + "{tls: {}, cleartext: true}}]", `1:73: there is no login in cleartext`},
		"an origin that is none": {
			upstreamIs + "{from: pod}}]", `1:59: unknown origin "pod" (allowed: node, client)`},
		"the client's network without TLS": {
			upstreamIs + "{from: client}}]", `1:59: without tls a container's root could read`},
		"the client's network behind the firewall": {
			upstreamIs + "{tls: {}, from: client}}]", `1:68: the firewall drops what containers send`},
		"two logins": {
			upstreamIs + "{tls: {}, login: {jwt-svid: {audience: a}, mechanism: PLAIN}}}]",
			`1:69: give either jwt-svid or mechanism`},
		"no login": {
			upstreamIs + "{tls: {}, login: {}}}]", `1:69: give either jwt-svid or mechanism`},
		"a token without an audience": {
			upstreamIs + "{tls: {}, login: {jwt-svid: {audience: ''}}}}]", `1:91: the audience is empty`},
		"a password for a token": {
			upstreamIs + "{tls: {}, login: {jwt-svid: {audience: a}, password-file: p}}}]",
			`1:110: jwt-svid has no password-file`},
		"client credentials in cleartext": {
			upstreamIs + "{tls: {}, login: {mechanism: OAUTHBEARER, token-url: 'http://a/', client-id: c, " +
				"client-secret-file: s}}}]", `1:105: the client's secret would go in cleartext: want https`},
		"a token endpoint with a user": {
			upstreamIs + "{tls: {}, login: {mechanism: OAUTHBEARER, token-url: 'https://u:p@a/', client-id: c, " +
				"client-secret-file: s}}}]", `1:105: want a URL like https://issuer.example/token`},
		"client credentials without a client": {
			upstreamIs + "{tls: {}, login: {mechanism: OAUTHBEARER, token-url: 'https://a/', client-secret-file: s}}}]",
			`1:69: OAUTHBEARER needs client-id`},
		"an extension that is the token": {
			upstreamIs + "{tls: {}, login: {jwt-svid: {audience: a}, extensions: {auth: x}}}}]",
			`1:114: want letters as name, not auth`},
		"SVIDs without SPIRE": {
			upstreamIs + "{tls: {certificate: workload}}}]", `1:52: SVIDs of workloads take a SPIRE agent`},
		"SVIDs of the node without SPIRE": {
			upstreamIs + "{tls: {certificate: node}}}]", `1:52: SVIDs of the node take a SPIRE agent`},
		"port 0": {
			smallest + "intercept: {ports: [0]}", `2:21: 0 is not a port: want 1 to 65535`},
		"port 65536": {
			smallest + "intercept: {ports: [65536]}", `2:21: 65536 is out of range`},
		"a port twice": {
			smallest + "intercept: {ports: [1, 2, 1]}", `2:27: port 1 is given twice`},
		"no ports": {
			smallest + "intercept: {ports: []}", `2:20: no port: leave the key out for 9092`},
		"a fail mode that the firewall undoes": {
			smallest + "intercept: {on-enforcer-down: pass}", `2:31: what passes the connect of a container the firewall`},
		"an exemption of everything": {
			smallest + "intercept: {exempt: [{cgroup: /}]}", `2:31: the root cgroup would exempt every process`},
		"an exemption of two things": {
			smallest + "intercept: {exempt: [{cgroup: /a, unit: b.service}]}", `2:22: give either cgroup or unit`},
		"an exemption of nothing": {
			smallest + "intercept: {exempt: [{}]}", `2:22: give either cgroup or unit`},
		"an exemption of a relative one": {
			smallest + "intercept: {exempt: [{cgroup: a}]}", `2:31: want a path in cgroup2`},
		"an exemption by a unit's alias": {
			smallest + "intercept: {exempt: [{unit: kafka}]}", `2:29: want a unit's full name like kafka.service`},
		"a fail mode that is none": {
			smallest + "intercept: {on-enforcer-down: open}", `2:31: unknown mode "open"`},
		"a fail mode that is empty": {
			smallest + "intercept: {on-unenrolled: ''}", `2:28: unknown mode ""`},
		"a mode for established connections that there is not": {
			smallest + "intercept: {established: {mode: takeover}}",
			`2:33: unknown mode "takeover", did you mean "take-over"? (allowed: take-over, observe, refuse-new-only)`},
		"a rate of 0": {
			smallest + "intercept: {established: {rate: 0}}", `2:33: want 1 to 10000 connections per second`},
		"a rate that is none": {
			smallest + "intercept: {established: {rate: 10001}}", `2:33: want 1 to 10000 connections per second`},
		"an identity without selector": {
			smallest + "identities:\n- spiffe-id: spiffe://a/b", `3:14: spiffe-id: the rule selects every process`},
		"an identity without an id": {
			smallest + "identities:\n- uid: 1", `3:3: spiffe-id: "" is no SPIFFE ID`},
		"an identity with a bad hash": {
			smallest + "identities:\n- {spiffe-id: spiffe://a/b, uid: 1}\n- {spiffe-id: spiffe://a/b, exe-sha256: abcd}",
			`4:41: exe-sha256: "abcd" is not 64 hex digits`},
		"a uid below 0": {
			smallest + "identities: [{spiffe-id: spiffe://a/b, uid: -1}]", `2:45: -1 is out of range`},
		"a source that there is not": {
			smallest + "attestation: {sources: [statics]}", `2:25: unknown source "statics", did you mean "static"?`},
		"a source twice": {
			smallest + "identities: [{spiffe-id: spiffe://a/b, uid: 1}]\nattestation: {sources: [static, static]}",
			`3:33: static is given twice`},
		"a source without its section": {
			smallest + "attestation: {sources: [static]}", `2:25: static needs the section "identities", which is missing`},
		"a loss mode that there is not": {
			smallest + "attestation: {on-loss: drop}", `2:24: unknown mode "drop" (allowed: close, deny)`},
		"no time to attest": {
			smallest + "attestation: {timeout: 0s}", `2:24: want a duration over 0, like 5s`},
		"a size without a unit's name": {
			smallest + "limits: {memory: 1 GB}", `2:18: "1 GB" is not a size: write it as 4096, 100KB or 64MiB`},
		"a frame below 1KiB": {
			smallest + "limits: {max-frame: 1023}", `2:21: want 1KiB to below 2GiB`},
		"a frame of 2GiB": {
			smallest + "limits: {max-frame: 2GiB, memory: 4GiB}", `2:21: want 1KiB to below 2GiB`},
		"less memory than one frame": {
			smallest + "limits: {memory: 99MiB}", `2:18: want at least 410MiB`},
		"more frame than memory": {
			smallest + "limits: {max-frame: 512MiB}", `2:9: want at least 2049MiB`},
		"no connections": {
			smallest + "limits: {connections: 0}", `2:23: want at least 1`},
		"a timeout in plain numbers": {
			smallest + "limits: {dial-timeout: 5}", `2:24: want a duration like 10s, not a number`},
		"a timeout of 0": {
			smallest + "limits: {dial-timeout: 0s}", `2:24: want a duration over 0, like 5s`},
		"a drain below 0": {
			smallest + "limits: {drain: -1s}", `2:17: want a duration like 30s, or 0s to cut all at once`},
		"a metrics port alone": {
			smallest + "metrics: {listen: ':9464'}", `2:19: want host:port like 127.0.0.1:9464`},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := load(t, test.text)
			if err == nil || !strings.HasPrefix(err.Error(), "klamm.yaml:"+test.want) {
				t.Errorf("got  %v\nwant klamm.yaml:%s", err, test.want)
			}
		})
	}
}

func TestAllThatIsWrongIsSaidAtOnce(t *testing.T) {
	_, err := load(t, "clusters:\n- {name: a b, bootstrap: [x]}\n- {name: c}\n"+
		"audit: {fiel: x}\nlimits: {connections: 0}")
	if err == nil {
		t.Fatal("no error")
	}
	if lines := strings.Split(err.Error(), "\n"); len(lines) != 5 {
		t.Errorf("%d errors, want 5:\n%v", len(lines), err)
	}
}

func TestAMissingFileIsNamed(t *testing.T) {
	_, err := Load("testdata/none.yaml")
	if !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "testdata/none.yaml") {
		t.Error(err)
	}
}

func FuzzConfig(f *testing.F) {
	full, err := os.ReadFile("testdata/full.yaml")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(string(full))
	f.Add(smallest)
	f.Add("clusters: [{name: a, bootstrap: ['b:1']}]\nidentities: [{}]\nintercept: {exempt: [{}]}")
	f.Fuzz(func(t *testing.T, text string) {
		c := new(Config)
		var err error
		bounds.Check(t, len(text), 1<<15, func() { err = strict.Decode("f", []byte(text), c) })
		if err != nil {
			return
		}
		for _, cluster := range c.Clusters {
			for _, b := range cluster.Bootstrap {
				if _, _, err = splitBroker(b); err != nil {
					t.Error(err)
				}
			}
		}
		if _, err = spiffe.NewStatic(c.Identities, nil); err != nil {
			t.Error(err)
		}
	})
}
