package node

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/rs/zerolog"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"golang.org/x/sys/unix"

	"klamm/enforcer"
	"klamm/enforcer/audit"
	"klamm/enforcer/hello"
	"klamm/node/issuer"
	"klamm/node/secure"
	"klamm/spiffe"
)

// partTimeout is how long a refused client may take to read the alert and end.
const partTimeout = time.Second

// clients are how a cluster meets those that speak TLS to its brokers.
type clients struct {
	mode   TLSMode
	issuer issuer.Issuer // of TLSTerminate
	close  func() error
	certs  *ClientCertificatesConfig // nil: none is asked for
	agent  *spiffe.Agent             // nil: there is none
}

func openClients(c ClientsConfig, agent *spiffe.Agent, log zerolog.Logger) (*clients, error) {
	met := &clients{mode: c.TLS, certs: c.ClientCertificates, agent: agent, close: func() error { return nil }}
	if c.TLS != TLSTerminate {
		return met, nil
	}
	if _, err := met.authorities(); err != nil {
		return nil, err
	}
	var err error
	met.issuer, met.close, err = OpenIssuer(c.Issuer, agent, log)
	return met, err
}

// opening is what a client that speaks TLS said first.
type opening struct {
	hello.Hello
	read []byte // all that was read
}

// listen waits for what a client says first, and reads it where that is a ClientHello that matters: nil is Kafka, or
// TLS that the session refuses. A client may be silent for as long as it likes.
func (c *clients) listen(ctx context.Context, conn *net.TCPConn) (*opening, error) {
	if c.mode != TLSPassthrough && c.mode != TLSTerminate {
		return nil, nil
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	speaks, err := speaksTLS(conn)
	if err != nil || !speaks {
		return nil, err
	}
	h, read, err := hello.Read(conn)
	if err == nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return &opening{h, read}, err
}

// speaksTLS looks at the first bytes of a connection and leaves them there.
func speaksTLS(conn *net.TCPConn) (bool, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return false, err
	}
	var first [2]byte
	n, err := peek(raw.Read, first[:1])
	if err != nil || n == 0 || !hello.Is([2]byte{first[0], 3}) {
		return false, err
	}
	if err := conn.SetReadDeadline(time.Now().Add(hello.Timeout)); err != nil {
		return false, err
	}
	if n, err = peek(raw.Read, first[:]); err != nil {
		return false, err
	}
	return n == len(first) && hello.Is(first), conn.SetReadDeadline(time.Time{})
}

// peek waits for b to be full, or the end.
func peek(read func(func(fd uintptr) bool) error, b []byte) (n int, err error) {
	werr := read(func(fd uintptr) bool {
		n, _, err = unix.Recvfrom(int(fd), b, unix.MSG_PEEK)
		switch {
		case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINTR):
			return false
		case err != nil:
			err = os.NewSyscallError("recvfrom", err)
			return true
		}
		return n == 0 || n == len(b)
	})
	return max(n, 0), errors.Join(werr, err)
}

// refusal is why a client's TLS does not come about.
type refusal struct {
	reason audit.Reason
	err    error
}

func (r *refusal) Error() string { return r.err.Error() }
func (r *refusal) Unwrap() error { return r.err }

// met is a client whose TLS ends here.
type met struct {
	*secure.Conn
	evidence *spiffe.Evidence // its certificate; nil: it has none
}

