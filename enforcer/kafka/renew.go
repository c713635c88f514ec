package kafka

import (
	"context"
	"time"

	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/audit"
	"klamm/enforcer/kafka/wire"
)

// The node's own login is renewed before the next request once it is due; a broker takes it also after the session has
// expired, and closes an idle connection for no such reason (SocketServer.processCompletedReceives of Apache Kafka).
const (
	renewLimit   = 30 * time.Second // for the exchange
	renewSpacing = time.Second      // a broker refuses more (KafkaChannel.MIN_REAUTH_INTERVAL_ONE_SECOND_NANOS)
)

// own makes requests of the node's.
var own = kmsg.NewRequestFormatter(kmsg.FormatterClientID("klamm"))

// renew logs in again at the broker where that is due. The client's next frame waits meanwhile.
func (s *session) renew() error {
	if s.conn.Login == nil {
		return nil
	}
	now, due := time.Now(), s.conn.Login.Due()
	if due.IsZero() || now.Before(due) || now.Before(s.renewed.Add(renewSpacing)) {
		return nil
	}
	if err := s.up.Flush(); err != nil {
		return err
	}
	if err := s.queue.WaitEmpty(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(s.life, renewLimit)
	defer cancel()
	s.renewed = time.Now()
	err := s.conn.Login.Exchange(ctx, func(req kmsg.Request) (kmsg.Response, error) { return s.call(ctx, req) })
	if err != nil {
		return refuse(audit.UpstreamLogin, "renewing the login at the broker: %w", err)
	}
	return nil
}

// call sends a request of our own between those of the client, and returns its answer, of which the client hears
// nothing.
func (s *session) call(ctx context.Context, req kmsg.Request) (kmsg.Response, error) {
	e := s.queue.New()
	e.V.reset(wire.Header{Key: req.Key(), Version: req.GetVersion()}, "", time.Now())
	e.V.kind, e.V.sequence, e.V.reply = ours, s.sequence, make(chan []byte, 1)
	reply := e.V.reply
	s.sequence++
	frame := own.AppendRequest(make([]byte, 0, maxAuthFrame), req, e.V.sequence)
	defer clear(frame)
	if err := s.push(e); err != nil {
		return nil, err
	}
	s.up.Emit(frame)
	if err := s.up.Flush(); err != nil {
		return nil, err
	}
	select {
	case body := <-reply:
		resp := req.ResponseKind()
		return resp, resp.ReadFrom(body)
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// replied hands an answer of n bytes to call.
func (s *session) replied(p *pending, n int) error {
	head := wire.ResponseHeaderLen(p.Key, p.Version)
	if n > maxAuthFrame || n < head {
		return refuse(audit.BadAnswer, "an answer of %d bytes to our own %s", n, apiName(p.Key))
	}
	frame, err := s.down.Need(n)
	if err != nil {
		return fromPipe(err, audit.BadAnswer)
	}
	p.reply <- append([]byte(nil), frame[head:]...)
	s.down.Drop(n)
	return nil
}
