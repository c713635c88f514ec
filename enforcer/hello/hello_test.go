package hello

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"strings"
	"testing"

	"klamm/test/bounds"
)

// spoken is what Go's client says first.
func spoken(t testing.TB, conf *tls.Config) []byte {
	t.Helper()
	client, server := net.Pipe()
	defer client.Close()
	go func() {
		_ = tls.Client(client, conf).Handshake() // it ends with the pipe
		_ = client.Close()
	}()
	b := make([]byte, MaxSize)
	n, err := server.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	_ = server.Close()
	return b[:n]
}

func clientConfig(name string) *tls.Config {
	return &tls.Config{ServerName: name, InsecureSkipVerify: name == "", MinVersion: tls.VersionTLS12}
}

// fragmented puts the message of one record into records of n bytes.
func fragmented(record []byte, n int) (out []byte) {
	for b := record[recordHeader:]; len(b) > 0; {
		part := b[:min(n, len(b))]
		out = append(out, recordHandshake, 3, 1, byte(len(part)>>8), byte(len(part)))
		out, b = append(out, part...), b[len(part):]
	}
	return out
}

func TestTheServerNameIsReadHoweverTheHelloIsCut(t *testing.T) {
	whole := spoken(t, clientConfig("Broker-1.Kafka.example"))
	for what, b := range map[string][]byte{
		"one record":                whole,
		"something behind it":       append(bytes.Clone(whole), "more"...),
		"records of one byte":       fragmented(whole, 1),
		"records of a hundred":      fragmented(whole, 100),
		"a record longer than that": append(bytes.Clone(whole[:3]), append([]byte{0x20, 0}, whole[recordHeader:]...)...),
	} {
		h, err := Parse(b)
		if err != nil || h != (Hello{ServerName: "broker-1.kafka.example"}) {
			t.Errorf("%s: %+v, %v", what, h, err)
		}
	}
	for n := range whole {
		if _, err := Parse(whole[:n]); !errors.Is(err, ErrMore) {
			t.Fatalf("of %d bytes: %v", n, err)
		}
	}
}

func TestAHelloMayHaveNoServerName(t *testing.T) {
	if h, err := Parse(spoken(t, clientConfig(""))); err != nil || h != (Hello{}) {
		t.Errorf("%+v, %v", h, err)
	}
}

func TestAnEncryptedHelloIsSeen(t *testing.T) {
	b := built(extension(extensionServerName, nameList("public.example")), extension(extensionECH, []byte{0}))
	if h, err := Parse(b); err != nil || h != (Hello{ServerName: "public.example", Encrypted: true}) {
		t.Errorf("%+v, %v", h, err)
	}
}

func prefixed(size int, b []byte) []byte {
	n := []byte{byte(len(b) >> 16), byte(len(b) >> 8), byte(len(b))}
	return append(n[3-size:], b...)
}

func extension(kind uint16, body []byte) []byte {
	return append([]byte{byte(kind >> 8), byte(kind)}, prefixed(2, body)...)
}

func nameList(name string) []byte {
	return prefixed(2, append([]byte{nameHost}, prefixed(2, []byte(name))...))
}

// built is a ClientHello of these extensions.
func built(extensions ...[]byte) []byte {
	body := append([]byte{3, 3}, make([]byte, 32)...)
	body = append(body, 0, 0, 2, 0x13, 1, 1, 0)
	body = append(body, prefixed(2, bytes.Join(extensions, nil))...)
	return append([]byte{recordHandshake, 3, 1}, prefixed(2, append([]byte{messageClientHello}, prefixed(3, body)...))...)
}

