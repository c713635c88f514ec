package main

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"time"

	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/kafka/wire"
	"klamm/test/host"
)

// patience bounds every read and write.
const patience = 90 * time.Second

// conn is a client's connection, as bytes.
type conn struct {
	net.Conn
	in   *bufio.Reader
	next int32
}

func dial(d *host.Dialer, broker string) (*conn, error) {
	c, err := d.Dial("", broker)
	if err != nil {
		return nil, err
	}
	return open(c)
}

func open(c net.Conn) (*conn, error) {
	return &conn{Conn: c, in: bufio.NewReader(c)}, c.SetDeadline(time.Now().Add(patience))
}

var formatter = kmsg.NewRequestFormatter(kmsg.FormatterClientID("large"))

// send sends a request, and tells its correlation id.
func (c *conn) send(req kmsg.Request) (int32, error) {
	c.next++
	_, err := c.Write(formatter.AppendRequest(nil, req, c.next))
	return c.next, err
}

// receive reads the answer to a request, which must be the next one.
func (c *conn) receive(id int32, req kmsg.Request) (kmsg.Response, error) {
	var head [8]byte
	if _, err := io.ReadFull(c.in, head[:]); err != nil {
		return nil, err
	}
	if got := int32(binary.BigEndian.Uint32(head[4:])); got != id {
		return nil, fmt.Errorf("the answer to request %d came where that to %d was due", got, id)
	}
	body := make([]byte, binary.BigEndian.Uint32(head[:])-4)
	if _, err := io.ReadFull(c.in, body); err != nil {
		return nil, err
	}
	resp := req.ResponseKind()
	if wire.ResponseHeaderLen(req.Key(), req.GetVersion()) > len(head) {
		body = body[1:] // no tagged fields in headers
	}
	if v, is := resp.(*kmsg.ApiVersionsResponse); is && len(body) > 1 && binary.BigEndian.Uint16(body) != 0 {
		v.Version = 0 // KIP-511
	}
	return resp, resp.ReadFrom(body)
}

func (c *conn) ask(req kmsg.Request) (kmsg.Response, error) {
	id, err := c.send(req)
	if err != nil {
		return nil, err
	}
	return c.receive(id, req)
}

// closeAll closes connections; how they end does not matter any more.
func closeAll(conns []*conn) {
	for _, c := range conns {
		_ = c.Close()
	}
}

func metadata(topic string) *kmsg.MetadataRequest {
	req := kmsg.NewPtrMetadataRequest()
	req.Version = 9
	t := kmsg.NewMetadataRequestTopic()
	t.Topic = &topic
	req.Topics = append(req.Topics, t)
	return req
}

// part is what goes to partition 0 of a topic.
type part struct {
	topic string
	batch []byte
}

func produce(parts ...part) *kmsg.ProduceRequest {
	req := kmsg.NewPtrProduceRequest()
	req.Version, req.Acks, req.TimeoutMillis = 9, 1, 30_000
	for _, part := range parts {
		t := kmsg.NewProduceRequestTopic()
		t.Topic = part.topic
		p := kmsg.NewProduceRequestTopicPartition()
		p.Records = part.batch
		t.Partitions = append(t.Partitions, p)
		req.Topics = append(req.Topics, t)
	}
	return req
}

// fetch asks for partition 0 of topics, the first from an offset on, in an answer of so many bytes.
func fetch(offset int64, bytes int32, topics ...string) *kmsg.FetchRequest {
	req := kmsg.NewPtrFetchRequest()
	req.Version, req.SessionEpoch, req.MaxBytes, req.MinBytes, req.MaxWaitMillis = 12, -1, bytes, 1, 500
	for i, name := range topics {
		t := kmsg.NewFetchRequestTopic()
		t.Topic = name
		p := kmsg.NewFetchRequestTopicPartition()
		p.PartitionMaxBytes = bytes
		if i == 0 {
			p.FetchOffset = offset
		}
		t.Partitions = append(t.Partitions, p)
		req.Topics = append(req.Topics, t)
	}
	return req
}

// write writes a batch into a topic, and tells its offset.
func (c *conn) write(topic string, batch []byte) (int64, error) {
	resp, err := c.ask(produce(part{topic, batch}))
	if err != nil {
		return 0, err
	}
	return produced(resp)
}

// produced tells the offset of the last batch, and fails unless the broker took all, but those for denied topics.
func produced(resp kmsg.Response, denied ...string) (offset int64, err error) {
	offset = -1
	refused := 0
	for _, t := range resp.(*kmsg.ProduceResponse).Topics {
		for _, p := range t.Partitions {
			switch {
			case p.ErrorCode == topicDenied && slices.Contains(denied, t.Topic):
				refused++
			case p.ErrorCode != 0 || p.BaseOffset < 0:
				err = errors.Join(err, fmt.Errorf("topic %s: error code %d, offset %d", t.Topic, p.ErrorCode, p.BaseOffset))
			default:
				offset = p.BaseOffset
			}
		}
	}
	if err == nil && (offset < 0 || refused != len(denied)) {
		err = fmt.Errorf("offset %d, and %d refused", offset, refused)
	}
	return offset, err
}

const topicDenied = 29 // TOPIC_AUTHORIZATION_FAILED
