package issuer

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"net"
	"slices"
	"strings"
	"sync"
	"time"
)

// MaxLife is the longest life of a leaf that is issued here.
const MaxLife = 24 * time.Hour

// skew is how far a client's clock may be behind.
const skew = time.Minute

// Intermediate is a CA below the clusters' own that signs leaves in memory. Its certificate confines it to the brokers'
// names, or whoever takes its key can be any server.
type Intermediate struct {
	cert, key string
	life      time.Duration

	mu    sync.Mutex
	ca    *authority
	stamp string
}

type authority struct {
	chain []*x509.Certificate // the CA first
	key   crypto.Signer
}

// NewIntermediate reads a CA's certificate with its chain, and its key; anew when they have changed. Its leaves live
// for as long as life, 24 hours at most.
func NewIntermediate(cert, key string, life time.Duration) (*Intermediate, error) {
	i := &Intermediate{cert: cert, key: key, life: life}
	_, err := i.current()
	return i, err
}

// Leaf signs a certificate.
func (i *Intermediate) Leaf(_ context.Context, names []string) (*tls.Certificate, error) {
	ca, err := i.current()
	if err != nil {
		return nil, failed(i.cert, names, err)
	}
	c, err := ca.sign(names, i.life)
	if err != nil {
		return nil, failed(i.cert, names, err)
	}
	return c, nil
}

func (i *Intermediate) current() (*authority, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	now := stamp(i.cert, i.key)
	if i.ca != nil && now == i.stamp {
		return i.ca, nil
	}
	ca, err := readAuthority(i.cert, i.key)
	if err != nil {
		return nil, err
	}
	i.ca, i.stamp = ca, now
	return ca, nil
}

func readAuthority(cert, key string) (*authority, error) {
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		return nil, fmt.Errorf("load the CA of %s and %s: %w", cert, key, err)
	}
	chain, err := parse(pair.Certificate)
	if err != nil {
		return nil, err
	}
	signer, ok := pair.PrivateKey.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("%s: a key of type %T", key, pair.PrivateKey)
	}
	if err := confined(chain[0]); err != nil {
		return nil, fmt.Errorf("%s: %w", cert, err)
	}
	return &authority{chain, signer}, nil
}

// ErrUnconfined says that a CA may sign for more than brokers.
var ErrUnconfined = errors.New("this CA is not confined to the brokers' names")

// confined tells whether a CA may be trusted to a node: it can sign for the brokers' names and for no other server.
func confined(ca *x509.Certificate) error {
	if !ca.IsCA || ca.KeyUsage != 0 && ca.KeyUsage&x509.KeyUsageCertSign == 0 {
		return errors.New("it is not the certificate of a CA")
	}
	if isRoot(ca) {
		return fmt.Errorf("%w: it is a root, whose constraints clients do not look at: use an intermediate below it",
			ErrUnconfined)
	}
	const how = `: issue it with the extension nameConstraints=critical,permitted;DNS:kafka.example,` +
		`excluded;IP:0.0.0.0/0.0.0.0,excluded;IP:0:0:0:0:0:0:0:0/0:0:0:0:0:0:0:0 (or permit the brokers' networks)`
	if len(ca.PermittedDNSDomains) == 0 {
		return fmt.Errorf("%w: its certificate permits every DNS name%s", ErrUnconfined, how)
	}
	for _, domain := range ca.PermittedDNSDomains {
		if !strings.Contains(strings.Trim(domain, "."), ".") {
			return fmt.Errorf("%w: its certificate permits %q, which is a whole top-level domain%s", ErrUnconfined, domain, how)
		}
	}
	if len(ca.PermittedIPRanges) == 0 && !excludesAll(ca.ExcludedIPRanges) {
		return fmt.Errorf("%w: its certificate permits every IP address%s", ErrUnconfined, how)
	}
	if slices.ContainsFunc(ca.PermittedIPRanges, isAll) {
		return fmt.Errorf("%w: its certificate permits every IP address of a family%s", ErrUnconfined, how)
	}
	return nil
}

func isAll(n *net.IPNet) bool { ones, _ := n.Mask.Size(); return ones == 0 }

func excludesAll(networks []*net.IPNet) bool {
	four, six := false, false
	for _, n := range networks {
		four = four || isAll(n) && len(n.Mask) == net.IPv4len
		six = six || isAll(n) && len(n.Mask) == net.IPv6len
	}
	return four && six
}

func (a *authority) sign(names []string, life time.Duration) (*tls.Certificate, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, err
	}
	key, err := newKey()
	if err != nil {
		return nil, err
	}
	now := time.Now()
	template := &x509.Certificate{SerialNumber: serial.Add(serial, big.NewInt(1)),
		Subject: pkix.Name{CommonName: commonName(names)}, NotBefore: now.Add(-skew), NotAfter: now.Add(min(life, MaxLife)),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	if end := a.chain[0].NotAfter; template.NotAfter.After(end) {
		template.NotAfter = end
	}
	template.DNSNames, template.IPAddresses = split(names)
	der, err := x509.CreateCertificate(rand.Reader, template, a.chain[0], key.Public(), a.key)
	if err != nil {
		return nil, err
	}
	c := &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	for _, above := range a.chain {
		if !isRoot(above) {
			c.Certificate = append(c.Certificate, above.Raw)
		}
	}
	if err := check(c, names, now); err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AddCert(a.chain[0])
	_, err = c.Leaf.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: now})
	return c, err // its constraints, too
}
