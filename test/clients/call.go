package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"klamm/test/kafka"
)

// call is one call of a client.
type call struct {
	name    string  // of its log
	place   *cgroup // nil: redirected
	uid     uint32  // 0: clientUID
	command string  // see client
	brokers string  // "": all of the cluster
	topic   string
	group   string
	n       int
	lines   []string  // standard input, or the content of {lines}
	input   io.Reader // standard input, instead of lines
	limit   time.Duration
	until   *regexp.Regexp // the call is over as soon as its output matches
	// done returns when a client has done its work that does not end by itself: it is ended by SIGTERM then.
	done func(context.Context) error
}

// outcome is how a call ended.
type outcome struct {
	out  string // standard output
	all  string // standard output and error
	took time.Duration
	err  error // nil: exit code 0
}

// run runs a client and returns how it ended. What it said is kept in the logs.
func (r *rig) run(ctx context.Context, c call) outcome {
	ctx, cancel := context.WithTimeout(ctx, c.limit)
	defer cancel()
	lines, err := r.writeLines(c)
	if err != nil {
		return outcome{err: err}
	}
	if c.brokers == "" {
		c.brokers = r.brokers()
	}
	command := strings.NewReplacer("{java}", r.java("tools"), "{streams}", r.java("streams"),
		"{connect}", r.java("connect"), "{stage}", r.stage, "{brokers}", c.brokers, "{topic}", c.topic,
		"{group}", c.group, "{n}", strconv.Itoa(c.n), "{lines}", lines).Replace(c.command)
	words := strings.Fields(command)
	if c.input == nil {
		c.input = strings.NewReader(joinLines(c.lines))
	}
	uid := cmp.Or(c.uid, clientUID)
	if c.place == nil {
		c.place = r.redirected
	}
	var out, all transcript
	cmd := exec.Command(words[0], words[1:]...)
	cmd.Dir = r.stage
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=" + r.stage,
		"PYTHONPATH=" + filepath.Join(r.stage, "confluent")}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = c.input, io.MultiWriter(&out, &all), &all
	cmd.WaitDelay = time.Second // a client that ended does not wait for its standard input
	began := time.Now()
	if err := (kafka.Place{Cgroup: c.place.path, UID: uid, GID: uid}).Start(cmd); err != nil {
		return outcome{err: err}
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	err = r.await(ctx, c, &all, ended)
	if errors.Is(err, errDone) {
		err = terminate(ctx, cmd, ended)
	}
	took := time.Since(began)
	if errors.Is(err, errStopped) || ctx.Err() != nil {
		_ = kafka.Kill(cmd)
		err = errors.Join(err, <-ended)
	}
	result := outcome{out.String(), all.String(), took, err}
	return result.logged(filepath.Join(r.logs, c.name+".log"), command)
}

// java returns the words before a main class of a directory that is staged. What the Java runtime unpacks goes with the
// stage: it is left behind by one that is killed.
func (r *rig) java(dir string) string {
	unpacked := "-Djava.io.tmpdir=" + filepath.Join(r.stage, "tmp")
	return strings.Join(kafka.JavaTool(filepath.Join(r.stage, dir), unpacked), " ")
}

var (
	errStopped = errors.New("stopped: it said what was awaited")
	errDone    = errors.New("it has done its work")
)

func (r *rig) await(ctx context.Context, c call, all *transcript, ended <-chan error) error {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	done := make(chan error, 1)
	if c.done != nil {
		go func() { done <- c.done(ctx) }()
	}
	for {
		select {
		case err := <-done:
			if err == nil {
				return errDone
			}
			return errors.Join(errStopped, err)
		case err := <-ended:
			if errors.Is(err, exec.ErrWaitDelay) {
				return nil
			}
			return err
		case <-ctx.Done():
			return fmt.Errorf("it did not end within %v", c.limit)
		case <-tick.C:
			if c.until != nil && c.until.MatchString(all.String()) {
				return errStopped
			}
		}
	}
}

// terminate ends a client in an orderly way. A Java runtime says by its exit code that it was told to.
func terminate(ctx context.Context, cmd *exec.Cmd, ended <-chan error) error {
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	select {
	case err := <-ended:
		var exit *exec.ExitError
		if errors.As(err, &exit) && exit.ExitCode() == 128+int(syscall.SIGTERM) {
			return nil
		}
		return err
	case <-ctx.Done():
		return errors.New("it did not end when it was told to")
	}
}

// writeLines writes the file for {lines}.
func (r *rig) writeLines(c call) (string, error) {
	if !strings.Contains(c.command, "{lines}") {
		return "", nil
	}
	file := filepath.Join(r.stage, c.name+".lines")
	// The tool takes the empty piece after the last line end for a record.
	return file, os.WriteFile(file, []byte(strings.TrimSuffix(joinLines(c.lines), "\n")), 0o644)
}

func joinLines(lines []string) string {
	var text strings.Builder
	for _, line := range lines {
		text.WriteString(line + "\n")
	}
	return text.String()
}

func (o outcome) logged(file, command string) outcome {
	end := "exit code 0"
	if o.err != nil {
		end = o.err.Error()
	}
	text := fmt.Sprintf("$ %s\n%s(%s after %v)\n", command, o.all, end, o.took.Round(time.Millisecond))
	return outcome{o.out, o.all, o.took, errors.Join(o.err, os.WriteFile(file, []byte(text), 0o644))}
}

// failure returns an error that also says how the call ended and what the client said last.
func (o outcome) failure(format string, args ...any) error {
	end := "exit code 0"
	if o.err != nil {
		end = o.err.Error()
	}
	return fmt.Errorf("%s (%s after %v)\n%s", fmt.Sprintf(format, args...), end, o.took.Round(time.Millisecond), o.tail())
}

// tail returns the end of what a client said.
func (o outcome) tail() string {
	const lines = 12
	var last []string
	scanner := bufio.NewScanner(strings.NewReader(o.all))
	scanner.Buffer(nil, 1<<20)
	for scanner.Scan() {
		if last = append(last, "  | "+scanner.Text()); len(last) > lines {
			last = last[1:]
		}
	}
	return strings.Join(last, "\n")
}

// transcript is a buffer that may be read while a process writes it.
type transcript struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (t *transcript) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.buf.Write(p)
}

func (t *transcript) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.buf.String()
}
