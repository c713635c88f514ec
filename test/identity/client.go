package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/sasl"
	"github.com/twmb/franz-go/pkg/sasl/oauth"
	"github.com/twmb/franz-go/pkg/sasl/plain"
	"github.com/twmb/franz-go/pkg/sasl/scram"

	"klamm/test/host"
	"klamm/test/kafka"
)

// client says what a Kafka client written in Go does: it produces one record to a topic, and reads it.
type client struct {
	Broker, Topic           string
	Mechanism, User, Secret string // Secret is the password, or the token
	CA, Certificate, Key    string // PEM files; CA "": plaintext
	ServerName              string
}

const clientTimeout = 20 * time.Second

// run runs the client as a process of a user below the redirected cgroup. Its error is what the client saw.
func (w *world) runClient(uid uint32, c client) error {
	return runClientAt(kafka.Place{Cgroup: w.clients(), UID: uid, GID: uid}, c)
}

func runClientAt(place kafka.Place, c client) error {
	text, err := json.Marshal(c)
	if err != nil {
		return err
	}
	p, err := host.StartSelf(place, "client", string(text))
	if err != nil {
		return err
	}
	return p.Wait()
}

// beClient is that process.
func beClient(args []string) int {
	var c client
	err := json.Unmarshal([]byte(args[0]), &c)
	if err == nil {
		err = c.run()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func (c *client) run() error {
	ctx, cancel := context.WithTimeout(context.Background(), clientTimeout)
	defer cancel()
	opts, err := c.options()
	if err != nil {
		return err
	}
	client, err := kgo.NewClient(opts...)
	if err != nil {
		return err
	}
	defer client.Close()
	if err := client.Ping(ctx); err != nil { // which does not try again and again
		return fmt.Errorf("connect: %w", err)
	}
	want := fmt.Sprintf("%d at %v", os.Getpid(), time.Now())
	if err := client.ProduceSync(ctx, kgo.StringRecord(want)).FirstErr(); err != nil {
		return fmt.Errorf("produce: %w", err)
	}
	client.AddConsumeTopics(c.Topic)
	for {
		fetches := client.PollFetches(ctx)
		if err := errors.Join(fetches.Err(), ctx.Err()); err != nil {
			return fmt.Errorf("consume: %w", err)
		}
		for _, r := range fetches.Records() {
			if string(r.Value) == want {
				return nil
			}
		}
	}
}

func (c *client) options() ([]kgo.Opt, error) {
	opts := []kgo.Opt{kgo.SeedBrokers(c.Broker), kgo.DefaultProduceTopic(c.Topic), kgo.DisableClientMetrics(),
		kgo.DisableIdempotentWrite(), kgo.RecordDeliveryTimeout(clientTimeout), kgo.RequestRetries(1),
		kgo.UnknownTopicRetries(1), kgo.ConsumeResetOffset(kgo.NewOffset().AtStart())}
	if m := c.mechanism(); m != nil {
		opts = append(opts, kgo.SASL(m))
	}
	if c.CA == "" {
		return opts, nil
	}
	trust, err := c.tls()
	return append(opts, kgo.DialTLSConfig(trust)), err
}

func (c *client) mechanism() sasl.Mechanism {
	switch c.Mechanism {
	case "PLAIN":
		return plain.Auth{User: c.User, Pass: c.Secret}.AsMechanism()
	case "SCRAM-SHA-256":
		return scram.Auth{User: c.User, Pass: c.Secret}.AsSha256Mechanism()
	case "SCRAM-SHA-512":
		return scram.Auth{User: c.User, Pass: c.Secret}.AsSha512Mechanism()
	case "OAUTHBEARER":
		return oauth.Auth{Token: c.Secret}.AsMechanism()
	}
	return nil
}

func (c *client) tls() (*tls.Config, error) {
	root, err := os.ReadFile(c.CA)
	if err != nil {
		return nil, err
	}
	trust := &tls.Config{RootCAs: x509.NewCertPool(), ServerName: c.ServerName}
	trust.RootCAs.AppendCertsFromPEM(root)
	if c.Certificate != "" {
		own, err := tls.LoadX509KeyPair(c.Certificate, c.Key)
		if err != nil {
			return nil, err
		}
		trust.Certificates = []tls.Certificate{own}
	}
	return trust, nil
}

// written is a file of the world that its clients can read.
func (w *world) written(name string, content []byte) (string, error) {
	file := w.file(name)
	return file, errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, content, 0o644))
}
