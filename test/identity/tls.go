package main

import (
	"bytes"
	"context"
	"crypto/tls"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"klamm/test/ca"
	"klamm/test/host"
	"klamm/test/kafka"
)

// Names of brokers, which clients verify and which are known in a file hosts of the suite's own.
const (
	brokerName   = "kafka-1.shop.test"
	impostorName = "kafka-9.shop.test" // in the cluster's bootstrap list, and somebody else's
	otherName    = "other.shop.test"   // somebody else's whom the cluster's CA knows, at the name of a broker
)

var (
	//go:embed tls_client.py
	pythonClient []byte
	//go:embed tls_client.js
	nodeClient []byte
)

const (
	storePassword = "changeit"
	limitOfClient = time.Minute
	endOfOutput   = 1500             // bytes that a failure shows
	leafLife      = 20 * time.Second // of what clients are shown in the check of rotation
)

// byTLS lets orders use its topic, and whoever shows the certificate of billing the other.
const byTLS = `apiVersion: klamm/v1
rules:
  - name: orders
    principals: ["` + ordersID + `"]
    allow: [{topic: orders, operations: [Read, Write, Describe]}, {group: "orders-*", operations: [Read, Describe]}]
  - name: billing by certificate
    when: tls.subject == "CN=billing"
    allow: [{topic: billing, operations: [Read, Write, Describe]}]
connections:
  - {name: opaque, principals: ["` + ordersID + `"], passthrough: true}
`

// tlsWorld is a world whose brokers speak TLS alone to clients that know them by name.
type tlsWorld struct {
	*world
	authority *ca.Authority // of brokers, the only one that clients trust
	cluster   *kafka.Cluster
	node      *node
	impostors []*impostor
	lines     atomic.Int64
}

// wayTo is how a client comes to the brokers.
type wayTo struct {
	name  string
	topic string
	port  int
	c     client
}

func (w *tlsWorld) ways() []wayTo {
	cert := client{Certificate: w.file("billing.crt"), Key: w.file("billing.key")}
	return []wayTo{
		{"server name verified", "orders", kafka.TLSPort, client{}},
		{"SASL", "orders", kafka.SASLTLSPort,
			client{Mechanism: "SCRAM-SHA-512", User: alice, Secret: fmt.Sprintf(secretOf, alice)}},
		{"client certificate", "billing", kafka.TLSPort, cert},
	}
}

// foreign are clients that are not ours, beside which there is one written in Go. Each prints the text it consumed.
var foreign = []struct {
	name    string
	command func(w *tlsWorld, c client, text string) []string
}{
	{"Java with a JKS truststore", (*tlsWorld).javaClient},
	{"kcat (librdkafka)", (*tlsWorld).kcatClient},
	{"confluent-kafka-python (librdkafka)", func(w *tlsWorld, c client, text string) []string {
		return []string{"env", "PYTHONPATH=" + w.file("python"), "/usr/bin/python3", w.file("tls_client.py"), object(c, text)}
	}},
	{"kafkajs", func(w *tlsWorld, c client, text string) []string {
		return []string{"env", "NODE_PATH=" + w.file("node/node_modules"), "node", w.file("tls_client.js"), object(c, text)}
	}},
	{"franz-go", func(w *tlsWorld, c client, text string) []string {
		return []string{"sh", "-c", `"$0" client "$1" && echo "$2"`, w.file("identity"), object(c, text), text}
	}},
}

// object is a client and a text as the clients' programs read it.
func object(c client, text string) string {
	out, _ := json.Marshal(struct { //nolint:errchkjson // strings
		client
		Text string
	}{c, text})
	return string(out)
}

