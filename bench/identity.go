package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"klamm/test/host"
	"klamm/test/kafka"
	"klamm/test/spire"
	"klamm/test/spire/fake"
	"klamm/test/stage"
)

const (
	coldProcesses  = 60
	cachedConnects = 600
	identityUID    = 30_999 // an entry of SPIRE, or a static rule, names it
	entryPatience  = 30 * time.Second
)

// identity is what it costs to tell who connects, in µs. Cold is the first connection of a process, cached a further
// one. FirstAnswer is from connect(2) to the answer of ApiVersions, as the client sees it; the median. Attestation is
// the part of it that telling takes in the node; the mean.
type identity struct {
	Source      string  `json:"source"` // "" for the bare relay, which tells nothing
	FirstAnswer twofold `json:"first_answer_us"`
	Attestation twofold `json:"attestation_us"`
}

type twofold struct {
	Cold   float64 `json:"cold"`
	Cached float64 `json:"cached"`
}

// agent is a SPIRE agent with its server.
type agent interface {
	WorkloadAPI() string
	Socket(api string) string
	Register(context.Context, spire.Entry) (string, error)
	Stop() error
}

// measureIdentity compares the bare relay with nodes that ask one source each.
func measureIdentity(ctx context.Context, s settings, dir, cgroup, broker string, bare *variant) (
	all []identity, err error) {
	relay := identity{}
	if relay.FirstAnswer, err = firstAnswers(ctx, bare.loadCgroup(), broker); err != nil || s.klamm == "" {
		return []identity{relay}, err
	}
	a, name, err := startAgent(ctx, s.spire)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, a.Stop()) }()
	all = []identity{relay}
	for i, source := range []struct{ name, sections string }{
		{"a static rule", ""},
		{name, fmt.Sprintf("spire: {api: delegated, socket: %s, workload-api: %s}\nattestation: {sources: [spire]}\n",
			a.Socket("delegated"), a.WorkloadAPI())},
	} {
		id := identity{Source: source.name}
		at := filepath.Join(cgroup, fmt.Sprintf("identity-%d", i))
		if err := id.measure(ctx, s, dir, at, broker, source.sections); err != nil {
			return nil, fmt.Errorf("identity by %s: %w", source.name, err)
		}
		all = append(all, id)
	}
	return all, nil
}

func startAgent(ctx context.Context, genuine bool) (a agent, name string, err error) {
	if genuine {
		a, err = spire.New(ctx, spire.Options{})
		name = "SPIRE"
	} else {
		a, err = fake.New(fake.Options{})
		name = "a fake SPIRE agent"
	}
	if err != nil {
		return nil, "", err
	}
	_, err = a.Register(ctx, spire.Entry{ID: host.Workload, Selectors: []string{fmt.Sprintf("unix:uid:%d", identityUID)}})
	if err != nil {
		return nil, "", errors.Join(err, a.Stop())
	}
	return a, name, nil
}

func (id *identity) measure(ctx context.Context, s settings, dir, cgroup, broker, sections string) (err error) {
	runs, load := filepath.Join(cgroup, "node"), filepath.Join(cgroup, "load")
	if err := errors.Join(os.MkdirAll(runs, 0o755), os.MkdirAll(load, 0o755)); err != nil {
		return err
	}
	metrics, err := host.FreeAddr()
	if err != nil {
		return err
	}
	node, err := host.StartNode(ctx, host.NodeOptions{Cgroup: cgroup, Runs: runs, Dir: dir, Brokers: []string{broker},
		UID: identityUID, Policy: policy, Metrics: metrics, More: sections, Start: host.Binary(s.klamm)})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, node.Terminate()) }()
	if err := awaitIdentity(ctx, metrics, load, broker); err != nil {
		return err
	}
	before, err := observe(metrics)
	if err != nil {
		return err
	}
	if id.FirstAnswer, err = firstAnswers(ctx, load, broker); err != nil {
		return err
	}
	after, err := observe(metrics)
	if err != nil {
		return err
	}
	id.Attestation = after.mean(before)
	return nil
}

