package spire

import (
	"crypto/tls"
	"fmt"
	"os"
	"strings"

	"klamm/test/ca"
)

// written is a configuration with the rig's own values in place of upper-case words.
func (s *SPIRE) written(text string, more ...string) string {
	return strings.NewReplacer(append(more, "DIR", s.dir, "PORT", fmt.Sprint(s.port), "DOMAIN", s.opts.TrustDomain,
		"SERVER-SOCKET", s.ServerSocket(), "WORKLOAD-SOCKET", s.WorkloadAPI(), "ADMIN-SOCKET", s.Socket("delegated"),
		"BROKER-SOCKET", s.Socket("broker"), "ISSUER", s.Issuer(), "OIDC-ADDRESS", fmt.Sprintf("127.0.0.1:%d", s.oidcPort),
	)...).Replace(text)
}

func (s *SPIRE) serverConfig() string {
	issuer := ""
	if s.Issuer() != "" {
		issuer = fmt.Sprintf("jwt_issuer = %q", s.Issuer())
	}
	return s.written(`
server {
    bind_address = "127.0.0.1"
    bind_port = "PORT"
    socket_path = "SERVER-SOCKET"
    trust_domain = "DOMAIN"
    data_dir = "DIR/server"
    log_level = "INFO"
    ca_ttl = "CA-TTL"
    default_x509_svid_ttl = "X509-TTL"
    default_jwt_svid_ttl = "JWT-TTL"
    ISSUER-LINE
    experimental {
        cache_reload_interval = "CACHE-INTERVAL"
    }
}
plugins {
    DataStore "sql" {
        plugin_data {
            database_type = "sqlite3"
            connection_string = "DIR/server/datastore.sqlite3"
        }
    }
    NodeAttestor "join_token" { plugin_data {} }
    KeyManager "disk" {
        plugin_data { keys_path = "DIR/server/keys.json" }
    }
}
`, "CA-TTL", s.opts.CATTL.String(), "X509-TTL", s.opts.X509TTL.String(), "JWT-TTL", s.opts.JWTTTL.String(),
		"ISSUER-LINE", issuer,
		"CACHE-INTERVAL", s.opts.CacheInterval.String())
}

func (s *SPIRE) agentConfig() string {
	unix := `WorkloadAttestor "unix" {
        plugin_data { discover_workload_path = true }
    }`
	if s.opts.WithoutUnix {
		unix = ""
	}
	return s.written(`
agent {
    data_dir = "DIR/agent"
    log_level = "INFO"
    server_address = "127.0.0.1"
    server_port = "PORT"
    socket_path = "WORKLOAD-SOCKET"
    admin_socket_path = "ADMIN-SOCKET"
    trust_bundle_path = "DIR/bootstrap.pem"
    trust_domain = "DOMAIN"
    DELEGATES
    experimental {
        sync_interval = "SYNC-INTERVAL"
        BROKERS
    }
}
plugins {
    NodeAttestor "join_token" { plugin_data {} }
    KeyManager "disk" {
        plugin_data { directory = "DIR/agent" }
    }
    UNIX
    PLUGINS
}
`, "DELEGATES", s.delegates(), "SYNC-INTERVAL", s.opts.SyncInterval.String(), "BROKERS", s.brokers(), "UNIX", unix,
		"PLUGINS", s.opts.AgentPlugins)
}

func (s *SPIRE) delegates() string {
	var ids []string
	for _, id := range s.opts.Delegates {
		ids = append(ids, fmt.Sprintf("%q", id))
	}
	return "authorized_delegates = [" + strings.Join(ids, ", ") + "]"
}

// brokers is the section of the Broker API, without which it is not served.
func (s *SPIRE) brokers() string {
	if len(s.opts.Delegates) == 0 {
		return ""
	}
	var all strings.Builder
	for _, id := range s.opts.Delegates {
		fmt.Fprintf(&all, `
                {
                    id = %q
                    allowed_reference_types = [
                        { type_url = "type.googleapis.com/spiffe.broker.WorkloadPIDReference" },
                    ]
                },`, id)
	}
	return fmt.Sprintf(`broker {
            socket_path = %q
            brokers = [%s
            ]
        }`, s.Socket("broker"), all.String())
}

func (s *SPIRE) discoveryConfig() string {
	return s.written(`
log_level = "info"
domains = ["127.0.0.1"]
jwt_issuer = "ISSUER"
serving_cert_file {
    cert_file_path = "DIR/oidc.crt"
    key_file_path = "DIR/oidc.key"
    addr = "OIDC-ADDRESS"
}
server_api { address = "unix://SERVER-SOCKET" }
`)
}

// discoveryCA is the discovery provider's certificate. Its root's is written to IssuerCA.
func (s *SPIRE) discoveryCA() (*tls.Certificate, error) {
	root, err := ca.New("discovery")
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(s.IssuerCA(), root.PEM(), 0o644); err != nil {
		return nil, err
	}
	return root.Issue(ca.Leaf{Names: []string{"127.0.0.1"}})
}
