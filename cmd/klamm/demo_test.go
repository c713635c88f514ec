package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"klamm/test/kafka"
	"klamm/test/stage"
)

func TestTheDemoComesOutAsItMust(t *testing.T) {
	t.Setenv("PATH", "") // no kcat, wherever it may be
	t.Setenv("TMPDIR", t.TempDir())
	code, out, errOut := inProcess(t, "demo", "-o", "json")
	var r demoResult
	if err := json.Unmarshal(out, &r); err != nil || code != 0 {
		t.Fatalf("exit code %d, %v, stderr\n%s", code, err, errOut)
	}
	if !r.OK || len(r.Steps) != len(demoSteps) || !strings.HasPrefix(r.Client, "franz-go") {
		t.Errorf("it came out as %+v", r)
	}
	if refused := r.Steps[2]; refused.ExitCode != 1 || !strings.Contains(refused.Output, "TOPIC_AUTHORIZATION_FAILED") {
		t.Errorf("who may not write is told %q", refused.Output)
	}
	verdicts := map[string]int{}
	for _, raw := range r.Audit {
		var l stage.Line
		if err := json.Unmarshal(raw, &l); err != nil {
			t.Fatal(err)
		}
		if len(l.Batches) > 0 {
			verdicts["with hashes"]++
		}
		verdicts[l.Verdict]++
	}
	if verdicts["allow"] == 0 || verdicts["deny"] == 0 || verdicts["with hashes"] < 3 {
		t.Errorf("the audit has %v", verdicts)
	}
	wantNothingLeft(t, r.Cgroup)
}

// wantNothingLeft fails when the demo has left its cgroup or its files.
func wantNothingLeft(t *testing.T, cgroup string) {
	t.Helper()
	if _, err := os.Stat(cgroup); !os.IsNotExist(err) {
		t.Errorf("the cgroup %s is left: %v", cgroup, err)
	}
	if left, err := filepath.Glob(filepath.Join(os.Getenv("TMPDIR"), "*")); err != nil || len(left) > 0 {
		t.Errorf("files are left: %v, %v", left, err)
	}
}

func TestAnInterruptedDemoCleansUp(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	cmd, out, errOut := command(t, kafka.Place{}, "PATH=", "demo")
	stage.Await(t, "the first step", func() bool { return strings.Contains(out.String(), "\n1. ") })
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	if code := exitCode(t, cmd); code != 1 || errOut.String() != "klamm: interrupted\n" {
		t.Errorf("exit code %d, stderr\n%s", code, errOut)
	}
	cgroup := regexp.MustCompile(`eBPF on (\S+) `).FindStringSubmatch(out.String())
	if cgroup == nil {
		t.Fatalf("the demo does not tell its cgroup:\n%s", out)
	}
	wantNothingLeft(t, cgroup[1])
}

func TestTheDemoTakesKcatWhereItIs(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("PATH", dir)
	if argv := demoClient("list", "broker:9092", ""); argv[0] == "kcat" {
		t.Errorf("without kcat, the client is %v", argv)
	}
	if err := os.WriteFile(filepath.Join(dir, "kcat"), []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if argv := demoClient("list", "broker:9092", ""); argv[0] != "kcat" {
		t.Errorf("with kcat, the client is %v", argv)
	}
}
