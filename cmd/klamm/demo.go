package main

import (
	"bytes"
	"context"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/rs/zerolog"
	"github.com/spf13/cobra"
	"github.com/twmb/franz-go/pkg/kfake"

	"klamm/node"
)

//go:embed demo
var demoFiles embed.FS

const (
	demoStepTimeout = 20 * time.Second
	demoCloseWait   = 2 * time.Second
)

// demoStep is what one workload does with a stock client, and what must come of it.
type demoStep struct {
	workload string
	uid      uint32
	title    string
	verb     string // of demoClient
	topic    string
	input    string
	succeeds bool
	shows    []string // in the client's own output
	hides    []string
}

var demoSteps = []demoStep{
	{workload: "orders", uid: 61001, title: "the shop writes two orders", verb: "produce", topic: "orders",
		input: "{\"id\":1,\"item\":\"book\"}\n{\"id\":2,\"item\":\"lamp\"}\n", succeeds: true},
	{workload: "report", uid: 61002, title: "analytics reads them", verb: "consume", topic: "orders",
		succeeds: true, shows: []string{`"book"`, `"lamp"`}},
	{workload: "report", uid: 61002, title: "analytics tries to write an order", verb: "produce", topic: "orders",
		input: "{\"id\":3,\"item\":\"forged\"}\n", shows: []string{"uthorization failed"}},
	{workload: "laptop", uid: 61003, title: "an intern lists all topics, and sees one of three", verb: "list",
		succeeds: true, shows: []string{"public.news"}, hides: []string{"orders", "payroll"}},
	{workload: "laptop", uid: 61003, title: "the intern tries to read the payroll by name", verb: "consume",
		topic: "payroll", shows: []string{"uthorization failed"}, hides: []string{"salary"}},
}

// demoResult is everything the demo shows.
type demoResult struct {
	Broker  string            `json:"broker"`
	Cgroup  string            `json:"cgroup"`
	Client  string            `json:"client"`
	Policy  string            `json:"policy"`
	Steps   []demoOutcome     `json:"steps"`
	Audit   []json.RawMessage `json:"audit"`
	OK      bool              `json:"ok"`
	Seconds float64           `json:"seconds"`
}

type demoOutcome struct {
	Title    string `json:"title"`
	Workload string `json:"workload"`
	UID      uint32 `json:"uid"`
	Command  string `json:"command"`
	Output   string `json:"output"`
	ExitCode int    `json:"exit_code"`
	OK       bool   `json:"ok"` // it came out as it must
}

func newDemoCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Show the whole product on this machine in a minute",
		Long: `Start an embedded broker and the node, with the real eBPF redirect on a cgroup of its own, and let three
workloads with different identities use it: stock clients (kcat where installed, else a franz-go client of its own)
configured for nothing but the broker's address. Needs root. Everything is removed at the end, also on Ctrl-C.

Exit codes: 0 all came out as it must, 1 it did not.`,
		Args: cobra.NoArgs,
	}
	output := outputFlag(cmd)
	cmd.AddCommand(newDemoClientCommand())
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		progress := cmd.OutOrStdout()
		if *output == jsonFormat {
			progress = cmd.ErrOrStderr()
		}
		r, err := runDemo(cmd.Context(), &printer{w: progress})
		if err != nil {
			return err
		}
		if *output == jsonFormat {
			if err := output.print(cmd.OutOrStdout(), r, nil); err != nil {
				return err
			}
		}
		if !r.OK {
			return errors.New("the demo did not come out as it must: see the steps above")
		}
		return nil
	}
	return cmd
}

// printer writes lines; what the demo does does not depend on who reads them.
type printer struct{ w io.Writer }

func (p *printer) line(format string, args ...any) { _, _ = fmt.Fprintf(p.w, format+"\n", args...) }

func runDemo(ctx context.Context, out *printer) (_ *demoResult, err error) {
	started := time.Now()
	dir, err := os.MkdirTemp("", "klamm-demo-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	cgroup, remove, err := demoCgroup()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, remove()) }()

	broker, err := kfake.NewCluster(kfake.NumBrokers(1), kfake.SeedTopics(1, "orders", "payroll", "public.news"))
	if err != nil {
		return nil, fmt.Errorf("starting the embedded broker: %w", err)
	}
	defer broker.Close()
	r := &demoResult{Broker: broker.ListenAddrs()[0], Cgroup: cgroup, Client: demoClientName(), OK: true}
	out.line("broker   an embedded Kafka (kfake) on %s", r.Broker)

	config, err := demoConfig(dir, cgroup, r)
	if err != nil {
		return nil, err
	}
	stop, err := startDemoNode(ctx, config)
	if err != nil {
		return nil, err
	}
	out.line("node     eBPF on %s redirects what goes to that port, for every process in it\nclient   %s\n\npolicy\n%s",
		cgroup, r.Client, indent(r.Policy))
	for i, step := range demoSteps {
		o := step.run(ctx, cgroup, r.Broker)
		r.Steps, r.OK = append(r.Steps, o), r.OK && o.OK
		mark := map[bool]string{true: "✓", false: "✗ NOT AS IT MUST BE"}[o.OK]
		out.line("%d. %s   %s\n   uid %d: %s\n%s", i+1, o.Title, mark, o.UID, o.Command, indent(o.Output))
		if ctx.Err() != nil {
			break
		}
	}
	if err := stop(); err != nil {
		return nil, err
	}
	if ctx.Err() != nil {
		return nil, errors.New("interrupted")
	}
	if err := r.readAudit(config.Audit.File); err != nil {
		return nil, err
	}
	r.Seconds = time.Since(started).Seconds()
	out.audit(r.Audit)
	out.line("\n%d steps in %.1f s", len(r.Steps), r.Seconds)
	return r, nil
}

func demoConfig(dir, cgroup string, r *demoResult) (node.Config, error) {
	_, port, _ := strings.Cut(r.Broker, ":")
	var n int
	if _, err := fmt.Sscan(port, &n); err != nil {
		return node.Config{}, fmt.Errorf("the broker's address %s: %w", r.Broker, err)
	}
	policy, err := demoFiles.ReadFile("demo/policy.yaml")
	if err != nil {
		return node.Config{}, err
	}
	template, err := demoFiles.ReadFile("demo/klamm.yaml")
	if err != nil {
		return node.Config{}, err
	}
	r.Policy = string(policy)
	file := filepath.Join(dir, "klamm.yaml")
	if err := errors.Join(os.WriteFile(filepath.Join(dir, "policy.yaml"), policy, 0o600),
		os.WriteFile(file, fmt.Appendf(nil, string(template), cgroup, n), 0o600)); err != nil {
		return node.Config{}, err
	}
	return node.Load(file)
}

// startDemoNode runs the node until the returned function is called.
func startDemoNode(ctx context.Context, config node.Config) (stop func() error, err error) {
	n, err := node.Open(config, zerolog.Nop())
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- n.Run(ctx, func() { close(ready) }) }()
	select {
	case <-ready:
	case err := <-done:
		cancel()
		return nil, errors.Join(err, n.Close())
	}
	return func() error {
		cancel()
		return errors.Join(<-done, n.Close())
	}, nil
}

