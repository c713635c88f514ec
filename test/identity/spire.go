package main

import (
	"context"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"klamm/test/ca"
	"klamm/test/host"
	"klamm/test/kafka"
)

// launcher runs the programs of a rig; kubernetes.Node is one.
type launcher interface {
	Start(name, below, command string) error
	Stop(name string, how syscall.Signal) error
	Alive(name string) error
}

// spire is a real SPIRE server, agent and OIDC discovery provider. Intervals are SPIRE's defaults.
type spire struct {
	dir, bin string
	run      launcher
	issuer   string // of JWT-SVIDs
}

// SPIFFE IDs.
const (
	trustDomain = "spiffe://example.test/"
	klammID     = trustDomain + "klamm"
	ordersID    = trustDomain + "ns/shop/sa/orders"
	billingID   = trustDomain + "ns/shop/sa/billing"
	agentOf     = trustDomain + "node"
)

const serverConfig = `server {
    bind_address = "127.0.0.1"
    bind_port = "{port}"
    socket_path = "{dir}/server/api.sock"
    trust_domain = "example.test"
    data_dir = "{dir}/server"
    log_level = "DEBUG"
    jwt_issuer = "{issuer}"
}
plugins {
    DataStore "sql" {
        plugin_data {
            database_type = "sqlite3"
            connection_string = "{dir}/server/datastore.sqlite3"
        }
    }
    NodeAttestor "join_token" { plugin_data {} }
    KeyManager "disk" { plugin_data { keys_path = "{dir}/server/keys.json" } }
}
`

const agentConfig = `agent {
    data_dir = "{dir}/agent/data"
    log_level = "DEBUG"
    server_address = "127.0.0.1"
    server_port = "{port}"
    socket_path = "{dir}/agent/public/api.sock"
    admin_socket_path = "{dir}/agent/private/admin.sock"
    trust_bundle_path = "{dir}/agent/bootstrap.pem"
    trust_domain = "example.test"
    authorized_delegates = ["` + klammID + `"]
    experimental {
        broker {
            socket_path = "{dir}/agent/broker/broker.sock"
            brokers = [
                {
                    id = "` + klammID + `"
                    allowed_reference_types = [
                        { type_url = "type.googleapis.com/spiffe.broker.WorkloadPIDReference" },
                    ]
                },
            ]
        }
    }
}
plugins {
    NodeAttestor "join_token" { plugin_data {} }
    KeyManager "disk" { plugin_data { directory = "{dir}/agent/data" } }
    WorkloadAttestor "unix" { plugin_data { discover_workload_path = true } }
    {attestor}
}
`

const providerConfig = `domains = ["127.0.0.1"]
jwt_issuer = "{issuer}"
serving_cert_file {
    cert_file_path = "{dir}/oidc.crt"
    key_file_path = "{dir}/oidc.key"
    addr = "{provider}"
}
server_api { address = "unix://{dir}/server/api.sock" }
`

// startSPIRE starts all of it below dir, where run runs programs. attestor is one more plugin of the agent, or "". What
// entries there are to be at the start, the agent then knows at once.
func startSPIRE(ctx context.Context, dir string, run launcher, authority *ca.Authority, attestor string, entries ...entry) (
	*spire, error,
) {
	cache, err := kafka.Cache()
	if err != nil {
		return nil, err
	}
	server, err := host.FreeAddr()
	if err != nil {
		return nil, err
	}
	provider, err := host.FreeAddr()
	if err != nil {
		return nil, err
	}
	s := &spire{dir: filepath.Join(dir, "spire"), bin: filepath.Join(cache, "spire/current"), run: run,
		issuer: "https://" + provider}
	for _, below := range []string{"server", "agent/public", "agent/private", "agent/broker", "agent/data"} {
		if err := os.MkdirAll(filepath.Join(s.dir, below), 0o755); err != nil {
			return nil, err
		}
	}
	certificate, err := authority.Issue(ca.Leaf{Subject: pkix.Name{CommonName: "provider"}, Names: []string{"127.0.0.1"}})
	if err != nil {
		return nil, err
	}
	if err := ca.Write(certificate, filepath.Join(s.dir, "oidc.crt"), filepath.Join(s.dir, "oidc.key")); err != nil {
		return nil, err
	}
	fill := strings.NewReplacer("{dir}", s.dir, "{port}", portOf(server), "{issuer}", s.issuer, "{provider}", provider,
		"{attestor}", attestor)
	for name, text := range map[string]string{"server": serverConfig, "agent": agentConfig, "provider": providerConfig} {
		if err := os.WriteFile(s.config(name), []byte(fill.Replace(text)), 0o600); err != nil {
			return nil, err
		}
	}
	if err := s.startServer(ctx); err != nil {
		return nil, err
	}
	token, err := s.server("token", "generate", "-spiffeID", agentOf)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if err := s.create(e); err != nil {
			return nil, err
		}
	}
	join := " -joinToken " + strings.TrimSpace(strings.TrimPrefix(token, "Token:"))
	return s, errors.Join(s.startAgent(ctx, join),
		run.Start("oidc-discovery-provider", "", s.program("oidc-discovery-provider")+" -config "+s.config("provider")))
}

