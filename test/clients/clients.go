package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"

	"klamm/test/kafka"
)

// client is one foreign Kafka client: how to come by it, how to call it, and how it tells of errors. It is called as
// anyone would who knows nothing but the brokers' addresses. An empty command means that it has no such operation.
//
// In commands {brokers}, {topic}, {group} and {n} stand for what they say, {lines} for a file with the records,
// {stage} for the directory with the clients, and {java} for Kafka's Java tools.
type client struct {
	name   string // of its row; also part of its topics, groups and transactional ids
	obtain func(context.Context, *rig) error

	produce string // one record per line of the standard input, or of {lines}
	consume string // prints the values of {n} records of a group; see counts
	list    string // prints the names of the topics, or groups, that it sees
	match   string // consume by a regular expression for the broker (KIP-848), which also fits the forbidden topic
	write   string // produces one record in the way that lets an application see a refusal; empty: produce
	reset   string // sets the offsets of a group to the earliest; for a client that does not consume
	members string // prints topics and committed offsets of {group}; for a client that does not consume
	slow    string // produces some 70 records in 15 s; empty: produce, fed slowly

	counts      bool           // consume prints the number of records instead of their values
	seesGroups  bool           // list prints groups
	givesUp     *regexp.Regexp // what it says of records it gave up before a killed broker was fenced; nil: it never does
	denied      *regexp.Regexp // the client's own words for TOPIC_AUTHORIZATION_FAILED
	unreachable *regexp.Regexp // the client's own words for brokers that cannot be reached
}

const (
	perf = "{java} " + kafka.ProducerPerformance + " --topic {topic} --payload-file {lines}"
	// The properties follow the option and end it.
	perfTo   = " --bootstrap-server {brokers}"
	perfSlow = " --num-records 70 --throughput 5"
	perfFast = " --num-records {n} --throughput -1"
	txn      = " --transactional-id orders-{group} --transaction-duration-ms 100"
)

var clients = []client{
	{
		name:        "java-console",
		obtain:      javaTools,
		produce:     "{java} " + kafka.ConsoleProducer + " --bootstrap-server {brokers} --topic {topic}",
		consume:     "{java} " + kafka.ConsoleConsumer + javaConsume,
		list:        "{java} " + kafka.TopicCommand + " --bootstrap-server {brokers} --list",
		givesUp:     regexp.MustCompile(`Error when sending message`), // after 3 retries, its default
		denied:      javaDenied,
		unreachable: javaUnreachable,
	}, {
		name:    "java-perf",
		obtain:  javaTools,
		produce: perf + perfFast + perfTo,
		consume: "{java} " + kafka.ConsumerPerformance + " --bootstrap-server {brokers} --topic {topic} --group {group}" +
			" --num-records {n}",
		slow:        perf + perfSlow + perfTo,
		counts:      true,
		denied:      javaDenied,
		unreachable: javaUnreachable,
	}, {
		name:        "java-txn-perf",
		obtain:      javaTools,
		produce:     perf + perfFast + perfTo + txn,
		consume:     "{java} " + kafka.ConsoleConsumer + javaConsume + " --isolation-level read_committed",
		slow:        perf + perfSlow + perfTo + txn,
		denied:      javaDenied,
		unreachable: javaUnreachable,
	}, {
		name:    "java-groups",
		obtain:  javaTools,
		list:    "{java} " + kafka.ConsumerGroupCommand + " --bootstrap-server {brokers} --list",
		members: "{java} " + kafka.ConsumerGroupCommand + " --bootstrap-server {brokers} --describe --group {group}",
		reset: "{java} " + kafka.ConsumerGroupCommand + " --bootstrap-server {brokers} --group {group} --topic {topic}" +
			" --reset-offsets --to-earliest --execute",
		seesGroups:  true,
		denied:      javaDenied,
		unreachable: javaUnreachable,
	}, {
		name:        "kcat",
		obtain:      setup("kcat"),
		produce:     "kcat -P -b {brokers} -t {topic}",
		consume:     "kcat -b {brokers} -X auto.offset.reset=earliest -c {n} -u -G {group} {topic}",
		list:        "kcat -L -b {brokers}",
		denied:      regexp.MustCompile(`Topic authorization failed`),
		unreachable: regexp.MustCompile(`Broker transport failure`),
	}, {
		name:        "franz-go",
		obtain:      goProgram("franz-go"),
		produce:     "{stage}/franz-go produce {brokers} {topic}",
		consume:     "{stage}/franz-go consume {brokers} {topic} {group} {n}",
		match:       "{stage}/franz-go match {brokers} {topic}|" + forbidden + " {group} {n}",
		list:        "{stage}/franz-go list {brokers}",
		denied:      regexp.MustCompile(`TOPIC_AUTHORIZATION_FAILED`),
		unreachable: regexp.MustCompile(`unable to dial|connection reset|broken pipe|EOF|broker closed`),
	}, {
		name:        "sarama",
		obtain:      goProgram("sarama"),
		produce:     "{stage}/sarama produce {brokers} {topic}",
		consume:     "{stage}/sarama consume {brokers} {topic} {group} {n}",
		list:        "{stage}/sarama list {brokers}",
		givesUp:     regexp.MustCompile(`.`), // errors are all it prints
		denied:      regexp.MustCompile(`The client is not authorized to access this topic`),
		unreachable: regexp.MustCompile(`client has run out of available brokers to talk to`),
	}, {
		name:        "kafka-go",
		obtain:      goProgram("kafka-go"),
		produce:     "{stage}/kafka-go produce {brokers} {topic}",
		write:       "{stage}/kafka-go write {brokers} {topic}",
		consume:     "{stage}/kafka-go consume {brokers} {topic} {group} {n}",
		list:        "{stage}/kafka-go list {brokers}",
		givesUp:     regexp.MustCompile(`.`), // errors are all it prints
		denied:      regexp.MustCompile(`Topic Authorization Failed`),
		unreachable: regexp.MustCompile(`connection refused|connection reset|broken pipe|EOF`),
	}, {
		name:        "kafkajs",
		obtain:      nodeProgram,
		produce:     "node {stage}/kafkajs/client.js produce {brokers} {topic}",
		consume:     "node {stage}/kafkajs/client.js consume {brokers} {topic} {group} {n}",
		list:        "node {stage}/kafkajs/client.js list {brokers}",
		denied:      regexp.MustCompile(`TOPIC_AUTHORIZATION_FAILED`),
		unreachable: regexp.MustCompile(`KafkaJSNumberOfRetriesExceeded|KafkaJSConnectionError`),
	}, {
		name:        "confluent-kafka",
		obtain:      pythonProgram,
		produce:     "/usr/bin/python3 {stage}/confluent/client.py produce {brokers} {topic}",
		consume:     "/usr/bin/python3 {stage}/confluent/client.py consume {brokers} {topic} {group} {n}",
		list:        "/usr/bin/python3 {stage}/confluent/client.py list {brokers}",
		denied:      regexp.MustCompile(`TOPIC_AUTHORIZATION_FAILED`),
		unreachable: regexp.MustCompile(`_TRANSPORT|_ALL_BROKERS_DOWN`),
	},
}

