package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/cilium/ebpf/link"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
	"golang.org/x/sys/unix"

	"klamm/test/host"
	"klamm/test/kafka"
)

const (
	restarts = 100 // by each way
	replaced = 20

	clientUID = 20093
	hidden    = "payouts" // the topic that the policy hides
	waitLimit = time.Minute

	// heartbeatOver is when at the latest a node that hangs counts as down.
	heartbeatOver = 15 * time.Second
)

// world is a broker, a node under a supervisor, and a cgroup of clients.
type world struct {
	dir, cgroup string
	cluster     *kafka.Cluster
	admin       *kgo.Client
	node        *host.Supervisor
	log         *os.File
	mode        string // intercept.on-enforcer-down
	topics      int
}

// lifecycle runs a node through its restarts, crashes, upgrades, hangs and its removal, under load. The supervisor in
// it speaks systemd's protocol; systemd itself is in make verify-kernels.
func lifecycle(ctx context.Context, mutate bool, tell func(string, error)) {
	mode := "refuse"
	if mutate {
		mode = "pass"
	}
	w, err := newWorld(ctx, mode)
	if err != nil {
		tell("it starts", err)
		return
	}
	defer func() { tell("it leaves nothing behind", w.close()) }()
	for _, c := range []struct {
		name  string
		check func(context.Context) error
	}{
		{"a producer that is older than the node is taken over and loses nothing", w.takesOver},
		{fmt.Sprintf("%d restarts under load: nothing goes past, nothing is lost", restarts), w.restarts(syscall.SIGTERM)},
		{fmt.Sprintf("%d kills under load: nothing goes past, nothing is lost", restarts), w.restarts(syscall.SIGKILL)},
		{fmt.Sprintf("%d replacements under load: nothing goes past, nothing is lost, nobody is refused", replaced),
			w.replacements},
		{"a replacement that fails leaves the old node in charge", w.failsToReplace},
		{"programs that are severed are back within a second", w.severed},
		{"a stopped node is refused for", w.down(syscall.SIGTERM)},
		{"a hung node is refused for", w.down(syscall.SIGSTOP)},
		{"on-enforcer-down: pass lets clients pass, on record, and only while the node is down", w.passes},
		{"klamm status tells of a node that runs, one that does not, and of none", w.status},
		{"klamm uninstall removes everything, and not while the node runs", w.uninstall},
	} {
		if err == nil {
			err = c.check(ctx)
			tell(c.name, err)
		} else { // it stands on those before it
			tell(c.name, errors.New("not run: one before it failed"))
		}
	}
}

func newWorld(ctx context.Context, mode string) (_ *world, err error) {
	w := &world{mode: mode}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.close())
		}
	}()
	if w.dir, err = os.MkdirTemp("", "klamm-lifecycle-"); err != nil {
		return nil, err
	}
	if err = os.Chmod(w.dir, 0o755); err != nil {
		return nil, err
	}
	bpffs := filepath.Join(w.dir, "bpf")
	if err = errors.Join(os.Mkdir(bpffs, 0o700), unix.Mount("bpffs", bpffs, "bpf", 0, "mode=0700")); err != nil {
		return nil, err
	}
	if w.cgroup, err = host.NewCgroup("klamm-lifecycle-", "clients", "node"); err != nil {
		return nil, err
	}
	if w.cluster, err = kafka.New(ctx, kafka.Options{Brokers: 1}); err != nil {
		return nil, err
	}
	if w.admin, err = w.cluster.Admin(); err != nil {
		return nil, err
	}
	if err = w.cluster.CreateTopic(ctx, hidden, 1); err != nil {
		return nil, err
	}
	if w.log, err = os.Create(filepath.Join(w.dir, "node.log")); err != nil {
		return nil, err
	}
	if err = w.configure(w.mode); err != nil {
		return nil, err
	}
	w.node, err = host.NewSupervisor(kafka.Place{Cgroup: filepath.Join(w.cgroup, "node")}, w.dir, w.log,
		"bin/klamm", "node", "-c", w.config())
	return w, err
}

// policy hides the topic that tells who went past the node.
const policy = `apiVersion: klamm/v1
rules:
  - name: load
    principals: ["spiffe://example.test/client"]
    allow: [{topic: "load-*", operations: [Read, Write, Describe]}]
`

