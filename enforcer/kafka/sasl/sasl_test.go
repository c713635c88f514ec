package sasl

import (
	"bytes"
	"encoding/json"
	"errors"
	"reflect"
	"strings"
	"testing"

	"klamm/test/bounds"
)

const iam = `{"x-amz-credential":"A/d/r/kafka-cluster/aws4_request"}`

func TestAMessageIsReadAsKafkaReadsIt(t *testing.T) {
	bearerOf := func(text string) Claim { return Claim{Token: []byte(text)} }
	for name, c := range map[string]struct {
		mechanism, msg string
		want           Claim // the zero value: it is malformed
	}{
		"PLAIN":                               {"PLAIN", "\x00alice\x00pw", Claim{Principal: "User:alice"}},
		"PLAIN for oneself":                   {"PLAIN", "alice\x00alice\x00pw", Claim{Principal: "User:alice"}},
		"PLAIN for another":                   {"PLAIN", "bob\x00alice\x00pw", Claim{}},
		"PLAIN with a name in UTF-8":          {"PLAIN", "\x00аlice\x00pw", Claim{Principal: "User:аlice"}},
		"PLAIN with a name in Latin-1":        {"PLAIN", "\x00ren\xe9\x00pw", Claim{}},
		"PLAIN without a name":                {"PLAIN", "\x00\x00pw", Claim{}},
		"PLAIN without a password":            {"PLAIN", "\x00alice\x00", Claim{}},
		"PLAIN of two parts":                  {"PLAIN", "alice\x00pw", Claim{}},
		"PLAIN of four parts":                 {"PLAIN", "\x00alice\x00pw\x00more", Claim{}},
		"PLAIN, empty":                        {"PLAIN", "", Claim{}},
		"SCRAM":                               {"SCRAM-SHA-256", "n,,n=alice,r=nonce", Claim{Principal: "User:alice"}},
		"SCRAM with escapes":                  {"SCRAM-SHA-512", "n,,n=a=3Dl=2Ce,r=nonce", Claim{Principal: "User:a=l,e"}},
		"SCRAM with an escape in another":     {"SCRAM-SHA-256", "n,,n==3D2C,r=nonce", Claim{Principal: "User:=2C"}},
		"SCRAM with an unknown escape":        {"SCRAM-SHA-256", "n,,n=a=2cb,r=nonce", Claim{}},
		"SCRAM with a bare comma":             {"SCRAM-SHA-256", "n,,n=a,b,r=nonce", Claim{}},
		"SCRAM for oneself":                   {"SCRAM-SHA-256", "n,a=alice,n=alice,r=nonce", Claim{Principal: "User:alice"}},
		"SCRAM for another":                   {"SCRAM-SHA-256", "n,a=bob,n=alice,r=nonce", Claim{}},
		"SCRAM with a reserved part":          {"SCRAM-SHA-256", "n,,m=x,n=alice,r=nonce", Claim{Principal: "User:alice"}},
		"SCRAM with channel binding":          {"SCRAM-SHA-256", "p=tls-unique,,n=alice,r=nonce", Claim{}},
		"SCRAM that could bind":               {"SCRAM-SHA-256", "y,,n=alice,r=nonce", Claim{}},
		"SCRAM without a nonce":               {"SCRAM-SHA-256", "n,,n=alice,r=", Claim{}},
		"SCRAM with a name that is not ASCII": {"SCRAM-SHA-256", "n,,n=аlice,r=nonce", Claim{}},
		"SCRAM with a newline at the end":     {"SCRAM-SHA-256", "n,,n=alice,r=nonce\n", Claim{}},
		"SCRAM with a delegation token": {"SCRAM-SHA-256", "n,,n=token-1,r=nonce,tokenauth=true",
			Claim{DelegationToken: "token-1"}},
		"SCRAM with a token in capitals": {"SCRAM-SHA-256", "n,,n=token-1,r=nonce,tokenauth=TRUE",
			Claim{DelegationToken: "token-1"}},
		"SCRAM with no delegation token": {"SCRAM-SHA-256", "n,,n=alice,r=nonce,tokenauth=false,x=y",
			Claim{Principal: "User:alice"}},
		"SCRAM that says both": {"SCRAM-SHA-256", "n,,n=alice,r=nonce,tokenauth=false,tokenauth=true", Claim{}},
		"OAUTHBEARER":          {"OAUTHBEARER", "n,,\x01auth=Bearer a.b-c_d~e+f/g==\x01\x01", bearerOf("a.b-c_d~e+f/g==")},
		"OAUTHBEARER with extensions": {"OAUTHBEARER",
			"n,,\x01logicalCluster=lkc-1\x01auth=bEARER   t\x01identityPoolId=pool-1\x01\x01", bearerOf("t")},
		"OAUTHBEARER for somebody": {"OAUTHBEARER", "n,a=alice,\x01auth=Bearer t\x01\x01",
			Claim{Token: []byte("t"), AuthzID: "alice"}},
		"OAUTHBEARER without a token":         {"OAUTHBEARER", "n,,\x01auth=Bearer \x01\x01", Claim{}},
		"OAUTHBEARER without auth":            {"OAUTHBEARER", "n,,\x01a=b\x01\x01", Claim{}},
		"OAUTHBEARER with auth in capitals":   {"OAUTHBEARER", "n,,\x01AUTH=Bearer t\x01\x01", Claim{}},
		"OAUTHBEARER of nothing":              {"OAUTHBEARER", "n,,\x01\x01", Claim{}},
		"OAUTHBEARER with two tokens":         {"OAUTHBEARER", "n,,\x01auth=Bearer t\x01auth=Bearer u\x01\x01", Claim{}},
		"OAUTHBEARER with another scheme":     {"OAUTHBEARER", "n,,\x01auth=Basic t\x01\x01", Claim{}},
		"OAUTHBEARER with a space in it":      {"OAUTHBEARER", "n,,\x01auth=Bearer t u\x01\x01", Claim{}},
		"OAUTHBEARER with a digit in a key":   {"OAUTHBEARER", "n,,\x01a1=b\x01auth=Bearer t\x01\x01", Claim{}},
		"OAUTHBEARER with an empty extension": {"OAUTHBEARER", "n,,\x01a=\x01auth=Bearer t\x01\x01", Claim{}},
		"OAUTHBEARER with no end":             {"OAUTHBEARER", "n,,\x01auth=Bearer t\x01", Claim{}},
		"OAUTHBEARER with channel binding":    {"OAUTHBEARER", "y,,\x01auth=Bearer t\x01\x01", Claim{}},
		"OAUTHBEARER as RFC 6750 has it":      {"OAUTHBEARER", "n,auth=Bearer t", Claim{}},
		"OAUTHBEARER, only the end of it":     {"OAUTHBEARER", "\x01", Claim{}},
		"AWS_MSK_IAM": {"AWS_MSK_IAM", `{"version":"2020_10_22","x-amz-credential":` +
			`"AKIA1/20261125/eu-west-1/kafka-cluster/aws4_request"}`, Claim{AccessKeyID: "AKIA1", Region: "eu-west-1"}},
		"AWS_MSK_IAM for another service":  {"AWS_MSK_IAM", `{"x-amz-credential":"A/d/r/s3/aws4_request"}`, Claim{}},
		"AWS_MSK_IAM without a credential": {"AWS_MSK_IAM", `{"version":"2020_10_22"}`, Claim{}},
		"AWS_MSK_IAM that is no object":    {"AWS_MSK_IAM", `[]`, Claim{}},
		"AWS_MSK_IAM with more behind it":  {"AWS_MSK_IAM", iam + "{}", Claim{}},
	} {
		t.Run(name, func(t *testing.T) {
			x := Exchange{Mechanism: c.mechanism}
			got, err := x.Client([]byte(c.msg))
			malformed := reflect.DeepEqual(c.want, Claim{})
			switch {
			case malformed && !errors.Is(err, ErrMalformed):
				t.Errorf("it is taken as %+v, %v", got, err)
			case !malformed && (err != nil || !reflect.DeepEqual(*got, c.want)):
				t.Errorf("it is taken as %+v, %v", got, err)
			}
		})
	}
}

