package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"klamm/test/kubernetes"
	"klamm/test/podtoken"
)

// told is a result as the program inside tells it.
type told struct{ Name, Measured, Err string }

// podTokens checks the service account tokens of pods on a node of their own, as package podtoken has it.
func podTokens(ctx context.Context, tell tell) {
	out, in := io.Pipe()
	ended := make(chan error, 1)
	go func() {
		dir, err := kubernetes.Enter(ctx, nil, in, "podhost")
		if err != nil {
			err = fmt.Errorf("logs are in %s: %w", dir, err)
		}
		_ = in.Close() // never fails
		ended <- err
	}()
	lines := json.NewDecoder(out)
	for {
		var t told
		if err := lines.Decode(&t); err != nil {
			break // its end
		}
		var err error
		if t.Err != "" {
			err = errors.New(t.Err)
		}
		tell(t.Name, t.Measured, err)
	}
	_, _ = io.Copy(io.Discard, out) // a Pipe's reader gives only its writer's errors
	if err := <-ended; err != nil {
		tell("the node runs", "", err)
	}
}

// bePods is the program inside: the host next to the node.
func bePods(args []string) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	node, err := kubernetes.New(args[0], args[1])
	if err == nil {
		err = node.Run(ctx)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "verify-identity: the node of the pods' tokens:", err)
		return 1
	}
	lines := json.NewEncoder(os.Stdout)
	for _, c := range podtoken.Checks(node) {
		t := told{Name: c.Name}
		if t.Measured, err = c.Run(ctx); err != nil {
			t.Err = err.Error()
		}
		if err := lines.Encode(t); err != nil {
			return 1
		}
	}
	return 0
}