func (s *spire) config(name string) string  { return filepath.Join(s.dir, name+".conf") }
func (s *spire) program(name string) string { return filepath.Join(s.bin, name) }
func (s *spire) keySet() string             { return s.issuer + "/keys" }
func (s *spire) workloadAPI() string        { return filepath.Join(s.dir, "agent/public/api.sock") }

// socket is where an API of the agent is served.
func (s *spire) socket(api string) string {
	return filepath.Join(s.dir, map[string]string{"delegated": "agent/private/admin.sock", "broker": "agent/broker/broker.sock"}[api])
}

// section is the section spire of a klamm.yaml.
func (s *spire) section(api string) string {
	return fmt.Sprintf("{api: %s, socket: %q, workload-api: %q}", api, s.socket(api), s.workloadAPI())
}

// server runs a command of the server's command line.
func (s *spire) server(command, verb string, args ...string) (string, error) {
	args = append([]string{command, verb, "-socketPath", filepath.Join(s.dir, "server/api.sock")}, args...)
	out, err := exec.Command(s.program("spire-server"), args...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("spire-server %s %s: %w\n%s", command, verb, err, out)
	}
	return string(out), nil
}

// startServer starts the server and keeps the bundle by which the agent trusts it.
func (s *spire) startServer(ctx context.Context) error {
	if err := s.run.Start("spire-server", "", s.program("spire-server")+" run -config "+s.config("server")); err != nil {
		return err
	}
	return until(ctx, "the SPIRE server", waitLimit, func() (bool, error) {
		bundle, err := s.server("bundle", "show")
		if err != nil {
			return false, s.run.Alive("spire-server")
		}
		return true, os.WriteFile(filepath.Join(s.dir, "agent/bootstrap.pem"), []byte(bundle), 0o600)
	})
}

func (s *spire) startAgent(ctx context.Context, more string) error {
	if err := s.run.Start("spire-agent", "", s.program("spire-agent")+" run -config "+s.config("agent")+more); err != nil {
		return err
	}
	return until(ctx, "the SPIRE agent", waitLimit, func() (bool, error) {
		healthy := exec.Command(s.program("spire-agent"), "healthcheck", "-socketPath", s.workloadAPI()).Run() == nil
		return healthy, s.run.Alive("spire-agent")
	})
}

// bundle are the certificates that SVIDs are verified by.
func (s *spire) bundle() ([]*x509.Certificate, error) {
	text, err := s.server("bundle", "show")
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode([]byte(text))
	if block == nil {
		return nil, fmt.Errorf("the server shows no certificate: %s", text)
	}
	return x509.ParseCertificates(block.Bytes)
}

// entry is a registration entry.
type entry struct {
	id        string
	selectors []string
	dns       string
	life      time.Duration // of X.509- and JWT-SVIDs; 0: the server's default
}

// unix is an entry of the processes of a user.
func unix(id string, uid int) entry {
	return entry{id: id, selectors: []string{"unix:uid:" + strconv.Itoa(uid)}}
}

// named is the entry with a DNS name.
func (e entry) named(dns string) entry {
	e.dns = dns
	return e
}

// lasting is the entry with SVIDs of this life.
func (e entry) lasting(life time.Duration) entry {
	e.life = life
	return e
}

// klammEntry is the entry of the node itself.
func klammEntry(binary string) entry {
	return entry{id: klammID, selectors: []string{"unix:uid:0", "unix:path:" + binary}}
}

// create creates an entry, whose id delete takes.
func (s *spire) create(e entry) error {
	args := []string{"-parentID", agentOf, "-spiffeID", e.id, "-entryID", entryID(e.id)}
	for _, selector := range e.selectors {
		args = append(args, "-selector", selector)
	}
	if e.dns != "" {
		args = append(args, "-dns", e.dns)
	}
	if e.life > 0 {
		seconds := strconv.Itoa(int(e.life.Seconds()))
		args = append(args, "-x509SVIDTTL", seconds, "-jwtSVIDTTL", seconds)
	}
	_, err := s.server("entry", "create", args...)
	return err
}

func entryID(id string) string {
	return strings.ReplaceAll(strings.TrimPrefix(id, trustDomain), "/", "-")
}

// delete deletes the entry of an ID.
func (s *spire) delete(id string) error {
	_, err := s.server("entry", "delete", "-entryID", entryID(id))
	return err
}

// expiry is when the X509-SVID ends that the agent has now for the processes of a user.
func (s *spire) expiry(uid uint32) (time.Time, error) {
	p, err := host.StartSelf(kafka.Place{UID: uid, GID: uid}, "svid", s.workloadAPI())
	if err != nil {
		return time.Time{}, err
	}
	line, err := p.Line()
	if err = errors.Join(err, p.Wait()); err != nil {
		return time.Time{}, err
	}
	return time.Parse(time.RFC3339Nano, line)
}

// fetchSVID prints when the X509-SVID ends that the agent at a socket has for this process.
func fetchSVID(args []string) int {
	ctx, cancel := context.WithTimeout(context.Background(), waitLimit)
	defer cancel()
	svid, err := workloadapi.FetchX509SVID(ctx, workloadapi.WithAddr("unix://"+args[0]))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	fmt.Println(svid.Certificates[0].NotAfter.Format(time.RFC3339Nano))
	return 0
}
