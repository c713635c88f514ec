package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"klamm/test/ca"
	"klamm/test/host"
	"klamm/test/kafka"
)

// The broker's name: nobody's DNS has it, but the hosts file that clients and node see.
const (
	brokerName = "broker-1.kafka.test"
	// impostorHost is where the clients' name service is made to lead them.
	impostorHost = "127.0.0.93"
)

const (
	storePassword = "store-secret"
	userPassword  = "user-secret"
)

// Lives of certificates: of those clients are shown while they are replaced under load, and of all others.
const (
	shortLife = 3 * time.Second
	longLife  = time.Hour
)

const tlsRules = `apiVersion: klamm/v1
rules:
  - name: clients
    principals: ["` + ordersID + `"]
    allow:
      - {topic: orders, operations: [Read, Write, Describe]}
      - {topic: payouts, operations: [Read, Write, Describe]}
      - {group: "*", operations: [Read, Describe]}
`

// tlsWorld is a world of clients that trust the cluster's CA and nobody else, brokers with certificates of that CA, and a
// node with an intermediate of it, which is confined to the brokers' names.
type tlsWorld struct {
	*world
	cluster *kafka.Cluster
	root    *ca.Authority
	node    *node
}

// tlsClient is a stock client. It produces a record to the topic orders and reads it, over TLS with a certificate of its
// own or with SCRAM, as a user of its own name in both.
type tlsClient struct {
	name string
	// commands of one way to connect: what produces has the value as standard input, what reads prints it. Without a
	// second command the first does both.
	commands func(w *tlsWorld, c connect) ([][]string, error)
}

// connect is one way to connect.
type connect struct {
	broker, value  string
	user           string
	login          bool   // by SCRAM, instead of a certificate
	cert, key, pem string // files; pem has both
}

var tlsMatrix = []tlsClient{
	{"java", javaCommands}, {"librdkafka", kcatCommands}, {"kafkajs", kafkajsCommands}, {"go", goCommands},
}

func tlsClients(ctx context.Context, tell tell) {
	w, err := newTLSWorld(ctx)
	if err != nil {
		tell("the clients' TLS ends at the node", "", err)
		return
	}
	var checks []check
	for _, c := range tlsMatrix {
		for way, login := range map[string]bool{"a certificate": false, "SCRAM": true} {
			checks = append(checks, check{fmt.Sprintf("%s with %s does what it does without the node", c.name, way),
				func(ctx context.Context) (string, error) { return "", w.unchanged(ctx, c, login) }})
		}
	}
	runAll(ctx, tell, append(checks,
		check{"what is not allowed is refused in Kafka's words", w.refused},
		check{"a client that does not trust the cluster's CA is told of", w.distrusted},
		check{"an impostor of a broker gets nothing", w.impostor},
		check{"klamm doctor tls knows what works", w.doctorTLS},
		check{"certificates are replaced under load, and nobody notices", w.replaced},
	))
	if err := w.close(); err != nil {
		tell("all ends in order", "", err)
	}
}

func newTLSWorld(ctx context.Context) (_ *tlsWorld, err error) {
	w := &tlsWorld{}
	if w.world, err = newWorld("tls"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.close())
		}
	}()
	if w.root, err = ca.New("cluster"); err != nil {
		return nil, err
	}
	users, super := map[string]string{}, []string{}
	for _, c := range tlsMatrix {
		users[c.name] = userPassword
		super = append(super, "User:"+c.name)
	}
	w.cluster, err = w.startKafka(ctx, kafka.Options{Users: users, SuperUsers: super,
		TLS: &kafka.TLS{CA: w.root, Names: []string{brokerName}}})
	if err != nil {
		return nil, err
	}
	if err = w.writeFiles(); err != nil {
		return nil, err
	}
	w.node, err = w.startNode(ctx, "node", longLife)
	return w, err
}

// writeFiles writes what clients and node have in files.
func (w *tlsWorld) writeFiles() error {
	address, _, err := net.SplitHostPort(w.cluster.TLSAddrs()[0])
	if err != nil {
		return err
	}
	between, err := w.root.Intermediate("brokers of this node", []string{"kafka.test"})
	if err != nil {
		return err
	}
	stranger, err := ca.New("stranger")
	if err != nil {
		return err
	}
	local := "127.0.0.1 localhost\n"
	for file, text := range map[string][]byte{
		"hosts":     []byte(local + address + " " + brokerName + "\n"),
		"spoofed":   []byte(local + impostorHost + " " + brokerName + "\n"),
		"ca.pem":    w.root.PEM(),
		"other.pem": stranger.PEM(),
		"password":  []byte(kafka.AdminPassword),
		"store":     []byte(storePassword),
	} {
		if err := os.WriteFile(w.file(file), text, 0o644); err != nil {
			return err
		}
	}
	out, err := exec.Command("keytool", "-importcert", "-noprompt", "-alias", "cluster", "-file", w.file("ca.pem"),
		"-keystore", w.file("trust.jks"), "-storetype", "JKS", "-storepass", storePassword).CombinedOutput()
	if err != nil {
		return fmt.Errorf("make a truststore: %w\n%s", err, out)
	}
	return ca.Write(between, w.file("between.pem"), w.file("between-key.pem"))
}