func (w *world) config() string { return filepath.Join(w.dir, "klamm.yaml") }
func (w *world) broker() string { return w.cluster.Addrs()[0] }

func (w *world) configure(onEnforcerDown string) error {
	_, port, err := net.SplitHostPort(w.broker())
	if err != nil {
		return err
	}
	config := fmt.Sprintf(`node: {name: lifecycle, cgroup: %s, pins: bpf/klamm, socket: klamm.sock}
intercept: {ports: [%s], firewall: false, on-enforcer-down: %s}
clusters: [{name: main, bootstrap: [%q]}]
identities: [{name: client, spiffe-id: "spiffe://example.test/client", uid: %d}]
policies: [policy.yaml]
audit: {file: audit.jsonl}
limits: {drain: 5s}
metrics: {listen: ""}
`, filepath.Join(w.cgroup, "clients"), port, onEnforcerDown, w.broker(), clientUID)
	return errors.Join(os.WriteFile(w.config(), []byte(config), 0o600),
		os.WriteFile(filepath.Join(w.dir, "policy.yaml"), []byte(policy), 0o600))
}

// close ends all, and tells what should have been gone.
func (w *world) close() error {
	var errs []error
	if w.node != nil {
		errs = append(errs, w.node.End(syscall.SIGKILL), w.node.Close())
	}
	if w.admin != nil {
		w.admin.Close()
	}
	if w.cluster != nil {
		errs = append(errs, w.cluster.Stop())
	}
	if w.log != nil {
		errs = append(errs, w.log.Close())
	}
	if w.cgroup != "" {
		errs = append(errs, host.RemoveCgroup(w.cgroup))
	}
	if w.dir != "" {
		pins := filepath.Join(w.dir, "bpf", "klamm")
		if _, err := os.Stat(pins); !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, fmt.Errorf("%s is still there", pins), os.RemoveAll(pins))
		}
		errs = append(errs, unix.Unmount(filepath.Join(w.dir, "bpf"), 0))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("see %s: %w", w.dir, err)
	}
	return os.RemoveAll(w.dir)
}

// client starts this program as a client in the redirected cgroup.
func (w *world) client(args ...string) (*host.Process, error) {
	return host.StartSelf(kafka.Place{Cgroup: filepath.Join(w.cgroup, "clients"), UID: clientUID, GID: clientUID}, args...)
}

// finish ends a client and reads what it saw.
func finish(p *host.Process, saw any) error {
	line := make(chan error, 1)
	go func() { line <- json.NewDecoder(p.Stdout).Decode(saw) }()
	return errors.Join(p.Stop(), <-line)
}

// load is clients at work.
type load struct {
	world    *world
	topic    string
	producer *host.Process
	connects *host.Process
}

func (w *world) load(ctx context.Context) (*load, error) {
	w.topics++
	l := &load{world: w, topic: "load-" + strconv.Itoa(w.topics)}
	if err := w.cluster.CreateTopic(ctx, l.topic, 1); err != nil {
		return nil, err
	}
	var err error
	if l.producer, err = w.client("produce", w.broker(), l.topic); err != nil {
		return nil, err
	}
	l.connects, err = w.client("connect", w.broker())
	return l, err
}

// abandon ends clients that a failed check has left at work.
func (l *load) abandon(err error) {
	if err != nil {
		_ = host.EndBy(l.producer.Cmd, syscall.SIGKILL)
		_ = host.EndBy(l.connects.Cmd, syscall.SIGKILL)
	}
}

// end tells what the clients saw, and checks what they must all have in common: no connect past the node, and every
// acknowledged record once and in its order.
func (l *load) end(ctx context.Context) (produced, connected, error) {
	var p produced
	var c connected
	if err := errors.Join(finish(l.producer, &p), finish(l.connects, &c)); err != nil {
		return p, c, err
	}
	var errs []error
	if len(p.Errors) > 0 {
		errs = append(errs, fmt.Errorf("the producer gave up: %s", strings.Join(p.Errors, "; ")))
	}
	if c.Unenforced > 0 {
		errs = append(errs, fmt.Errorf("%d connects went past the node", c.Unenforced))
	}
	if p.Acknowledged == 0 || c.Enforced == 0 {
		errs = append(errs, fmt.Errorf("there was no load: %d records, %d connects", p.Acknowledged, c.Enforced))
	}
	errs = append(errs, l.world.holds(ctx, l.topic, p.Acknowledged))
	return p, c, errors.Join(errs...)
}

