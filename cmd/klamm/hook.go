package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

// hookTimeout bounds what a container's start waits for the node.
const hookTimeout = 2 * time.Second

func newHookCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "hook",
		Short: "Enrol a container before it starts: a hook for OCI runtimes",
		Long: `Ask the node on this host to enrol the network namespace of a container before its first process runs, so that
its first connect to a broker is redirected. Meant as a createRuntime hook of an OCI runtime (runc, crun); the
container's state is read from standard input, as the OCI runtime specification says. It waits for 2 seconds at most.

Without the hook, or when the node does not answer, a container starts all the same: its connects to brokers are
refused until the node has found it by itself.

Exit codes: 0 enrolled, or not enrolled and --require was not given (stderr says why); 1 not enrolled: the runtime
then does not start the container.`,
		Args: cobra.NoArgs,
	}
	socket := cmd.Flags().String("socket", "/run/klamm/klamm.sock", "the node's socket, node.socket in klamm.yaml")
	require := cmd.Flags().Bool("require", false, "fail, and so the container's start, when it is not enrolled")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		var state struct { // OCI runtime specification, "State"
			ID  string `json:"id"`
			PID int    `json:"pid"`
		}
		if err := json.NewDecoder(cmd.InOrStdin()).Decode(&state); err != nil {
			return fmt.Errorf("read the container's state from standard input: %w", err)
		}
		if state.PID <= 0 {
			return fmt.Errorf("container %q has no process: use the hook at the stage createRuntime", state.ID)
		}
		err := askToEnrol(cmd.Context(), *socket, state.PID)
		if err == nil || *require {
			return err
		}
		_, _ = fmt.Fprintf(cmd.ErrOrStderr(), "klamm: container %s is not enrolled, "+
			"its connects to brokers are refused until the node finds it: %v\n", state.ID, err)
		return nil
	}
	return cmd
}

// askToEnrol returns when the node behind the socket has enrolled the network namespace of a process.
func askToEnrol(ctx context.Context, socket string, pid int) error {
	ctx, cancel := context.WithTimeout(ctx, hookTimeout)
	defer cancel()
	node := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}}
	defer node.CloseIdleConnections()
	at := url.URL{Scheme: "http", Host: "klamm", Path: "/v1/enrol", RawQuery: "pid=" + strconv.Itoa(pid)}
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, at.String(), nil)
	if err != nil {
		return err
	}
	response, err := node.Do(request)
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("the node at %s did not answer within %s", socket, hookTimeout)
	}
	if err != nil {
		return fmt.Errorf("the node is not there: %w", errors.Unwrap(err)) // of a *url.Error, whose URL is our own
	}
	defer func() { _ = response.Body.Close() }()
	if response.StatusCode == http.StatusNoContent {
		return nil
	}
	why, err := io.ReadAll(io.LimitReader(response.Body, 4<<10))
	if err != nil {
		return fmt.Errorf("read the node's answer: %w", err)
	}
	return fmt.Errorf("the node says: %s", strings.TrimSpace(string(why)))
}
