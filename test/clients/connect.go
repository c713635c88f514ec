package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"

	"klamm/test/host"
	"klamm/test/kafka"
)

// Workers of Kafka Connect take a file to a topic and the topic to a file: one that stands alone, and one of a cluster,
// which keeps what it knows in topics of its own. The connector makes the topic (KIP-158), of one partition, so that
// the lines keep their order.

const (
	connectWorker = `bootstrap.servers=%s
key.converter=org.apache.kafka.connect.storage.StringConverter
value.converter=org.apache.kafka.connect.storage.StringConverter
offset.flush.interval.ms=1000
plugin.discovery=service_load
listeners=http://%s
`
	connectAlone   = "offset.storage.file.filename=%s/offsets\n"
	connectCluster = `group.id=%[1]s
config.storage.topic=%[1]s-configs
offset.storage.topic=%[1]s-offsets
offset.storage.partitions=1
status.storage.topic=%[1]s-status
status.storage.partitions=1
`
)

// Connect tells only a debugger that it may not make the topics it keeps what it knows in.
const tellTopics = "-Dorg.slf4j.simpleLogger.log.org.apache.kafka.connect.util.TopicAdmin=debug "

// connectors are the configurations of the two connectors by name.
func connectors(as *actor, dir string) map[string]map[string]string {
	return map[string]map[string]string{
		as.id + "-source": {
			"name": as.id + "-source", "connector.class": "org.apache.kafka.connect.file.FileStreamSourceConnector",
			"file": dir + "/in", "topic": as.id,
			"topic.creation.default.partitions": "1", "topic.creation.default.replication.factor": "3",
		},
		as.id + "-sink": {
			"name": as.id + "-sink", "connector.class": "org.apache.kafka.connect.file.FileStreamSinkConnector",
			"file": dir + "/out", "topics": as.id,
		},
	}
}

var connectorRights = []right{
	{allow: `topic: "{id}", operations: [Create]`, says: `Task failed to create new topic \(name={id},.*authorized`},
	{allow: `topic: "{id}", operations: [Write]`, says: topicDenied("{id}")},
	{allow: `topic: "{id}", operations: [Read]`, says: topicDenied("{id}")},
	{allow: `group: "connect-{id}-sink", operations: [Read]`, says: groupDenied("connect-{id}-sink")},
}

// connectWorkerRights are those of a worker of a cluster, and those of its connectors.
func connectWorkerRights() []right {
	all := []right{
		{allow: `topic: "{id}-*", operations: [Create]`, says: `Not authorized to create topic\(s\) '{id}-`},
		{allow: `topic: "{id}-*", operations: [Read]`, says: topicDenied("{id}-")},
		{allow: `topic: "{id}-*", operations: [Write]`, says: topicDenied("{id}-")},
		{allow: `group: "{id}", operations: [Read]`, says: groupDenied("{id}")},
	}
	for _, right := range connectorRights {
		all = append(all, right)
		all[len(all)-1].says = ""
	}
	return all
}

// copyFile returns the call of a worker that stands alone, which is over when the second file is as long as the first.
func copyFile(r *rig, as *actor) ([]call, error) {
	dir := filepath.Join(r.stage, as.id)
	worker := fmt.Sprintf(connectWorker+connectAlone, r.brokers(), "127.0.0.1:0", dir)
	files := map[string]string{"worker.properties": worker, "in": joinLines(linesOf(as.id, records))}
	command := "{connect} " + kafka.ConnectStandalone + " " + dir + "/worker.properties"
	for name, config := range connectors(as, dir) {
		text, err := json.Marshal(config)
		if err != nil {
			return nil, err
		}
		files[name+".json"] = string(text)
		command += " " + dir + "/" + name + ".json"
	}
	if _, err := r.place(as, files); err != nil {
		return nil, err
	}
	return []call{{
		name: as.id, limit: limit, command: command,
		done: func(ctx context.Context) error { return awaitCopy(ctx, dir) },
	}}, nil
}

// copyFileDistributed returns the call of a worker of a cluster, which is told of its connectors by HTTP.
func copyFileDistributed(r *rig, as *actor) ([]call, error) {
	listen, err := host.FreeAddr()
	if err != nil {
		return nil, err
	}
	worker := fmt.Sprintf(connectWorker, r.brokers(), listen) + fmt.Sprintf(connectCluster, as.id)
	dir, err := r.place(as, map[string]string{"worker.properties": worker, "in": joinLines(linesOf(as.id, records))})
	if err != nil {
		return nil, err
	}
	return []call{{
		name: as.id, limit: limit,
		command: "{connect} " + tellTopics + kafka.ConnectDistributed + " " + dir + "/worker.properties",
		done: func(ctx context.Context) error {
			for name, config := range connectors(as, dir) {
				err := await(ctx, "the worker to take "+name, func() (bool, error) {
					return putConnector(ctx, "http://"+listen+"/connectors/"+name+"/config", config)
				})
				if err != nil {
					return err
				}
			}
			return awaitCopy(ctx, dir)
		},
	}}, nil
}

// putConnector tells a worker of a connector. It takes none before it has joined its group.
func putConnector(ctx context.Context, url string, config map[string]string) (taken bool, err error) {
	text, err := json.Marshal(config)
	if err != nil {
		return false, err
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodPut, url, bytes.NewReader(text))
	if err != nil {
		return false, err
	}
	request.Header.Set("Content-Type", "application/json")
	answer, err := http.DefaultClient.Do(request)
	if err != nil {
		return false, nil //nolint:nilerr // it does not listen yet
	}
	return answer.StatusCode == http.StatusCreated, answer.Body.Close()
}

func awaitCopy(ctx context.Context, dir string) error {
	return await(ctx, "the file to be copied", func() (bool, error) {
		in, err := os.Stat(dir + "/in")
		if err != nil {
			return false, err
		}
		out, err := os.Stat(dir + "/out")
		if errors.Is(err, os.ErrNotExist) {
			return false, nil
		}
		return err == nil && out.Size() >= in.Size(), err
	})
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
