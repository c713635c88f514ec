package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"klamm/test/kafka"
)

// A worker of Kafka Connect takes a file to a topic and the topic to a file. It makes the topic (KIP-158), of one
// partition, so that the lines keep their order.

const (
	connectWorker = `bootstrap.servers=%s
key.converter=org.apache.kafka.connect.storage.StringConverter
value.converter=org.apache.kafka.connect.storage.StringConverter
offset.storage.file.filename=%s/offsets
offset.flush.interval.ms=1000
listeners=http://127.0.0.1:0
plugin.discovery=service_load
`
	connectSource = `name=%[1]s-source
connector.class=org.apache.kafka.connect.file.FileStreamSourceConnector
file=%[2]s/in
topic=%[1]s
topic.creation.default.partitions=1
topic.creation.default.replication.factor=3
`
	connectSink = `name=%[1]s-sink
connector.class=org.apache.kafka.connect.file.FileStreamSinkConnector
file=%[2]s/out
topics=%[1]s
`
)

// copyFile returns the call of the worker, which is over when the second file is as long as the first.
func copyFile(r *rig, as *actor) ([]call, error) {
	dir := filepath.Join(r.stage, as.id)
	lines := joinLines(linesOf(as.id, records))
	if _, err := r.place(as, map[string]string{
		"worker.properties": fmt.Sprintf(connectWorker, r.brokers(), dir),
		"source.properties": fmt.Sprintf(connectSource, as.id, dir),
		"sink.properties":   fmt.Sprintf(connectSink, as.id, dir),
		"in":                lines,
	}); err != nil {
		return nil, err
	}
	return []call{{
		name: as.id, limit: limit, command: fmt.Sprintf("{connect} %s %[2]s/worker.properties %[2]s/source.properties"+
			" %[2]s/sink.properties", kafka.ConnectStandalone, dir),
		done: func(ctx context.Context) error {
			return await(ctx, "the file to be copied", func() (bool, error) {
				out, err := os.Stat(dir + "/out")
				if errors.Is(err, os.ErrNotExist) {
					return false, nil
				}
				return err == nil && out.Size() >= int64(len(lines)), err
			})
		},
	}}, nil
}

func fileCopied(_ context.Context, r *rig, as *actor, outcomes []outcome) error {
	if o := outcomes[0]; o.err != nil {
		return o.failure("it failed")
	}
	in, err := os.ReadFile(filepath.Join(r.stage, as.id, "in"))
	if err != nil {
		return err
	}
	out, err := os.ReadFile(filepath.Join(r.stage, as.id, "out"))
	if err != nil {
		return err
	}
	if string(in) != string(out) {
		return fmt.Errorf("of a file of %d bytes one of %d bytes came out:\n%s", len(in), len(out), out)
	}
	return nil
}
