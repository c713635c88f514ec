package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"syscall"
)

// verdict is a line of the program that runs the cases.
var verdict = regexp.MustCompile(`^(ok|FAIL) +([0-9.]+s)  (.*)$`)

// source runs the cases of the SPIRE source, which make test runs on fakes, on the real one.
func source(ctx context.Context, tell tell) {
	dir, err := os.MkdirTemp("", "klamm-identity-source-")
	if err != nil {
		tell("it starts", "", err)
		return
	}
	program := filepath.Join(dir, "verify")
	cmd := exec.CommandContext(ctx, program)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = build(ctx, "./test/spire/verify", program)
	}
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		tell("it starts", "", errors.Join(err, os.RemoveAll(dir)))
		return
	}
	failed, why := "", ""
	flush := func() {
		if failed != "" {
			tell(failed, "", errors.New(why))
		}
		failed, why = "", ""
	}
	for lines := bufio.NewScanner(out); lines.Scan(); {
		switch m := verdict.FindStringSubmatch(lines.Text()); {
		case m == nil:
			why += lines.Text() + "\n"
		case m[1] == "ok":
			flush()
			tell(m[3], m[2], nil)
		default:
			flush()
			failed = m[3]
		}
	}
	told := failed != ""
	flush()
	if err := errors.Join(cmd.Wait(), os.RemoveAll(dir)); err != nil && !told {
		tell("all cases pass", "", err)
	}
}

func build(ctx context.Context, what, to string) error {
	out, err := exec.CommandContext(ctx, "go", "build", "-o", to, what).CombinedOutput()
	if err != nil {
		err = fmt.Errorf("build %s: %w\n%s", what, err, out)
	}
	return err
}
