package kafka

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// ToolsVersion is the version of Kafka's Java tools that scripts/setup kafka installs.
const ToolsVersion = "4.3.1"

// Main classes of Kafka's Java tools, for [Tool], and of what is in the other directories below.
const (
	ACLCommand           = "org.apache.kafka.tools.AclCommand"
	ConsoleProducer      = "org.apache.kafka.tools.ConsoleProducer"
	ConsoleConsumer      = "org.apache.kafka.tools.consumer.ConsoleConsumer"
	ConsumerGroupCommand = "org.apache.kafka.tools.consumer.group.ConsumerGroupCommand"
	ConsumerPerformance  = "org.apache.kafka.tools.ConsumerPerformance"
	ProducerPerformance  = "org.apache.kafka.tools.ProducerPerformance"
	TopicCommand         = "org.apache.kafka.tools.TopicCommand"
	TransactionalCopier  = "org.apache.kafka.tools.TransactionalMessageCopier"
	VerifiableConsumer   = "org.apache.kafka.tools.VerifiableConsumer"
	VerifiableProducer   = "org.apache.kafka.tools.VerifiableProducer"
	VerifiableShare      = "org.apache.kafka.tools.VerifiableShareConsumer"

	WordCountDemo = "org.apache.kafka.streams.examples.wordcount.WordCountDemo" // of StreamsDir

	ConnectDistributed = "org.apache.kafka.connect.cli.ConnectDistributed" // of ConnectDir
	ConnectStandalone  = "org.apache.kafka.connect.cli.ConnectStandalone"
)

const (
	toolHeap   = "-Xmx128m"
	brokerHeap = "256m" // unless Options.Heap says otherwise
)

// Tool returns the command that runs a main class of Kafka's Java tools. Start it with [Place.Start] to choose its
// cgroup and user; a user who cannot read the cache needs a copy of [ToolsDir] and [JavaTool].
func Tool(ctx context.Context, class string, args ...string) (*exec.Cmd, error) {
	dir, err := ToolsDir()
	if err != nil {
		return nil, err
	}
	return java(ctx, jars(dir), toolHeap, useArchive(dir), append([]string{class}, args...)), nil
}

// JavaTool returns the words of the command that runs a tool of the classes in dir, with options of the Java runtime:
// the class and its arguments follow.
func JavaTool(dir string, options ...string) []string {
	return words(jars(dir), toolHeap, append(useArchive(dir), options...))
}

// ToolsDir returns the directory with the classes of Kafka's Java tools, or an error that says how to install them.
func ToolsDir() (string, error) { return installed("kafka", "tools-"+ToolsVersion) }

// StreamsDir is what [ToolsDir] is, for Kafka Streams and Apache Kafka's examples of it.
func StreamsDir() (string, error) { return installed("kafka-streams", "streams-"+ToolsVersion) }

// ConnectDir is what [ToolsDir] is, for Kafka Connect and its connectors for files.
func ConnectDir() (string, error) { return installed("kafka-connect", "connect-"+ToolsVersion) }

// Cache returns the directory that scripts/setup installs into.
func Cache() (string, error) {
	if cache := os.Getenv("KLAMM_CACHE"); cache != "" {
		return cache, nil
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "", fmt.Errorf("find the cache of scripts/setup: %w: set KLAMM_CACHE", err)
	}
	return filepath.Join(home, ".cache", "klamm"), nil
}

// installed finds what scripts/setup put into the cache when it was told the name setup.
func installed(setup, name string) (string, error) {
	cache, err := Cache()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, "kafka", name)
	if _, err := os.Stat(dir); err != nil {
		return "", fmt.Errorf("find Apache Kafka %s: %w: run scripts/setup %s", name, err, setup)
	}
	return dir, nil
}

// java returns a command tuned for a quick start and a small footprint: tests start many and none lives long.
func java(ctx context.Context, classPath, heap string, options, args []string) *exec.Cmd {
	all := append(words(classPath, heap, options), args...)
	return exec.CommandContext(ctx, all[0], all[1:]...)
}

func words(classPath, heap string, options []string) []string {
	all := []string{"java", heap, "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Djava.net.preferIPv4Stack=true"}
	return append(append(all, options...), "-cp", classPath)
}

func jars(dir string) string { return filepath.Join(dir, "*") }
