// Package hello reads what a TLS client says first, without answering it: the ClientHello (RFC 8446, section 4.1.2).
package hello

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/crypto/cryptobyte"
)

// MaxSize is the largest ClientHello that is read, in bytes with its record headers. Those of Kafka clients have 200 to
// 2,000.
const MaxSize = 16 << 10

// Timeout is how long a client that has begun a ClientHello may take for it.
const Timeout = 10 * time.Second

// Of TLS: RFC 8446, sections 4 and 5.1, RFC 6066, section 3, and RFC 9849.
const (
	recordHandshake     = 0x16
	recordHeader        = 5
	messageClientHello  = 1
	messageHeader       = 4
	extensionServerName = 0
	extensionECH        = 0xfe0d
	nameHost            = 0
)

// Errors of Parse.
var (
	ErrMore      = errors.New("the ClientHello is not whole yet")
	ErrMalformed = errors.New("it is no ClientHello")
)

// Hello is what a client says of the connection it wants.
type Hello struct {
	ServerName string // SNI, in lower case; empty when there is none
	// Encrypted: there is an encrypted ClientHello, whose SNI may be another one.
	Encrypted bool
}

// Is tells TLS from Kafka by the first two bytes of a connection: a frame that begins like this has 369 MB.
func Is(b [2]byte) bool { return b[0] == recordHandshake && b[1] == 3 }

// Parse reads the ClientHello at the start of b. It may span records, and something may follow it.
func Parse(b []byte) (Hello, error) {
	message, err := firstMessage(b)
	if err != nil {
		return Hello{}, err
	}
	var h Hello
	if !h.read(cryptobyte.String(message)) {
		return Hello{}, ErrMalformed
	}
	return h, nil
}

// firstMessage puts the first handshake message together from the records it is in.
func firstMessage(b []byte) (message []byte, err error) {
	for len(b) > 0 {
		if b[0] != recordHandshake || len(b) > 1 && b[1] != 3 {
			return nil, ErrMalformed
		}
		if len(b) < recordHeader {
			return nil, ErrMore
		}
		n := int(b[3])<<8 | int(b[4])
		if n == 0 || n > MaxSize {
			return nil, ErrMalformed
		}
		fragment := b[recordHeader:min(len(b), recordHeader+n)]
		message, b = append(message, fragment...), b[recordHeader+len(fragment):]
		if len(message) > 0 && message[0] != messageClientHello {
			return nil, ErrMalformed
		}
		if len(message) < messageHeader {
			continue
		}
		size := messageHeader + (int(message[1])<<16 | int(message[2])<<8 | int(message[3]))
		if size > MaxSize {
			return nil, fmt.Errorf("%w: it has %d bytes, over %d", ErrMalformed, size, MaxSize)
		}
		if len(message) >= size {
			return message[messageHeader:size], nil
		}
	}
	return nil, ErrMore
}

func (h *Hello) read(s cryptobyte.String) bool {
	var session, suites, compression, extensions cryptobyte.String
	if !s.Skip(2+32) || // legacy_version, random
		!s.ReadUint8LengthPrefixed(&session) || !s.ReadUint16LengthPrefixed(&suites) ||
		!s.ReadUint8LengthPrefixed(&compression) {
		return false
	}
	if s.Empty() {
		return true // TLS 1.2 without extensions
	}
	if !s.ReadUint16LengthPrefixed(&extensions) || !s.Empty() {
		return false
	}
	seen := map[uint16]bool{}
	for !extensions.Empty() {
		var kind uint16
		var body cryptobyte.String
		if !extensions.ReadUint16(&kind) || !extensions.ReadUint16LengthPrefixed(&body) || seen[kind] {
			return false
		}
		seen[kind] = true
		switch kind {
		case extensionECH:
			h.Encrypted = true
		case extensionServerName:
			if !h.readServerName(body) {
				return false
			}
		}
	}
	return true
}