// turn is a message and its answer; what the client claims with it, and whether the broker has accepted it then.
type turn struct {
	client, server string
	claims, done   bool
}

func TestAnExchangeEndsWithTheSuccessOfItsMechanism(t *testing.T) {
	const (
		first, final     = "n,,n=alice,r=c", "c=biws,r=cs,p=cA=="
		token, challenge = "n,,\x01auth=Bearer t\x01\x01", `{"status":"invalid_token"}`
	)
	for name, c := range map[string]struct {
		mechanism string
		turns     []turn
	}{
		"PLAIN":       {"PLAIN", []turn{{"\x00a\x00p", "", true, true}}},
		"SCRAM":       {"SCRAM-SHA-256", []turn{{first, "r=cs,s=,i=4096", true, false}, {final, "v=cA==", false, true}}},
		"OAUTHBEARER": {"OAUTHBEARER", []turn{{token, "", true, true}}},
		"a token that is refused": {"OAUTHBEARER", []turn{{token, challenge, true, false}, {"\x01", "", false, false},
			{"\x01", "", false, false}}},
		"a second token": {"OAUTHBEARER", []turn{{token, challenge, true, false}, {token, "", true, true}}},
		"AWS_MSK_IAM":    {"AWS_MSK_IAM", []turn{{iam, "{}", true, true}}},
		"GSSAPI": {"GSSAPI", []turn{{"ticket", "reply", true, false}, {"", "offer", false, false},
			{"choice", "", false, false}}},
	} {
		t.Run(name, func(t *testing.T) {
			x := Exchange{Mechanism: c.mechanism}
			if x.Begun() || x.Opaque() != (c.mechanism == "GSSAPI") {
				t.Errorf("at first: begun %v, opaque %v", x.Begun(), x.Opaque())
			}
			for i, turn := range c.turns {
				claim, err := x.Client([]byte(turn.client))
				if err != nil || (claim != nil) != turn.claims {
					t.Errorf("message %d claims %+v, %v", i, claim, err)
				}
				if done := x.Answered([]byte(turn.server)); done != turn.done || !x.Begun() {
					t.Errorf("after answer %d: done %v, begun %v", i, done, x.Begun())
				}
			}
		})
	}
}

