package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"klamm/test/host"
	"klamm/test/kafka"
)

// results is everything a run measured.
type results struct {
	Machine  machine                      `json:"machine"`
	Broker   string                       `json:"broker"`
	Rounds   int                          `json:"rounds"`
	Measured time.Duration                `json:"measured_ns"`  // per load and variant in a round
	Variants []string                     `json:"variants"`     // in the order of the tables
	Cells    map[string]map[string][]cell `json:"cells"`        // load -> variant -> one per round
	Memory   map[string]int64             `json:"memory_bytes"` // of the relay, high-water mark over all rounds
	Connects connects                     `json:"connects"`
	Identity []identity                   `json:"identity"`
}

func measure(ctx context.Context, s settings, progress io.Writer) (r *results, err error) {
	dir, err := os.MkdirTemp("", "klamm-bench-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	cgroup, err := host.NewCgroup("klamm-bench-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, host.RemoveCgroup(cgroup)) }()
	broker, err := startBroker(ctx, s.kafka)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, broker.stop()) }()
	all, stop, err := startVariants(ctx, s, dir, cgroup, broker.addr)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, stop()) }()

	r = &results{Broker: broker.name, Rounds: s.rounds, Measured: s.measure, Cells: map[string]map[string][]cell{},
		Memory: map[string]int64{}}
	if r.Machine, err = thisMachine(); err != nil {
		return nil, err
	}
	for _, v := range all {
		r.Variants = append(r.Variants, v.name)
	}
	if err := r.rounds(ctx, s, all, broker.addr, progress); err != nil {
		return nil, err
	}
	for _, v := range all {
		if v.relay != nil {
			if r.Memory[v.name], err = peakMemory(v.relay.Cmd.Process.Pid); err != nil {
				return nil, err
			}
		}
	}
	if r.Connects, err = measureConnects(ctx, all, broker.addr); err != nil {
		return nil, err
	}
	r.Identity, err = measureIdentity(ctx, s, dir, cgroup, broker.addr, all[1])
	return r, err
}

// rounds runs every load on every variant, s.rounds times. Within a round the variants of one load follow each other at
// once, and who begins rotates, so that what drifts on the host hits all alike.
func (r *results) rounds(ctx context.Context, s settings, all []*variant, broker string, progress io.Writer) error {
	for round := range s.rounds {
		for _, l := range loads {
			if s.only != "" && s.only != l.name {
				continue
			}
			if r.Cells[l.name] == nil {
				r.Cells[l.name] = map[string][]cell{}
			}
			for i := range all {
				v := all[(round+i)%len(all)]
				c, err := v.run(ctx, s, l, broker)
				if err != nil {
					return fmt.Errorf("%s, %s: %w", l.title, v.name, err)
				}
				r.Cells[l.name][v.name] = append(r.Cells[l.name][v.name], c)
				if _, err := fmt.Fprintf(progress, "round %d  %-34s %-14s %6.0f MB/s  %.3f CPU-ms/MB  p50 %.2f ms\n",
					round+1, l.title, v.name, c.MBs, c.CPUPerMB, c.P50); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

func (v *variant) run(ctx context.Context, s settings, l load, broker string) (c cell, err error) {
	args := []string{"load", "-load", l.name, "-broker", broker, "-warm", s.warm.String(), "-measure", s.measure.String()}
	if v.relay != nil {
		args = append(args, "-relay", v.relayCgroup())
	}
	err = v.client(ctx, &c, args...)
	if err == nil && c.Errors > 0 {
		err = fmt.Errorf("%d records failed", c.Errors)
	}
	return c, err
}

// client runs this binary in a role, in the cgroup that is redirected, and decodes what it prints.
func (v *variant) client(ctx context.Context, into any, args ...string) error {
	return client(ctx, kafka.Place{Cgroup: v.loadCgroup()}, into, args...)
}

func client(ctx context.Context, place kafka.Place, into any, args ...string) error {
	p, err := host.StartSelf(place, args...)
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = kafka.Kill(p.Cmd) })
	defer stop()
	decodeErr := json.NewDecoder(p.Stdout).Decode(into)
	if err := p.Wait(); err != nil {
		return errors.Join(ctx.Err(), err)
	}
	return decodeErr
}
