package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"klamm/test/kafka"
)

// suiteRunner runs the tests against one broker.
type suiteRunner struct {
	binary  string
	records int
	seeds   string
	logs    string      // directory
	through kafka.Place // where a process is redirected to the node
}

// endings is how each test ended, by name. Subtests are tests of their own.
type endings map[string]string

const (
	passed  = "pass"
	failed  = "fail"
	skipped = "skip"
	// unfinished: its run panicked or was out of time, in this test or before it.
	unfinished = "unfinished"
)

// event is one line of go tool test2json.
type event struct{ Action, Test string }

// run runs the tests that match. That some fail is a result and no error.
func (r *suiteRunner) run(ctx context.Context, pattern string, through bool) (endings, error) {
	const timeout = "15m" // of all tests, to end a run that hangs
	test := exec.CommandContext(ctx, r.binary, "-test.v=test2json", "-test.timeout", timeout, "-test.run", pattern)
	test.Dir = filepath.Dir(r.binary)
	test.Env = append(os.Environ(), "KGO_SEEDS="+r.seeds, "KGO_TEST_RF=1", "KGO_LOG_LEVEL=none",
		fmt.Sprintf("KGO_TEST_RECORDS=%d", r.records))
	log, err := os.CreateTemp(r.logs, "log-")
	if err != nil {
		return nil, err
	}
	defer func() { _ = log.Close() }()
	test.Stdout, test.Stderr = log, log
	place := kafka.Place{}
	if through {
		place = r.through
	}
	if err := place.Start(test); err != nil {
		return nil, err
	}
	var failed *exec.ExitError
	if err := test.Wait(); err != nil && !errors.As(err, &failed) || ctx.Err() != nil {
		return nil, errors.Join(ctx.Err(), err)
	}
	if _, err := log.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	ends, err := parse(ctx, log)
	if err != nil {
		return nil, fmt.Errorf("%w\n%s", err, end(log))
	}
	return ends, r.miss(ctx, pattern, ends)
}

// miss adds the tests that a run did not come to.
func (r *suiteRunner) miss(ctx context.Context, pattern string, ends endings) error {
	top, _, _ := strings.Cut(pattern, "/") // subtests are not listed
	names, err := output(ctx, r.binary, "-test.list", top)
	if err != nil {
		return err
	}
	for name := range strings.FieldsSeq(names) {
		if strings.HasPrefix(name, "Test") && ends[name] == "" {
			ends[name] = unfinished
		}
	}
	return nil
}

// end is the last of a log.
func end(log *os.File) []byte {
	const most = 2000
	size, err := log.Seek(0, io.SeekEnd)
	if err != nil {
		return nil
	}
	tail := make([]byte, min(size, most))
	n, _ := log.ReadAt(tail, size-int64(len(tail))) // what it could read
	return tail[:n]
}

func parse(ctx context.Context, log io.Reader) (endings, error) {
	convert := exec.CommandContext(ctx, "go", "tool", "test2json")
	convert.Stdin = log
	events, err := convert.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := convert.Start(); err != nil {
		return nil, err
	}
	ends := endings{}
	for decoder := json.NewDecoder(events); ; {
		var e event
		if err := decoder.Decode(&e); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, errors.Join(err, convert.Wait())
		}
		if e.Test == "" {
			continue
		}
		switch e.Action {
		case "run":
			ends[e.Test] = unfinished
		case passed, failed, skipped:
			ends[e.Test] = e.Action
		}
	}
	if len(ends) == 0 {
		return nil, errors.Join(errors.New("no test ran"), convert.Wait())
	}
	return ends, convert.Wait()
}