// A name that went in comes out.
func FuzzPlain(f *testing.F) {
	f.Add([]byte("\x00alice\x00pw"))
	f.Add([]byte("alice\x00alice\x00pw"))
	f.Add([]byte("\x00\xff\x00pw\x00"))
	f.Fuzz(func(t *testing.T, msg []byte) {
		var c Claim
		var err error
		bounds.Check(t, len(msg), 256, func() { c, err = plain(msg) })
		if err != nil {
			return
		}
		name, named := strings.CutPrefix(c.Principal, "User:")
		_, password, _ := bytes.Cut(msg[bytes.IndexByte(msg, 0)+1:], []byte{0})
		if !named || name == "" || bytes.IndexByte(password, 0) >= 0 || len(password) == 0 ||
			!bytes.HasSuffix(msg, []byte("\x00"+name+"\x00"+string(password))) {
			t.Errorf("%q is taken as %+v", msg, c)
		}
	})
}

// What is accepted has one reading: its parts, split at commas, are those that were understood.
func FuzzScram(f *testing.F) {
	f.Add([]byte("n,,n=alice,r=nonce"))
	f.Add([]byte("n,a=a,m=x,n=a=2C=3D,r=nonce,tokenauth=true"))
	f.Add([]byte("n,,n=n=3D,r=r,r=r"))
	f.Fuzz(func(t *testing.T, msg []byte) {
		var c Claim
		var err error
		bounds.Check(t, len(msg), 256, func() { c, err = scram(msg) })
		if err != nil {
			return
		}
		parts := strings.Split(string(msg), ",")[2:]
		if strings.HasPrefix(parts[0], "m=") {
			parts = parts[1:]
		}
		escaped := strings.NewReplacer("=", "=3D", ",", "=2C")
		name, byName := strings.CutPrefix(c.Principal, "User:")
		if !byName {
			name = c.DelegationToken
		}
		if parts[0] != "n="+escaped.Replace(name) || !strings.HasPrefix(parts[1], "r=") || len(parts[1]) < 3 {
			t.Errorf("%q is taken as %+v", msg, c)
		}
		token := false
		for _, extension := range parts[2:] {
			token = token || strings.EqualFold(extension, "tokenauth=true") && strings.HasPrefix(extension, "tokenauth=")
		}
		if token == byName {
			t.Errorf("%q, by a token: %v, is taken as %+v", msg, token, c)
		}
	})
}

