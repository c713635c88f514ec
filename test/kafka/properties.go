package kafka

import (
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
)

// properties are for combined mode on one small machine: internal topics of one partition, no waiting for a group to
// fill, small buffers. Brokers and controllers speak SASL to each other, so that an authorizer can tell them from
// anonymous clients.
func (c *Cluster) properties(b *broker) map[string]string {
	var voters []string
	for _, other := range c.brokers {
		voters = append(voters, fmt.Sprintf("%d@%s", other.id, other.addr(controllerPort)))
	}
	listener := func(name string, port int) string { return fmt.Sprintf("%s://%s:%d", name, b.host, port) }
	advertised := []string{
		listener("PLAINTEXT", PlaintextPort), listener("SASL", SASLPort), listener("INTER", interPort),
	}
	replicas := strconv.Itoa(min(len(c.brokers), 3))
	isr := strconv.Itoa(min(len(c.brokers), 2))
	p := map[string]string{
		"process.roles":                  "broker,controller",
		"node.id":                        strconv.Itoa(b.id),
		"controller.quorum.voters":       strings.Join(voters, ","),
		"listeners":                      strings.Join(append(advertised, listener("CONTROLLER", controllerPort)), ","),
		"advertised.listeners":           strings.Join(advertised, ","),
		"inter.broker.listener.name":     "INTER",
		"controller.listener.names":      "CONTROLLER",
		"listener.security.protocol.map": protocols,

		"sasl.enabled.mechanisms":                           "PLAIN",
		"listener.name.sasl.sasl.enabled.mechanisms":        "PLAIN,SCRAM-SHA-256,SCRAM-SHA-512",
		"sasl.mechanism.inter.broker.protocol":              "PLAIN",
		"sasl.mechanism.controller.protocol":                "PLAIN",
		"listener.name.inter.plain.sasl.jaas.config":        c.plainUsers(),
		"listener.name.controller.plain.sasl.jaas.config":   c.plainUsers(),
		"listener.name.sasl.plain.sasl.jaas.config":         c.plainUsers(),
		"listener.name.sasl.scram-sha-256.sasl.jaas.config": scramUsers,
		"listener.name.sasl.scram-sha-512.sasl.jaas.config": scramUsers,

		"log.dirs":                         filepath.Join(b.dir, "data"),
		"log.cleaner.dedupe.buffer.size":   "4194304",
		"num.network.threads":              "2",
		"num.io.threads":                   "4",
		"auto.create.topics.enable":        "false",
		"num.partitions":                   "3",
		"default.replication.factor":       replicas,
		"min.insync.replicas":              isr,
		"group.initial.rebalance.delay.ms": "0",

		"offsets.topic.num.partitions":             "3",
		"offsets.topic.replication.factor":         replicas,
		"transaction.state.log.num.partitions":     "3",
		"transaction.state.log.replication.factor": replicas,
		"transaction.state.log.min.isr":            isr,

		// A killed broker is fenced, and its partitions move, after this time (default 9 s).
		"broker.session.timeout.ms":    "3000",
		"broker.heartbeat.interval.ms": "500",
	}
	if c.opts.Version != Previous {
		p["share.coordinator.state.topic.num.partitions"] = "1"
		p["share.coordinator.state.topic.replication.factor"] = replicas
		p["share.coordinator.state.topic.min.isr"] = isr
	}
	if c.opts.Authorizer {
		p["authorizer.class.name"] = "org.apache.kafka.metadata.authorizer.StandardAuthorizer"
		p["super.users"] = strings.Join(append([]string{"User:" + Admin}, c.opts.SuperUsers...), ";")
	}
	if c.opts.Telemetry {
		p["metric.reporters"] = "TelemetryReceiver"
	}
	if c.opts.Racks {
		p["broker.rack"] = "RACK" + strconv.Itoa(b.id) // librdkafka's tests know it
		p["replica.selector.class"] = "org.apache.kafka.common.replica.RackAwareReplicaSelector"
	}
	if c.opts.MaxReauth > 0 {
		p["listener.name.sasl.connections.max.reauth.ms"] = milliseconds(c.opts.MaxReauth)
	}
	return p
}

const protocols = "PLAINTEXT:PLAINTEXT,SASL:SASL_PLAINTEXT,INTER:SASL_PLAINTEXT,CONTROLLER:SASL_PLAINTEXT"

const scramUsers = "org.apache.kafka.common.security.scram.ScramLoginModule required;"

// plainUsers is the JAAS line with all users of PLAIN; the node itself logs in as Admin.
func (c *Cluster) plainUsers() string {
	line := "org.apache.kafka.common.security.plain.PlainLoginModule required " +
		"username=\"" + Admin + "\" password=\"" + AdminPassword + "\""
	for name, password := range c.users() {
		line += fmt.Sprintf(" user_%s=%q", name, password)
	}
	return line + ";"
}