func TestWhatIsNoClientHelloIsRefused(t *testing.T) {
	named := func(name string) []byte { return built(extension(extensionServerName, nameList(name))) }
	for what, b := range map[string][]byte{
		"a Kafka frame":               {0, 0, 0, 20, 0, 18, 0, 3},
		"SSL 2":                       {0x80, 0x2e, 1, 3, 1},
		"another handshake message":   {recordHandshake, 3, 1, 0, 4, 2, 0, 0, 0},
		"an empty record":             {recordHandshake, 3, 1, 0, 0},
		"a record that is too long":   {recordHandshake, 3, 1, 0xff, 0xff},
		"a message that is too long":  {recordHandshake, 3, 1, 0x20, 0, 1, 1, 0, 0},
		"no body":                     {recordHandshake, 3, 1, 0, 4, 1, 0, 0, 0},
		"an extension twice":          built(extension(5, nil), extension(5, nil)),
		"an extension cut short":      built([]byte{0, 0, 0, 9, 1}),
		"an empty name":               named(""),
		"a name with a dot at an end": named("broker.example."),
		"an address for a name":       named("192.0.2.1"),
		"a zero byte in a name":       named("broker\x00.example"),
		"a name that is too long":     named(strings.Repeat("a", 254)),
		"two names": built(extension(extensionServerName, prefixed(2, bytes.Repeat(
			append([]byte{nameHost}, prefixed(2, []byte("a.example"))...), 2)))),
	} {
		if h, err := Parse(b); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %+v, %v", what, h, err)
		}
	}
}

func TestAHelloIsReadByteByByte(t *testing.T) {
	client, server := net.Pipe()
	defer server.Close()
	whole := spoken(t, clientConfig("broker-1.example"))
	go func() {
		for i := range whole {
			_, _ = client.Write(whole[i : i+1])
		}
	}()
	h, read, err := Read(server)
	if err != nil || h.ServerName != "broker-1.example" || !bytes.Equal(read, whole) {
		t.Errorf("%+v, %v, %d of %d bytes", h, err, len(read), len(whole))
	}
}

func TestAClientThatEndsWithinItsHelloSaysNothing(t *testing.T) {
	client, server := net.Pipe()
	go func() {
		_, _ = client.Write(spoken(t, clientConfig("broker-1.example"))[:50])
		_ = client.Close()
	}()
	if h, _, err := Read(server); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("%+v, %v", h, err)
	}
}

func TestAClientMustAskForTheBrokerItConnectedTo(t *testing.T) {
	named := Names{Known: []string{"broker-1.example"}, Aside: []string{"kafka.internal"}}
	for what, c := range map[string]struct {
		hello Hello
		names Names
		want  string
	}{
		"its name": {hello: Hello{ServerName: "broker-1.example"}, names: named},
		"an alias": {hello: Hello{ServerName: "kafka.internal"}, names: named},
		"another name": {Hello{ServerName: "other.example"}, named,
			"asks for other.example, the broker is broker-1.example"},
		"no name":                    {Hello{}, named, "asks for no name"},
		"an encrypted name":          {Hello{ServerName: "broker-1.example", Encrypted: true}, named, "ECH"},
		"no name, an address":        {hello: Hello{}, names: Names{Known: []string{"broker-1.example", "192.0.2.1"}}},
		"no name, IPv6":              {hello: Hello{}, names: Names{Known: []string{"2001:db8::1"}}},
		"no name, one without a dot": {hello: Hello{}, names: Names{Known: []string{"kafka"}}},
		"no name, a network":         {hello: Hello{}, names: Names{Known: []string{"broker-1.example"}, ByAddress: true}},
		"another name, a network": {Hello{ServerName: "other.example"},
			Names{Known: []string{"broker-1.example"}, ByAddress: true}, "asks for other.example"},
	} {
		err := c.hello.Agree(c.names)
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(spoken(f, clientConfig("broker-1.example")))
	f.Add(spoken(f, clientConfig("")))
	f.Add(fragmented(spoken(f, clientConfig("broker-1.example")), 7))
	f.Add(built(extension(extensionECH, nil)))
	f.Fuzz(func(t *testing.T, b []byte) {
		var h Hello
		var err error
		bounds.Check(t, len(b), 64, func() { h, err = Parse(b) })
		if err != nil && h != (Hello{}) {
			t.Errorf("%+v with %v", h, err)
		}
		if h.ServerName != "" && !isHost(h.ServerName) {
			t.Errorf("the server name %q", h.ServerName)
		}
		// What is decided of a prefix stays so.
		for _, n := range []int{len(b) / 2, len(b) - 1} {
			if n < 0 {
				continue
			}
			if before, berr := Parse(b[:n]); !errors.Is(berr, ErrMore) && (before != h || (berr == nil) != (err == nil)) {
				t.Errorf("%d bytes: %+v, %v; all: %+v, %v", n, before, berr, h, err)
			}
		}
	})
}
