// Package host runs processes for outside checks: in cgroups of their own, the node among them.
package host

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"syscall"

	"klamm/test/kafka"
)

// Process is a child. It is killed when this process ends.
type Process struct {
	Cmd    *exec.Cmd
	Stdout *bufio.Reader
	stdin  io.Closer
	stderr bytes.Buffer
}

// StartSelf starts the running binary again, with other arguments. By this link a user who may not enter the binary's
// directory can run it.
func StartSelf(place kafka.Place, args ...string) (*Process, error) {
	return Start(place, "/proc/self/exe", args...)
}

// Start starts a binary.
func Start(place kafka.Place, path string, args ...string) (*Process, error) {
	p := &Process{Cmd: exec.Command(path, args...)}
	p.Cmd.Stderr = &p.stderr
	stdin, err := p.Cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := p.Cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	p.stdin, p.Stdout = stdin, bufio.NewReader(stdout)
	if err := place.Start(p.Cmd); err != nil {
		return nil, fmt.Errorf("start %s: %w", p, err)
	}
	return p, nil
}

func (p *Process) String() string { return strings.Join(p.Cmd.Args, " ") }

// Line is the next line of standard output.
func (p *Process) Line() (string, error) {
	s, err := p.Stdout.ReadString('\n')
	if err != nil {
		return "", errors.Join(fmt.Errorf("%s ended early: %w", p, err), p.Wait())
	}
	return strings.TrimSpace(s), nil
}

// Wait waits for the end. The error of a failed process has what it wrote to standard error.
func (p *Process) Wait() error {
	if err := p.Cmd.Wait(); err != nil {
		return fmt.Errorf("%s: %w\n%s", p, err, p.stderr.Bytes())
	}
	return nil
}

// Stop ends a process that waits for the end of its standard input.
func (p *Process) Stop() error { return errors.Join(p.stdin.Close(), p.Wait()) }

// Terminate ends a process by SIGTERM.
func (p *Process) Terminate() error {
	return errors.Join(p.Cmd.Process.Signal(syscall.SIGTERM), p.Wait())
}
