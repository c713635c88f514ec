package main

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"klamm/test/kafka"
)

// programs runs the programs of a rig on this host. What they print goes to NAME.log.
type programs struct {
	world   *world
	running map[string]*program
}

type program struct {
	cmd   *exec.Cmd
	ended chan struct{} // closed when it has
}

func (w *world) programs() *programs {
	p := &programs{w, map[string]*program{}}
	w.onClose(p.close)
	return p
}

// Start implements launcher; all programs are in the cgroup of this one.
func (p *programs) Start(name, _, command string) error {
	log, err := os.OpenFile(p.log(name), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer func() { _ = log.Close() }()
	words := strings.Fields(command)
	cmd := exec.Command(words[0], words[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := (kafka.Place{}).Start(cmd); err != nil {
		return fmt.Errorf("start %s: %w", name, err)
	}
	started := &program{cmd, make(chan struct{})}
	p.running[name] = started
	go func() {
		_ = cmd.Wait() // how it ended is in its log
		close(started.ended)
	}()
	return nil
}

func (p *programs) log(name string) string { return p.world.file(name + ".log") }

// Stop implements launcher.
func (p *programs) Stop(name string, how syscall.Signal) error {
	running := p.running[name]
	if err := running.cmd.Process.Signal(how); err != nil {
		return fmt.Errorf("end %s: %w", name, err)
	}
	select {
	case <-running.ended:
		return nil
	case <-time.After(waitLimit):
		return fmt.Errorf("%s did not end", name)
	}
}

// Alive implements launcher.
func (p *programs) Alive(name string) error {
	select {
	case <-p.running[name].ended:
	default:
		return nil
	}
	text, _ := os.ReadFile(p.log(name))
	return fmt.Errorf("%s has ended; its log ends:\n%s", name, text[max(0, len(text)-2000):])
}

func (p *programs) close() error {
	for _, running := range p.running {
		_ = running.cmd.Process.Kill() // it may have ended
		<-running.ended
	}
	return nil
}