// holds: of a topic's records those up to the number are there once each and in their order, at most one more follows.
func (w *world) holds(ctx context.Context, topic string, acknowledged int) error {
	ctx, cancel := context.WithTimeout(ctx, waitLimit)
	defer cancel()
	reader, err := w.cluster.Admin(kgo.ConsumeTopics(topic), kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()))
	if err != nil {
		return err
	}
	defer reader.Close()
	for next := 0; next < acknowledged; {
		fetches := reader.PollFetches(ctx)
		if ctx.Err() != nil {
			return fmt.Errorf("of %d acknowledged records only %d are there", acknowledged, next)
		}
		for _, record := range fetches.Records() {
			if string(record.Value) != strconv.Itoa(next) {
				return fmt.Errorf("at offset %d is record %s, not %d", record.Offset, record.Value, next)
			}
			next++
		}
	}
	return nil
}

// await waits until clients get through to the broker by the node.
func (w *world) await(ctx context.Context) error {
	return until(ctx, "a client to get through", func() (bool, error) {
		c, err := w.connects(ctx, 100*time.Millisecond)
		return c.Enforced > 0, err
	})
}

func (w *world) takesOver(ctx context.Context) error {
	topic := "load-older"
	if err := w.cluster.CreateTopic(ctx, topic, 1); err != nil {
		return err
	}
	producer, err := w.client("produce", w.broker(), topic)
	if err != nil {
		return err
	}
	if err := w.written(ctx, topic, 100); err != nil {
		return err
	}
	if err := w.node.Start(); err != nil {
		return err
	}
	if err := w.logged("connections older than the node"); err != nil {
		return err
	}
	end, err := w.end(ctx, topic)
	if err != nil {
		return err
	}
	if err := w.written(ctx, topic, end+100); err != nil {
		return err
	}
	var p produced
	if err := finish(producer, &p); err != nil {
		return err
	}
	if len(p.Errors) > 0 {
		return fmt.Errorf("the producer gave up: %v", p.Errors)
	}
	audit, err := os.ReadFile(filepath.Join(w.dir, "audit.jsonl"))
	if err != nil {
		return err
	}
	for _, want := range []string{`"reason":"older_connection"`, `"topic":"` + topic + `"`} {
		if !strings.Contains(string(audit), want) {
			return fmt.Errorf("no audit line has %s", want)
		}
	}
	return w.holds(ctx, topic, p.Acknowledged)
}

// end is the end offset of a topic.
func (w *world) end(ctx context.Context, topic string) (int64, error) {
	return endOffset(ctx, w.admin, topic)
}

// written waits for as many records.
func (w *world) written(ctx context.Context, topic string, n int64) error {
	return until(ctx, fmt.Sprintf("%d records in %s", n, topic), func() (bool, error) {
		end, err := w.end(ctx, topic)
		if kerr.IsRetriable(err) { // on a slow host the broker may lose its leadership for a moment
			return false, nil
		}
		return end >= n, err
	})
}

// logged waits for a line of the node's log.
func (w *world) logged(text string) error {
	return until(context.Background(), "the log to say "+text, func() (bool, error) {
		log, err := os.ReadFile(w.log.Name())
		return strings.Contains(string(log), text), err
	})
}

