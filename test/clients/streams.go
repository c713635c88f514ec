package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"maps"
	"regexp"
	"strings"
	"sync"

	"github.com/twmb/franz-go/pkg/kgo"

	"klamm/test/kafka"
)

// A word count by Kafka Streams, exactly once (KIP-447), in the classic protocol of groups and in that of Streams
// (KIP-1071). It is Apache Kafka's own example, which has the names of its topics built in.

const (
	wordInput, wordOutput = "streams-plaintext-input", "streams-wordcount-output"

	// The topic between the words and the counts, as the example's topology names it.
	wordsBetween = "-KSTREAM-AGGREGATE-STATE-STORE-0000000003-repartition"

	wordConfig = `application.id=%s
bootstrap.servers=%s
processing.guarantee=exactly_once_v2
group.protocol=%s
state.dir=%s
replication.factor=3
statestore.cache.max.bytes=0
# What was counted is deleted from the topic in between at each commit.
repartition.purge.interval.ms=100
`
)

// Streams tells only a debugger that it may not delete.
const tellDeletions = "-Dorg.slf4j.simpleLogger.log.org.apache.kafka.streams.processor.internals.TaskManager=debug "

var wordTurn sync.Mutex

// wordCountRights are the same in both protocols. In one it is Streams that makes its topics, in the other the broker.
func wordCountRights(mayNotCreate string) []right {
	return []right{
		{allow: "topic: " + wordInput + ", operations: [Read]", says: topicDenied(wordInput), keeps: wordOutput},
		{allow: "topic: " + wordOutput + ", operations: [Write]", says: topicDenied(wordOutput), keeps: wordOutput},
		{allow: `group: "{id}", operations: [Read]`, says: groupDenied("{id}"), keeps: wordOutput},
		{allow: `topic: "{id}-*", operations: [Read]`, says: topicDenied("{id}-"), keeps: wordOutput},
		{allow: `topic: "{id}-*", operations: [Write]`, says: topicDenied("{id}-"), keeps: wordOutput},
		{allow: `topic: "{id}-*", operations: [Delete]`, says: `delete-records.* failed.*TopicAuthorizationException`},
		{allow: `topic: "{id}-*", operations: [Create]`, says: mayNotCreate, keeps: wordOutput},
		{allow: `transactional-id: "{id}-*", operations: [Write]`, says: transactionalDenied, keeps: wordOutput},
	}
}

var wordLines = linesOf("word-count", records)

func feedWords(ctx context.Context, r *rig, _ *application) error {
	ends, err := r.offsets(ctx, wordInput, latest)
	if err != nil {
		return err
	}
	for _, end := range ends {
		if end > 0 {
			return nil // by an application before
		}
	}
	var all []*kgo.Record
	for _, line := range wordLines {
		all = append(all, &kgo.Record{Topic: wordInput, Value: []byte(line)})
	}
	return r.admin.ProduceSync(ctx, all...).FirstErr()
}

// words are the words of all lines, as often as they are there, as the example tells words.
func words() []string {
	return regexp.MustCompile(`\W+`).Split(strings.ToLower(strings.Join(wordLines, " ")), -1)
}

// wordCount returns the call of the example, which is over when all words are counted and the topic in between is
// empty.
func wordCount(protocol string) func(*rig, *actor) ([]call, error) {
	return func(r *rig, as *actor) ([]call, error) {
		config := fmt.Sprintf(wordConfig, as.id, r.brokers(), protocol, r.stage+"/"+as.id+"/state")
		dir, err := r.place(as, map[string]string{"streams.properties": config})
		if err != nil {
			return nil, err
		}
		if r.counted, err = r.offsets(context.Background(), wordOutput, latest); err != nil {
			return nil, err
		}
		all := len(words())
		return []call{{
			name: as.id, limit: limit,
			command: "{streams} " + tellDeletions + kafka.WordCountDemo + " " + dir + "/streams.properties",
			done: func(ctx context.Context) error {
				return await(ctx, "all words to be counted", func() (bool, error) {
					counts, err := r.counts(ctx)
					if err != nil || len(counts) < all {
						return false, err
					}
					left, err := r.offsets(ctx, as.id+wordsBetween, earliest)
					deleted := 0
					for _, offset := range left {
						deleted += int(offset)
					}
					return deleted >= all, err
				})
			},
		}}, nil
	}
}

// counts are the records of the output by the application whose turn it is.
func (r *rig) counts(ctx context.Context) ([]*kgo.Record, error) {
	all, err := r.records(ctx, wordOutput)
	if err != nil {
		return nil, err
	}
	var counts []*kgo.Record
	for _, record := range all {
		if record.Offset >= r.counted[record.Partition] {
			counts = append(counts, record)
		}
	}
	return counts, nil
}

func wordsCounted(ctx context.Context, r *rig, _ *actor, outcomes []outcome) error {
	if o := outcomes[0]; o.err != nil {
		return o.failure("it failed")
	}
	all, err := r.counts(ctx)
	if err != nil {
		return err
	}
	return countedOnce(all, words())
}

// countedOnce: the counts of each word go up one by one to as often as it is there.
func countedOnce(counts []*kgo.Record, words []string) error {
	want, got := map[string]uint64{}, map[string]uint64{}
	for _, word := range words {
		want[word]++
	}
	for _, record := range counts {
		word, count := string(record.Key), binary.BigEndian.Uint64(record.Value)
		if got[word]++; count != got[word] {
			return fmt.Errorf("the word %q was counted %d, want %d", word, count, got[word])
		}
	}
	if !maps.Equal(want, got) {
		return fmt.Errorf("the words were counted %v, want %v", got, want)
	}
	return nil
}