func (h *Hello) readServerName(s cryptobyte.String) bool {
	var list, name cryptobyte.String
	var kind uint8
	if !s.ReadUint16LengthPrefixed(&list) || !s.Empty() || !list.ReadUint8(&kind) || kind != nameHost ||
		!list.ReadUint16LengthPrefixed(&name) || !list.Empty() {
		return false
	}
	h.ServerName = strings.ToLower(string(name))
	return isHost(h.ServerName)
}

// isHost tells whether a name may stand in SNI: letters, digits, dashes, underscores and dots, not at its end, and no
// address (RFC 6066).
func isHost(name string) bool {
	if name == "" || len(name) > 253 || strings.HasSuffix(name, ".") || strings.HasPrefix(name, ".") {
		return false
	}
	if strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789-_.") != "" {
		return false
	}
	_, err := netip.ParseAddr(name)
	return err != nil
}

// Names are those by which a cluster has a broker.
type Names struct {
	Known []string // host names and addresses, in lower case
	// Aside: other host names by which clients know the cluster.
	Aside []string
	// ByAddress: only the network is known that the broker's address is in, and any of the names may be its.
	ByAddress bool
}

// Has tells whether a server name is one of the broker's.
func (n Names) Has(server string) bool {
	return slices.Contains(n.Known, server) || slices.Contains(n.Aside, server)
}

// Agree tells whether a client asks for the broker it connected to: where many brokers are behind one address, it is
// the name that leads to one of them. Clients that were told an address, or a name without a dot (Java), send none.
func (h Hello) Agree(n Names) error {
	switch {
	case h.Encrypted:
		return errors.New("the client encrypts which name it asks for (ECH)")
	case h.ServerName != "" && !n.Has(h.ServerName):
		return fmt.Errorf("the client asks for %s, the broker is %s", h.ServerName, strings.Join(n.Known, ", "))
	case h.ServerName == "" && !n.ByAddress && !slices.ContainsFunc(n.Known, isUnsent):
		return fmt.Errorf("the client asks for no name (SNI), the broker is %s", strings.Join(n.Known, ", "))
	}
	return nil
}

// isUnsent tells of a name that clients do not send.
func isUnsent(name string) bool { return !isHost(name) || !strings.Contains(name, ".") }

// Read reads from a connection as far as the ClientHello, and maybe some bytes beyond: read is all of them. It takes no
// longer than Timeout.
func Read(conn net.Conn) (h Hello, read []byte, err error) {
	if err := conn.SetReadDeadline(time.Now().Add(Timeout)); err != nil {
		return Hello{}, nil, err
	}
	b := make([]byte, 0, 2<<10)
	for {
		if len(b) == cap(b) {
			b = append(make([]byte, 0, 2*cap(b)), b...)
		}
		n, err := conn.Read(b[len(b):cap(b)])
		b = b[:len(b)+n]
		h, perr := Parse(b)
		switch {
		case perr == nil:
			return h, b, conn.SetReadDeadline(time.Time{})
		case !errors.Is(perr, ErrMore):
			return Hello{}, b, perr
		case errors.Is(err, io.EOF):
			return Hello{}, b, fmt.Errorf("the client ended within its ClientHello: %w", io.ErrUnexpectedEOF)
		case err != nil:
			return Hello{}, b, fmt.Errorf("read the ClientHello: %w", err)
		case len(b) > MaxSize:
			return Hello{}, b, fmt.Errorf("%w: it has over %d bytes", ErrMalformed, MaxSize)
		}
	}
}

// An Alert ends a handshake (RFC 8446, section 6).
type Alert byte

// The alerts that refuse a client.
const (
	AccessDenied     Alert = 49
	InternalError    Alert = 80
	UnrecognizedName Alert = 112
)

// Bytes is the alert as a fatal one, in a record of its own.
func (a Alert) Bytes() []byte { return []byte{0x15, 3, 3, 0, 2, 2, byte(a)} }
