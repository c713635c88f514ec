package truststore

import (
	"bytes"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pavlo-v-chernykh/keystore-go/v4"
	"software.sslmate.com/src/go-pkcs12"

	"klamm/test/bounds"
	"klamm/test/ca"
)

func root(t testing.TB) *ca.Authority {
	t.Helper()
	a, err := ca.New("cluster")
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func jks(t testing.TB, a *ca.Authority, password string) []byte {
	t.Helper()
	store := keystore.New()
	if err := store.SetTrustedCertificateEntry("cluster", keystore.TrustedCertificateEntry{CreationTime: time.Now(),
		Certificate: keystore.Certificate{Type: "X509", Content: a.Certificate.Raw}}); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := store.Store(&out, []byte(password)); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func pfx(t testing.TB, encoder *pkcs12.Encoder, a *ca.Authority, password string) []byte {
	t.Helper()
	out, err := encoder.EncodeTrustStore([]*x509.Certificate{a.Certificate}, password)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// perByte is what a store may allocate for each of its bytes, key derivation included, which leaves garbage each round.
const perByte = 1 << 19

func TestStoresThatDeclareMoreThanTheyHoldAreRefused(t *testing.T) {
	a := root(t)
	whole := jks(t, a, "changeit")
	raw := a.Certificate.Raw
	at := bytes.Index(whole, raw) - 4 // the certificate's length
	long, keys, many := bytes.Clone(whole), bytes.Clone(whole), bytes.Clone(whole)
	copy(long[at:], "\xff\xff\xff\xff")
	copy(many[8:], "\xff\xff\xff\xff")  // entries
	copy(keys[12:], "\x00\x00\x00\x01") // a key's entry, so that what follows is the key's length, and of the chain
	slow := pfx(t, pkcs12.Modern2023.WithIterations(0x011170), a, "changeit")
	slower := bytes.ReplaceAll(slow, []byte{2, 3, 1, 0x11, 0x70}, []byte{2, 3, 0x7f, 0xff, 0xff})
	for what, c := range map[string]struct {
		data []byte
		want error
	}{
		"a certificate of 4 GiB":     {long, errJKS},
		"4,294,967,295 entries":      {many, errJKS},
		"a chain of as many":         {keys, errJKS},
		"an unknown kind of entry":   {append(bytes.Clone(whole[:12]), "\x00\x00\x00\x07\x00\x00"...), errJKS},
		"no entries":                 {whole[:10], errJKS},
		"8 million rounds":           {slower, errRounds},
		"70,000 rounds, as declared": {slow, nil},
	} {
		var err error
		bounds.Check(t, len(c.data), perByte, func() { _, err = Read(bytes.NewReader(c.data), "") })
		if !errors.Is(err, c.want) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestStoresOfEveryKindAreRead(t *testing.T) {
	a := root(t)
	for what, c := range map[string]struct {
		data           []byte
		password, kind string
	}{
		"PEM":                   {a.PEM(), "", "PEM"},
		"PEM with words in it":  {append([]byte("# the cluster\n"), a.PEM()...), "", "PEM"},
		"JKS":                   {jks(t, a, "secret"), "secret", "JKS"},
		"JKS, Java's default":   {jks(t, a, "changeit"), "", "JKS"},
		"PKCS12, of now":        {pfx(t, pkcs12.Modern2023, a, "secret"), "secret", "PKCS12"},
		"PKCS12, of old":        {pfx(t, pkcs12.LegacyDES, a, "changeit"), "", "PKCS12"},
		"PKCS12, no password":   {pfx(t, pkcs12.Passwordless, a, ""), "", "PKCS12"},
		"PKCS12, another given": {pfx(t, pkcs12.Passwordless, a, ""), "other", "PKCS12"},
	} {
		s, err := Read(bytes.NewReader(c.data), c.password)
		if err != nil {
			t.Errorf("%s: %v", what, err)
			continue
		}
		if s.Kind != c.kind || len(s.Certificates) != 1 || !s.Certificates[0].Equal(a.Certificate) {
			t.Errorf("%s: %s with %d certificates", what, s.Kind, len(s.Certificates))
		}
	}
}

func TestAStoreThatOpensWithNoPasswordSaysSo(t *testing.T) {
	a := root(t)
	for what, data := range map[string][]byte{"JKS": jks(t, a, "secret"),
		"PKCS12": pfx(t, pkcs12.Modern2023, a, "secret")} {
		if _, err := Read(bytes.NewReader(data), "other"); !errors.Is(err, ErrPassword) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestWhatIsNoStoreIsAnError(t *testing.T) {
	noise := make([]byte, 100)
	_, _ = rand.Read(noise)
	for what, data := range map[string][]byte{"nothing": nil, "text": []byte("hello"), "JCEKS": magicJCEKS,
		"JKS": magicJKS, "ASN.1": append([]byte{0x30}, noise...), "too much": make([]byte, MaxSize+1)} {
		if s, err := Read(bytes.NewReader(data), ""); err == nil {
			t.Errorf("%s: %+v", what, s)
		}
	}
}

func TestAProcessTellsWhereItsStoresAre(t *testing.T) {
	dir := t.TempDir()
	cmd := exec.Command("/bin/sleep", "60")
	cmd.Args = []string{"sleep", "60"}
	cmd.Env = []string{"SSL_CERT_FILE=/app/ca.pem", "JAVA_HOME=/opt/java", "OTHER=/x"}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = cmd.Process.Kill(), cmd.Wait() }()
	// Start returns when the pipe it waits at is closed by exec, which is before the kernel knows the new environment.
	found := Find(cmd.Process.Pid)
	for begun := time.Now(); !slices.Contains(found, "/app/ca.pem") && time.Since(begun) < 10*time.Second; {
		found = Find(cmd.Process.Pid)
	}
	for _, want := range []string{"/app/ca.pem", "/opt/java/lib/security/cacerts", "/etc/ssl/certs/ca-certificates.crt"} {
		if !slices.Contains(found, want) {
			t.Errorf("%s is not among %v", want, found)
		}
	}
	file := filepath.Join(dir, "ca.pem")
	if err := errors.Join(os.WriteFile(file, root(t).PEM(), 0o600),
		os.Symlink(file, filepath.Join(dir, "link.pem"))); err != nil {
		t.Fatal(err)
	}
	f, err := OpenOf(cmd.Process.Pid, filepath.Join(dir, "link.pem"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if s, err := Read(f, ""); err != nil || len(s.Certificates) != 1 {
		t.Errorf("%+v, %v", s, err)
	}
	for _, name := range []string{dir, "/dev/null", "/none"} {
		if f, err := OpenOf(cmd.Process.Pid, name); err == nil {
			_ = f.Close()
			t.Errorf("%s was opened", name)
		}
	}
}

func FuzzRead(f *testing.F) {
	a := root(f)
	f.Add(a.PEM(), "")
	f.Add(jks(f, a, "changeit"), "")
	f.Add(pfx(f, pkcs12.LegacyDES, a, "x"), "x")
	f.Fuzz(func(t *testing.T, data []byte, password string) {
		var s *Store
		var err error
		bounds.Check(t, len(data)+len(password), perByte, func() { s, err = Read(bytes.NewReader(data), password) })
		if (s == nil) == (err == nil) || s != nil && len(s.Certificates) == 0 {
			t.Errorf("%+v, %v", s, err)
		}
		if err != nil && len(password) > 8 && strings.Contains(err.Error(), password) {
			t.Error("the error has the password")
		}
	})
}