func until(ctx context.Context, what string, is func() (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, waitLimit)
	defer cancel()
	for {
		if yes, err := is(); yes || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waited %v in vain for %s", waitLimit, what)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// restarts ends the node by a signal and starts it again, as often as that, under load. Each life is long enough for
// the producer to write.
func (w *world) restarts(how syscall.Signal) func(context.Context) error {
	return func(ctx context.Context) (err error) {
		l, err := w.load(ctx)
		if err != nil {
			return err
		}
		defer func() { l.abandon(err) }()
		for n := range restarts {
			if err := w.progress(ctx, l); err != nil {
				return fmt.Errorf("life %d: %w", n, err)
			}
			if err := errors.Join(w.node.End(how), w.node.Start()); err != nil {
				return fmt.Errorf("life %d: %w", n, err)
			}
		}
		if err := w.progress(ctx, l); err != nil {
			return err
		}
		p, c, err := l.end(ctx)
		fmt.Printf("        %d records, %d connects, ended otherwise: %v\n", p.Acknowledged, c.Enforced, c.Ended)
		return err
	}
}

// progress waits until the producer has got more records through.
func (w *world) progress(ctx context.Context, l *load) error {
	before, err := w.end(ctx, l.topic)
	for kerr.IsRetriable(err) && ctx.Err() == nil {
		before, err = w.end(ctx, l.topic)
	}
	if err != nil {
		return err
	}
	return w.written(ctx, l.topic, before+5)
}

func (w *world) replacements(ctx context.Context) (err error) {
	l, err := w.load(ctx)
	if err != nil {
		return err
	}
	defer func() { l.abandon(err) }()
	for n := range replaced {
		old := w.node.Command()
		if err := w.progress(ctx, l); err != nil {
			return fmt.Errorf("replacement %d: %w", n, err)
		}
		if err := w.node.Start("--replace"); err != nil {
			return fmt.Errorf("replacement %d: %w", n, err)
		}
		if err := old.Wait(); err != nil {
			return fmt.Errorf("replacement %d: the old node: %w", n, err)
		}
	}
	if err := w.progress(ctx, l); err != nil {
		return err
	}
	p, c, err := l.end(ctx)
	fmt.Printf("        %d records, %d connects, ended otherwise: %v\n", p.Acknowledged, c.Enforced, c.Ended)
	if refused := c.Ended[syscall.ECONNREFUSED.Error()]; refused > 0 {
		err = errors.Join(err, fmt.Errorf("%d connects were refused", refused))
	}
	return err
}

func (w *world) failsToReplace(ctx context.Context) error {
	bad := filepath.Join(w.dir, "bad.yaml")
	good, err := os.ReadFile(w.config())
	if err != nil {
		return err
	}
	wrong := strings.Replace(string(good), "audit.jsonl", "gone/audit.jsonl", 1)
	if err := os.WriteFile(bad, []byte(wrong), 0o600); err != nil {
		return err
	}
	out, err := exec.CommandContext(ctx, "bin/klamm", "node", "--replace", "-c", bad).CombinedOutput()
	if err == nil {
		return fmt.Errorf("it did not fail: %s", out)
	}
	return w.await(ctx)
}

func (w *world) severed(ctx context.Context) error {
	pins, err := filepath.Glob(filepath.Join(w.dir, "bpf", "klamm", "*", "links", "connect4"))
	if err != nil || len(pins) != 1 {
		return fmt.Errorf("pinned are %v, %w", pins, err)
	}
	l, err := link.LoadPinnedLink(pins[0], nil)
	if err != nil {
		return err
	}
	if err := errors.Join(l.Detach(), l.Close()); err != nil {
		return err
	}
	began := time.Now()
	if err := until(ctx, "the program to be back", func() (bool, error) {
		l, err := link.LoadPinnedLink(pins[0], nil)
		if err != nil {
			return false, nil // its pin is being replaced
		}
		defer func() { _ = l.Close() }()
		info, err := l.Info()
		return err == nil && info.Cgroup().CgroupId != 0, nil
	}); err != nil {
		return err
	}
	if took := time.Since(began); took > time.Second {
		return fmt.Errorf("it took %v", took)
	}
	return errors.Join(w.audited(`"reason":"tampered"`), w.await(ctx))
}

func (w *world) audited(text string) error {
	return until(context.Background(), "an audit line with "+text, func() (bool, error) {
		audit, err := os.ReadFile(filepath.Join(w.dir, "audit.jsonl"))
		return strings.Contains(string(audit), text), err
	})
}

// down: while the node is down clients are refused, and when it is back they get through.
func (w *world) down(how syscall.Signal) func(context.Context) error {
	return func(ctx context.Context) (err error) {
		node := w.node.Command()
		if how == syscall.SIGSTOP {
			err = node.Process.Signal(how)
		} else {
			err = w.node.End(how)
		}
		if err != nil {
			return err
		}
		c, err := w.connects(ctx, heartbeatOver)
		if err != nil {
			return err
		}
		if how == syscall.SIGSTOP {
			err = node.Process.Signal(syscall.SIGCONT)
		} else {
			err = w.node.Start()
		}
		switch {
		case err != nil:
			return err
		case c.Unenforced > 0:
			return fmt.Errorf("%d connects went past the node", c.Unenforced)
		case c.Ended[syscall.ECONNREFUSED.Error()] == 0:
			return fmt.Errorf("nobody was refused: %+v", c)
		}
		return errors.Join(w.audited(`"reason":"enforcer_down"`), w.await(ctx))
	}
}

// connects connects for so long.
func (w *world) connects(ctx context.Context, d time.Duration) (c connected, err error) {
	client, err := w.client("connect", w.broker())
	if err != nil {
		return c, err
	}
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
	return c, finish(client, &c)
}

func (w *world) passes(ctx context.Context) error {
	if err := errors.Join(w.configure("pass"), w.node.End(syscall.SIGTERM), w.node.Start()); err != nil {
		return err
	}
	up, err := w.connects(ctx, time.Second)
	if err != nil {
		return err
	}
	if err := w.node.End(syscall.SIGKILL); err != nil {
		return err
	}
	w.node.Forget()
	down, err := w.connects(ctx, heartbeatOver)
	if err != nil {
		return err
	}
	if err := errors.Join(w.configure(w.mode), w.node.Start()); err != nil {
		return err
	}
	if up.Unenforced > 0 || up.Enforced == 0 || down.Unenforced == 0 {
		return fmt.Errorf("while the node was up %+v, while it was down %+v", up, down)
	}
	return errors.Join(w.audited(`"event":"unenforced"`), w.await(ctx))
}

// klamm runs a command that ends.
func (w *world) klamm(ctx context.Context, args ...string) (out string, code int, err error) {
	cmd := exec.CommandContext(ctx, "bin/klamm", append(args, "-c", w.config())...)
	b, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		err = nil
	}
	return string(b), cmd.ProcessState.ExitCode(), err
}

func (w *world) status(ctx context.Context) error {
	check := func(code int, words ...string) error {
		out, got, err := w.klamm(ctx, "status")
		if err != nil || got != code {
			return fmt.Errorf("exit code %d, not %d: %s %w", got, code, out, err)
		}
		for _, word := range words {
			if !strings.Contains(out, word) {
				return fmt.Errorf("it does not say %q:\n%s", word, out)
			}
		}
		return nil
	}
	if err := check(0, "lifecycle, up since", "attached", "(host)", "main: "+w.broker(), "redirected"); err != nil {
		return err
	}
	if err := w.node.End(syscall.SIGTERM); err != nil {
		return err
	}
	down := check(1, "does not run", "attached", map[string]string{"refuse": "refuse", "pass": "PASS, unseen"}[w.mode])
	return errors.Join(down, w.node.Start())
}

func (w *world) uninstall(ctx context.Context) error {
	out, code, err := w.klamm(ctx, "uninstall")
	if err != nil || code != 1 || !strings.Contains(out, "stop it first") {
		return fmt.Errorf("while the node ran: exit code %d, %s %w", code, out, err)
	}
	if err := w.await(ctx); err != nil {
		return err
	}
	if err := w.node.End(syscall.SIGTERM); err != nil {
		return err
	}
	w.node.Forget()
	for range 2 { // the second time there is nothing left to remove
		if out, code, err = w.klamm(ctx, "uninstall"); err != nil || code != 0 {
			return fmt.Errorf("exit code %d, %s %w", code, out, err)
		}
	}
	c, err := w.connects(ctx, time.Second)
	if err != nil {
		return err
	}
	if c.Unenforced == 0 || c.Enforced > 0 || len(c.Ended) > 0 {
		return fmt.Errorf("clients do not reach the broker as if there had never been a node: %+v", c)
	}
	out, code, err = w.klamm(ctx, "status")
	if err != nil || code != 1 || !strings.Contains(out, "nothing is intercepted") {
		return fmt.Errorf("status: exit code %d, %s %w", code, out, err)
	}
	for _, left := range []string{"klamm.sock", "bpf/klamm"} {
		if _, err := os.Stat(filepath.Join(w.dir, left)); !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("%s is still there", left)
		}
	}
	return nil
}
