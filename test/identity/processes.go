package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"klamm/test/kafka"
)

// processes checks what becomes of an attested connection when the process that made it is no longer who it was, or
// when others hold it.
func processes(ctx context.Context, tell tell) {
	a, err := newAttested(ctx, "processes", kafka.Options{}, user(ordersUID, ordersID), user(billingUID, billingID))
	if err != nil {
		tell("SPIRE and Kafka start", "", err)
		return
	}
	tell = a.noting(tell)
	defer func() { tell("it leaves nothing behind", "", a.close()) }()
	a.node, err = a.newNode(ctx, "processes", []int{kafka.PlaintextPort}, identified, sections{
		"clusters": fmt.Sprintf("[{name: main, bootstrap: [%q]}]", a.cluster.Addrs()[0]),
		"spire":    a.section("broker"),
	})
	if err == nil {
		err = a.node.ready(ctx)
	}
	if err == nil {
		_, err = a.identifies(ctx)
	}
	if err != nil {
		tell("the node starts", "", err)
		return
	}
	runAll(ctx, tell, []check{
		{"execve ends the connection, and the new program is attested by itself", a.execEnds},
		{"a forked child keeps the connection of its parent that exited", a.heirKeeps},
		{"a forked child that executes does not, once the parent has exited", a.executedHeirLoses},
		{"a forked child in another cgroup does not either", a.movedHeirLoses},
		{"a connection that was passed on ends with the process that made it", a.passedOnEnds},
		{"a process with a used process id is somebody else", a.reusedPID},
	})
}

// lost waits until the held connection is closed, at most as long as a look takes, and tells how long it took.
func (p *workload) lost(ctx context.Context) (string, error) {
	began := time.Now()
	err := until(ctx, "the end of the connection", 5*time.Second, func() (bool, error) {
		topics, err := p.topics()
		if err == nil && len(topics) == 0 {
			return false, errors.New("it is without rights, and still open")
		}
		return err != nil, nil
	})
	return fmt.Sprintf("%d ms after", time.Since(began).Milliseconds()), err
}

// ownRights fails unless the workload has a new connection and orders' rights.
func (a *attested) ownRights(p *workload) error {
	if err := p.connect(a.cluster.Addrs()[0]); err != nil {
		return err
	}
	return p.sees("orders")
}

func (a *attested) execEnds(ctx context.Context) (string, error) {
	p, err := a.holding(ordersUID)
	if err != nil {
		return "", err
	}
	if err := p.sees("orders"); err != nil {
		return "", err
	}
	if _, err := p.tell("execute", nil); err != nil {
		return "", err
	}
	took, err := p.lost(ctx)
	return took, errors.Join(err, a.ownRights(p), p.end())
}

// forked is a workload of orders with a connection that it has in common with its child, which obeys from now on.
func (a *attested) forked() (p *workload, child int, err error) {
	if p, err = a.holding(ordersUID); err != nil {
		return nil, 0, err
	}
	if err = p.sees("orders"); err != nil {
		return nil, 0, err
	}
	answer, err := p.tell("fork", nil)
	if err != nil {
		return nil, 0, err
	}
	pid, _ := answer["pid"].(float64)
	return p, int(pid), p.sees("orders")
}

func (a *attested) heirKeeps(context.Context) (string, error) {
	p, _, err := a.forked()
	if err != nil {
		return "", err
	}
	if err := p.kill(); err != nil {
		return "", err
	}
	for range 100 {
		if err := p.sees("orders"); err != nil {
			return "", err
		}
		time.Sleep(10 * time.Millisecond)
	}
	return "100 requests within a second", errors.Join(a.ownRights(p), p.end())
}

func (a *attested) executedHeirLoses(ctx context.Context) (string, error) {
	p, _, err := a.forked()
	if err != nil {
		return "", err
	}
	if _, err := p.tell("execute", nil); err != nil {
		return "", err
	}
	if err := p.kill(); err != nil {
		return "", err
	}
	took, err := p.lost(ctx)
	return took, errors.Join(err, p.end())
}

func (a *attested) movedHeirLoses(ctx context.Context) (string, error) {
	p, child, err := a.forked()
	if err != nil {
		return "", err
	}
	other := filepath.Join(a.clients(), "other", "cgroup.procs")
	if err := os.WriteFile(other, []byte(strconv.Itoa(child)), 0); err != nil {
		return "", err
	}
	if err := p.kill(); err != nil {
		return "", err
	}
	took, err := p.lost(ctx)
	return took, errors.Join(err, p.end())
}

// passedOnEnds: as long as the process that made it lives, nobody can tell which of its holders uses a connection.
func (a *attested) passedOnEnds(ctx context.Context) (string, error) {
	p, err := a.holding(ordersUID)
	if err != nil {
		return "", err
	}
	taker, err := a.startWorkload(billingUID)
	if err != nil {
		return "", err
	}
	path := values{"path": filepath.Join(os.TempDir(), fmt.Sprintf("klamm-identity-%d", taker.pid()))}
	defer func() { _ = os.Remove(fmt.Sprint(path["path"])) }()
	if _, err := taker.tell("listen", path); err != nil {
		return "", err
	}
	if _, err := p.tell("give", path); err != nil {
		return "", err
	}
	if _, err := taker.tell("receive", nil); err != nil {
		return "", err
	}
	if err := taker.sees("orders"); err != nil {
		return "", fmt.Errorf("while its maker lives: %w", err)
	}
	if err := p.kill(); err != nil {
		return "", err
	}
	took, err := taker.lost(ctx)
	return took, errors.Join(err, p.end(), taker.end())
}

// reusedPID: the connection of a process outlives it, by a forked child, and another user's process gets its id.
func (a *attested) reusedPID(ctx context.Context) (string, error) {
	p, _, err := a.forked()
	if err != nil {
		return "", err
	}
	used := p.pid()
	if err := p.kill(); err != nil {
		return "", err
	}
	other, tries, err := a.startWithPID(ctx, billingUID, used)
	if err != nil {
		return "", err
	}
	if err := other.connect(a.cluster.Addrs()[0]); err != nil {
		return "", err
	}
	if err := errors.Join(p.sees("orders"), other.sees("billing"), p.sees("orders")); err != nil {
		return "", err
	}
	for _, id := range []string{ordersID, billingID} {
		_, err := a.node.awaitAudit(ctx, id+" under this process id", func(l auditLine) bool {
			return l.PID == uint32(used) && l.SPIFFE == id
		})
		if err != nil {
			return "", err
		}
	}
	return fmt.Sprintf("process id %d, in %d tries", used, tries), errors.Join(other.end(), p.end())
}

// startWithPID starts a workload until it has that process id: the kernel gives the next free one, and other processes
// of this host may get in between.
func (a *attested) startWithPID(ctx context.Context, uid uint32, pid int) (*workload, int, error) {
	for tries := 1; ctx.Err() == nil && tries <= 1000; tries++ {
		err := os.WriteFile("/proc/sys/kernel/ns_last_pid", []byte(strconv.Itoa(pid-1)), 0)
		if err != nil {
			return nil, tries, err
		}
		p, err := a.startWorkload(uid)
		if err != nil || p.pid() == pid {
			return p, tries, err
		}
		if err := p.end(); err != nil {
			return nil, tries, err
		}
	}
	return nil, 0, fmt.Errorf("no process got the id %d", pid)
}
