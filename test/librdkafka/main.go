// Librdkafka runs librdkafka's own tests (its directory tests), in quick mode and without those that need no broker,
// twice against the same brokers, direct and through the node, and tells where a test passes, fails or is skipped in
// one and not in the other.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"

	"klamm/test/host"
	"klamm/test/kafka"
)

// workloadUID is whom the tests run as on either path: a user id that the policy knows.
const workloadUID = 30_002

// policies: what brokers without ACLs grant everyone, and the same with one right withheld, which has to show
// (MUTATE=1).
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

// setting is what the tests run with.
type setting struct {
	name       string
	librdkafka string // release of Debian that it is of
	kafka      string // version of the brokers
	groups     string // group protocol of consumers: classic, or consumer (KIP-848)
	autoCreate bool   // auto.create.topics.enable
}

// settings: librdkafka with brokers of about its time. Some tests want brokers that do not create topics (scenario
// noautocreate), and the others do not run there.
var settings = []setting{
	{"old", "bookworm", kafka.Previous, "classic", true},
	{"old-noautocreate", "bookworm", kafka.Previous, "classic", false},
	{"new", "sid", kafka.Newest, "classic", true},
	{"new-noautocreate", "sid", kafka.Newest, "classic", false},
	{"new-consumer", "sid", kafka.Newest, "consumer", true},
}

// scenario is the suite's name for settings of brokers.
func (s setting) scenario() string {
	if s.autoCreate {
		return "default"
	}
	return "noautocreate"
}

type options struct {
	klamm, dir      string
	settings, tests *regexp.Regexp
	parallel        int
	direct, mutate  bool
}

func main() {
	if err := run(os.Args[1:]); err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "librdkafka:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	o := options{mutate: os.Getenv("MUTATE") == "1"}
	names, tests := ".", "."
	if o.mutate { // a right withheld has to show in a test that needs it
		names, tests = "^old$", "^0030"
	}
	flags := flag.NewFlagSet("librdkafka", flag.ContinueOnError)
	flags.StringVar(&o.klamm, "klamm", "bin/klamm", "the klamm binary")
	flags.StringVar(&o.dir, "dir", "", "new directory for what the tests say; if none is given, it goes when none differs")
	flags.StringVar(&names, "settings", names, "only settings whose name matches")
	flags.StringVar(&tests, "tests", tests, "only tests whose name matches")
	flags.IntVar(&o.parallel, "parallel", 16, "tests at a time")
	flags.BoolVar(&o.direct, "direct", false, "run direct only, and show how each test ends")
	err := flags.Parse(args)
	if err != nil {
		return err
	}
	if o.settings, err = regexp.Compile(names); err != nil {
		return err
	}
	if o.tests, err = regexp.Compile(tests); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	return check(ctx, o, os.Stdout)
}

func check(ctx context.Context, o options, out io.Writer) (err error) {
	dir, err := o.makeDir()
	if err != nil {
		return err
	}
	if err := stageKafka(dir); err != nil {
		return err
	}
	var total count
	for _, s := range settings {
		if !o.settings.MatchString(s.name) {
			continue
		}
		c, err := checkSetting(ctx, o, s, dir, out)
		if err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		total.add(c)
	}
	kept := fmt.Sprintf("what the tests said is in %s\n", dir)
	if total.failed == 0 && o.dir == "" {
		kept, err = "", os.RemoveAll(dir)
	}
	_, werr := fmt.Fprintf(out, "%s%d passed, %d failed\n", kept, total.passed, total.failed)
	if err := errors.Join(err, werr); err != nil {
		return err
	}
	return total.err()
}

// makeDir makes the directory of everything. The workload's user runs the tests in it.
func (o *options) makeDir() (string, error) {
	if o.dir != "" {
		dir, err := filepath.Abs(o.dir)
		return dir, errors.Join(err, os.Mkdir(dir, 0o755))
	}
	dir, err := os.MkdirTemp("", "klamm-librdkafka-")
	if err != nil {
		return "", err
	}
	return dir, os.Chmod(dir, 0o755)
}

func checkSetting(ctx context.Context, o options, s setting, dir string, out io.Writer) (c count, err error) {
	cluster, err := startCluster(ctx, s)
	if err != nil {
		return count{}, err
	}
	defer func() { err = errors.Join(err, cluster.Stop()) }()
	tests := &suite{setting: s, kafkaPath: dir, dir: filepath.Join(dir, s.name),
		brokers: strings.Join(cluster.Addrs(), ","), parallel: o.parallel}
	if err := tests.stage(ctx); err != nil {
		return count{}, err
	}
	groups, err := tests.list(ctx, o.tests)
	if err != nil {
		return count{}, err
	}
	if o.direct {
		results, err := tests.runAll(ctx, groups, direct)
		if err != nil {
			return count{}, err
		}
		return report(results, s.name, out)
	}

	cgroup, err := host.NewCgroup("klamm-librdkafka-", "node", "workload")
	if err != nil {
		return count{}, err
	}
	defer func() { err = errors.Join(err, host.RemoveCgroup(cgroup)) }()
	policy := allowAll
	if o.mutate {
		policy = withoutGroups
	}
	agent, err := host.StartNode(ctx, host.NodeOptions{Cgroup: cgroup, Runs: filepath.Join(cgroup, "node"),
		Dir: tests.dir, Brokers: cluster.Addrs(), UID: workloadUID, Policy: policy, Start: host.Binary(o.klamm)})
	if err != nil {
		return count{}, err
	}
	defer func() { err = errors.Join(err, agent.Terminate()) }()
	tests.through = filepath.Join(cgroup, "workload")
	results, err := tests.compare(ctx, groups)
	if err != nil {
		return count{}, err
	}
	return report(results, s.name, out)
}

// startCluster starts brokers as librdkafka's own harness sets them up (trivup's KafkaBrokerApp): with an authorizer
// that allows what no ACL forbids, and each in a rack of its own.
func startCluster(ctx context.Context, s setting) (*kafka.Cluster, error) {
	return kafka.New(ctx, kafka.Options{Version: s.kafka, Brokers: 3, Authorizer: true, Racks: true,
		Config: map[string]string{
			"allow.everyone.if.no.acl.found": "true",
			"num.partitions":                 "4",
			"auto.create.topics.enable":      strconv.FormatBool(s.autoCreate),
		}})
}