// The token of what is accepted is the whole of its only credential.
func FuzzOAuthBearer(f *testing.F) {
	f.Add([]byte("n,,\x01auth=Bearer t\x01\x01"))
	f.Add([]byte("n,a=a=2Cb,\x01a=b\x01auth=bearer  t==\x01c=d\x01\x01"))
	f.Add([]byte("n,,\x01auth=Bearer t\x01auth=Bearer u\x01\x01"))
	f.Fuzz(func(t *testing.T, msg []byte) {
		var c Claim
		var err error
		bounds.Check(t, len(msg), 256, func() { c, err = bearer(msg) })
		if err != nil {
			return
		}
		parts := strings.Split(string(msg), "\x01")
		if n := len(parts); n < 4 || parts[n-1] != "" || parts[n-2] != "" {
			t.Fatalf("%q has no end", msg)
		}
		var credentials []string
		for _, pair := range parts[1 : len(parts)-2] {
			if strings.HasPrefix(pair, "auth=") {
				credentials = append(credentials, pair)
			}
		}
		fields := strings.Fields(strings.Join(credentials, " "))
		if len(credentials) != 1 || len(fields) != 2 || fields[1] != string(c.Token) ||
			!strings.EqualFold(fields[0], "auth=bearer") {
			t.Errorf("%q is taken as %+v", msg, c)
		}
		if head := parts[0]; head != "n,," && head != "n,a="+c.AuthzID+"," {
			t.Errorf("%q is taken as %+v", msg, c)
		}
	})
}

func FuzzMSKIAM(f *testing.F) {
	f.Add([]byte(`{"x-amz-credential":"AKIA1/20261125/eu-west-1/kafka-cluster/aws4_request"}`))
	f.Add([]byte(`{"X-AMZ-Credential":"////","x-amz-credential":null}`))
	f.Fuzz(func(t *testing.T, msg []byte) {
		var c Claim
		var err error
		bounds.Check(t, len(msg), 256, func() { c, err = mskIAM(msg) })
		if err != nil {
			return
		}
		if !json.Valid(msg) || c.AccessKeyID == "" || strings.ContainsAny(c.AccessKeyID+c.Region, "/") {
			t.Errorf("%q is taken as %+v", msg, c)
		}
	})
}

// Whatever the two sides say, an exchange that is not opaque ends only by a success that follows a claim.
func FuzzExchange(f *testing.F) {
	for mechanism := range mechanisms {
		f.Add(mechanism, []byte("\x00a\x00p"), []byte(""), []byte("\x01"), []byte("x"))
	}
	f.Add("GSSAPI", []byte("ticket"), []byte("reply"), []byte(""), []byte(""))
	f.Fuzz(func(t *testing.T, mechanism string, a, b, c, d []byte) {
		x := Exchange{Mechanism: mechanism}
		claimed := false
		for _, turn := range [][2][]byte{{a, b}, {c, d}} {
			claim, err := x.Client(turn[0])
			if err != nil {
				return
			}
			claimed = claimed || claim != nil
			if done := x.Answered(turn[1]); done && (!claimed || x.Opaque()) {
				t.Errorf("%s ended with success: claimed %v", mechanism, claimed)
			}
		}
	})
}
