package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/test/kafka"
)

// An exactly-once copy by Apache Kafka's transactional message copier (KIP-98, KIP-447), which aborts one of three
// transactions on purpose, while each broker is restarted.

const (
	copyInput, copyOutput = "copy-in", "copy-out"

	copied       = 600 // records there are more each time the copier has nothing left to do before all is over
	copyLimit    = 4 * time.Minute
	restartLimit = time.Minute // for the copy to go on, and for the replicas of a broker to be in sync again

	copyCommand = "{java} " + kafka.TransactionalCopier + " --broker-list {brokers} --input-topic " + copyInput +
		" --input-partition 0 --output-topic " + copyOutput + " --consumer-group {group} --transactional-id {group}" +
		" --transaction-size 10 --group-mode --use-group-metadata --enable-random-aborts"
)

func copiers(_ *rig, as *actor) ([]call, error) {
	return []call{{name: as.id, command: copyCommand, group: as.id, limit: copyLimit}}, nil
}

// feedCopier adds records to the input.
func feedCopier(ctx context.Context, r *rig, _ *application) error {
	ends, err := r.offsets(ctx, copyInput, latest)
	if err != nil {
		return err
	}
	first := 0
	for _, end := range ends {
		first += int(end)
	}
	var records []*kgo.Record
	for i := range copied {
		records = append(records, &kgo.Record{Topic: copyInput, Value: strconv.AppendInt(nil, int64(first+i), 10)})
	}
	return r.admin.ProduceSync(ctx, records...).FirstErr()
}

// copiesExactlyOnce: after the copy each partition of the output holds what that of the input holds, in its order.
func copiesExactlyOnce(ctx context.Context, r *rig, a *application) error {
	as := a.actors()[0]
	ctx, cancel := context.WithTimeout(ctx, copyLimit)
	defer cancel()
	var restarted error
	over := make(chan struct{})
	var all sync.WaitGroup
	all.Go(func() {
		defer close(over)
		restarted = r.restartAll(ctx)
	})
	failed := r.copyUntil(ctx, a, &as, over)
	all.Wait()
	if err := errors.Join(restarted, failed); err != nil {
		return err
	}
	in, err := r.records(ctx, copyInput)
	if err != nil {
		return err
	}
	out, err := r.records(ctx, copyOutput)
	if err != nil {
		return err
	}
	if err := sameRecords(in, out); err != nil {
		return err
	}
	return r.meetsNoRefusal(&as)
}

// sameRecords: each partition holds the same values in the same order.
func sameRecords(in, out []*kgo.Record) error {
	for p := range int32(partitions) {
		if given, made := valuesOf(in, p), valuesOf(out, p); !slices.Equal(given, made) {
			return fmt.Errorf("partition %d: %d records became %d: %s", p, len(given), len(made),
				firstDifference(given, made))
		}
	}
	return nil
}

func valuesOf(records []*kgo.Record, partition int32) []string {
	var values []string
	for _, record := range records {
		if record.Partition == partition {
			values = append(values, string(record.Value))
		}
	}
	return values
}

func firstDifference(given, made []string) string {
	for i := range min(len(given), len(made)) {
		if given[i] != made[i] {
			return fmt.Sprintf("at %d there is %s instead of %s", i, made[i], given[i])
		}
	}
	return "one goes on longer"
}

// copyUntil runs the copier again and again until one that began when all was over has nothing left to do. A copier
// ends when it has copied what there was, and one that meets an error it was not written for ends too: exactly once
// holds over that. There must be work for it as long as brokers are restarted.
func (r *rig) copyUntil(ctx context.Context, a *application, as *actor, over <-chan struct{}) error {
	for run := 1; ; run++ {
		last := false
		select {
		case <-over:
			last = true
		default:
			if err := a.feed(ctx, r, a); err != nil {
				return err
			}
		}
		o := r.run(ctx, call{name: fmt.Sprintf("%s-%d", as.id, run), uid: as.uid, command: copyCommand, group: as.id,
			limit: copyLimit})
		switch {
		case ctx.Err() != nil:
			return o.failure("the copy does not end")
		case last && o.err == nil:
			return nil
		}
	}
}

// restartAll restarts the brokers one after the other: those that are asked to end hand over their partitions, the one
// that is killed does not. Each time the copy must go on without the broker, and the next goes when the last is back in
// sync.
func (r *rig) restartAll(ctx context.Context) error {
	for broker, how := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL, syscall.SIGTERM} {
		if err := r.copyGoesOn(ctx); err != nil {
			return fmt.Errorf("before broker %d goes: %w", broker+1, err)
		}
		if err := r.cluster.StopBroker(broker, how); err != nil {
			return err
		}
		goesOn := r.copyGoesOn(ctx)
		if err := errors.Join(goesOn, r.cluster.StartBroker(ctx, broker)); err != nil {
			return fmt.Errorf("without broker %d: %w", broker+1, err)
		}
		if err := r.inSync(ctx); err != nil {
			return err
		}
	}
	return nil
}

// copyGoesOn waits until the output has grown.
func (r *rig) copyGoesOn(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, restartLimit)
	defer cancel()
	var before []int64
	return await(ctx, "the copy to go on", func() (bool, error) {
		now, err := r.offsets(ctx, copyOutput, latest)
		if err != nil {
			return false, nil //nolint:nilerr // a partition without a leader, for a moment
		}
		if before == nil {
			before = now
		}
		return !slices.Equal(now, before), nil
	})
}

// inSync waits until all replicas of all partitions are in sync.
func (r *rig) inSync(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, restartLimit)
	defer cancel()
	return await(ctx, "replicas to be in sync", func() (bool, error) {
		request := kmsg.NewPtrMetadataRequest() // of all topics
		answer, err := request.RequestWith(ctx, r.admin)
		if err != nil {
			return false, err
		}
		for _, topic := range answer.Topics {
			for _, partition := range topic.Partitions {
				if partition.ErrorCode != 0 || len(partition.ISR) < len(partition.Replicas) {
					return false, nil
				}
			}
		}
		return true, kerr.ErrorForCode(answer.ErrorCode)
	})
}
