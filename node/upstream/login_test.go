package upstream

import (
	"bytes"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/test/bounds"
)

func rewrite(t testing.TB, file, text string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestTheNodeLogsInWithThePasswordThatTheFileHolds(t *testing.T) {
	for _, mechanism := range []string{"PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"} {
		t.Run(mechanism, func(t *testing.T) {
			cluster := must(kfake.NewCluster(kfake.NumBrokers(1), kfake.EnableSASL(),
				kfake.Superuser(mechanism, "klamm", "s3cret")))(t)
			t.Cleanup(cluster.Close)
			broker := &server{addr: cluster.ListenAddrs()[0]}
			file := write(t, "password", []byte("s3cret\n"))
			u := must(New(Options{Login: &Credentials{Mechanism: mechanism, Username: "klamm", PasswordFile: file}}))(t)
			b, err := openFor(t, u, broker, nil, patience)
			if err != nil {
				t.Fatal(err)
			}
			if due := b.Login.Due(); !due.IsZero() {
				t.Errorf("it is due at %v, though the session does not end", due)
			}
			rewrite(t, file, "wr0ng")
			_, err = openFor(t, u, broker, nil, patience)
			if !errors.Is(err, ErrLogin) || strings.Contains(err.Error(), "wr0ng") ||
				!strings.Contains(err.Error(), name) || !strings.Contains(err.Error(), mechanism) {
				t.Errorf("with a wrong password: %v", err)
			}
			rewrite(t, file, "")
			_, err = openFor(t, u, broker, nil, patience)
			if !errors.Is(err, ErrLogin) || !strings.Contains(err.Error(), file) {
				t.Errorf("without a password: %v", err)
			}
		})
	}
}

func TestAMechanismTheBrokerDoesNotTakeIsNamed(t *testing.T) {
	cluster := must(kfake.NewCluster(kfake.NumBrokers(1), kfake.EnableSASL(), kfake.Superuser("PLAIN", "a", "b")))(t)
	t.Cleanup(cluster.Close)
	_, err := open(t, Options{Login: &Credentials{Audience: "kafka"}}, &server{addr: cluster.ListenAddrs()[0]},
		&who{token: "t0ken"})
	if !errors.Is(err, ErrLogin) || !errors.Is(err, kerr.UnsupportedSaslMechanism) ||
		!strings.Contains(err.Error(), "PLAIN") {
		t.Errorf("the error is %v", err)
	}
}

func TestTheWorkloadsTokenIsShownAndRenewed(t *testing.T) {
	const life = 10 * time.Second
	var shown [][]byte
	s := serve(t, nil, kafka(life, func(message []byte) ([]byte, int16, string) {
		shown = append(shown, message)
		return nil, 0, ""
	}))
	workload := &who{token: "first"}
	began := time.Now()
	login := &Credentials{Audience: "kafka", Extensions: map[string]string{"logicalCluster": "lkc-1"}}
	b, err := open(t, Options{Login: login},
		s, workload)
	if err != nil {
		t.Fatal(err)
	}
	if due := b.Login.Due().Sub(began); due < life*3/4 || due > life*9/10 {
		t.Errorf("it is due after %v of %v", due, life)
	}
	workload.token = "second"
	if err := b.Login.Exchange(t.Context(), caller(b.Conn)); err != nil {
		t.Fatal(err)
	}
	workload.err = errors.New("the process is gone")
	if err := b.Login.Exchange(t.Context(), caller(b.Conn)); !errors.Is(err, ErrNoSVID) || errors.Is(err, ErrLogin) {
		t.Errorf("the login of a process that is gone: %v", err)
	}
	_ = b.Close()
	if e := s.end(t); e.got != "SASLHandshake SASLAuthenticate SASLHandshake SASLAuthenticate" {
		t.Errorf("the broker got %s", e.got)
	}
	for i, token := range []string{"first", "second"} {
		want := []byte("n,,\x01auth=Bearer " + token + "\x01logicalCluster=lkc-1\x01\x01")
		if !bytes.Equal(shown[i], want) {
			t.Errorf("the broker was shown %q", shown[i])
		}
	}
}

func TestARefusedLoginSaysWhatTheBrokerSays(t *testing.T) {
	for what, c := range map[string]struct {
		answer func([]byte) ([]byte, int16, string)
		want   string
	}{
		"a code and a word": {func([]byte) ([]byte, int16, string) {
			return nil, kerr.SaslAuthenticationFailed.Code, "no such user"
		}, "no such user"},
		"a challenge": {func([]byte) ([]byte, int16, string) { return []byte(`{"status":"invalid_token"}`), 0, "" },
			"invalid_token"},
	} {
		t.Run(what, func(t *testing.T) {
			s := serve(t, nil, kafka(0, c.answer))
			_, err := open(t, Options{Login: &Credentials{Audience: "kafka"}}, s, &who{token: "t0ken"})
			if !errors.Is(err, ErrLogin) || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "t0ken") {
				t.Errorf("the error is %v", err)
			}
		})
	}
}

func TestASessionsLifeIsBounded(t *testing.T) {
	for _, life := range []time.Duration{-time.Second, 0, time.Millisecond, time.Hour, 1 << 62} {
		l := new(Login)
		now := time.Now()
		l.renew(now, life)
		due := l.Due()
		in := due.After(now.Add(time.Second-1)) && due.Before(now.Add(maxLifetime))
		if life <= 0 != due.IsZero() || !due.IsZero() && !in {
			t.Errorf("a session of %v is renewed at %v", life, due)
		}
	}
}

func FuzzAnswer(f *testing.F) {
	f.Add([]byte{0, 0, 0, 10, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0}, int16(kmsg.ApiVersions))
	f.Add([]byte{0, 0, 0, 14, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 2, 'o', 'k'}, int16(kmsg.SASLHandshake))
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 0, 0, 0, 1}, int16(kmsg.SASLAuthenticate))
	f.Fuzz(func(t *testing.T, answer []byte, key int16) {
		for _, req := range []kmsg.Request{&kmsg.ApiVersionsRequest{}, &kmsg.SASLHandshakeRequest{Version: 1},
			&kmsg.SASLAuthenticateRequest{Version: 1}} {
			if req.Key() != key {
				continue
			}
			bounds.Check(t, len(answer), 1<<11, func() {
				if resp, err := readAnswer(bytes.NewReader(answer), req, 1); err == nil && resp.Key() != key {
					t.Errorf("the answer to %d is one to %d", key, resp.Key())
				}
			})
		}
	})
}
