package main

import (
	"bufio"
	_ "embed"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"syscall"

	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/test/kafka"
	"klamm/test/stage"
)

//go:embed workload.py
var workloadProgram []byte

// workload is a process that holds at most one connection, which other processes may come to hold too.
type workload struct {
	cmd     *exec.Cmd
	orders  *os.File
	answers *bufio.Reader
	output  *os.File
	end     func() error // ends it and whatever goes on in its place
}

// startWorkload starts a workload of a user below the redirected cgroup. It ends with the world.
func (w *world) startWorkload(uid uint32) (*workload, error) {
	return w.startWorkloadIn("", uid)
}

// startWorkloadIn is startWorkload in a cgroup below that of the clients.
func (w *world) startWorkloadIn(below string, uid uint32) (*workload, error) {
	program := filepath.Join(w.dir, "workload.py")
	if err := os.WriteFile(program, workloadProgram, 0o644); err != nil {
		return nil, err
	}
	// Pipes of our own: those of exec.Cmd end with the process, and another may go on in its place.
	theirOrders, orders, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	output, theirAnswers, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	p := &workload{cmd: exec.Command("/usr/bin/python3", program), orders: orders, output: output,
		answers: bufio.NewReader(output)}
	p.cmd.Stdin, p.cmd.Stdout, p.cmd.Stderr = theirOrders, theirAnswers, os.Stderr
	err = kafka.Place{Cgroup: filepath.Join(w.clients(), below), UID: uid, GID: uid}.Start(p.cmd)
	err = errors.Join(err, theirOrders.Close(), theirAnswers.Close())
	if err != nil {
		return nil, errors.Join(err, orders.Close(), output.Close())
	}
	p.end = sync.OnceValue(p.stop)
	w.onClose(p.end)
	return p, nil
}

func (p *workload) pid() int { return p.cmd.Process.Pid }

// stop ends the workload; whatever goes on in its place sees the end of its orders.
func (p *workload) stop() error {
	err := p.orders.Close()
	if p.cmd.ProcessState == nil {
		err = errors.Join(err, kafka.Kill(p.cmd))
		_ = p.cmd.Wait() // killed
	}
	return errors.Join(err, p.output.Close())
}

type values map[string]any

// tell gives an order and reads the answer.
func (p *workload) tell(do string, with values) (values, error) {
	order := values{"do": do}
	for k, v := range with {
		order[k] = v
	}
	text, err := json.Marshal(order)
	if err != nil {
		return nil, err
	}
	if _, err := p.orders.Write(append(text, '\n')); err != nil {
		return nil, err
	}
	line, err := p.answers.ReadBytes('\n')
	if err != nil {
		return nil, fmt.Errorf("the workload does not answer: %w", err)
	}
	var answer values
	if err := json.Unmarshal(line, &answer); err != nil {
		return nil, err
	}
	if text, failed := answer["error"].(string); failed {
		return nil, fmt.Errorf("workload, %s: %s", do, text)
	}
	return answer, nil
}

func (p *workload) connect(broker string) error {
	to, err := netip.ParseAddrPort(broker)
	if err != nil {
		return err
	}
	_, err = p.tell("connect", values{"host": to.Addr().String(), "port": to.Port()})
	return err
}

// ask sends a request, of a version before tagged fields (KIP-482), over the held connection.
func (p *workload) ask(req kmsg.Request) (kmsg.Response, error) {
	answer, err := p.tell("ask", values{"frame": hex.EncodeToString(stage.Frame(req))})
	if err != nil {
		return nil, err
	}
	text, _ := answer["frame"].(string)
	body, err := hex.DecodeString(text)
	if err != nil || len(body) < 4 || binary.BigEndian.Uint32(body) != stage.Correlation {
		return nil, fmt.Errorf("this is no answer to request %d: %q, %w", stage.Correlation, text, err)
	}
	resp := req.ResponseKind()
	return resp, resp.ReadFrom(body[4:])
}

// topics are those it sees by the held connection.
func (p *workload) topics() ([]string, error) {
	resp, err := p.ask(stage.AllTopics())
	if err != nil {
		return nil, err
	}
	var names []string
	for _, t := range resp.(*kmsg.MetadataResponse).Topics { //nolint:forcetypeassert // the kind of the request
		names = append(names, *t.Topic)
	}
	slices.Sort(names)
	return names, nil
}

// sees fails unless the held connection shows exactly these topics.
func (p *workload) sees(want ...string) error {
	got, err := p.topics()
	if err == nil && !slices.Equal(got, want) {
		return fmt.Errorf("it sees the topics %q, want %q", got, want)
	}
	return err
}

// kill kills the process that was started, not those it left behind, and reaps it.
func (p *workload) kill() error {
	if err := p.cmd.Process.Signal(syscall.SIGKILL); err != nil {
		return err
	}
	_ = p.cmd.Wait() // killed
	return nil
}
