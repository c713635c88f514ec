// Package upstream is the way from the node to the brokers of a cluster: TLS verified against who they are said to be,
// and certificates and logins on behalf of workloads.
package upstream

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// Why a connection to a broker is no good; each error of Open is one of these. In TLS 1.3 a broker tells after the
// handshake that it does not take the certificate it was shown: then a read of the connection is ErrTLS.
var (
	ErrTLS    = errors.New("no trusted TLS connection")
	ErrLogin  = errors.New("not logged in")
	ErrNoSVID = errors.New("nothing to prove who the workload is")
)

// Identity hands out SVIDs: of a workload (spiffe.Attested), or of the node itself.
type Identity interface {
	X509SVID() (*x509svid.SVID, error)
	JWTSVID(ctx context.Context, audience string) (token string, expires time.Time, err error)
}

// Options say how the brokers of a cluster are reached. The zero value is plaintext.
type Options struct {
	TLS   *TLS         // nil: plaintext
	Login *Credentials // nil: the node does not log in
	Node  Identity     // the node's own; nil: it has none
	// Dial opens connections to token endpoints.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

// Upstream is the way to the brokers of one cluster. Safe for concurrent use.
type Upstream struct {
	tls    *verifier
	login  *Credentials
	node   Identity
	tokens *tokens // of Credentials.TokenURL
}

// New checks what can be checked before a broker is dialled: that files can be read, and hold what they should.
func New(o Options) (*Upstream, error) {
	u := &Upstream{login: o.Login, node: o.Node}
	if o.TLS != nil {
		var err error
		if u.tls, err = newVerifier(o.TLS); err != nil {
			return nil, err
		}
	}
	if o.Login != nil {
		if err := o.Login.check(); err != nil {
			return nil, err
		}
		u.tokens = newTokens(o.Login, o.Dial)
	}
	return u, nil
}

// Dialer makes the connections of a client of the node's own, on behalf of who. The broker is verified by the name
// dialled.
func (u *Upstream) Dialer(dial func(ctx context.Context, network, address string) (net.Conn, error), who Identity,
) func(ctx context.Context, network, address string) (net.Conn, error) {
	if u.tls == nil {
		return dial
	}
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := dial(ctx, network, address)
		if err != nil {
			return nil, err
		}
		secure, err := u.tls.handshake(ctx, conn, address, u.subject(who))
		if err != nil {
			return nil, errors.Join(fmt.Errorf("broker %s: %w", address, err), conn.Close())
		}
		return secure, nil
	}
}

// Broker is a connection to a broker that was verified, and told what there is to tell.
type Broker struct {
	net.Conn
	Login *Login // nil: the node does not log in

	who  Identity
	svid *x509svid.SVID // that the broker was shown, or whose JWT-SVID it was; nil where it knows nothing of the workload
}

// Open makes a dialled connection one to a broker, on behalf of who. Name is host:port of the broker as the cluster has
// it: the certificate must be for it, unless another name is configured. An error closes the connection, on which no
// byte of a client was sent. It takes no longer than ctx, which should have a deadline.
func (u *Upstream) Open(ctx context.Context, conn net.Conn, name string, who Identity) (*Broker, error) {
	b := &Broker{Conn: conn}
	deadline, _ := ctx.Deadline()
	err := conn.SetDeadline(deadline)
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	if err == nil {
		err = u.open(ctx, b, name, who)
	}
	if stop() && err == nil {
		err = conn.SetDeadline(time.Time{})
	}
	if err == nil {
		err = context.Cause(ctx)
	}
	if err == nil {
		return b, nil
	}
	if b.Login == nil { // whose errors say it themselves
		err = fmt.Errorf("broker %s: %w", name, err)
	}
	return nil, errors.Join(err, conn.Close())
}

func (u *Upstream) open(ctx context.Context, b *Broker, name string, who Identity) error {
	if err := u.identify(b, who); err != nil {
		return err
	}
	if u.tls != nil {
		conn, err := u.tls.handshake(ctx, b.Conn, name, u.subject(who))
		if err != nil {
			return err
		}
		if b.Conn = conn; u.tls.Certificate == Workload && !conn.shown {
			return fmt.Errorf("%w: the broker asks for no certificate, so it does not learn who the workload is "+
				"(Kafka: ssl.client.auth=required)", ErrTLS)
		}
	}
	if u.login != nil {
		b.Login = &Login{mechanism: u.login.mechanism(who, u.tokens), broker: name}
		return b.Login.Exchange(ctx, caller(b.Conn))
	}
	return nil
}

// identify notes as whom the broker will know the workload.
func (u *Upstream) identify(b *Broker, who Identity) (err error) {
	byCertificate := u.tls != nil && u.tls.Certificate == Workload
	if !byCertificate && (u.login == nil || u.login.Audience == "") {
		return nil
	}
	if b.who = who; who == nil {
		return ErrNoSVID
	}
	if b.svid, err = who.X509SVID(); err != nil {
		return fmt.Errorf("%w: %w", ErrNoSVID, err)
	}
	return nil
}

// subject is whose certificate is shown.
func (u *Upstream) subject(who Identity) Identity {
	if u.tls.Certificate == Node {
		return u.node
	}
	return who
}

// Probe asks for the broker's ApiVersions, for diagnosis. A broker answers them once to who has not logged in yet
// (SaslServerAuthenticator), so a client's own would be one too many.
func (b *Broker) Probe(ctx context.Context) error {
	deadline, _ := ctx.Deadline()
	if err := b.SetDeadline(deadline); err != nil {
		return err
	}
	_, err := caller(b.Conn)(kmsg.NewPtrApiVersionsRequest())
	return err
}

// AsWorkload tells whether the broker knows the workload by its SVID.
func (b *Broker) AsWorkload() bool { return b.svid != nil }

// String says what was agreed on, for diagnosis.
func (b *Broker) String() string {
	said := []string{"plaintext"}
	if secure, is := b.Conn.(*secured); is {
		state := secure.ConnectionState()
		said[0] = fmt.Sprintf("%s with %s", tls.VersionName(state.Version), state.PeerCertificates[0].Subject)
	}
	if b.svid != nil {
		said = append(said, "on behalf of "+b.svid.ID.String())
	}
	if b.Login != nil {
		said = append(said, "logged in by "+b.Login.mechanism.Name())
	}
	return strings.Join(said, ", ")
}

// Current tells whether the broker still knows the workload as who it is: nil, or why not. An SVID that was replaced by
// one of the same SPIFFE ID and subject is as good, for Kafka takes no more than these from it.
func (b *Broker) Current() error {
	if b.svid == nil {
		return nil
	}
	now, err := b.who.X509SVID()
	if err != nil {
		return fmt.Errorf("%w any more: %w", ErrNoSVID, err)
	}
	was, is := b.svid.Certificates[0].Subject.String(), now.Certificates[0].Subject.String()
	if now.ID != b.svid.ID || was != is {
		return fmt.Errorf("%w any more: it was %s (%s) and is %s (%s)", ErrNoSVID, b.svid.ID, was, now.ID, is)
	}
	return nil
}