// in has a command see a hosts file.
func (w *tlsWorld) in(hosts string, command ...string) []string {
	return append([]string{"unshare", "--mount", "--propagation", "private", "sh", "-c",
		`mount --bind "$0" /etc/hosts && exec "$@"`, w.file(hosts)}, command...)
}

// startNode starts a node that ends the clients' TLS, with certificates of a life. The one before it must have ended.
func (w *tlsWorld) startNode(ctx context.Context, name string, life time.Duration) (*node, error) {
	met := fmt.Sprintf("clients: {tls: terminate, issuer: {intermediate: {cert: %q, key: %q, ttl: %v}}, "+
		"client-certificates: {ca: [%q]}}, upstream: {tls: {ca: %[4]q}}",
		w.file("between.pem"), w.file("between-key.pem"), life, w.file("ca.pem"))
	n, err := w.newNode(ctx, name, []int{kafka.TLSPort, kafka.SASLTLSPort}, tlsRules, sections{
		"identities": fmt.Sprintf("[{spiffe-id: %q, uid: 0}]", ordersID),
		"clusters": fmt.Sprintf("\n- {name: tls, bootstrap: ['%s:%d'], cidrs: [%s/32], %s}\n- {name: sasl, bootstrap: "+
			"['%[1]s:%[5]d'], credentials: {mechanism: SCRAM-SHA-512, username: %s, password-file: %q}, %[4]s}",
			brokerName, kafka.TLSPort, impostorHost, met, kafka.SASLTLSPort, kafka.Admin, w.file("password")),
	})
	if err != nil {
		return nil, err
	}
	// The node knows the brokers' names as its clients do.
	words := w.in("hosts", n.binary)
	script := "#!/bin/sh\nexec"
	for _, word := range words {
		script += " '" + word + "'"
	}
	n.binary = n.file("klamm")
	if err := os.WriteFile(n.binary, []byte(script+` "$@"`+"\n"), 0o755); err != nil {
		return nil, err
	}
	return n, n.ready(ctx)
}

// run runs a client's command in the redirected cgroup, and returns what it prints.
func (w *tlsWorld) run(ctx context.Context, hosts, input string, command []string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, waitLimit)
	defer cancel()
	command = w.in(hosts, command...)
	cmd := exec.CommandContext(ctx, command[0], command[1:]...)
	var out, all bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(input), &out, &all
	err := (kafka.Place{Cgroup: w.clients()}).Start(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		said := all.String()
		err = fmt.Errorf("%s: %w\n%s%s", strings.Join(command[8:], " "), err, out.String(), said[max(0, len(said)-2000):])
	}
	return out.String(), err
}

// way is how a client connects, with a certificate of its own name in files.
func (w *tlsWorld) way(name, value string, login bool) (connect, error) {
	c := connect{broker: fmt.Sprintf("%s:%d", brokerName, kafka.TLSPort), value: value, user: name, login: login}
	if login {
		c.broker = fmt.Sprintf("%s:%d", brokerName, kafka.SASLTLSPort)
		return c, nil
	}
	own, err := w.root.Issue(ca.Leaf{Subject: pkix.Name{CommonName: name}})
	if err != nil {
		return c, err
	}
	chain, key, err := ca.PEM(own)
	c.cert, c.key, c.pem = w.file(name+".crt"), w.file(name+".key"), w.file(name+".pem")
	return c, errors.Join(err, os.WriteFile(c.cert, chain, 0o600), os.WriteFile(c.key, key, 0o600),
		os.WriteFile(c.pem, append(key, chain...), 0o600))
}

