package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"klamm/test/host"
	"klamm/test/kafka"
)

// sections are those of a klamm.yaml, as YAML.
type sections map[string]string

// node is the klamm daemon.
type node struct {
	world   *world
	dir     string // of klamm.yaml, policy.yaml, audit.jsonl and node.log
	binary  string
	metrics string
	wrapped []string // the command that executes the daemon's; nil: none
	cmd     *exec.Cmd
	ended   chan struct{} // closed when cmd has
}

// newNode writes the configuration of a node on the world's clients: these sections, and for what they leave out one
// that intercepts the ports. It ends with the world.
func (w *world) newNode(ctx context.Context, name string, ports []int, policy string, more sections) (*node, error) {
	n := &node{world: w, dir: w.file(name)}
	if err := os.Mkdir(n.dir, 0o755); err != nil {
		return nil, err
	}
	var err error
	if n.binary, err = klammBinary(ctx); err != nil {
		return nil, err
	}
	if n.metrics, err = host.FreeAddr(); err != nil {
		return nil, err
	}
	all := sections{
		"node":      fmt.Sprintf(`{name: %s, cgroup: %q, pins: "", socket: klamm.sock}`, name, w.clients()),
		"intercept": fmt.Sprintf("{firewall: false, ports: %s}", strings.ReplaceAll(fmt.Sprint(ports), " ", ", ")),
		"policies":  "[policy.yaml]",
		"audit":     "{file: audit.jsonl}",
		"metrics":   fmt.Sprintf("{listen: %q}", n.metrics),
	}
	maps.Copy(all, more)
	var text strings.Builder
	for _, key := range slices.Sorted(maps.Keys(all)) {
		fmt.Fprintf(&text, "%s: %s\n", key, all[key])
	}
	w.onClose(n.stop)
	return n, errors.Join(os.WriteFile(n.file("klamm.yaml"), []byte(text.String()), 0o600),
		os.WriteFile(n.file("policy.yaml"), []byte(policy), 0o600))
}

func (n *node) file(name string) string { return filepath.Join(n.dir, name) }

// start starts the daemon; it redirects when start returns.
func (n *node) start(ctx context.Context) error {
	log, err := os.OpenFile(n.file("node.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer func() { _ = log.Close() }()
	command := append(slices.Clone(n.wrapped), n.binary, "node", "-c", n.file("klamm.yaml"))
	n.cmd = exec.Command(command[0], command[1:]...)
	n.cmd.Stdout, n.cmd.Stderr = log, log
	if err := (kafka.Place{}).Start(n.cmd); err != nil {
		return fmt.Errorf("start the node: %w: run make build", err)
	}
	n.ended = make(chan struct{})
	go func(ended chan<- struct{}) {
		_ = n.cmd.Wait() // how it ended is in its log
		close(ended)
	}(n.ended)
	err = until(ctx, "the node to be up", waitLimit, func() (bool, error) {
		select {
		case <-n.ended:
			return false, fmt.Errorf("it has ended: %s", n.cmd.ProcessState)
		default:
		}
		resp, err := http.Get("http://" + n.metrics + "/healthz")
		if err != nil {
			return false, nil // it does not listen yet
		}
		defer func() { _ = resp.Body.Close() }()
		return resp.StatusCode == http.StatusOK, nil
	})
	if err != nil {
		return errors.Join(err, n.said())
	}
	return nil
}

// ready starts the daemon and waits until it has reached its clusters.
func (n *node) ready(ctx context.Context) error {
	if err := n.start(ctx); err != nil {
		return err
	}
	if err := host.AwaitReady(ctx, "http://"+n.metrics+"/readyz"); err != nil {
		return errors.Join(err, n.said())
	}
	return nil
}

// said is the end of the node's log, as an error.
func (n *node) said() error {
	text, err := os.ReadFile(n.file("node.log"))
	if err != nil {
		return err
	}
	return fmt.Errorf("the node's log ends:\n%s", text[max(0, len(text)-3000):])
}

// logged tells whether a line of the log has all of these.
func (n *node) logged(words ...string) (bool, error) {
	return anyLine(n.file("node.log"), words)
}

// audited tells whether a line of the audit has all of these.
func (n *node) audited(words ...string) (bool, error) {
	return anyLine(n.file("audit.jsonl"), words)
}

func anyLine(file string, words []string) (bool, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return false, err
	}
	for line := range strings.Lines(string(text)) {
		if !slices.ContainsFunc(words, func(word string) bool { return !strings.Contains(line, word) }) {
			return true, nil
		}
	}
	return false, nil
}

// stop ends the daemon.
func (n *node) stop() error {
	if n.ended == nil {
		return nil
	}
	select {
	case <-n.ended:
	default:
		if err := n.cmd.Process.Signal(syscall.SIGTERM); err != nil {
			return err
		}
	}
	<-n.ended
	if !n.cmd.ProcessState.Success() {
		return errors.Join(fmt.Errorf("the node: %s", n.cmd.ProcessState), n.said())
	}
	return nil
}

// auditLine is what the checks read of a line of the audit.
type auditLine struct {
	Event, State, Verdict, Reason, Error, Cluster, Principal string
	API, Topic                                               string
	Time                                                     time.Time
	SPIFFE                                                   string `json:"spiffe_id"`
	PID, UID                                                 uint32
	Pod                                                      string
	PodUID                                                   string `json:"pod_uid"`
	text                                                     string
}

// audit returns the lines so far that match.
func (n *node) audit(match func(auditLine) bool) ([]auditLine, error) {
	file, err := os.Open(n.file("audit.jsonl"))
	if err != nil {
		return nil, err
	}
	defer func() { _ = file.Close() }()
	var found []auditLine
	for r := bufio.NewReader(file); ; {
		text, err := r.ReadString('\n')
		if errors.Is(err, io.EOF) {
			return found, nil // a line without its end is still being written
		} else if err != nil {
			return nil, err
		}
		l := auditLine{text: text}
		if err := json.Unmarshal([]byte(text), &l); err != nil {
			return nil, fmt.Errorf("an audit line is no JSON: %w\n%s", err, text)
		}
		if match(l) {
			found = append(found, l)
		}
	}
}

// awaitAudit waits for a line that matches and returns the last.
func (n *node) awaitAudit(ctx context.Context, what string, match func(auditLine) bool) (last auditLine, err error) {
	err = until(ctx, "an audit line: "+what, waitLimit, func() (bool, error) {
		lines, err := n.audit(match)
		if len(lines) > 0 {
			last = lines[len(lines)-1]
		}
		return len(lines) > 0, err
	})
	return last, err
}

// klammBinary is the daemon's: bin/klamm, or one with a rule broken.
func klammBinary(ctx context.Context) (string, error) {
	rule := mutation(ctx)
	if rule == "" {
		return filepath.Abs("bin/klamm")
	}
	file := filepath.Join(os.TempDir(), "klamm-without-"+rule)
	if out, err := exec.CommandContext(ctx, "scripts/mutated-klamm", file, rule).CombinedOutput(); err != nil {
		return "", fmt.Errorf("break the rule %s: %w\n%s", rule, err, out)
	}
	return file, nil
}

// klamm runs a command of the node's binary with its configuration and returns what it prints.
func (n *node) klamm(command ...string) (string, error) {
	out, err := exec.Command(n.binary, append(command, "-c", n.file("klamm.yaml"))...).CombinedOutput()
	if err != nil {
		err = fmt.Errorf("klamm %s: %w\n%s", strings.Join(command, " "), err, out)
	}
	return string(out), err
}
