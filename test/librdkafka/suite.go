package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"klamm/test/kafka"
)

// suite is the tests of one librdkafka, which run against one cluster.
type suite struct {
	setting
	kafkaPath string // directory of Kafka's programs
	dir       string // of this suite: the tests, and what they leave and say
	brokers   string
	parallel  int    // tests at a time
	through   string // cgroup where a process is redirected to the node
}

// path is the way to the brokers.
type path string

const (
	direct path = "direct"
	node   path = "node"
)

// ending is how a test ended, in the suite's words, and if it was skipped, why, or if it failed, where.
type ending struct{ state, reason string }

const (
	passed  = "PASSED"
	failed  = "FAILED"
	skipped = "SKIPPED"
	// aborted: the process ended badly though no test failed, as when the suite finds threads left at its end.
	aborted = "ABORTED"
)

// endings is how each test ended, by name.
type endings map[string]ending

// group is the tests whose names begin with the same number, which the suite runs only together.
type group struct {
	number string
	names  []string
}

// manual is the number from which on tests have no end of their own, or want brokers that are set up by hand.
const manual = "1000"

// list lists all tests that match: a process that is asked for none of them reports them all.
func (s *suite) list(ctx context.Context, matching *regexp.Regexp) ([]group, error) {
	dir, _, err := s.start(ctx, "none", "list", direct)
	if err != nil {
		return nil, err
	}
	states, err := readReport(dir)
	if err != nil {
		return nil, err
	}
	var groups []group
	for _, name := range slices.Sorted(maps.Keys(states)) {
		number, _, _ := strings.Cut(name, "_")
		switch last := len(groups) - 1; {
		case !matching.MatchString(name) || number >= manual:
		case last >= 0 && groups[last].number == number:
			groups[last].names = append(groups[last].names, name)
		default:
			groups = append(groups, group{number, []string{name}})
		}
	}
	if len(groups) == 0 {
		return nil, fmt.Errorf("no test matches %s", matching)
	}
	return groups, nil
}

// processLimit ends tests that hang: those that do not take two minutes at most.
const processLimit = 3 * time.Minute

// start runs tests in a process of their own, as the suite ends the process when one test is out of time. It returns
// the directory with what they left and said, and whether nothing failed: exit code 0.
func (s *suite) start(ctx context.Context, number, name string, by path) (dir string, succeeded bool, err error) {
	dir = filepath.Join(s.dir, name)
	if err := s.prepare(dir, name); err != nil {
		return "", false, err
	}
	log, err := os.Create(filepath.Join(dir, logFile))
	if err != nil {
		return "", false, err
	}
	defer func() { _ = log.Close() }()
	binaries := filepath.Join(s.dir, "src")
	// One test at a time, quick, and not those that need no broker.
	test := exec.Command(filepath.Join(binaries, "test-runner"), "-p1", "-Q", "-L", "-s", s.scenario())
	test.Dir, test.Stdout, test.Stderr = dir, log, log
	test.Env = append(os.Environ(), "LD_LIBRARY_PATH="+binaries, "TESTS="+number, "TEST_REPORT="+reportFile,
		"TEST_KAFKA_VERSION="+s.kafka, "TEST_CONSUMER_GROUP_PROTOCOL="+s.groups, "KAFKA_PATH="+s.kafkaPath,
		"BROKERS="+s.brokers)
	place := kafka.Place{UID: workloadUID, GID: workloadUID}
	if by == node {
		place.Cgroup = s.through
	}
	if err := place.Start(test); err != nil {
		return "", false, err
	}
	limited, cancel := context.WithTimeout(ctx, processLimit)
	defer cancel()
	ended := context.AfterFunc(limited, func() { _ = kafka.Kill(test) })
	err = test.Wait()
	ended()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) || ctx.Err() != nil {
		return "", false, errors.Join(ctx.Err(), err)
	}
	return dir, err == nil, nil
}

// prepare makes the working directory of a process. Topics have names of their own. Limits are longer by the factor
// that librdkafka's own harness takes, and once more for the company of other tests.
func (s *suite) prepare(dir, name string) error {
	config := fmt.Sprintf("bootstrap.servers=%s\nbroker.address.family=v4\ntest.topic.prefix=rdkafkatest-%s\n"+
		"test.timeout.multiplier=4\n", s.brokers, name)
	return errors.Join(os.Mkdir(dir, 0o755), os.Chown(dir, workloadUID, workloadUID),
		os.WriteFile(filepath.Join(dir, "test.conf"), []byte(config), 0o644),
		os.Symlink(s.java(), filepath.Join(dir, "java")))
}

// run runs the tests of a group. That some fail is a result and no error.
func (s *suite) run(ctx context.Context, g group, attempt int, by path) (endings, error) {
	dir, succeeded, err := s.start(ctx, g.number, fmt.Sprintf("%s-%s-%d", g.number, by, attempt), by)
	if err != nil {
		return nil, err
	}
	states, err := readReport(dir)
	if err != nil {
		return nil, err
	}
	log, err := os.ReadFile(filepath.Join(dir, logFile))
	if err != nil {
		return nil, err
	}
	return g.endings(states, log, succeeded), nil
}

// Files in the working directory of a process.
const (
	reportFile = "report.json"
	logFile    = "log"
)

// readReport reads the state of each test. A process that crashed has left none.
func readReport(dir string) (states map[string]string, err error) {
	text, err := os.ReadFile(filepath.Join(dir, reportFile))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	var report struct {
		Tests map[string]struct{ State string }
	}
	if err := json.Unmarshal(text, &report); err != nil {
		return nil, fmt.Errorf("read the report in %s: %w", dir, err)
	}
	states = map[string]string{}
	for name, test := range report.Tests {
		if name != "<MAIN>" { // what the suite does between the tests
			states[name] = test.State
		}
	}
	return states, nil
}

// What the suite says about a test, beside its report.
var (
	whySkipped  = regexp.MustCompile(`(?m)^\S*\[(\w+) */.*SKIPPING TEST: ([^\x1b\n]*)`)
	whereFailed = regexp.MustCompile(`(?m)### Test "(\w+).*" failed at (\S+) .*###\n(.*)$`)
)

func (g group) endings(states map[string]string, log []byte, succeeded bool) endings {
	said := map[string]string{}
	for _, m := range whySkipped.FindAllSubmatch(log, -1) {
		said[skipped+string(m[1])] = strings.TrimSpace(string(m[2]))
	}
	for _, m := range whereFailed.FindAllSubmatch(log, -1) {
		if name := failed + string(m[1]); said[name] == "" { // what fails then is of no interest
			said[name] = fmt.Sprintf("%s %s", m[2], m[3])
		}
	}
	ends := endings{}
	for _, name := range g.names {
		ends[name] = ending{states[name], said[states[name]+name]}
		if states[name] == "" {
			ends[name] = ending{state: aborted}
		}
	}
	if !succeeded && !ends.have(failed) {
		for name := range ends {
			ends[name] = ending{state: aborted}
		}
	}
	return ends
}

func (e endings) have(state string) bool {
	for _, end := range e {
		if end.state == state {
			return true
		}
	}
	return false
}