// unchanged has a client write and read, and looks whether the node saw what it did, and who it is.
func (w *tlsWorld) unchanged(ctx context.Context, client tlsClient, login bool) error {
	value := fmt.Sprintf("%s %v %d", client.name, login, time.Now().UnixNano())
	way, err := w.way(client.name, value, login)
	if err != nil {
		return err
	}
	commands, err := client.commands(w, way)
	if err != nil {
		return err
	}
	var out string
	for _, command := range commands {
		if out, err = w.run(ctx, "hosts", value+"\n", command); err != nil {
			return errors.Join(err, w.refusals())
		}
	}
	if len(commands) > 1 && !strings.Contains(out, value) {
		return fmt.Errorf("it reads %q, not %q", out, value)
	}
	who := `"source":"tls","issuer":"CN=cluster","subject":"CN=` + client.name + `"`
	if login {
		who = `"principal":"User:` + client.name + `"`
	}
	for _, api := range []string{"Produce", "Fetch"} {
		yes, err := w.node.audited(`"api":"`+api+`"`, `"topic":"orders"`, who)
		if err == nil && !yes {
			err = fmt.Errorf("the audit has no %s with %s", api, who)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func javaCommands(w *tlsWorld, c connect) ([][]string, error) {
	tools, err := kafka.ToolsDir()
	if err != nil {
		return nil, err
	}
	properties := fmt.Sprintf("ssl.truststore.location=%s\nssl.truststore.type=JKS\nssl.truststore.password=%s\n"+
		"ssl.endpoint.identification.algorithm=https\n", w.file("trust.jks"), storePassword)
	if c.login {
		properties += fmt.Sprintf("security.protocol=SASL_SSL\nsasl.mechanism=SCRAM-SHA-512\nsasl.jaas.config="+
			"org.apache.kafka.common.security.scram.ScramLoginModule required username=\"%s\" password=\"%s\";\n",
			c.user, userPassword)
	} else {
		properties += fmt.Sprintf("security.protocol=SSL\nssl.keystore.type=PEM\nssl.keystore.location=%s\n", c.pem)
	}
	file := w.file("java.properties")
	if err := os.WriteFile(file, []byte(properties), 0o600); err != nil {
		return nil, err
	}
	tool := func(class string, args ...string) []string {
		return append(append(kafka.JavaTool(tools), class, "--bootstrap-server", c.broker, "--topic", "orders",
			"--command-config", file), args...)
	}
	return [][]string{tool(kafka.ConsoleProducer), tool(kafka.ConsoleConsumer, "--from-beginning", "--timeout-ms", "8000")}, nil
}

func kcatCommands(w *tlsWorld, c connect) ([][]string, error) {
	settings := []string{"ssl.ca.location=" + w.file("ca.pem"), "ssl.endpoint.identification.algorithm=https"}
	if c.login {
		settings = append(settings, "security.protocol=sasl_ssl", "sasl.mechanisms=SCRAM-SHA-512", "sasl.username="+c.user,
			"sasl.password="+userPassword)
	} else {
		settings = append(settings, "security.protocol=ssl", "ssl.certificate.location="+c.cert, "ssl.key.location="+c.key)
	}
	command := []string{"kcat", "-b", c.broker, "-t", "orders"}
	for _, s := range settings {
		command = append(command, "-X", s)
	}
	return [][]string{append(command[:len(command):len(command)], "-P"),
		append(command[:len(command):len(command)], "-C", "-o", "beginning", "-e", "-q")}, nil
}

func kafkajsCommands(w *tlsWorld, c connect) ([][]string, error) {
	cache, err := kafka.Cache()
	if err != nil {
		return nil, err
	}
	program, err := filepath.Abs("test/identity/tls_client.js")
	if err != nil {
		return nil, err
	}
	said := map[string]string{"broker": c.broker, "topic": "orders", "value": c.value, "ca": w.file("ca.pem"),
		"cert": c.cert, "key": c.key}
	if c.login {
		said["user"], said["password"] = c.user, userPassword
	}
	text, err := json.Marshal(said)
	return [][]string{{"env", "NODE_PATH=" + filepath.Join(cache, "node-clients", "node_modules"), "node", program,
		string(text)}}, err
}

func goCommands(w *tlsWorld, c connect) ([][]string, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	said := client{Broker: c.broker, Topic: "orders", CA: w.file("ca.pem"), Certificate: c.cert, Key: c.key}
	if c.login {
		said.Mechanism, said.User, said.Secret = "SCRAM-SHA-512", c.user, userPassword
	}
	text, err := json.Marshal(said)
	return [][]string{{self, "client", string(text)}}, err
}

// as runs the client written in Go, as it is after change.
func (w *tlsWorld) as(ctx context.Context, hosts string, change func(*client)) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	said := client{Broker: fmt.Sprintf("%s:%d", brokerName, kafka.TLSPort), Topic: "orders", CA: w.file("ca.pem")}
	change(&said)
	text, err := json.Marshal(said)
	if err != nil {
		return err
	}
	_, err = w.run(ctx, hosts, "", []string{self, "client", string(text)})
	return err
}

func (w *tlsWorld) refused(ctx context.Context) (string, error) {
	err := w.as(ctx, "hosts", func(c *client) { c.Topic = "billing" })
	if err == nil || !strings.Contains(err.Error(), "TOPIC_AUTHORIZATION_FAILED") {
		return "", fmt.Errorf("the client sees: %w", err)
	}
	return "", nil
}

// refusals are the last lines of the audit that say why something was refused, as an error.
func (w *tlsWorld) refusals() error {
	lines, err := w.node.audit(func(l auditLine) bool { return l.Reason != "" })
	for _, l := range lines[max(0, len(lines)-3):] {
		err = errors.Join(err, errors.New(l.text))
	}
	return err
}

// reason waits until the audit has a refusal for a reason.
func (w *tlsWorld) reason(ctx context.Context, reason string) error {
	_, err := w.node.awaitAudit(ctx, "a refusal for "+reason, func(l auditLine) bool { return l.Reason == reason })
	return err
}

func (w *tlsWorld) distrusted(ctx context.Context) (string, error) {
	if err := w.as(ctx, "hosts", func(c *client) { c.CA = w.file("other.pem") }); err == nil {
		return "", errors.New("it trusts the node")
	}
	return "", w.reason(ctx, "tls_untrusted")
}

// impostor stands where the clients' name service leads them, with a certificate for the broker's name of another CA.
func (w *tlsWorld) impostor(ctx context.Context) (_ string, err error) {
	rogue, err := ca.New("rogue")
	if err != nil {
		return "", err
	}
	leaf, err := rogue.Issue(ca.Leaf{Names: []string{brokerName, impostorHost}})
	if err != nil {
		return "", err
	}
	l, err := tls.Listen("tcp", fmt.Sprintf("%s:%d", impostorHost, kafka.TLSPort), &tls.Config{
		Certificates: []tls.Certificate{*leaf}, MinVersion: tls.VersionTLS12})
	if err != nil {
		return "", err
	}
	var came, got atomic.Int64
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			came.Add(1)
			n, _ := conn.Read(make([]byte, 1<<10)) // a handshake that fails gives nothing
			got.Add(int64(n))
			_ = conn.Close()
		}
	})
	seen := w.as(ctx, "spoofed", func(*client) {})
	err = l.Close()
	serving.Wait()
	switch {
	case err != nil:
		return "", err
	case seen == nil:
		return "", errors.New("the client is content with the impostor")
	case came.Load() == 0:
		return "", errors.New("nobody came to the impostor, so nothing is shown")
	case got.Load() > 0:
		return "", fmt.Errorf("the impostor got %d bytes of Kafka", got.Load())
	}
	return fmt.Sprintf("%d connections", came.Load()), w.reason(ctx, "upstream_tls")
}

