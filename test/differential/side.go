package main

import (
	"errors"
	"fmt"
	"net"
	"strings"

	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/test/kafka"
)

// side is one of the clusters, as its clients know it.
type side struct {
	world  *world
	addr   string
	host   string
	dial   func(from, to string) (net.Conn, error)
	conns  map[string]*conn
	ids    map[[16]byte]string // all that topics ever had, or would have had
	topics map[string]bool     // all that there ever were
}

func newSide(w *world, addr string, dial func(from, to string) (net.Conn, error)) *side {
	host, _, _ := net.SplitHostPort(addr) // it has both by construction
	return &side{world: w, addr: addr, host: host, dial: dial, conns: map[string]*conn{}, ids: map[[16]byte]string{},
		topics: map[string]bool{}}
}

// dialDirect connects from this process, which nothing redirects.
func dialDirect(from, to string) (net.Conn, error) {
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
	return d.Dial("tcp", to)
}

// conn is a user's connection of a name, which stays open for the requests to come.
func (s *side) conn(user, name string, anonymous bool) (*conn, error) {
	key := user + " " + name
	if c := s.conns[key]; c != nil {
		return c, nil
	}
	raw, err := s.dial(s.world.users[user].From, s.addr)
	if err != nil {
		return nil, err
	}
	c := newConn(raw)
	if !anonymous {
		login := s.world.login(user)
		if err := c.login(login, password(login)); err != nil {
			return nil, errors.Join(fmt.Errorf("log in as %s: %w", user, err), c.Close())
		}
	}
	s.conns[key] = c
	return c, nil
}

// exchange asks as a user. A connection that did not answer is no longer used.
func (s *side) exchange(user, connection string, anonymous bool, req kmsg.Request) (outcome, error) {
	c, err := s.conn(user, connection, anonymous)
	if err != nil {
		return outcome{}, err
	}
	o, err := c.ask(req)
	if err != nil || o.answer == nil && o.ended != unanswered {
		s.drop(user, connection)
	}
	if created, is := o.answer.(*kmsg.CreateTopicsResponse); is {
		for _, t := range created.Topics {
			if t.TopicID != [16]byte{} {
				s.ids[t.TopicID] = t.Topic
			}
		}
	}
	return o, err
}

func (s *side) drop(user, connection string) {
	key := user + " " + connection
	if c := s.conns[key]; c != nil {
		_ = c.Close() // it is of no use any more
		delete(s.conns, key)
	}
}

// close ends all connections.
func (s *side) close() {
	for _, c := range s.conns {
		_ = c.Close() // nothing more is asked
	}
	clear(s.conns)
}

// ask asks as the super user for what the suite itself wants to know.
func (s *side) ask(req kmsg.Request) (kmsg.Response, error) {
	o, err := s.exchange(kafka.Admin, "", false, req)
	if err != nil || o.answer == nil {
		return nil, errors.Join(err, fmt.Errorf("ask %s: %s", s.addr, o.ended))
	}
	return o.answer, nil
}

// settle waits until a transaction has ended: its markers are written behind the answer, and offsets depend on them.
func (s *side) settle(transaction string) error {
	return await(func() (bool, error) {
		resp, err := s.ask(&kmsg.DescribeTransactionsRequest{TransactionalIDs: []string{transaction}})
		if err != nil {
			return false, err
		}
		state := resp.(*kmsg.DescribeTransactionsResponse).TransactionStates[0].State
		return state != "Ongoing" && !strings.HasPrefix(state, "Prepare"), nil
	})
}

// learn takes up the ids of all topics.
func (s *side) learn() error {
	resp, err := s.ask(&kmsg.MetadataRequest{Version: 12})
	if err != nil {
		return err
	}
	for _, t := range resp.(*kmsg.MetadataResponse).Topics {
		s.ids[t.TopicID], s.topics[*t.Topic] = *t.Topic, true
	}
	return nil
}

// id is the id of a topic; of a name that had several, that of now.
func (s *side) id(topic string) (found [16]byte, err error) {
	resp, err := s.ask(&kmsg.MetadataRequest{Version: 12, Topics: []kmsg.MetadataRequestTopic{{Topic: &topic}}})
	if err != nil {
		return found, err
	}
	t := resp.(*kmsg.MetadataResponse).Topics[0]
	if t.ErrorCode != 0 {
		return found, fmt.Errorf("the cluster has no topic %s", topic)
	}
	s.ids[t.TopicID], s.topics[topic] = topic, true
	return t.TopicID, nil
}

// named is an id as both sides call it.
func (s *side) named(id [16]byte) (string, error) {
	if _, known := s.ids[id]; !known && id != [16]byte{} {
		if err := s.learn(); err != nil {
			return "", err
		}
	}
	if name, known := s.ids[id]; known {
		return "the id of " + name, nil
	}
	return strings.TrimLeft(fmt.Sprintf("%x", id), "0"), nil
}