func (w *tlsWorld) kcatClient(c client, text string) []string {
	if c.User != "" {
		c.Mechanism = "PLAIN" // SCRAM of distributions' older librdkafka is refused by Kafka 4 also without a node
	}
	args := fmt.Sprintf("-b %s -t %s -X ssl.ca.location=%s -X ssl.endpoint.identification.algorithm=https", c.Broker,
		c.Topic, c.CA)
	switch {
	case c.User != "":
		args += fmt.Sprintf(" -X security.protocol=sasl_ssl -X sasl.mechanisms=%s -X sasl.username=%s -X sasl.password=%s",
			c.Mechanism, c.User, c.Secret)
	case c.Certificate != "":
		args += " -X security.protocol=ssl -X ssl.certificate.location=" + c.Certificate + " -X ssl.key.location=" + c.Key
	default:
		args += " -X security.protocol=ssl"
	}
	return []string{"sh", "-c", "echo '" + text + "' | kcat -P -X message.timeout.ms=20000 " + args +
		" && kcat -C -e -o beginning " + args + " | grep -Fx '" + text + "'"}
}

func (w *tlsWorld) javaClient(c client, text string) []string {
	properties := "security.protocol=SSL\nssl.truststore.type=JKS\nssl.truststore.location=" + w.file("trust.jks") +
		"\nssl.truststore.password=" + storePassword + "\nssl.endpoint.identification.algorithm=https\n"
	if c.User != "" {
		properties = strings.Replace(properties, "=SSL\n", "=SASL_SSL\n", 1) + "sasl.mechanism=" + c.Mechanism +
			"\nsasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required username=\"" + c.User +
			"\" password=\"" + c.Secret + "\";\n"
	}
	if c.Certificate != "" {
		properties += "ssl.keystore.type=PEM\nssl.keystore.location=" + w.file("billing.pem") + "\n"
	}
	file := w.file("java-" + strconv.FormatInt(w.lines.Add(1), 10) + ".properties")
	if err := os.WriteFile(file, []byte(properties), 0o644); err != nil {
		return []string{"sh", "-c", "echo " + strconv.Quote(err.Error()) + "; exit 1"}
	}
	java := "'" + strings.Join(kafka.JavaTool(w.file("java")), "' '") + "'"
	common := " --bootstrap-server " + c.Broker + " --topic " + c.Topic + " --command-config " + file
	return []string{"sh", "-c", "echo '" + text + "' | " + java + " " + kafka.ConsoleProducer + common +
		" && timeout 40 " + java + " " + kafka.ConsoleConsumer + common +
		" --from-beginning --timeout-ms 8000 --group orders-java | grep -m 1 -Fx '" + text + "'"}
}

func tlsClients(ctx context.Context, tell tell) {
	w, err := newTLSWorld(ctx)
	if err != nil {
		tell("Kafka starts", "", err)
		return
	}
	tell = w.noting(tell)
	defer func() { tell("it leaves nothing behind", "", w.close()) }()
	w.with(ctx, tell, "terminate", w.terminating(leafLife), func() (all []check) {
		for _, f := range foreign {
			for _, way := range w.ways() {
				all = append(all, check{f.name + ", " + way.name, func(ctx context.Context) (string, error) {
					return "", w.produceAndConsume(ctx, f.command, way)
				}})
			}
		}
		return append(all,
			check{"without the client certificate there is no right that takes it", w.certificateCounts},
			check{"the audit has each topic, and the certificate's subject", w.audited},
			check{"certificates of brokers are replaced under load", w.leavesRotate},
			check{"a broker with another CA's certificate is refused, and gets nothing of a client", w.impostor(0)},
			check{"a broker with another name in its certificate is refused, and gets nothing of a client", w.impostor(1)},
			check{"doctor tls tells which truststores it works for", w.doctor})
	})
	w.with(ctx, tell, "passthrough", "{tls: passthrough}", func() (all []check) {
		for _, f := range foreign {
			way := w.ways()[1]
			all = append(all, check{f.name + ", " + way.name, func(ctx context.Context) (string, error) {
				return "", w.produceAndConsume(ctx, f.command, way)
			}})
		}
		return append(all,
			check{"the audit says that it is opaque", w.opaque},
			check{"who has no permission to be opaque is refused", w.notOpaque},
			check{"a server name that is no broker's is refused", w.wrongServerName})
	})
	w.with(ctx, tell, "deny", "{}", func() []check {
		return []check{{"every TLS client is refused, and told by an alert", w.denied}}
	})
}

