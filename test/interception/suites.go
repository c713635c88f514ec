package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
)

// goTest runs tests of a package; each test and subtest that has no subtests counts. One that was skipped has failed.
func goTest(dir, only string) func(context.Context, bool, func(string, error)) {
	return func(ctx context.Context, _ bool, tell func(string, error)) {
		args := []string{"test", "-json", "-count=1", "-timeout=60m", dir}
		if only != "" {
			args = append(args, "-run", only)
		}
		cmd := exec.CommandContext(ctx, "go", args...)
		cmd.Env = append(os.Environ(), "KLAMM_VERIFY=1")
		events, err := cmd.StdoutPipe()
		if err != nil {
			tell("it starts", err)
			return
		}
		cmd.Stderr = os.Stderr
		if err := cmd.Start(); err != nil {
			tell("it starts", err)
			return
		}
		failed := readEvents(json.NewDecoder(events), tell)
		if err := cmd.Wait(); err != nil && !failed {
			tell("it runs to its end", err)
		}
	}
}

// event is one of test2json's.
type event struct {
	Action, Test, Output string
}

func readEvents(events *json.Decoder, tell func(string, error)) (failed bool) {
	parents, output := map[string]bool{}, map[string]string{}
	for {
		var e event
		if err := events.Decode(&e); err != nil {
			return failed
		}
		if i := strings.LastIndexByte(e.Test, '/'); i > 0 {
			parents[e.Test[:i]] = true
		}
		switch e.Action {
		case "output":
			output[e.Test] += e.Output
			continue
		case "pass", "fail", "skip":
		default:
			continue
		}
		name := strings.ReplaceAll(strings.TrimPrefix(e.Test, "Test"), "_", " ")
		leaf := e.Test != "" && !parents[e.Test]
		switch {
		case leaf && e.Action == "pass":
			tell(name, nil)
		case leaf:
			failed = true
			tell(name, fmt.Errorf("%s\n%s", e.Action, output[e.Test]))
		case e.Test != "" && e.Action == "fail":
			failed = true // its subtests have told, or it failed by itself
			if strings.Contains(output[e.Test], ".go:") {
				tell(name, errors.New(output[e.Test]))
			}
		}
		delete(output, e.Test)
	}
}

// program builds and runs a verify program of its own.
func program(dir string) func(context.Context, bool, func(string, error)) {
	return func(ctx context.Context, _ bool, tell func(string, error)) {
		bin, err := os.MkdirTemp("", "klamm-verify-")
		if err != nil {
			tell("it starts", err)
			return
		}
		defer func() { _ = os.RemoveAll(bin) }()
		path := filepath.Join(bin, "verify")
		if out, err := exec.CommandContext(ctx, "go", "build", "-o", path, dir).CombinedOutput(); err != nil {
			tell("it builds", fmt.Errorf("%w\n%s", err, out))
			return
		}
		readLines(ctx, tell, exec.CommandContext(ctx, path))
	}
}

// readLines runs a command that prints a line "  pass  NAME" or "  FAIL  NAME" for each check, and what went wrong
// behind it.
func readLines(ctx context.Context, tell func(string, error), cmd *exec.Cmd) {
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		tell("it starts", err)
		return
	}
	n, failed, why := 0, "", ""
	flush := func() {
		if failed != "" {
			tell(failed, errors.New(why))
		}
		failed, why = "", ""
	}
	for lines := bufio.NewScanner(out); lines.Scan(); {
		if _, name, is := strings.Cut(lines.Text(), "  pass  "); is {
			flush()
			tell(name, nil)
			n++
		} else if _, name, is := strings.Cut(lines.Text(), "  FAIL  "); is {
			flush()
			failed = name
			n++
		} else {
			why += lines.Text() + "\n"
		}
	}
	flush()
	var exit *exec.ExitError
	if err := cmd.Wait(); err != nil && (n == 0 || ctx.Err() != nil || !errors.As(err, &exit) || exit.ExitCode() != 1) {
		tell("it runs to its end", err)
	}
}
