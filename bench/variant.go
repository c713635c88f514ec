package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"

	"klamm/test/host"
	"klamm/test/kafka"
)

// variant is one way to the broker: a cgroup of its own whose connects are redirected, with the relay and the load in
// cgroups below it.
type variant struct {
	name   string
	cgroup string
	start  func(v *variant) (*host.Process, error) // nil for direct
	stop   func(*host.Process) error
	relay  *host.Process
}

func (v *variant) relayCgroup() string { return filepath.Join(v.cgroup, "relay") }
func (v *variant) loadCgroup() string  { return filepath.Join(v.cgroup, "load") }

const (
	direct      = "direct"
	bareRelay   = "bare relay"
	hashRelay   = "hashing relay"
	klammItself = "klamm"
)

// startVariants starts the ways to a broker. When one fails, those before it are stopped.
func startVariants(
	ctx context.Context, s settings, dir, cgroup, broker string,
) (_ []*variant, stop func() error, err error) {
	_, port, err := net.SplitHostPort(broker)
	if err != nil {
		return nil, nil, err
	}
	all := []*variant{
		{name: direct},
		{name: bareRelay, start: relayOn(port), stop: (*host.Process).Stop},
		{name: hashRelay, start: relayOn(port, "-hash"), stop: (*host.Process).Stop},
	}
	if s.klamm != "" || s.profile != "" {
		all = append(all, &variant{name: klammItself, start: nodeOn(ctx, s, dir, broker), stop: (*host.Process).Terminate})
	}
	stop = func() error {
		var errs []error
		for _, v := range all {
			if v.relay != nil {
				errs = append(errs, v.stop(v.relay))
			}
		}
		return errors.Join(errs...)
	}
	for _, v := range all {
		v.cgroup = filepath.Join(cgroup, strings.ReplaceAll(v.name, " ", "-"))
		for _, dir := range []string{v.relayCgroup(), v.loadCgroup()} {
			if err := os.MkdirAll(dir, 0o755); err != nil {
				return nil, nil, errors.Join(fmt.Errorf("make a cgroup: %w", err), stop())
			}
		}
		if v.start == nil {
			continue
		}
		if v.relay, err = v.start(v); err != nil {
			return nil, nil, errors.Join(fmt.Errorf("start %s: %w", v.name, err), stop())
		}
	}
	return all, stop, nil
}

func relayOn(port string, args ...string) func(*variant) (*host.Process, error) {
	return func(v *variant) (*host.Process, error) {
		p, err := host.StartSelf(kafka.Place{Cgroup: v.relayCgroup()},
			append([]string{"relay", "-cgroup", v.cgroup, "-port", port}, args...)...)
		if err != nil {
			return nil, err
		}
		_, err = p.Line()
		return p, err
	}
}

// policy lets the load do what it does.
const policy = `apiVersion: klamm/v1
rules:
  - name: load uses its topics
    principals: ["` + host.Workload + `"]
    allow:
      - {topic: "bench-*", operations: [Read, Write]}
      - {cluster: kafka-cluster, operations: [IdempotentWrite]}
`

func nodeOn(ctx context.Context, s settings, dir, broker string) func(*variant) (*host.Process, error) {
	start := host.Binary(s.klamm)
	if s.profile != "" {
		start = func(place kafka.Place, config string) (*host.Process, error) {
			return host.StartSelf(place, "node", config, s.profile)
		}
	}
	return func(v *variant) (*host.Process, error) {
		return host.StartNode(ctx, host.NodeOptions{Cgroup: v.cgroup, Runs: v.relayCgroup(), Dir: dir,
			Brokers: []string{broker}, UID: uint32(os.Getuid()), Policy: policy, Start: start})
	}
}