// with runs a node that meets TLS clients in a way, and checks.
func (w *tlsWorld) with(ctx context.Context, tell tell, mode, clients string, checks func() []check) {
	told := func(name, measured string, err error) { tell(mode+": "+name, measured, err) }
	if err := w.startNode(ctx, mode, clients); err != nil {
		told("the node starts", "", err)
		return
	}
	runAll(ctx, told, checks())
	told("the node ends", "", w.node.stop())
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
	if w.authority, err = ca.New("the cluster's CA"); err != nil {
		return nil, err
	}
	w.cluster, err = w.startKafka(ctx, kafka.Options{TLS: &kafka.TLS{CA: w.authority, Names: []string{brokerName}},
		Users: map[string]string{alice: fmt.Sprintf(secretOf, alice)}, SuperUsers: []string{"User:" + alice}})
	if err != nil {
		return nil, err
	}
	return w, errors.Join(w.findClients(), w.writeStores(ctx), w.startImpostors())
}

// mounts are what clients find below the suite's directory, which users other than root can enter.
func (w *tlsWorld) mounts() (map[string]string, error) {
	cache, err := kafka.Cache()
	if err != nil {
		return nil, err
	}
	java, err := kafka.ToolsDir()
	return map[string]string{"java": java, "node": filepath.Join(cache, "node-clients"),
		"python": filepath.Join(cache, "python-clients")}, err
}

func (w *tlsWorld) findClients() error {
	mounts, err := w.mounts()
	for name := range mounts {
		err = errors.Join(err, os.Mkdir(w.file(name), 0o755))
	}
	self, rerr := os.ReadFile("/proc/self/exe")
	broker, _, serr := net.SplitHostPort(w.cluster.Addrs()[0])
	hosts := fmt.Sprintf("127.0.0.1 localhost\n%s %s\n%s %s\n%s %s\n", broker, brokerName, beside(broker, 101),
		impostorName, beside(broker, 102), otherName)
	return errors.Join(err, rerr, serr, os.WriteFile(w.file("identity"), self, 0o755),
		os.WriteFile(w.file("hosts"), []byte(hosts), 0o644), os.WriteFile(w.file("tls_client.py"), pythonClient, 0o644),
		os.WriteFile(w.file("tls_client.js"), nodeClient, 0o644))
}

// beside is an address of the same cluster as that of a broker.
func beside(broker string, last int) string {
	return broker[:strings.LastIndexByte(broker, '.')+1] + strconv.Itoa(last)
}

// writeStores writes what clients trust and show.
func (w *tlsWorld) writeStores(ctx context.Context) error {
	strange, err := ca.New("another CA")
	if err != nil {
		return err
	}
	for name, root := range map[string]*ca.Authority{"trust": w.authority, "strange": strange} {
		if err := os.WriteFile(w.file(name+".pem"), root.PEM(), 0o644); err != nil {
			return err
		}
		cmd := exec.CommandContext(ctx, "keytool", "-importcert", "-noprompt", "-alias", "ca", "-file", w.file(name+".pem"),
			"-keystore", w.file(name+".jks"), "-storetype", "JKS", "-storepass", storePassword)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("keytool: %w\n%s", err, out)
		}
	}
	// Clients' certificates are of another CA than the brokers'.
	clients, err := ca.New("the clients' CA")
	if err != nil {
		return err
	}
	billing, err := clients.Issue(ca.Leaf{Subject: commonName("billing")})
	if err != nil {
		return err
	}
	chain, key, err := ca.PEM(billing)
	return errors.Join(err, os.WriteFile(w.file("clients.pem"), clients.PEM(), 0o644),
		os.WriteFile(w.file("billing.crt"), chain, 0o644), os.WriteFile(w.file("billing.key"), key, 0o644),
		os.WriteFile(w.file("billing.pem"), append(key, chain...), 0o644))
}

// within has a command run with the suite's hosts and mounts, as a user, or as root.
func (w *tlsWorld) within(uid uint32, command ...string) ([]string, error) {
	mounts, err := w.mounts()
	script := "mount --bind " + w.file("hosts") + " /etc/hosts"
	for name, from := range mounts {
		script += " && mount --bind " + from + " " + w.file(name)
	}
	script += ` && cd / && exec "$@"`
	all := []string{"unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"}
	if uid != 0 {
		user := strconv.FormatUint(uint64(uid), 10)
		all = append(all, "setpriv", "--reuid="+user, "--regid="+user, "--clear-groups")
	}
	return append(all, command...), err
}

