package stage

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/twmb/franz-go/pkg/kmsg"
)

// Correlation is the correlation id of every Frame.
const Correlation = 4711

// Frame is a request as it goes over the wire.
func Frame(req kmsg.Request) []byte {
	return kmsg.NewRequestFormatter(kmsg.FormatterClientID("workload")).AppendRequest(nil, req, Correlation)
}

// Ask sends a request, of a version before tagged fields (KIP-482), and reads its answer.
func Ask(conn net.Conn, req kmsg.Request) (kmsg.Response, error) {
	if err := conn.SetDeadline(time.Now().Add(Patience)); err != nil {
		return nil, err
	}
	if _, err := conn.Write(Frame(req)); err != nil {
		return nil, err
	}
	head := make([]byte, 8)
	if _, err := io.ReadFull(conn, head); err != nil {
		return nil, err
	}
	if got := binary.BigEndian.Uint32(head[4:]); got != Correlation {
		return nil, fmt.Errorf("an answer to request %d", got)
	}
	body := make([]byte, binary.BigEndian.Uint32(head)-4)
	if _, err := io.ReadFull(conn, body); err != nil {
		return nil, err
	}
	resp := req.ResponseKind()
	return resp, resp.ReadFrom(body)
}

// Hello is the first request of a client.
func Hello() kmsg.Request { return kmsg.NewPtrApiVersionsRequest() }

// AllTopics asks for all topics that one may see.
func AllTopics() kmsg.Request {
	m := kmsg.NewPtrMetadataRequest()
	m.Version = 1
	return m
}

// End reads a connection to its end and returns what came and how it ended: nil, or an error such as a reset.
func End(conn net.Conn) ([]byte, error) {
	if err := conn.SetDeadline(time.Now().Add(Patience)); err != nil {
		return nil, err
	}
	return io.ReadAll(conn)
}
