package node

import (
	"reflect"
	"strings"
	"testing"
	"time"
)

func TestEveryKeyOfTLSClientsIsRead(t *testing.T) {
	const head = "clusters:\n- name: a\n  bootstrap: ['b.example:9093']\n  upstream: {tls: {}}\n  clients:\n    tls: "
	const spire = "\nspire: {api: delegated, socket: /s}\n"
	for what, c := range map[string]struct {
		text string
		want ClientsConfig
	}{
		"passthrough": {"passthrough\n    names: [kafka.internal]", ClientsConfig{TLS: TLSPassthrough,
			Names: []string{"kafka.internal"}}},
		"Vault with a token": {`terminate
    names: [kafka.internal]
    issuer:
      vault: {address: "https://vault.example:8200", namespace: streams, mount: team/pki, role: kafka, ttl: 12h,
        ca: /ca, token-file: /token}
    client-certificates: {ca: [/clients], required: true}`, ClientsConfig{TLS: TLSTerminate,
			Names: []string{"kafka.internal"}, Issuer: &LeafIssuerConfig{Vault: &VaultConfig{
				Address: "https://vault.example:8200", Namespace: "streams", Mount: "team/pki", Role: "kafka",
				TTL: 12 * time.Hour, CA: "/ca", TokenFile: "/token"}},
			ClientCertificates: &ClientCertificatesConfig{CA: []string{"/clients"}, Required: true}}},
		"Vault with AppRole": {`terminate
    issuer: {vault: {address: "http://127.0.0.1:8200", role: kafka,
      app-role: {role-id: node, secret-id-file: /secret}}}`,
			ClientsConfig{TLS: TLSTerminate, Issuer: &LeafIssuerConfig{Vault: &VaultConfig{Address: "http://127.0.0.1:8200",
				Mount: "pki", Role: "kafka",
				AppRole: &AppRoleConfig{Mount: "approle", RoleID: "node", SecretIDFile: "/secret"}}}}},
		"Vault with a service account": {`terminate
    issuer: {vault: {address: "https://vault:8200", role: kafka, kubernetes: {role: node}}}`,
			ClientsConfig{TLS: TLSTerminate, Issuer: &LeafIssuerConfig{Vault: &VaultConfig{Address: "https://vault:8200",
				Mount: "pki", Role: "kafka", Kubernetes: &VaultKubernetesConfig{Mount: "kubernetes", Role: "node",
					TokenFile: "/var/run/secrets/kubernetes.io/serviceaccount/token"}}}}},
		"an intermediate": {"terminate\n    issuer: {intermediate: {cert: /c, key: /k, ttl: 1h}}", ClientsConfig{
			TLS:    TLSTerminate,
			Issuer: &LeafIssuerConfig{Intermediate: &IntermediateConfig{Cert: "/c", Key: "/k", TTL: time.Hour}}}},
		"an intermediate's default": {"terminate\n    issuer: {intermediate: {cert: /c, key: /k}}", ClientsConfig{
			TLS:    TLSTerminate,
			Issuer: &LeafIssuerConfig{Intermediate: &IntermediateConfig{Cert: "/c", Key: "/k", TTL: 24 * time.Hour}}}},
		"files": {"terminate\n    issuer: {files: {cert: /c, key: /k}}", ClientsConfig{TLS: TLSTerminate,
			Issuer: &LeafIssuerConfig{Files: &KeyPairConfig{"/c", "/k"}}}},
		"cert-manager": {"terminate\n    issuer: {cert-manager: {directory: /tls}}", ClientsConfig{TLS: TLSTerminate,
			Issuer: &LeafIssuerConfig{CertManager: &CertManagerConfig{"/tls"}}}},
		"SPIRE": {"terminate\n    issuer: {spire: {hint: kafka}}\n    client-certificates: {spire: true}" + spire,
			ClientsConfig{TLS: TLSTerminate, Issuer: &LeafIssuerConfig{SPIRE: &SVIDConfig{"kafka"}},
				ClientCertificates: &ClientCertificatesConfig{SPIRE: true}}},
	} {
		got, err := load(t, head+c.text)
		if err != nil {
			t.Errorf("%s: %v", what, err)
		} else if !reflect.DeepEqual(got.Clusters[0].Clients, c.want) {
			t.Errorf("%s: got  %+v\nwant %+v", what, got.Clusters[0].Clients, c.want)
		}
	}
}