// run runs a command as a user below the redirected cgroup and returns what it prints.
func (w *tlsWorld) run(ctx context.Context, uid uint32, command ...string) (string, error) {
	return w.runIn(ctx, w.clients(), uid, command...)
}

func (w *tlsWorld) runIn(ctx context.Context, cgroup string, uid uint32, command ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, limitOfClient)
	defer cancel()
	all, err := w.within(uid, command...)
	if err != nil {
		return "", err
	}
	cmd := exec.CommandContext(ctx, all[0], all[1:]...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.Cancel = func() error { return kafka.Kill(cmd) }
	if err := (kafka.Place{Cgroup: cgroup}).Start(cmd); err != nil {
		return "", err
	}
	err = cmd.Wait()
	text := out.String()
	if err != nil {
		err = fmt.Errorf("%w\n%s", err, text[max(0, len(text)-endOfOutput):])
	}
	return text, err
}

// terminating is the section clients with a confined CA below that of the brokers.
func (w *tlsWorld) terminating(life time.Duration) string {
	return fmt.Sprintf("{tls: terminate, issuer: {intermediate: {cert: %q, key: %q, ttl: %s}},"+
		" client-certificates: {ca: [%q]}}", w.file("intermediate.crt"), w.file("intermediate.key"), life,
		w.file("clients.pem"))
}

func (w *tlsWorld) startNode(ctx context.Context, mode, clients string) error {
	confined, err := w.authority.Intermediate("brokers of this node", []string{"shop.test"})
	if err != nil {
		return err
	}
	password, perr := w.written("admin-password", []byte(kafka.AdminPassword))
	if err := errors.Join(perr, ca.Write(confined, w.file("intermediate.crt"), w.file("intermediate.key"))); err != nil {
		return err
	}
	w.node, err = w.newNode(ctx, mode, []int{kafka.TLSPort, kafka.SASLTLSPort}, byTLS, sections{
		"identities": fmt.Sprintf("[{name: orders, spiffe-id: %q, uid: %d}]", ordersID, ordersUID),
		"clusters": fmt.Sprintf(`
  - name: tls
    bootstrap: [%q, %q, %q]
    upstream: {tls: {ca: %q}}
    clients: %s
  - name: scram
    bootstrap: [%q]
    upstream: {tls: {ca: %[4]q}}
    credentials: {mechanism: SCRAM-SHA-512, username: %[7]s, password-file: %[8]q}
    clients: %[5]s`, at(brokerName, kafka.TLSPort), at(impostorName, kafka.TLSPort), at(otherName, kafka.TLSPort),
			w.file("trust.pem"), clients, at(brokerName, kafka.SASLTLSPort), kafka.Admin, password),
	})
	if err != nil {
		return err
	}
	if w.node.wrapped, err = w.within(0); err != nil {
		return err
	}
	return w.node.ready(ctx)
}

func (w *tlsWorld) client(way wayTo) client {
	c := way.c
	c.Broker, c.Topic, c.CA = at(brokerName, way.port), way.topic, w.file("trust.pem")
	return c
}

// produceAndConsume: the client prints what it consumed, which is what it produced.
func (w *tlsWorld) produceAndConsume(
	ctx context.Context, command func(*tlsWorld, client, string) []string, way wayTo,
) error {
	text := fmt.Sprintf("record %d", w.lines.Add(1))
	out, err := w.run(ctx, ordersUID, command(w, w.client(way), text)...)
	if err == nil && !strings.Contains(out, text) {
		err = fmt.Errorf("it did not consume %q:\n%s", text, out)
	}
	return err
}

func (w *tlsWorld) certificateCounts(ctx context.Context) (string, error) {
	way := w.ways()[0]
	way.topic = "billing"
	out, err := w.run(ctx, ordersUID, w.file("identity"), "client", object(w.client(way), ""))
	if err == nil || !strings.Contains(out, "TOPIC_AUTHORIZATION_FAILED") {
		return "", fmt.Errorf("it was not refused as Kafka refuses: %s\n%s", fmt.Sprint(err), out)
	}
	return "", nil
}

