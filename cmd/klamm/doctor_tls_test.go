package main

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pavlo-v-chernykh/keystore-go/v4"

	"klamm/test/ca"
)

// tlsBroker is a server that shows a certificate, and the files of who may trust it.
type tlsBroker struct {
	t                *testing.T
	dir              string
	address          string
	brokers, cluster *ca.Authority
}

func startTLSBroker(t *testing.T, clientAuth tls.ClientAuthType) *tlsBroker {
	t.Helper()
	b := &tlsBroker{t: t, dir: t.TempDir()}
	var err error
	if b.brokers, err = ca.New("brokers"); err == nil {
		b.cluster, err = ca.New("cluster")
	}
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := b.brokers.Issue(ca.Leaf{Names: []string{"localhost"}})
	if err != nil {
		t.Fatal(err)
	}
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{*leaf}, ClientAuth: clientAuth,
		MinVersion: tls.VersionTLS12})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_ = conn.(*tls.Conn).Handshake() // who looks at the certificate goes away
			_ = conn.Close()
		}
	}()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	b.address = "localhost:" + port
	return b
}

func (b *tlsBroker) file(name string, text []byte) string {
	b.t.Helper()
	file := filepath.Join(b.dir, name)
	if err := os.WriteFile(file, text, 0o600); err != nil {
		b.t.Fatal(err)
	}
	return file
}

func (b *tlsBroker) jks(name string, a *ca.Authority, password string) string {
	b.t.Helper()
	store := keystore.New()
	var out bytes.Buffer
	err := store.SetTrustedCertificateEntry("ca", keystore.TrustedCertificateEntry{CreationTime: time.Now(),
		Certificate: keystore.Certificate{Type: "X509", Content: a.Certificate.Raw}})
	if err == nil {
		err = store.Store(&out, []byte(password))
	}
	if err != nil {
		b.t.Fatal(err)
	}
	return b.file(name, out.Bytes())
}

// config is one by which the cluster's own CA signs for the node.
func (b *tlsBroker) config() string {
	b.t.Helper()
	leaf, err := b.cluster.Issue(ca.Leaf{Names: []string{"localhost"}})
	if err != nil {
		b.t.Fatal(err)
	}
	cert, key := filepath.Join(b.dir, "leaf.pem"), filepath.Join(b.dir, "key.pem")
	if err := ca.Write(leaf, cert, key); err != nil {
		b.t.Fatal(err)
	}
	return b.file("klamm.yaml", fmt.Appendf(nil, "clusters: [{name: main, bootstrap: [%q], clients: {tls: terminate, "+
		"issuer: {files: {cert: %s, key: %s}}}}]", b.address, cert, key))
}

func (b *tlsBroker) doctor(args ...string) (int, tlsReport) {
	b.t.Helper()
	code, out, errOut := inProcess(b.t, append([]string{"doctor", "tls", b.address, "-o", "json"}, args...)...)
	var r tlsReport
	if err := json.Unmarshal(out, &r); err != nil {
		b.t.Fatalf("%v\n%s%s", err, out, errOut)
	}
	return code, r
}

func TestTheDoctorSaysWhichModeOfTLSWorksForWhom(t *testing.T) {
	b := startTLSBroker(t, tls.NoClientCert)
	both := append(b.brokers.PEM(), b.cluster.PEM()...)
	stores := map[string][]string{ // file to what works
		b.file("brokers.pem", b.brokers.PEM()):          {"passthrough"},
		b.jks("cluster.jks", b.cluster, "store-secret"): {"terminate"},
		b.file("both.pem", both):                        {"passthrough", "terminate"},
	}
	args := []string{"-c", b.config(), "--storepass-file", b.file("pass", []byte("store-secret\n"))}
	for file := range stores {
		args = append(args, "--truststore", file)
	}
	code, r := b.doctor(args...)
	if code != 1 || r.Mode != "terminate" || r.Public || r.Issuer != "CN=brokers" || r.NodeIssuer != "CN=cluster" ||
		!slices.Equal(r.Names, []string{"localhost"}) || len(r.Stores) != len(stores) {
		t.Errorf("exit code %d, %+v", code, r)
	}
	for _, s := range r.Stores {
		if !slices.Equal(s.Works, stores[s.File]) || len(s.WhyNot) != 2-len(s.Works) {
			t.Errorf("%+v, not %v", s, stores[s.File])
		}
	}
	if code, r := b.doctor("-c", b.config(), "--truststore", b.file("both.pem", both)); code != 0 {
		t.Errorf("where all is well: exit code %d, %+v", code, r)
	}
}

func TestWithoutAnIssuerTheDoctorSaysSo(t *testing.T) {
	b := startTLSBroker(t, tls.RequireAnyClientCert)
	code, r := b.doctor("--truststore", b.file("brokers.pem", b.brokers.PEM()))
	if code != 0 || !r.ClientCertificates || !slices.Equal(r.Stores[0].Works, []string{"passthrough"}) ||
		!strings.Contains(r.Stores[0].WhyNot[0], "no issuer is configured") {
		t.Errorf("exit code %d, %+v", code, r)
	}
	code, r = b.doctor() // the host's roots
	if code != 1 || len(r.Stores) != 1 || len(r.Stores[0].Works) != 0 ||
		!strings.Contains(strings.Join(r.Stores[0].WhyNot, ";"), "passthrough: it has no CA of the broker's certificate") {
		t.Errorf("exit code %d, %+v", code, r)
	}
}

func TestAPublicCAHasTheDoctorSayWhatIsLeft(t *testing.T) {
	b := startTLSBroker(t, tls.NoClientCert)
	r := &tlsReport{Broker: b.address, Public: true, chain: []*x509.Certificate{b.brokers.Certificate}}
	r.judge([]string{b.file("brokers.pem", b.brokers.PEM())}, 0, "")
	if why := r.Stores[0].WhyNot; !strings.Contains(why[len(why)-1], "a public CA signs for nobody but the broker") {
		t.Errorf("%+v", r.Stores)
	}
}

func TestTheDoctorSaysWhatItCannotRead(t *testing.T) {
	b := startTLSBroker(t, tls.NoClientCert)
	code, r := b.doctor("--truststore", b.jks("locked.jks", b.cluster, "other-secret"), "--truststore", "/none")
	if code != 1 || !strings.Contains(r.Stores[0].Error, "the password is wrong") ||
		!strings.Contains(r.Stores[1].Error, "no such file") {
		t.Errorf("exit code %d, %+v", code, r)
	}
	if code, r := b.doctor("--pid", fmt.Sprint(os.Getpid())); r.Stores == nil {
		t.Errorf("exit code %d, %+v", code, r)
	}
	for what, args := range map[string][]string{
		"no port":          {"localhost"},
		"nobody there":     {"127.0.0.1:1"},
		"no configuration": {b.address, "-c", "/none"},
		"no such cluster":  {b.address, "-c", b.config(), "--cluster", "other"},
	} {
		if code, _, errOut := inProcess(t, append([]string{"doctor", "tls"}, args...)...); code != 1 || errOut == "" {
			t.Errorf("%s: exit code %d, %s", what, code, errOut)
		}
	}
	code, out, _ := inProcess(t, "doctor", "tls", b.address, "--truststore", b.file("brokers.pem", b.brokers.PEM()))
	if code != 0 || !strings.Contains(string(out), "WHY NOT") || !strings.Contains(string(out), "brokers.pem") {
		t.Errorf("exit code %d\n%s", code, out)
	}
}