// awaitIdentity connects until the node knows who does: a SPIRE agent takes a moment to learn of an entry.
func awaitIdentity(ctx context.Context, metrics, cgroup, broker string) error {
	for end := time.Now().Add(entryPatience); ; {
		unidentified := -1.0
		_, err := hello(ctx, cgroup, broker, 1)
		if err == nil {
			unidentified, err = metric(metrics, "klamm_unidentified_processes")
		}
		if err != nil || unidentified == 0 {
			return err
		}
		if time.Now().After(end) {
			return errors.New("the node does not know the load")
		}
	}
}

// observed are the attestations of a node by whether they were cached.
type observed struct{ sum, count twofold }

func observe(metrics string) (o observed, err error) {
	for _, of := range []struct {
		into *float64
		name string
	}{
		{&o.sum.Cold, `sum{cached="false"}`}, {&o.count.Cold, `count{cached="false"}`},
		{&o.sum.Cached, `sum{cached="true"}`}, {&o.count.Cached, `count{cached="true"}`},
	} {
		if *of.into, err = metric(metrics, "klamm_attestation_seconds_"+of.name); err != nil {
			return o, err
		}
	}
	return o, nil
}

// mean is in µs, of what came after before.
func (o observed) mean(before observed) twofold {
	return twofold{(o.sum.Cold - before.sum.Cold) / (o.count.Cold - before.count.Cold) * 1e6,
		(o.sum.Cached - before.sum.Cached) / (o.count.Cached - before.count.Cached) * 1e6}
}

// metric is the value of a series, 0 where there is none yet.
func metric(metrics, series string) (v float64, err error) {
	resp, err := http.Get("http://" + metrics + "/metrics")
	if err != nil {
		return 0, err
	}
	defer func() { _ = resp.Body.Close() }()
	for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
		if value, ok := strings.CutPrefix(lines.Text(), series+" "); ok {
			return strconv.ParseFloat(value, 64)
		}
	}
	return 0, nil
}

func firstAnswers(ctx context.Context, cgroup, broker string) (t twofold, err error) {
	var cold []float64
	for range coldProcesses {
		us, err := hello(ctx, cgroup, broker, 1)
		if err != nil {
			return t, err
		}
		cold = append(cold, us)
	}
	t.Cold = median(cold)
	t.Cached, err = hello(ctx, cgroup, broker, cachedConnects)
	return t, err
}

// hello runs runHello in a process of its own.
func hello(ctx context.Context, cgroup, broker string, connects int) (us float64, err error) {
	err = client(ctx, kafka.Place{Cgroup: cgroup, UID: identityUID, GID: identityUID}, &us,
		"hello", "-addr", broker, "-n", strconv.Itoa(connects))
	return us, err
}

// runHello prints the median time, in µs, from connect(2) to the first answer. Where it connects more than once the
// first does not count.
func runHello(args []string) error {
	flags := flag.NewFlagSet("hello", flag.ContinueOnError)
	addr := flags.String("addr", "", "IPv4 host:port")
	n := flags.Int("n", 1, "connections")
	if err := flags.Parse(args); err != nil {
		return err
	}
	var times []float64
	for range *n {
		begin := time.Now()
		if err := greet(*addr); err != nil {
			return err
		}
		times = append(times, float64(time.Since(begin))/1e3)
	}
	if len(times) > 1 {
		times = times[1:]
	}
	return printMedian(times)
}

func greet(addr string) error {
	conn, err := net.Dial("tcp4", addr)
	if err != nil {
		return err
	}
	_, err = stage.Ask(conn, stage.Hello())
	return errors.Join(err, conn.Close())
}

func identitySentences(all []identity) string {
	var b strings.Builder
	for _, id := range all {
		if id.Source == "" {
			fmt.Fprintf(&b, "\nFrom connect(2) to the answer of the first request it takes %.0f µs by the bare relay, and "+
				"%.0f µs "+
				"for the first connection of a process.", id.FirstAnswer.Cached, id.FirstAnswer.Cold)
			continue
		}
		fmt.Fprintf(&b, " By klamm with %s it takes %.0f µs and %.0f µs, of which to tell who connects takes %.0f µs "+
			"and %.0f µs.",
			id.Source, id.FirstAnswer.Cached, id.FirstAnswer.Cold, id.Attestation.Cached, id.Attestation.Cold)
	}
	return b.String() + "\n"
}
