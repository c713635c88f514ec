// Kgo runs franz-go's own integration tests of its client (package kgo) twice against the same brokers, direct and
// through the node, and tells where a test passes, fails or is skipped in one and not in the other.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/twmb/franz-go/pkg/kfake"

	"klamm/test/host"
	"klamm/test/kafka"
)

// workloadUID is whom the tests run as through the node: a user id that the policy knows.
const workloadUID = 30_001

// policies: everything, and the same with one rule broken on purpose, which has to show (MUTATE=1).
const (
	allowAll = `apiVersion: klamm/v1
rules:
  - name: everything
    principals: ["` + host.Workload + `"]
    allow:
      - {topic: "*", operations: [All]}
      - {group: "*", operations: [All]}
      - {transactional-id: "*", operations: [All]}
      - {cluster: kafka-cluster, operations: [All]}
`
	withoutGroups = allowAll + `    deny:
      - {group: "*", operations: [Read]}
`
)

type settings struct {
	klamm, brokers, run string
	records             int
	direct, mutate      bool
}

func main() {
	if err := run(os.Args[1:]); err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "kgo:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) > 0 && args[0] == "broker" {
		return runBroker()
	}
	s := settings{mutate: os.Getenv("MUTATE") == "1"}
	flags := flag.NewFlagSet("kgo", flag.ContinueOnError)
	flags.StringVar(&s.klamm, "klamm", "bin/klamm", "the klamm binary")
	flags.StringVar(&s.brokers, "brokers", "kfake,kafka", "kinds of broker")
	flags.StringVar(&s.run, "run", pattern(s.mutate), "only tests that match, as in go test -run")
	flags.IntVar(&s.records, "records", 10_000, "records that tests produce (KGO_TEST_RECORDS)")
	flags.BoolVar(&s.direct, "direct", false, "run direct only, and show how each test ends")
	if err := flags.Parse(args); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	return check(ctx, s, os.Stdout)
}

// pattern: a broken rule has to show in the tests that meet it, and need not in the others.
func pattern(mutate bool) string {
	if mutate {
		return "^TestGroupSimple$"
	}
	return "."
}

func check(ctx context.Context, s settings, out io.Writer) (err error) {
	dir, err := os.MkdirTemp("", "klamm-kgo-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err := os.Chmod(dir, 0o755); err != nil { // the workload's user runs the tests in it
		return err
	}
	suite, err := buildSuite(ctx, dir)
	if err != nil {
		return err
	}
	var total count
	for kind := range strings.SplitSeq(s.brokers, ",") {
		c, err := checkBroker(ctx, s, kind, dir, suite, out)
		if err != nil {
			return fmt.Errorf("%s: %w", kind, err)
		}
		total.add(c)
	}
	if _, err := fmt.Fprintf(out, "%d passed, %d failed\n", total.passed, total.failed); err != nil {
		return err
	}
	return total.err()
}

// buildSuite builds the tests at the version that go.mod names. Beside them are their sources: some tests read them.
func buildSuite(ctx context.Context, dir string) (string, error) {
	const pkg = "github.com/twmb/franz-go/pkg/kgo"
	sources, err := output(ctx, "go", "list", "-f", "{{.Dir}}", pkg)
	if err != nil {
		return "", err
	}
	to := filepath.Join(dir, "kgo")
	if err := os.CopyFS(to, os.DirFS(sources)); err != nil {
		return "", err
	}
	suite := filepath.Join(to, "kgo.test")
	_, err = output(ctx, "go", "test", "-c", "-o", suite, pkg)
	return suite, err
}

func output(ctx context.Context, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s: %w\n%s", cmd, err, stderr.String())
	}
	return strings.TrimSpace(string(out)), nil
}

func checkBroker(ctx context.Context, s settings, kind, dir, suite string, out io.Writer) (c count, err error) {
	addrs, stop, err := startBroker(ctx, kind)
	if err != nil {
		return c, err
	}
	defer func() { err = errors.Join(err, stop()) }()
	runner := suiteRunner{binary: suite, records: s.records, seeds: strings.Join(addrs, ","), logs: dir}
	if s.direct {
		ends, err := runner.run(ctx, s.run, false)
		if err != nil {
			return c, err
		}
		all := outcomes{}
		all.add(map[path]endings{direct: ends})
		return all.report(kind, out)
	}

	cgroup, err := host.NewCgroup("klamm-kgo-", "node", "workload")
	if err != nil {
		return c, err
	}
	defer func() { err = errors.Join(err, host.RemoveCgroup(cgroup)) }()
	policy := allowAll
	if s.mutate {
		policy = withoutGroups
	}
	private := filepath.Join(dir, kind)
	if err := os.Mkdir(private, 0o700); err != nil {
		return c, err
	}
	agent, err := host.StartNode(ctx, host.NodeOptions{Cgroup: cgroup, Runs: filepath.Join(cgroup, "node"), Dir: private,
		Brokers: addrs, UID: workloadUID, Policy: policy, Start: host.Binary(s.klamm)})
	if err != nil {
		return c, err
	}
	defer func() { err = errors.Join(err, agent.Terminate()) }()
	runner.through = kafka.Place{Cgroup: filepath.Join(cgroup, "workload"), UID: workloadUID, GID: workloadUID}
	all, err := runner.compare(ctx, s.run)
	if err != nil {
		return c, err
	}
	return all.report(kind, out)
}

// startBroker starts a broker and tells its addresses.
func startBroker(ctx context.Context, kind string) (addrs []string, stop func() error, err error) {
	switch kind {
	case "kfake":
		p, err := host.StartSelf(kafka.Place{}, "broker")
		if err != nil {
			return nil, nil, err
		}
		line, err := p.Line()
		return strings.Split(line, ","), p.Stop, err
	case "kafka":
		c, err := kafka.New(ctx, kafka.Options{Config: map[string]string{"auto.create.topics.enable": "true"}})
		if err != nil {
			return nil, nil, err
		}
		return c.Addrs(), c.Stop, nil
	}
	return nil, nil, fmt.Errorf("no such kind of broker: want kfake or kafka")
}

// runBroker is kfake as its own repository runs these tests, until standard input ends.
func runBroker() error {
	cluster, err := kfake.NewCluster(kfake.NumBrokers(3), kfake.SeedTopics(-1, "foo"))
	if err != nil {
		return err
	}
	defer cluster.Close()
	fmt.Println(strings.Join(cluster.ListenAddrs(), ","))
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}
