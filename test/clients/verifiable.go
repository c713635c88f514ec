package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/test/kafka"
)

// Apache Kafka's verifiable producer and consumers tell of every record in JSON: what was acknowledged must have been
// consumed.

const (
	verified         = 1000 // records
	verifiedPerCall  = " --max-messages {n} --bootstrap-server {brokers} --topic {topic}"
	verifiedConsumer = verifiedPerCall + " --group-id {group} --verbose"
	recordData       = `"name":"record_data"`
)

func verifiableRights(topic string) []right {
	return []right{
		{allow: "topic: " + topic + ", operations: [Write]", says: topicDenied(topic), keeps: topic},
		{allow: "topic: " + topic + ", operations: [Read]", says: topicDenied(topic), hides: recordData},
		{allow: `group: "{id}", operations: [Read]`, says: groupDenied("{id}"), hides: recordData},
	}
}

// verifiable returns the calls of the producer and of a consumer, which meets it at work.
func verifiable(topic, consumer string) func(*rig, *actor) ([]call, error) {
	return func(_ *rig, as *actor) ([]call, error) {
		produce := call{
			name: as.id + "-producer", command: "{java} " + kafka.VerifiableProducer + verifiedPerCall + " --throughput 500",
			topic: topic, n: verified, limit: limit,
		}
		consume := call{
			name: as.id, command: "{java} " + consumer + verifiedConsumer,
			topic: topic, group: as.id, n: verified, limit: limit,
		}
		return []call{produce, consume}, nil
	}
}

// event is a line of the verifiable tools: of all fields those that are checked here, in the words of the tools.
type event struct {
	Name      string `json:"name"`
	Value     string `json:"value"`
	Partition int32  `json:"partition"`
	Offset    int64  `json:"offset"`
	Sent      int    `json:"sent"`
	Acked     int    `json:"acked"`
	Count     int    `json:"count"`
	Success   bool   `json:"success"`
	Error     string `json:"error"`
	Offsets   []struct {
		Partition int32 `json:"partition"`
		Offset    int64 `json:"offset"`
	} `json:"offsets"`
}

func eventsOf(o outcome) (map[string][]event, error) {
	if o.err != nil {
		return nil, o.failure("it failed")
	}
	events := map[string][]event{}
	for line := range strings.Lines(o.out) {
		var e event
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			return nil, o.failure("it said %q: %v", line, err)
		}
		events[e.Name] = append(events[e.Name], e)
	}
	return events, nil
}

// at is where a record is.
type at struct {
	partition int32
	offset    int64
}

// acknowledged returns the values of the producer by where they are. All must be acknowledged.
func acknowledged(produced map[string][]event) (map[at]string, error) {
	values := map[at]string{}
	for _, e := range produced["producer_send_success"] {
		values[at{e.Partition, e.Offset}] = e.Value
	}
	sum := produced["tool_data"]
	if len(sum) != 1 || sum[0].Sent != verified || sum[0].Acked != verified || len(values) != verified {
		return nil, fmt.Errorf("of %d records %d are acknowledged: %v, %v", verified, len(values), sum,
			produced["producer_send_error"])
	}
	return values, nil
}

// consumed compares what was consumed with what was acknowledged and returns the offsets after the last of each
// partition.
func consumed(values map[at]string, records []event, ordered bool) (next map[int32]int64, err error) {
	if len(records) != len(values) {
		return nil, fmt.Errorf("%d records consumed, %d acknowledged", len(records), len(values))
	}
	next = map[int32]int64{}
	seen := map[at]bool{}
	for _, e := range records {
		where := at{e.Partition, e.Offset}
		value, known := values[where]
		switch {
		case !known || value != e.Value:
			return nil, fmt.Errorf("consumed %+v, which was not acknowledged", e)
		case seen[where]:
			return nil, fmt.Errorf("consumed %+v twice", e)
		case ordered && e.Offset < next[e.Partition]:
			return nil, fmt.Errorf("consumed %+v out of order", e)
		}
		seen[where] = true
		next[e.Partition] = max(next[e.Partition], e.Offset+1)
	}
	return next, nil
}

// verifiedRecords returns what a run of the producer acknowledged and a consumer told.
func verifiedRecords(outcomes []outcome) (values map[at]string, told map[string][]event, err error) {
	produced, err := eventsOf(outcomes[0])
	if err != nil {
		return nil, nil, fmt.Errorf("the producer: %w", err)
	}
	told, err = eventsOf(outcomes[1])
	if err != nil {
		return nil, nil, fmt.Errorf("the consumer: %w", err)
	}
	values, err = acknowledged(produced)
	return values, told, err
}

// consumedInOrder: each acknowledged record was consumed once, those of a partition in order, and is committed.
func consumedInOrder(_ context.Context, _ *rig, _ *actor, outcomes []outcome) error {
	values, told, err := verifiedRecords(outcomes)
	if err != nil {
		return err
	}
	next, err := consumed(values, told["record_data"], true)
	if err != nil {
		return err
	}
	for _, e := range told["offsets_committed"] {
		if !e.Success {
			return fmt.Errorf("a commit failed: %s", e.Error)
		}
		for _, committed := range e.Offsets {
			if committed.Offset == next[committed.Partition] {
				delete(next, committed.Partition)
			}
		}
	}
	if len(next) > 0 {
		return fmt.Errorf("offsets never committed, by partition: %v", next)
	}
	return nil
}

// sharedAndAcknowledged: each acknowledged record was consumed once by the only member of a share group, which
// acknowledged it. Share groups promise no order (KIP-932).
func sharedAndAcknowledged(_ context.Context, _ *rig, _ *actor, outcomes []outcome) error {
	values, told, err := verifiedRecords(outcomes)
	if err != nil {
		return err
	}
	if _, err := consumed(values, told["record_data"], false); err != nil {
		return err
	}
	done := 0
	for _, e := range told["offsets_acknowledged"] {
		if !e.Success {
			return fmt.Errorf("an acknowledgement failed: %s", e.Error)
		}
		done += e.Count
	}
	if done != verified {
		return fmt.Errorf("%d records acknowledged, want %d", done, verified)
	}
	return nil
}

// shareFromTheBeginning has the share groups of an application begin with the first record, as an operator does: by
// default they begin with what comes after their first member.
func shareFromTheBeginning(ctx context.Context, r *rig, a *application) error {
	earliest := "earliest"
	request := kmsg.NewPtrIncrementalAlterConfigsRequest()
	for _, as := range a.actors() {
		config := kmsg.NewIncrementalAlterConfigsRequestResourceConfig()
		config.Name, config.Value = "share.auto.offset.reset", &earliest
		resource := kmsg.NewIncrementalAlterConfigsRequestResource()
		resource.ResourceType, resource.ResourceName = kmsg.ConfigResourceTypeGroupConfig, as.id
		resource.Configs = append(resource.Configs, config)
		request.Resources = append(request.Resources, resource)
	}
	answer, err := request.RequestWith(ctx, r.admin)
	if err != nil {
		return fmt.Errorf("configure share groups: %w", err)
	}
	for _, resource := range answer.Resources {
		err = errors.Join(err, kerr.ErrorForCode(resource.ErrorCode))
	}
	return err
}
