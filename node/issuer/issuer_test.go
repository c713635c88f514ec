package issuer

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

func TestOnlyACertificateThatClientsTakeIsShown(t *testing.T) {
	ca := root(t)
	between := ca.make(t, authorityOf)
	good := between.make(t, named("broker-1.example"))
	other := ca.make(t, named("broker-1.example"))
	for what, c := range map[string]struct {
		leaf  *signer
		key   *signer
		chain []*signer
		want  string
	}{
		"a whole one":         {leaf: good, chain: []*signer{between}},
		"one without a chain": {leaf: other},
		"another name":        {leaf: ca.make(t, named("broker-2.example")), want: "not for broker-1.example"},
		"an expired one": {leaf: ca.make(t, func(c *x509.Certificate) {
			named("broker-1.example")(c)
			c.NotAfter = time.Now().Add(-time.Minute)
		}), want: "expired at"},
		"one of tomorrow": {leaf: ca.make(t, func(c *x509.Certificate) {
			named("broker-1.example")(c)
			c.NotBefore = time.Now().Add(time.Minute)
		}), want: "not valid before"},
		"a client's": {leaf: ca.make(t, func(c *x509.Certificate) {
			named("broker-1.example")(c)
			c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
		}), want: "not for servers"},
		"another key":         {leaf: good, key: other, chain: []*signer{between}, want: "key is not the certificate's"},
		"a chain of another":  {leaf: other, chain: []*signer{between}, want: "the chain is broken"},
		"a chain out of turn": {leaf: good, chain: []*signer{ca, between}, want: "the chain is broken"},
	} {
		key := c.leaf
		if c.key != nil {
			key = c.key
		}
		shown := &tls.Certificate{PrivateKey: key.key, Certificate: [][]byte{c.leaf.cert.Raw}}
		for _, above := range c.chain {
			shown.Certificate = append(shown.Certificate, above.cert.Raw)
		}
		err := check(shown, []string{"broker-1.example"}, time.Now())
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestFilesAreReadAnewWhenTheyChange(t *testing.T) {
	ca := root(t)
	first, second := ca.make(t, named("broker-1.example")), ca.make(t, named("broker-1.example", "broker-2.example"))
	cert, key := first.files(t)
	var log strings.Builder
	f, err := NewFiles(cert, key, zerolog.New(&log))
	if err != nil {
		t.Fatal(err)
	}
	want := func(s *signer) {
		t.Helper()
		c, err := f.Leaf(t.Context(), []string{"broker-1.example"})
		if err != nil || !c.Leaf.Equal(s.cert) {
			t.Errorf("the certificate is another one; %v", err)
		}
	}
	want(first)
	if _, err := f.Leaf(t.Context(), []string{"broker-2.example"}); err == nil || !strings.Contains(err.Error(), cert) {
		t.Errorf("for another name: %v", err)
	}
	write(t, cert, text(second))
	want(first) // the key is not written yet
	want(first)
	if n := strings.Count(log.String(), "not usable"); n != 1 {
		t.Errorf("it was told %d times: %s", n, &log)
	}
	write(t, key, second.keyText(t))
	want(second)
	if err := os.Remove(cert); err != nil {
		t.Fatal(err)
	}
	want(second)
}

func TestWhatIsWrongWithFilesAtTheStartIsAnError(t *testing.T) {
	ca := root(t)
	leaf := ca.make(t, named("broker-1.example"))
	cert, key := leaf.files(t)
	_, otherKey := ca.make(t, named("broker-1.example")).files(t)
	expired, expiredKey := ca.make(t, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }).files(t)
	for what, c := range map[string]struct{ cert, key, want string }{
		"no file":     {cert + ".none", key, "no such file"},
		"another key": {cert, otherKey, "private key does not match"},
		"an old one":  {expired, expiredKey, "expired at"},
	} {
		if _, err := NewFiles(c.cert, c.key, zerolog.Nop()); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// mount writes a secret as kubelet mounts it, and shows it in place of the one before by one rename.
func mount(t *testing.T, dir, version string, leaf, ca *signer) {
	t.Helper()
	at := filepath.Join(dir, version)
	if err := os.Mkdir(at, 0o700); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(at, "tls.crt"), text(leaf))
	write(t, filepath.Join(at, "tls.key"), leaf.keyText(t))
	write(t, filepath.Join(at, "ca.crt"), text(ca))
	next := filepath.Join(dir, "..data_tmp")
	if err := errors.Join(os.Symlink(version, next), os.Rename(next, filepath.Join(dir, "..data"))); err != nil {
		t.Fatal(err)
	}
}

func TestACertManagerSecretIsFollowedAsKubeletMountsIt(t *testing.T) {
	ca, dir := root(t), t.TempDir()
	leaves := make([]*signer, 3)
	for i := range leaves {
		leaves[i] = ca.make(t, named("broker-1.example"))
	}
	mount(t, dir, "..first", leaves[0], ca)
	f, err := NewCertManager(dir, zerolog.Nop())
	if err != nil {
		t.Fatal(err)
	}
	want := func(s *signer) {
		t.Helper()
		c, err := f.Leaf(t.Context(), []string{"broker-1.example"})
		if err != nil || !c.Leaf.Equal(s.cert) {
			t.Errorf("the certificate is another one; %v", err)
		}
	}
	want(leaves[0])
	mount(t, dir, "..second", leaves[1], ca)
	want(leaves[1])
	mount(t, dir, "..third", leaves[2], root(t)) // of another CA than ca.crt says
	want(leaves[1])
}

func TestAnIntermediateSignsWhatItIsConfinedTo(t *testing.T) {
	ca := root(t)
	between := ca.make(t, confinedTo("kafka.example"))
	cert, key := between.files(t, ca)
	i, err := NewIntermediate(cert, key, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	names := []string{"broker-1.kafka.example", "broker-1.az-a.kafka.example"}
	c, err := i.Leaf(t.Context(), names)
	if err != nil {
		t.Fatal(err)
	}
	wantTrusted(t, c, ca, names...)
	if len(c.Certificate) != 2 {
		t.Errorf("the chain has %d certificates, not the leaf and the intermediate", len(c.Certificate))
	}
	if life := time.Until(c.Leaf.NotAfter); life > time.Hour {
		t.Errorf("it lives for %v", life)
	}
	for _, name := range []string{"broker-1.other.example", "192.0.2.1", "2001:db8::1"} {
		if _, err := i.Leaf(t.Context(), []string{name}); err == nil || !strings.Contains(err.Error(), cert) {
			t.Errorf("for %s: %v", name, err)
		}
	}
	// Its own end is that of its leaves.
	short := ca.make(t, func(c *x509.Certificate) {
		confinedTo("kafka.example")(c)
		c.NotAfter = time.Now().Add(time.Minute)
	})
	cert, key = short.files(t)
	if i, err = NewIntermediate(cert, key, time.Hour); err != nil {
		t.Fatal(err)
	}
	if c, err = i.Leaf(t.Context(), names); err != nil || !c.Leaf.NotAfter.Equal(short.cert.NotAfter) {
		t.Errorf("it outlives its CA; %v", err)
	}
}

func TestAnUnconfinedAuthorityIsRefused(t *testing.T) {
	ca := root(t)
	all := &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}
	for what, c := range map[string]struct {
		cert *signer
		want string
	}{
		"no constraint":      {ca.make(t, authorityOf), "every DNS name"},
		"a top-level domain": {ca.make(t, confinedTo("kafka.example", ".com")), `permits ".com"`},
		"every address": {ca.make(t, func(c *x509.Certificate) {
			confinedTo("kafka.example")(c)
			c.ExcludedIPRanges = c.ExcludedIPRanges[:1]
		}), "every IP address"},
		"every IPv4 address": {ca.make(t, func(c *x509.Certificate) {
			confinedTo("kafka.example")(c)
			c.PermittedIPRanges = []*net.IPNet{all}
		}), "every IP address of a family"},
		"a root": {(*signer)(nil).make(t, confinedTo("kafka.example")), "it is a root"},
		"no CA":  {ca.make(t, named("broker-1.kafka.example")), "not the certificate of a CA"},
	} {
		cert, key := c.cert.files(t)
		if _, err := NewIntermediate(cert, key, time.Hour); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if cert, key := ca.make(t, func(c *x509.Certificate) {
		confinedTo("kafka.example")(c)
		c.ExcludedIPRanges = nil
		c.PermittedIPRanges = []*net.IPNet{{IP: net.IPv4(10, 1, 0, 0).To4(), Mask: net.CIDRMask(16, 32)}}
	}).files(t); cert != "" {
		if _, err := NewIntermediate(cert, key, time.Hour); err != nil {
			t.Errorf("the brokers' networks: %v", err)
		}
	}
}

func TestAnSVIDIsShownWhereItHasTheBrokersNames(t *testing.T) {
	ca := root(t)
	leaf := ca.make(t, named("broker-1.example"))
	id := spiffeid.RequireFromString("spiffe://example.test/klamm")
	svid := SVID{func() (*x509svid.SVID, error) {
		return &x509svid.SVID{ID: id, Certificates: []*x509.Certificate{leaf.cert}, PrivateKey: leaf.key}, nil
	}}
	c, err := svid.Leaf(t.Context(), []string{"broker-1.example"})
	if err != nil {
		t.Fatal(err)
	}
	wantTrusted(t, c, ca, "broker-1.example")
	if _, err := svid.Leaf(t.Context(), []string{"broker-2.example"}); err == nil ||
		!strings.Contains(err.Error(), "-dns") {
		t.Errorf("for another name: %v", err)
	}
	svid.Fetch = func() (*x509svid.SVID, error) { return nil, fmt.Errorf("the agent is gone") }
	if _, err := svid.Leaf(t.Context(), []string{"broker-1.example"}); err == nil {
		t.Error("without an agent there is a certificate")
	}
}