func (w *tlsWorld) doctorTLS(context.Context) (string, error) {
	broker := fmt.Sprintf("%s:%d", brokerName, kafka.TLSPort)
	out, err := w.node.klamm("doctor", "tls", broker, "-o", "json", "--truststore", w.file("trust.jks"),
		"--storepass-file", w.file("store"))
	if err != nil {
		return "", err
	}
	var report struct {
		Mode   string
		Public bool
		Stores []struct{ Works []string } `json:"truststores"`
	}
	if err := json.Unmarshal([]byte(out), &report); err != nil {
		return "", fmt.Errorf("%w\n%s", err, out)
	}
	if report.Mode != "terminate" || report.Public || len(report.Stores) != 1 || len(report.Stores[0].Works) != 2 {
		return "", fmt.Errorf("it says %s", out)
	}
	return "", nil
}

// replaced keeps a connection busy, and connects anew all the time, while the node's certificate is replaced.
func (w *tlsWorld) replaced(ctx context.Context) (_ string, err error) {
	if err := w.node.stop(); err != nil {
		return "", err
	}
	if w.node, err = w.startNode(ctx, "brief", shortLife); err != nil {
		return "", err
	}
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	l := load{client: client{Broker: fmt.Sprintf("%s:%d", brokerName, kafka.TLSPort), Topic: "payouts", CA: w.file("ca.pem")}}
	text, err := json.Marshal(l)
	if err != nil {
		return "", err
	}
	command := w.in("hosts", self, "load", string(text))
	path, err := exec.LookPath(command[0])
	if err != nil {
		return "", err
	}
	began := time.Now()
	p, err := host.Start(kafka.Place{Cgroup: w.clients()}, path, command[1:]...)
	if err != nil {
		return "", err
	}
	connects := 0
	for time.Since(began) < 10*shortLife && err == nil && ctx.Err() == nil {
		err = w.as(ctx, "hosts", func(*client) {})
		connects++
	}
	lasted := time.Since(began)
	measured, jerr := l.judge(p, lasted)
	return fmt.Sprintf("%s; %d clients that connected anew, certificates of %v for %v", measured, connects, shortLife,
		lasted.Round(time.Second)), errors.Join(err, jerr)
}
