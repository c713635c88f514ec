package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"klamm/test/host"
	"klamm/test/kafka"
)

// Users of workloads.
const (
	ordersUID   = 61101
	billingUID  = 61102
	strangerUID = 61103
	lateUID     = 61104
	briefUID    = 61105
)

// world is what a suite has to itself: a directory, and a cgroup whose connects its node redirects.
type world struct {
	dir, cgroup string
	closers     []func() error
	failed      bool // a check has
}

// noting is tell, and notes failures: then the directory, with its logs, stays.
func (w *world) noting(tell tell) tell {
	return func(name, measured string, err error) {
		if err != nil {
			w.failed = true
			err = fmt.Errorf("%w\nsee %s", err, w.dir)
		}
		tell(name, measured, err)
	}
}

// newWorld makes a world of a name.
func newWorld(name string) (_ *world, err error) {
	w := &world{}
	if w.dir, err = os.MkdirTemp("", "klamm-identity-"+name+"-"); err != nil {
		return nil, err
	}
	if err = os.Chmod(w.dir, 0o755); err != nil {
		return nil, err
	}
	w.cgroup, err = host.NewCgroup("klamm-identity-", "clients", "clients/other")
	return w, err
}

func (w *world) clients() string          { return filepath.Join(w.cgroup, "clients") }
func (w *world) file(name string) string  { return filepath.Join(w.dir, name) }
func (w *world) onClose(end func() error) { w.closers = append(w.closers, end) }

// close ends all, what came last first. The directory stays when something went wrong.
func (w *world) close() error {
	var errs []error
	for _, end := range slices.Backward(w.closers) {
		errs = append(errs, end())
	}
	if w.cgroup != "" {
		errs = append(errs, host.RemoveCgroup(w.cgroup))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("see %s: %w", w.dir, err)
	}
	if w.failed {
		return nil
	}
	return os.RemoveAll(w.dir)
}

const topicPartitions = 3

// startKafka starts brokers whose authorizer logs what it decides. The anonymous principal of the plaintext listener
// may do everything, the others only what they are allowed.
func (w *world) startKafka(ctx context.Context, opts kafka.Options) (*kafka.Cluster, error) {
	opts.Authorizer, opts.Decisions = true, true
	opts.SuperUsers = append(opts.SuperUsers, "User:ANONYMOUS")
	c, err := kafka.New(ctx, opts)
	if err != nil {
		return nil, err
	}
	w.onClose(c.Stop)
	for _, topic := range []string{"orders", "billing", "payouts"} {
		if err := c.CreateTopic(ctx, topic, topicPartitions); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// waitLimit bounds every wait that has no bound of its own.
const waitLimit = time.Minute

// until waits until it is so, or fails.
func until(ctx context.Context, what string, limit time.Duration, is func() (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		yes, err := is()
		if yes || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waited %v in vain for %s", limit, what)
		case <-time.After(20 * time.Millisecond):
		}
	}
}