// demoCgroup makes a cgroup2 directory for the workloads.
func demoCgroup() (path string, remove func() error, err error) {
	root, err := node.Cgroup2Mount()
	if err != nil {
		return "", nil, err
	}
	path, err = os.MkdirTemp(root, "klamm-demo-")
	if err != nil {
		return "", nil, fmt.Errorf("making a cgroup: %w: run as root", err)
	}
	return path, func() error {
		// cgroup.kill is Linux 5.14; the node needs 5.15.
		if err := os.WriteFile(filepath.Join(path, "cgroup.kill"), []byte("1"), 0); err != nil {
			return err
		}
		var err error
		for deadline := time.Now().Add(demoCloseWait); time.Now().Before(deadline); time.Sleep(demoCloseWait / 100) {
			if err = os.Remove(path); !errors.Is(err, syscall.EBUSY) {
				return err
			}
		}
		return err
	}, nil
}

// run starts the client in the cgroup, under the workload's uid.
func (s demoStep) run(ctx context.Context, cgroup, broker string) demoOutcome {
	ctx, cancel := context.WithTimeout(ctx, demoStepTimeout)
	defer cancel()
	// The client is killed when the thread that started it ends (prctl(2)), and entering network namespaces ends threads.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	argv := demoClient(s.verb, broker, s.topic)
	o := demoOutcome{Title: s.title, Workload: s.workload, UID: s.uid, Command: strings.Join(argv, " ")}
	dir, err := os.Open(cgroup)
	if err != nil {
		o.Output, o.ExitCode = err.Error(), -1
		return o
	}
	defer func() { _ = dir.Close() }()
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd()),
		Credential: &syscall.Credential{Uid: s.uid, Gid: s.uid}, Pdeathsig: syscall.SIGKILL}
	cmd.Dir, cmd.Env, cmd.Stdin = "/", []string{"PATH=" + os.Getenv("PATH")}, strings.NewReader(s.input)
	b, err := cmd.CombinedOutput()
	o.Output, o.ExitCode = strings.TrimSpace(string(b)), cmd.ProcessState.ExitCode()
	if err != nil && len(b) == 0 {
		o.Output = err.Error()
	}
	o.OK = (err == nil) == s.succeeds
	for _, want := range s.shows {
		o.OK = o.OK && strings.Contains(o.Output, want)
	}
	for _, secret := range s.hides {
		o.OK = o.OK && !strings.Contains(o.Output, secret)
	}
	return o
}

func (r *demoResult) readAudit(file string) error {
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	for line := range bytes.Lines(b) {
		r.Audit = append(r.Audit, json.RawMessage(bytes.TrimSpace(line)))
	}
	return nil
}

// audit prints what the security team reads: one line per operation, here only some of its fields.
func (p *printer) audit(lines []json.RawMessage) {
	p.line("audit (%d lines; the refused ones and those about records, shortened)", len(lines))
	var sample json.RawMessage
	for _, raw := range lines {
		var l struct {
			Event, Verdict, API, Topic, Rule, Reason string
			SPIFFE                                   string `json:"spiffe_id"`
			UID, Count                               int
			Batches                                  []struct{ SHA256 string }
			Resources                                []struct{ Type, Name, Operation, Verdict string }
		}
		if json.Unmarshal(raw, &l) != nil || (l.Verdict == "allow" && len(l.Batches) == 0) {
			continue
		}
		what := l.API
		for _, res := range l.Resources {
			if res.Verdict == "deny" {
				what += fmt.Sprintf(" %s %s %s", res.Operation, res.Type, res.Name)
			}
		}
		if len(l.Batches) > 0 {
			what += fmt.Sprintf(" %s, %d records, sha256 %.12s…, by rule %q", l.Topic, l.Count, l.Batches[0].SHA256, l.Rule)
			sample = raw
		}
		p.line("  %-5s  %-43s %s%s", l.Verdict, l.SPIFFE, what, l.Reason)
	}
	p.line("\none line in full\n  %s", sample)
}

func indent(s string) string {
	return "     " + strings.ReplaceAll(strings.TrimRight(s, "\n"), "\n", "\n     ")
}
