package audit

// Reason says why a connection or a request was refused. Each is counted and audited under this name.
type Reason string

// The reasons.
const (
	NoIdentity         Reason = "identity"           // who connected could not be established
	NoCluster          Reason = "no_cluster"         // the destination belongs to no configured cluster
	BrokerUnreachable  Reason = "broker_unreachable" // the dial to the original destination failed
	UpstreamTLS        Reason = "upstream_tls"       // the broker is not who it should be, or refuses our certificate
	UpstreamLogin      Reason = "upstream_login"     // the node's login at the broker failed, or its renewal
	NoSVID             Reason = "no_svid"            // the broker is to see the workload's SVID, and it has none
	TooManyConnections Reason = "too_many_connections"
	NotEnrolled        Reason = "not_enrolled"        // refused in the kernel: nobody listens in its network namespace yet
	EnforcerDown       Reason = "enforcer_down"       // refused in the kernel: the node did not run, or hung
	KernelFailed       Reason = "kernel"              // refused in the kernel: it could not make the record of the connect
	Older              Reason = "older_connection"    // ended, for it was there before the node
	Bypass             Reason = "bypass"              // refused in the kernel: something tried to go around the node
	Tampered           Reason = "tampered"            // the node's programs or rules were taken away, and put back
	TLSRefused         Reason = "tls"                 // the client speaks TLS, which cannot be read
	TLSName            Reason = "tls_name"            // the client asks in TLS for a name that is none of the broker's
	TLSUntrusted       Reason = "tls_untrusted"       // the client does not trust the certificate it is shown
	TLSCertificate     Reason = "tls_certificate"     // the client's own certificate is not accepted, or missing
	TLSIssuer          Reason = "tls_issuer"          // there is no certificate to show for the broker's name
	TLSHandshake       Reason = "tls_handshake"       // the client's TLS did not come about for another reason
	BadFrame           Reason = "bad_frame"           // not a Kafka frame, or larger than the limit
	UnknownAPI         Reason = "unknown_api"         // an API key nobody knows
	UnsupportedVersion Reason = "unsupported_version" // an API key or version we do not decide
	Undecodable        Reason = "undecodable"         // the body does not parse as what the header says
	Denied             Reason = "denied"              // the policy refuses it, and no answer can say so
	IdentityLost       Reason = "identity_lost"       // nobody, or nobody known, is behind the connection any more
	IdentityChanged    Reason = "identity_changed"    // somebody else is behind the connection than before
	SessionExpired     Reason = "session_expired"     // the SASL session or its token ended, and was not renewed (KIP-368)
	LoginRefused       Reason = "login"               // a SASL login that the policy, or we, refuse
	OutOfMemory        Reason = "memory"              // the memory budget has no room for the frame
	BadAnswer          Reason = "bad_answer"          // the broker's answer is none to what was asked
	AuditFailed        Reason = "audit"               // the audit line could not be written
	Internal           Reason = "internal"            // a defect of ours; the connection is closed, nothing passes
)

// Reasons are all reasons with what an operator can do, for the audit line and the counters.
var Reasons = map[Reason]string{
	NoIdentity:         "the process ended or changed while it was identified; a client that retries is identified anew",
	NoCluster:          "if this is a broker of yours, add it under clusters in klamm.yaml",
	BrokerUnreachable:  "check the broker and the route to it from this host",
	UpstreamTLS:        "see upstream.tls in klamm.yaml, and the broker's certificate; klamm doctor broker tries it",
	UpstreamLogin:      "see upstream.login in klamm.yaml, and the broker's log; klamm doctor broker tries it",
	NoSVID:             "give the workload an entry in SPIRE; klamm status says whether the agent is reached",
	TooManyConnections: "raise limits.connections in klamm.yaml, or find the client that opens them",
	NotEnrolled:        "nothing to do if it is the only one of its container; else the node's log says why",
	EnforcerDown:       "see why the node was down; clients retry",
	KernelFailed:       "look at net.core.optmem_max and at the memory of the host",
	Older:              "nothing to do: the client connects anew, through the node",
	Bypass:             "find out who runs there: no Kafka client does this",
	Tampered:           "find out who has root's rights on this host, and uses them",
	TLSRefused: "set clients.tls of the cluster in klamm.yaml (klamm doctor tls tells which mode works for whom), or " +
		"let the client speak plaintext to the node",
	TLSName: "let the client use a name of bootstrap or one the brokers advertise, or add its name to clients.names of " +
		"the cluster in klamm.yaml",
	TLSUntrusted:       "the client's truststore does not have the issuer: see klamm doctor tls",
	TLSCertificate:     "look at the client's certificate; client-certificates in klamm.yaml says what is accepted",
	TLSIssuer:          "see what the issuer says; clients.issuer of the cluster in klamm.yaml says who it is",
	TLSHandshake:       "the client speaks no TLS 1.2 or later, or something that is not Kafka over TLS",
	BadFrame:           "the client does not speak Kafka, or sends frames above limits.max-frame",
	UnknownAPI:         "the client uses an API key that Kafka does not have; nothing to do",
	UnsupportedVersion: "the client ignored ApiVersions; upgrade it or the node",
	Undecodable:        "the client's request is malformed; look for a proxy or a bug on its side",
	Denied:             "grant it in the policy if it is wanted; klamm policy explain tells which rule is missing",
	IdentityLost:       "nothing to do if its process ended; else see why its identity sources do not know it any more",
	IdentityChanged:    "nothing to do if its entry was changed on purpose; the client connects anew, as who it is now",
	SessionExpired:     "let the client log in again in time (KIP-368), or let its tokens live longer",
	LoginRefused:       "allow it under connections in the policy if it is wanted; or look at the client's credentials",
	OutOfMemory:        "raise limits.memory in klamm.yaml, or lower the clients' request and fetch sizes",
	BadAnswer:          "the broker's answer does not match the request; look at what is between the node and the broker",
	AuditFailed:        "make room for, or repair, the audit destination; nothing passes without its audit line",
	Internal:           "please report it, with the audit line",
}
