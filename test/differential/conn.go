package main

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"
	"time"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

const (
	// answerTimeout is longer than any request of the scenarios may take.
	answerTimeout = 10 * time.Second
	// untilTimeout is longer than anything that they wait for may take.
	untilTimeout = 30 * time.Second
)

// outcome is what became of a request: an answer, or why there is none.
type outcome struct {
	answer kmsg.Response
	ended  string
}

const (
	closed     = "the connection is closed"
	unanswered = "no answer is due"
	late       = "no answer comes"
)

// conn is a client's connection.
type conn struct {
	net.Conn
	in   *bufio.Reader
	last int32
}

func newConn(c net.Conn) *conn { return &conn{Conn: c, in: bufio.NewReader(c)} }

func (c *conn) login(user, password string) error {
	handshake := kmsg.SASLHandshakeRequest{Version: 1, Mechanism: "PLAIN"}
	auth := kmsg.SASLAuthenticateRequest{SASLAuthBytes: []byte("\x00" + user + "\x00" + password)}
	for _, req := range []kmsg.Request{&handshake, &auth} {
		o, err := c.ask(req)
		if err != nil {
			return err
		}
		if r, is := o.answer.(*kmsg.SASLAuthenticateResponse); is && r.ErrorCode != 0 {
			return kerr.ErrorForCode(r.ErrorCode)
		}
	}
	return nil
}

// ask sends a request and waits for what becomes of it. An error means that there was no asking.
func (c *conn) ask(req kmsg.Request) (outcome, error) {
	if err := c.SetDeadline(time.Now().Add(answerTimeout)); err != nil {
		return outcome{}, err
	}
	if err := c.send(req); err != nil {
		return ending(err)
	}
	due := req
	if p, is := req.(*kmsg.ProduceRequest); is && p.Acks == 0 {
		// Whether such a request closed the connection is told by whether the next one is answered.
		due = &kmsg.ApiVersionsRequest{}
		if err := c.send(due); err != nil {
			return ending(err)
		}
	}
	answer, err := c.receive(due)
	switch {
	case err != nil:
		return ending(err)
	case due != req:
		return outcome{ended: unanswered}, nil
	}
	return outcome{answer: answer}, nil
}

func ending(err error) (outcome, error) {
	var timeout net.Error
	switch {
	case errors.As(err, &timeout) && timeout.Timeout():
		return outcome{ended: late}, nil
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ECONNRESET),
		errors.Is(err, syscall.EPIPE):
		return outcome{ended: closed}, nil
	}
	return outcome{}, err
}

func (c *conn) send(req kmsg.Request) error {
	c.last++
	_, err := c.Write(kmsg.NewRequestFormatter(kmsg.FormatterClientID("differential")).AppendRequest(nil, req, c.last))
	return err
}

func (c *conn) receive(req kmsg.Request) (kmsg.Response, error) {
	var head [4]byte
	if _, err := io.ReadFull(c.in, head[:]); err != nil {
		return nil, err
	}
	body := make([]byte, binary.BigEndian.Uint32(head[:]))
	if _, err := io.ReadFull(c.in, body); err != nil {
		return nil, err
	}
	if len(body) < 5 || int32(binary.BigEndian.Uint32(body)) != c.last {
		return nil, fmt.Errorf("the answer to request %d has the wrong header: %x", c.last, body[:min(len(body), 5)])
	}
	body = body[4:]
	resp := req.ResponseKind()
	if resp.IsFlexible() && resp.Key() != int16(kmsg.ApiVersions) { // whose header has no tags (KIP-511)
		body = body[1:]
	}
	if err := resp.ReadFrom(body); err != nil {
		return nil, fmt.Errorf("decode the answer to %s version %d: %w", kmsg.NameForKey(req.Key()), req.GetVersion(), err)
	}
	return resp, nil
}
