// Command k8s runs a real Kubernetes node (etcd, the API server and its controllers, a kubelet, containerd with NRI,
// runc, CNI) with klamm on it, and pods with unmodified Kafka clients against a real broker on another host, which a
// network namespace is. It judges at the broker's wire, at the broker, and in the audit. It needs root, bin/klamm, and
// the root of the repository as working directory: make verify-k8s.
//
// Environment: MUTATE=1 makes the policy grant the topic that it must forbid, and turns the firewall off, so that the
// run must fail.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"syscall"
	"time"

	"klamm/test/kubernetes"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	run := outside
	if len(os.Args) == 4 && os.Args[1] == "inside" {
		run = func(ctx context.Context) int { return inside(ctx, os.Args[2], os.Args[3]) }
	}
	code := run(ctx)
	stop()
	os.Exit(code)
}

const (
	exitFailed = 1 // checks failed
	exitBroken = 2 // there was nothing to check
)

func outside(ctx context.Context) int {
	dir, err := kubernetes.Enter(ctx, images(ctx), os.Stdout, "inside")
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit) && exit.ExitCode() == exitFailed:
		return exitFailed
	}
	fmt.Fprintf(os.Stderr, "verify-k8s: %v\nlogs are in %s\n", err, dir)
	return exitBroken
}

func inside(ctx context.Context, dir, cgroup string) int {
	began := time.Now()
	r, err := newRig(ctx, dir, cgroup)
	if err == nil {
		fmt.Printf("%6s  the node is ready\n", time.Since(began).Round(time.Second/10))
		var failed int
		failed, err = verify(ctx, r, began)
		err = errors.Join(err, r.close())
		if err == nil && failed > 0 {
			return exitFailed
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "verify-k8s:", err)
		return exitBroken
	}
	return 0
}

// verify runs all checks in their order, each on what the ones before it left. Without klamm the rest have failed.
func verify(ctx context.Context, r *rig, began time.Time) (failed int, err error) {
	var passed int
	for _, c := range checks() {
		err := r.missing
		if err == nil {
			err = c.run(ctx, r)
		}
		if ctx.Err() != nil {
			return 0, ctx.Err()
		}
		verdict := "pass"
		if err != nil {
			verdict = "FAIL"
			failed++
		} else {
			passed++
		}
		fmt.Printf("%6s  %s  %s\n", time.Since(began).Round(time.Second/10), verdict, c.name)
		if err != nil {
			fmt.Printf("%v\n", err)
		}
	}
	if failed > 0 {
		fmt.Println("logs are in", r.node.Dir)
	}
	fmt.Printf("%d passed, %d failed\n", passed, failed)
	return failed, nil
}