func TestPathsOfTLSClientsAreRelativeToTheFile(t *testing.T) {
	c, err := load(t, "clusters: [{name: a, bootstrap: ['b:1'], upstream: {tls: {}}, clients: {tls: terminate, "+
		"issuer: {files: {cert: c.pem, key: k.pem}}, client-certificates: {ca: [ca.pem]}}}]")
	if err != nil {
		t.Fatal(err)
	}
	met := c.Clusters[0].Clients
	for _, path := range []string{met.Issuer.Files.Cert, met.Issuer.Files.Key, met.ClientCertificates.CA[0]} {
		if !strings.HasPrefix(path, "/") {
			t.Errorf("%s is not of the file's directory", path)
		}
	}
}

func TestWhatIsWrongWithTLSClientsIsSaidWithLineAndColumn(t *testing.T) {
	with := func(clients string) string {
		return "clusters:\n- name: a\n  bootstrap: ['b.example:9093']\n  upstream: {tls: {}}\n  clients: {" + clients + "}"
	}
	const files = "tls: terminate, issuer: {files: {cert: c, key: k}}"
	vault := func(more string) string {
		return with("tls: terminate, issuer: {vault: {role: r, " + more + "}}")
	}
	for what, c := range map[string]struct{ text, want string }{
		"a mode that there is not":  {with("tls: passthru"), `5:18: unknown mode "passthru"`},
		"nobody who signs":          {with("tls: terminate"), "5:12: terminate needs an issuer"},
		"an issuer for passthrough": {with("tls: passthrough, issuer: {spire: {}}"), "5:39: it is for tls: terminate"},
		"an issuer without a mode":  {with("issuer: {spire: {}}"), "5:21: it is for tls: terminate"},
		"certificates for deny":     {with("client-certificates: {ca: [a]}"), "5:34: it is for tls: terminate"},
		"names for deny":            {with("names: [a]"), "5:20: they are for tls: passthrough or terminate"},
		"a name in upper case": {with("tls: passthrough, names: [Kafka]"),
			`5:39: "Kafka" is no host name in lower case`},
		"two issuers": {with("tls: terminate, issuer: {files: {cert: c, key: k}, intermediate: {cert: c, key: k}}"),
			"5:37: give one of vault, intermediate, files, cert-manager, spire"},
		"no issuer": {with("tls: terminate, issuer: {}"), "5:37: give one of"},
		"plaintext to Vault": {vault(`address: "http://vault:8200", token-file: t`),
			"want https://host:port, without a path; http only to a loopback address"},
		"a path to Vault": {vault(`address: "https://vault:8200/v1", token-file: t`), "want https://host:port"},
		"a user in a URL": {vault(`address: "https://u:p@vault:8200", token-file: t`), "want https://host:port"},
		"a mount that is none": {vault(`address: "https://vault:8200", token-file: t, mount: "../sys"`),
			"want the path of a"},
		"no login": {vault(`address: "https://vault:8200"`), "give one way to log in"},
		"two logins": {vault(`address: "https://vault:8200", token-file: t, kubernetes: {role: r}`),
			"give one way to log in"},
		"a leaf that lives too long": {with("tls: terminate, issuer: {intermediate: {cert: c, key: k, ttl: 48h}}"),
			"want a duration of up to 24h"},
		"certificates of nobody": {with(files + ", client-certificates: {required: true}"),
			"give ca, or spire: true"},
		"no agent for an SVID": {with("tls: terminate, issuer: {spire: {}}"), "5:12: SVIDs take a SPIRE agent"},
		"no agent for SVIDs of clients": {with(files + ", client-certificates: {spire: true}"),
			"5:12: SVIDs take a SPIRE agent"},
		"plaintext behind TLS": {"clusters: [{name: a, bootstrap: ['b.example:1'], clients: {tls: terminate, " +
			"issuer: {files: {cert: c, key: k}}}}]", "what clients encrypt would go on to the brokers in plaintext"},
	} {
		if _, err := load(t, c.text); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := load(t, "clusters: [{name: a, bootstrap: ['localhost:1', '127.0.0.1:2', '[::1]:3'], clients: {"+files+
		"}}]"); err != nil {
		t.Errorf("brokers on this host: %v", err)
	}
}
