package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

const (
	connectRounds = 7
	connectCount  = 2_000 // per round
)

// connects is what a connect(2) takes.
type connects struct {
	Direct            float64            `json:"direct_us"`             // to the broker, without a redirect in its cgroup
	Redirected        float64            `json:"redirected_us"`         // to the broker, redirected
	Foreign           float64            `json:"foreign_us"`            // to another port, without a redirect
	ForeignRedirected float64            `json:"foreign_redirected_us"` // to another port, in a redirected cgroup
	RoundTrip         float64            `json:"round_trip_us"`         // of a byte by another port, without a redirect
	RoundTripAttached float64            `json:"round_trip_attached_us"`
	Enrolment         float64            `json:"enrolment_us"` // from a namespace's first socket to a redirected connect
	Programs          map[string]float64 `json:"programs_ns"`  // eBPF program -> ns per run
}

// measureConnects compares connects in the cgroups of direct and of the bare relay, alternating; medians, in µs.
func measureConnects(ctx context.Context, all []*variant, broker string) (c connects, err error) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return c, err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				_, _ = io.Copy(conn, conn)
				_ = conn.Close()
			}()
		}
	}()
	stats, err := ebpf.EnableStats(uint32(unix.BPF_STATS_RUN_TIME))
	if err != nil {
		return c, fmt.Errorf("enable the run-time statistics of eBPF: %w", err)
	}
	defer func() { err = errors.Join(err, stats.Close()) }()
	before, err := programRuns()
	if err != nil {
		return c, err
	}
	cases := []struct {
		into       *float64
		variant    *variant
		role, addr string
		medians    []float64
	}{
		{into: &c.Direct, variant: all[0], role: "connect", addr: broker},
		{into: &c.Redirected, variant: all[1], role: "connect", addr: broker},
		{into: &c.Foreign, variant: all[0], role: "connect", addr: l.Addr().String()},
		{into: &c.ForeignRedirected, variant: all[1], role: "connect", addr: l.Addr().String()},
		{into: &c.RoundTrip, variant: all[0], role: "roundtrip", addr: l.Addr().String()},
		{into: &c.RoundTripAttached, variant: all[1], role: "roundtrip", addr: l.Addr().String()},
	}
	if node := all[len(all)-1]; node.name == klammItself {
		if err := node.client(ctx, &c.Enrolment, "enrol", "-addr", broker); err != nil {
			return c, err
		}
	}
	for range connectRounds {
		for i := range cases {
			var us float64
			if err := cases[i].variant.client(ctx, &us, cases[i].role, "-addr", cases[i].addr); err != nil {
				return c, err
			}
			cases[i].medians = append(cases[i].medians, us)
		}
	}
	for _, m := range cases {
		*m.into = median(m.medians)
	}
	after, err := programRuns()
	if err != nil {
		return c, err
	}
	c.Programs = map[string]float64{}
	for name, a := range after {
		if b := before[name]; a.count > b.count {
			c.Programs[name] = float64(a.time-b.time) / float64(a.count-b.count)
		}
	}
	return c, nil
}

// runConnect prints the median time of a connect(2) in µs.
func runConnect(args []string) error {
	to, err := target("connect", args)
	if err != nil {
		return err
	}
	times := make([]float64, connectCount)
	for i := range times {
		if times[i], err = connectOnce(to); err != nil {
			return err
		}
	}
	return printMedian(times)
}

// target is the address that a role is given.
func target(role string, args []string) (unix.Sockaddr, error) {
	flags := flag.NewFlagSet(role, flag.ContinueOnError)
	addr := flags.String("addr", "", "IPv4 host:port")
	if err := flags.Parse(args); err != nil {
		return nil, err
	}
	to, err := net.ResolveTCPAddr("tcp4", *addr)
	if err != nil {
		return nil, err
	}
	return &unix.SockaddrInet4{Port: to.Port, Addr: [4]byte(to.IP.To4())}, nil
}

func connectOnce(to unix.Sockaddr) (us float64, err error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	begin := time.Now()
	err = unix.Connect(fd, to)
	us = float64(time.Since(begin)) / 1e3
	return us, errors.Join(err, unix.Close(fd))
}

type runs struct {
	time  time.Duration
	count uint64
}

// programRuns sums the runs of all loaded programs of ours by name; the redirects of all variants run the same code.
func programRuns() (map[string]runs, error) {
	all := map[string]runs{}
	for id, err := ebpf.ProgramGetNextID(0); ; id, err = ebpf.ProgramGetNextID(id) {
		if errors.Is(err, os.ErrNotExist) {
			return all, nil
		}
		if err != nil {
			return nil, err
		}
		p, err := ebpf.NewProgramFromID(id)
		if errors.Is(err, os.ErrNotExist) {
			continue // unloaded meanwhile
		}
		if err != nil {
			return nil, err
		}
		info, err := p.Info()
		stats, serr := p.Stats()
		if err := errors.Join(err, serr, p.Close()); err != nil {
			return nil, err
		}
		if strings.HasPrefix(info.Name, "klamm_") {
			r := all[info.Name]
			all[info.Name] = runs{r.time + stats.Runtime, r.count + stats.RunCount}
		}
	}
}
