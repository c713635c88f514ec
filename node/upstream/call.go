package upstream

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"

	"github.com/twmb/franz-go/pkg/kmsg"
)

// clientID is that of all requests of the node itself.
const clientID = "klamm"

// maxAnswer bounds what a broker answers before anybody has logged in.
const maxAnswer = 64 << 10

// caller sends requests, of versions before tagged fields (KIP-482), and reads their answers, one after the other.
func caller(conn net.Conn) func(kmsg.Request) (kmsg.Response, error) {
	formatter := kmsg.NewRequestFormatter(kmsg.FormatterClientID(clientID))
	var sequence int32
	return func(req kmsg.Request) (kmsg.Response, error) {
		sequence++
		if _, err := conn.Write(formatter.AppendRequest(nil, req, sequence)); err != nil {
			return nil, err
		}
		return readAnswer(conn, req, sequence)
	}
}

func readAnswer(r io.Reader, req kmsg.Request, sequence int32) (kmsg.Response, error) {
	var head [8]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, fmt.Errorf("%s: no answer: %w", kmsg.NameForKey(req.Key()), err)
	}
	size, got := int32(binary.BigEndian.Uint32(head[:])), int32(binary.BigEndian.Uint32(head[4:]))
	if size < 4 || size > maxAnswer || got != sequence {
		return nil, fmt.Errorf("%s: what answers does not speak Kafka", kmsg.NameForKey(req.Key()))
	}
	body := make([]byte, size-4)
	if _, err := io.ReadFull(r, body); err != nil {
		return nil, fmt.Errorf("%s: half an answer: %w", kmsg.NameForKey(req.Key()), err)
	}
	resp := req.ResponseKind()
	if err := resp.ReadFrom(body); err != nil {
		return nil, fmt.Errorf("%s: read the answer: %w", kmsg.NameForKey(req.Key()), err)
	}
	return resp, nil
}