func (w *tlsWorld) audited(context.Context) (string, error) {
	for _, words := range [][]string{{`"topic":"orders"`, ordersID}, {`"topic":"billing"`, "CN=billing"}} {
		is, err := w.node.audited(words...)
		if err == nil && !is {
			err = fmt.Errorf("no line of the audit has all of %q", words)
		}
		if err != nil {
			return "", err
		}
	}
	return "", nil
}

// leaf is the certificate that a client is shown.
func (w *tlsWorld) leaf(ctx context.Context) (serial string, err error) {
	out, err := w.run(ctx, ordersUID, w.file("identity"), "leaf", at(brokerName, kafka.TLSPort), w.file("trust.pem"))
	return strings.TrimSpace(out), err
}

// beLeaf connects by TLS, to a broker whose CAs are in a file, and prints the serial number of the certificate it is
// shown. A third argument is the server name it asks for.
func beLeaf(args []string) int {
	c := client{Broker: args[0], CA: args[1]}
	if len(args) > 2 {
		c.ServerName = args[2]
	}
	trust, err := c.tls()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	conn, err := tls.Dial("tcp", c.Broker, trust)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	fmt.Println(conn.ConnectionState().PeerCertificates[0].SerialNumber)
	_ = conn.Close() // it is not needed any more
	return 0
}

func (w *tlsWorld) leavesRotate(ctx context.Context) (string, error) {
	c := w.client(w.ways()[0])
	text, err := json.Marshal(load{client: c})
	if err != nil {
		return "", err
	}
	all, err := w.within(ordersUID, w.file("identity"), "load", string(text))
	if err != nil {
		return "", err
	}
	p, err := host.Start(kafka.Place{Cgroup: w.clients()}, all[0], all[1:]...)
	if err != nil {
		return "", err
	}
	began, serials := time.Now(), map[string]bool{}
	for time.Since(began) < 3*leafLife {
		serial, err := w.leaf(ctx)
		if err != nil {
			return "", errors.Join(err, p.Terminate())
		}
		serials[serial] = true
		time.Sleep(time.Second)
	}
	l := load{client: c}
	measured, err := l.judge(p, time.Since(began))
	if err == nil && len(serials) < 3 {
		err = fmt.Errorf("%d certificates in %v: they are not replaced", len(serials), 3*leafLife)
	}
	return fmt.Sprintf("%d certificates; %s", len(serials), measured), err
}

// impostor is a server in the brokers' place.
type impostor struct {
	at       string
	arrived  atomic.Int64
	received atomic.Int64 // bytes behind the handshake
}

// startImpostors starts one with a certificate of another CA, and one whose certificate is the cluster's for another
// name.
func (w *tlsWorld) startImpostors() error {
	strange, err := ca.New("an impostor")
	if err != nil {
		return err
	}
	broker, _, err := net.SplitHostPort(w.cluster.Addrs()[0])
	if err != nil {
		return err
	}
	for i, of := range []struct {
		by   *ca.Authority
		name string
	}{{strange, impostorName}, {w.authority, "somebody.test"}} {
		shown, err := of.by.Issue(ca.Leaf{Names: []string{of.name}})
		if err != nil {
			return err
		}
		server := &impostor{at: net.JoinHostPort(beside(broker, 101+i), strconv.Itoa(kafka.TLSPort))}
		l, err := tls.Listen("tcp", server.at,
			&tls.Config{Certificates: []tls.Certificate{*shown}, MinVersion: tls.VersionTLS12})
		if err != nil {
			return err
		}
		w.onClose(l.Close)
		w.impostors = append(w.impostors, server)
		go server.serve(l)
	}
	return nil
}

func (i *impostor) serve(l net.Listener) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		i.arrived.Add(1)
		go func() {
			n, _ := io.Copy(io.Discard, conn) // however it ends
			i.received.Add(n)
			_ = conn.Close()
		}()
	}
}

