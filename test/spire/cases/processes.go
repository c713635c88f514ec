package cases

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/rs/zerolog"

	"klamm/spiffe"
	"klamm/test/kafka"
)

// shell is a process of a user that executes another program when it is told to.
func (e *Env) shell(uid uint32) (spiffe.Peer, func() error, error) {
	cmd := exec.Command("sh", "-c", "read -r go; exec sleep 1000")
	in, err := cmd.StdinPipe()
	if err != nil {
		return spiffe.Peer{}, nil, err
	}
	if err := (kafka.Place{UID: uid, GID: uid}).Start(cmd); err != nil {
		return spiffe.Peer{}, nil, err
	}
	e.finally(func() error {
		err := kafka.Kill(cmd)
		_ = cmd.Wait() // killed
		return err
	})
	peer, err := peerOf(cmd.Process.Pid)
	return peer, func() error {
		_, err := io.WriteString(in, "go\n")
		return err
	}, err
}

// probeVariable makes a process a probe: see Probe.
const probeVariable = "KLAMM_TEST_PROBE"

// Probe is to be called first by every program that runs cases. In a process that a case made to be another user it
// asks the agent, prints what comes of it and does not return.
func Probe() {
	what, ok := os.LookupEnv(probeVariable)
	if !ok {
		return
	}
	words := strings.Split(what, " ")
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	_, err := spiffe.ProbeSPIRE(ctx, spiffe.SPIREOptions{API: words[0], Socket: words[1], WorkloadAPI: words[2],
		Log: zerolog.Nop()})
	fmt.Println(err)
	os.Exit(0) //nolint:gocritic // nothing is left to be cancelled
}

// probeAs is what a probe of another user prints.
func (e *Env) probeAs(ctx context.Context, uid uint32) (string, error) {
	self, err := e.copyOfSelf()
	if err != nil {
		return "", err
	}
	cmd := exec.CommandContext(ctx, self)
	cmd.Env = append(os.Environ(), probeVariable+"="+strings.Join([]string{e.API, e.Socket(e.API), e.WorkloadAPI()}, " "))
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := (kafka.Place{UID: uid, GID: uid}).Start(cmd); err != nil {
		return "", err
	}
	err = cmd.Wait()
	return out.String(), errors.Join(err)
}

// copyOfSelf is this program where every user can execute it.
func (e *Env) copyOfSelf() (string, error) {
	dir, err := os.MkdirTemp("", "probe-")
	if err != nil {
		return "", err
	}
	e.finally(func() error { return os.RemoveAll(dir) })
	code, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		return "", err
	}
	self := filepath.Join(dir, "probe")
	return self, errors.Join(os.Chmod(dir, 0o755), os.WriteFile(self, code, 0o755))
}