// terminate ends a client's TLS, as the broker that it connected to. It takes no longer than hello.Timeout. An error is
// a *refusal; the client has heard an alert by then.
func (d Destination) terminate(ctx context.Context, conn *net.TCPConn, o *opening) (*met, error) {
	names := d.Names()
	if o.ServerName != "" && !names.Has(o.ServerName) {
		return nil, alert(conn, hello.UnrecognizedName, audit.TLSName,
			fmt.Errorf("the client asks for %s, the broker is %s", o.ServerName, strings.Join(names.Known, ", ")))
	}
	ctx, cancel := context.WithTimeout(ctx, hello.Timeout)
	defer cancel()
	leaf, err := d.leaf(ctx, o.ServerName, names)
	if err != nil {
		return nil, alert(conn, hello.InternalError, audit.TLSIssuer, err)
	}
	roots, err := d.clients.authorities()
	if err != nil {
		return nil, alert(conn, hello.InternalError, audit.TLSCertificate, err)
	}
	m := new(met)
	conf := &tls.Config{Certificates: []tls.Certificate{*leaf}, MinVersion: tls.VersionTLS12,
		SessionTicketsDisabled: true} // a session resumed would be that of who had a certificate then
	if d.clients.certs != nil {
		conf.ClientAuth, conf.ClientCAs = tls.VerifyClientCertIfGiven, roots.all
		if d.clients.certs.Required {
			conf.ClientAuth = tls.RequireAndVerifyClientCert
		}
		conf.VerifyConnection = func(s tls.ConnectionState) (err error) {
			m.evidence, err = d.clients.evidence(s, roots)
			return err
		}
	}
	m.Conn = secure.Server(conn, o.read, conf)
	if err := m.HandshakeContext(ctx); err != nil {
		partFrom(conn)
		return nil, &refusal{handshakeReason(err), fmt.Errorf("TLS with the client: %w", err)}
	}
	return m, nil
}

// partFrom closes a connection whose client has been sent an alert. Clients of TLS 1.3 speak before they read it, and
// to close a socket with bytes nobody read is a reset, also of what the client has not read yet (RFC 2525, section
// 2.17).
func partFrom(conn *net.TCPConn) {
	if conn.CloseWrite() == nil && conn.SetReadDeadline(time.Now().Add(partTimeout)) == nil {
		_, _ = io.CopyN(io.Discard, conn, hello.MaxSize) // its end is all it waits for
	}
	_ = conn.Close()
}

// alert tells the client why, and closes.
func alert(conn *net.TCPConn, a hello.Alert, reason audit.Reason, err error) error {
	_, werr := conn.Write(a.Bytes())
	return &refusal{reason, errors.Join(err, werr, conn.Close())}
}