func (w *tlsWorld) impostor(n int) func(context.Context) (string, error) {
	return func(ctx context.Context) (string, error) {
		server, before := w.impostors[n], w.impostors[n].arrived.Load()
		c := w.client(w.ways()[0])
		c.Broker = net.JoinHostPort([]string{impostorName, otherName}[n], strconv.Itoa(kafka.TLSPort))
		if out, err := w.run(ctx, ordersUID, w.file("identity"), "client", object(c, "")); err == nil {
			return "", fmt.Errorf("the client was served: %s", out)
		}
		if server.arrived.Load() == before {
			return "", errors.New("nothing came to the impostor: it does not measure")
		}
		if got := server.received.Load(); got > 0 {
			return "", fmt.Errorf("it got %d bytes", got)
		}
		is, err := w.node.audited(`"event":"refusal"`, strings.Split(c.Broker, ":")[0])
		if err == nil && !is {
			is, err = w.node.audited(`"event":"refusal"`, server.at)
		}
		if err == nil && !is {
			err = fmt.Errorf("no refusal in the audit names %s", c.Broker)
		}
		return "", err
	}
}

func (w *tlsWorld) doctor(ctx context.Context) (string, error) {
	for store, works := range map[string]bool{"trust.jks": true, "trust.pem": true, "strange.jks": false} {
		out, err := w.runIn(ctx, "", 0, w.node.binary, "doctor", "tls", at(brokerName, kafka.TLSPort), "-c",
			w.node.file("klamm.yaml"), "--cluster", "tls", "--truststore", w.file(store))
		if (err == nil) != works {
			return "", fmt.Errorf("with %s: %s\n%s", store, fmt.Sprint(err), out)
		}
	}
	return "", nil
}

func (w *tlsWorld) opaque(context.Context) (string, error) {
	is, err := w.node.audited("opaque", ordersID)
	if err == nil && !is {
		err = errors.New("no line of the audit says so")
	}
	return "", err
}

// refusedAt fails when a client is served, or the refusal is not in the audit.
func (w *tlsWorld) refusedAt(ctx context.Context, uid uint32, c client) error {
	if out, err := w.run(ctx, uid, w.file("identity"), "client", object(c, "")); err == nil {
		return fmt.Errorf("it was served: %s", out)
	}
	_, err := w.node.awaitAudit(ctx, "the refusal", func(l auditLine) bool { return l.Event == "refusal" && l.UID == uid })
	return err
}

func (w *tlsWorld) notOpaque(ctx context.Context) (string, error) {
	return "", w.refusedAt(ctx, billingUID, w.client(w.ways()[1]))
}

func (w *tlsWorld) wrongServerName(ctx context.Context) (string, error) {
	out, err := w.run(ctx, ordersUID, w.file("identity"), "leaf", at(brokerName, kafka.TLSPort), w.file("trust.pem"),
		"evil.shop.test")
	if err == nil || strings.Contains(out, "x509") {
		return "", fmt.Errorf("a broker answers: %s", out)
	}
	is, err := w.node.audited(`"event":"refusal"`, "evil.shop.test")
	if err == nil && !is {
		err = errors.New("no refusal in the audit names it")
	}
	return strings.TrimSpace(lastLine(out)), err
}

func (w *tlsWorld) denied(ctx context.Context) (string, error) {
	c := w.client(w.ways()[0])
	out, err := w.run(ctx, ordersUID, w.file("identity"), "client", object(c, ""))
	if err == nil || !strings.Contains(out, "tls: ") {
		return "", fmt.Errorf("it did not end by an alert: %s\n%s", fmt.Sprint(err), out)
	}
	for _, f := range foreign {
		if err := w.produceAndConsume(ctx, f.command, w.ways()[0]); err == nil {
			return "", fmt.Errorf("%s was served", f.name)
		}
	}
	is, err := w.node.audited(`"event":"refusal"`, `"reason":"tls`)
	if err == nil && !is {
		err = errors.New("no refusal in the audit says so")
	}
	return strings.TrimSpace(lastLine(out)), err
}

func at(name string, port int) string { return net.JoinHostPort(name, strconv.Itoa(port)) }

func lastLine(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return lines[len(lines)-1]
}
