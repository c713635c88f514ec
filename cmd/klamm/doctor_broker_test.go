package main

import (
	"path/filepath"
	"strings"
	"testing"

	"klamm/test/stage"
)

func TestTheDoctorFindsBrokersThatServeAnybody(t *testing.T) {
	broker := stage.StartBroker(t)
	dir := t.TempDir()
	stage.Load(t, dir, stage.NewCgroup(t), broker.Addr(), stage.OrdersOnly, nil)
	config := filepath.Join(dir, "klamm.yaml")
	code, out, errOut := inProcess(t, "doctor", "broker", "-c", config, "--cluster", "main", "-o", "json")
	if f := parseFindings(t, out)["direct "+broker.Addr()]; code != 1 || f.OK || f.Remedy == "" {
		t.Errorf("exit code %d, %+v, stderr\n%s", code, f, errOut)
	}
	if f := parseFindings(t, out)["upstream "+broker.Addr()]; !f.OK || !strings.Contains(f.Detail, "plaintext") {
		t.Errorf("%+v", f)
	}
	for _, args := range [][]string{{"--cluster", "other"}, {"--pid", "-1"}, {"broker-1"}} {
		code, _, errOut := inProcess(t, append([]string{"doctor", "broker", "-c", config}, args...)...)
		if code != 1 || errOut == "" {
			t.Errorf("%v: exit code %d, stderr\n%s", args, code, errOut)
		}
	}
}
