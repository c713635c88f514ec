package node

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"
)

// exemptingCgroup exempts name in the cgroup that r redirects.
func exemptingCgroup(t *testing.T, r *Redirect, cgroup, name string) *exemptions {
	t.Helper()
	root, err := Cgroup2Mount()
	if err != nil {
		t.Fatal(err)
	}
	return &exemptions{redirect: r, root: root, log: zerolog.New(zerolog.NewTestWriter(t)), ids: make([]uint64, 1),
		wanted: []Exemption{{Cgroup: filepath.Join(strings.TrimPrefix(cgroup, root), name)}}}
}

func makeCgroup(t *testing.T, path string) {
	t.Helper()
	if err := os.Mkdir(path, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { removeCgroup(t, path) })
}

// removeCgroup waits until the kernel has let go of the last process, shortly after it was waited for.
func removeCgroup(t *testing.T, path string) {
	t.Helper()
	for end := time.Now().Add(redirectPatience); ; {
		err := os.Remove(path)
		switch {
		case err == nil, errors.Is(err, fs.ErrNotExist):
			return
		case time.Now().After(end):
			t.Fatal(err)
		}
	}
}

func mustRefresh(t *testing.T, e *exemptions) {
	t.Helper()
	if err := e.refresh(); err != nil {
		t.Fatal(err)
	}
}

// goesDirectly tells whether a client in the cgroup is not redirected, and fails when it does not get through.
func goesDirectly(t *testing.T, r *Redirect, cgroup, broker string) bool {
	t.Helper()
	before, err := r.Counters()
	if err != nil {
		t.Fatal(err)
	}
	_, wait := startReader(t, cgroup, broker)
	closed := make(chan struct{})
	var output string
	var failed error
	go func() {
		defer close(closed)
		output, failed = wait()
	}()
	select {
	case <-closed:
	case a := <-r.accepted:
		_ = a.conn.Close()
		<-closed
	}
	after, err := r.Counters()
	if err != nil || failed != nil {
		t.Fatalf("the client: %v; the counters: %v", failed, err)
	}
	exempt := after["passed_exempt"] - before["passed_exempt"]
	if redirected := after["redirected"] - before["redirected"]; exempt+redirected != 1 {
		t.Errorf("one connect was exempt %d times and redirected %d times", exempt, redirected)
	}
	if direct := output == "the broker"; direct != (exempt == 1) {
		t.Errorf("the client read %q, the kernel counts %d exempt connects", output, exempt)
	}
	return exempt == 1
}

func TestACgroupIsExemptWithAllBelowAndNothingAbove(t *testing.T) {
	broker := startBroker(t, "127.0.0.1:0")
	r, cgroup := openRedirect(t, broker.Port())
	kafka := filepath.Join(cgroup, "kafka")
	for _, path := range []string{kafka, filepath.Join(kafka, "jvm"), cgroup + "/kafka-tools"} {
		makeCgroup(t, path)
	}
	mustRefresh(t, exemptingCgroup(t, r, cgroup, "kafka"))
	for path, want := range map[string]bool{".": false, "kafka": true, "kafka/jvm": true, "kafka-tools": false} {
		if got := goesDirectly(t, r, filepath.Join(cgroup, path), broker.String()); got != want {
			t.Errorf("a client in %s goes directly: %v, want %v", path, got, want)
		}
	}
}

func TestARestartedUnitIsExemptByItsNewCgroup(t *testing.T) {
	broker := startBroker(t, "127.0.0.1:0")
	r, cgroup := openRedirect(t, broker.Port())
	path := filepath.Join(cgroup, "kafka.service")
	e := exemptingCgroup(t, r, cgroup, "kafka.service")
	mustRefresh(t, e) // there is none yet
	if e.ids[0] != 0 {
		t.Errorf("cgroup %d is exempt before there is one", e.ids[0])
	}
	var ids []uint64
	for range 2 {
		if err := os.Mkdir(path, 0o755); err != nil {
			t.Fatal(err)
		}
		if goesDirectly(t, r, path, broker.String()) {
			t.Error("a new cgroup is exempt before anybody looked")
		}
		mustRefresh(t, e)
		if !goesDirectly(t, r, path, broker.String()) {
			t.Error("the cgroup is not exempt")
		}
		ids = append(ids, e.ids[0])
		removeCgroup(t, path)
	}
	if ids[0] == ids[1] {
		t.Errorf("both cgroups have the id %d: nothing was tried", ids[0])
	}
	mustRefresh(t, e)
	if e.ids[0] != 0 {
		t.Errorf("cgroup %d is exempt although it is gone", e.ids[0])
	}
}

func TestAUnitIsFoundBelowSlicesOnly(t *testing.T) {
	root := t.TempDir()
	for _, dir := range []string{
		"system.slice/kafka.service/jvm",
		"system.slice/system-kafka.slice/kafka@1.service",
		"user.slice/user-1000.slice/user@1000.service/app.slice/forged.service",
		"docker/forged.service",
	} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for unit, want := range map[string]string{
		"kafka.service":   "system.slice/kafka.service",
		"kafka@1.service": "system.slice/system-kafka.slice/kafka@1.service",
		"forged.service":  "",
		"gone.service":    "",
	} {
		if want != "" {
			want = filepath.Join(root, want)
		}
		if got := findUnit(root, unit); got != want {
			t.Errorf("%s is found at %q, want %q", unit, got, want)
		}
	}
}