const javaConsume = " --bootstrap-server {brokers} --topic {topic} --group {group} --from-beginning --max-messages {n}"

var (
	javaDenied      = regexp.MustCompile(`TopicAuthorizationException`)
	javaUnreachable = regexp.MustCompile(`TimeoutException`)
)

// setup returns what obtains a client that scripts/setup installs as a whole.
func setup(name string) func(context.Context, *rig) error {
	return func(ctx context.Context, _ *rig) error { return install(ctx, name) }
}

func javaTools(_ context.Context, r *rig) error { return r.tools() }

// staged returns what installs classes by scripts/setup, where they are then, and what they are called in the stage.
func staged(setup, name string, dir func() (string, error)) func(context.Context, *rig) error {
	return func(ctx context.Context, r *rig) error {
		to := filepath.Join(r.stage, name)
		if _, err := os.Stat(to); err == nil {
			return nil
		}
		if err := install(ctx, setup); err != nil {
			return err
		}
		from, err := dir()
		if err != nil {
			return err
		}
		return os.CopyFS(to, os.DirFS(from))
	}
}

// stageTools stages Kafka's Java tools, with an archive of their classes: more than forty of them are started.
func (r *rig) stageTools(ctx context.Context) error {
	from, err := kafka.ToolsDir()
	if err != nil {
		return err
	}
	to := filepath.Join(r.stage, "tools")
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		return err
	}
	return kafka.ArchiveTool(ctx, to, kafka.TopicCommand, "--bootstrap-server", r.brokers(), "--list")
}

// goProgram returns what builds one of the programs beside this file, each a module of its own.
func goProgram(name string) func(context.Context, *rig) error {
	return func(ctx context.Context, r *rig) error {
		build := exec.CommandContext(ctx, "go", "build", "-C", filepath.Join(sources, name), "-o",
			filepath.Join(r.stage, name), ".")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		return loud(build)
	}
}

func nodeProgram(ctx context.Context, r *rig) error {
	if err := install(ctx, "node-clients"); err != nil {
		return err
	}
	return r.stageProgram("node-clients", "kafkajs", "client.js")
}

func pythonProgram(ctx context.Context, r *rig) error {
	if err := install(ctx, "python-clients"); err != nil {
		return err
	}
	return r.stageProgram("python-clients", "confluent", "client.py")
}

// stageProgram stages a program of ours together with the client library that scripts/setup put into the cache.
func (r *rig) stageProgram(cached, name, file string) error {
	cache, err := kafka.Cache()
	if err != nil {
		return err
	}
	to := filepath.Join(r.stage, name)
	if err := os.CopyFS(to, os.DirFS(filepath.Join(cache, cached))); err != nil {
		return err
	}
	program, err := os.ReadFile(filepath.Join(sources, name, file))
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(to, file), program, 0o644)
}

func install(ctx context.Context, name string) error {
	return loud(exec.CommandContext(ctx, "scripts/setup", name))
}

// loud runs a command; what it wrote becomes part of the error.
func loud(cmd *exec.Cmd) error {
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%v: %w\n%s", cmd.Args, err, out)
	}
	return nil
}