// leaf is the certificate that a client is shown.
func (d Destination) leaf(ctx context.Context, server string, names hello.Names) (leaf *tls.Certificate, err error) {
	var errs []error
	for _, names := range leafNames(server, names, d.Address.Addr()) {
		if leaf, err = d.clients.issuer.Leaf(ctx, names); err == nil {
			return leaf, nil
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}

// leafNames are those that the certificate for a client must have: the one it asks for, or else all by which it can
// have been told of the broker without asking for a name. Where nobody signs for them all, some must do.
func leafNames(server string, names hello.Names, addr netip.Addr) [][]string {
	if server != "" {
		return [][]string{{server}}
	}
	if names.ByAddress {
		return [][]string{{addr.String()}}
	}
	var addresses, short []string
	for _, name := range names.Known {
		if _, err := netip.ParseAddr(name); err == nil {
			addresses = append(addresses, name)
		} else if !strings.Contains(name, ".") {
			short = append(short, name)
		}
	}
	switch {
	case len(addresses) == 0 && len(short) == 0:
		return [][]string{names.Known}
	case len(addresses) == 0 || len(short) == 0:
		return [][]string{append(addresses, short...)}
	}
	return [][]string{slices.Concat(addresses, short), addresses, short}
}

// authorities are whose certificates of clients count.
type authorities struct {
	all   *x509.CertPool
	files *x509.CertPool
}

// authorities reads the files, and asks the agent.
func (c *clients) authorities() (authorities, error) {
	a := authorities{x509.NewCertPool(), x509.NewCertPool()}
	if c.certs == nil {
		return a, nil
	}
	for _, file := range c.certs.CA {
		text, err := os.ReadFile(file)
		if err != nil {
			return a, fmt.Errorf("read client-certificates.ca: %w", err)
		}
		if !a.files.AppendCertsFromPEM(text) {
			return a, fmt.Errorf("client-certificates.ca: no PEM certificate in %s", file)
		}
		a.all.AppendCertsFromPEM(text)
	}
	if c.certs.SPIRE && c.agent != nil {
		for _, root := range c.agent.Authorities() {
			a.all.AddCert(root)
		}
	}
	return a, nil
}

// evidence is what a certificate says that was verified; nil where there is none. An SVID names a SPIFFE ID where its
// own trust domain's bundle says so, whatever else it is signed by.
func (c *clients) evidence(s tls.ConnectionState, roots authorities) (*spiffe.Evidence, error) {
	if len(s.PeerCertificates) == 0 {
		return nil, nil
	}
	leaf := s.PeerCertificates[0]
	e := &spiffe.Evidence{Source: spiffe.SourceTLS, Subject: leaf.Subject.String(), Issuer: leaf.Issuer.String(),
		Expires: leaf.NotAfter}
	var unknown error
	if c.certs.SPIRE && c.agent != nil {
		id, _, err := x509svid.Verify(s.PeerCertificates, c.agent)
		if err == nil && id.Path() != "" {
			e.ID = id
			return e, nil
		}
		unknown = err
	}
	opts := x509.VerifyOptions{Roots: roots.files, Intermediates: x509.NewCertPool(),
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	for _, above := range s.PeerCertificates[1:] {
		opts.Intermediates.AddCert(above)
	}
	if _, err := leaf.Verify(opts); err != nil {
		return nil, &tls.CertificateVerificationError{UnverifiedCertificates: s.PeerCertificates,
			Err: errors.Join(err, unknown)}
	}
	return e, nil
}

// Alerts by which clients refuse a certificate (RFC 8446, section 6.2): bad, unsupported, expired, unknown, unknown CA.
// Java has certificate_unknown for all that it does not trust.
var distrust = []tls.AlertError{42, 43, 45, 46, 48}

// noCertificate is what crypto/tls says of a client that must have one.
const noCertificate = "client didn't provide a certificate"

func handshakeReason(err error) audit.Reason {
	var op *net.OpError
	var unverified *tls.CertificateVerificationError
	switch {
	case errors.As(err, &unverified), strings.Contains(err.Error(), noCertificate):
		return audit.TLSCertificate
	case errors.As(err, &op) && op.Op == "remote error" && slices.ContainsFunc(distrust, func(a tls.AlertError) bool {
		return a.Error() == op.Err.Error()
	}):
		return audit.TLSUntrusted
	}
	return audit.TLSHandshake
}

// named is the destination as the broker of this name, where only its network is known, and the name is one of the
// cluster's.
func (d Destination) named(server string) Destination {
	if !d.Confirmed && server != "" && slices.Contains(d.Names().Known, server) {
		d.Broker = net.JoinHostPort(server, fmt.Sprint(d.Address.Port()))
	}
	return d
}

// pass lets a client's TLS pass unread, where the policy allows it.
func (n *Node) pass(ctx context.Context, client enforcer.Client, conn, broker *net.TCPConn, workload *spiffe.Attested,
	d Destination, o *opening) {
	err := n.enforcer.Passthrough(ctx, enforcer.Opaque{Client: client, Downstream: conn, Upstream: broker,
		Workload: workload, Hello: o.Hello, Read: o.read, Names: d.Names()})
	if err != nil {
		n.log.Debug().Err(err).Str("conn", client.ID).Msg("opaque connection ended")
	}
}

// terminate ends a client's TLS, and enforces policy on what is said inside.
func (n *Node) terminate(ctx context.Context, client enforcer.Client, conn, broker *net.TCPConn,
	workload *spiffe.Attested, d Destination, o *opening) {
	m, err := d.terminate(ctx, conn, o)
	var refused *refusal
	if errors.As(err, &refused) {
		_ = broker.Close()
		n.refuse(client, refused.reason, refused)
		return
	}
	c := &enforcer.Conn{Client: client, Downstream: m.Conn, Workload: workload}
	if m.evidence != nil {
		joined := spiffe.Join(workload, *m.evidence)
		defer joined.Release()
		c.Identity, c.Workload = *joined.Identity(), joined
	}
	n.enforce(ctx, d.named(o.ServerName), broker, c, workload)
}
