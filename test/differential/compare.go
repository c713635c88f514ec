package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// volatile fields differ between two brokers that do the same. Of numbers the sign is compared, of ids and texts
// whether there is one.
var volatile = map[string]string{
	"*.ThrottleMillis":                                      "how busy the broker is",
	"ApiVersions.FinalizedFeaturesEpoch":                    "how far the metadata log is",
	"DescribeTransactions.TransactionStates.StartTimestamp": "when it was",
	"Fetch.SessionID":                                       "chosen at random, but for 0",
	"GetTelemetrySubscriptions.SubscriptionID":              "of an id chosen at random, but for 0",
	"JoinGroup.MemberID":                                    "chosen at random",
	"JoinGroup.LeaderID":                                    "chosen at random",
	"JoinGroup.Members.MemberID":                            "chosen at random",
	"DescribeGroups.Groups.Members.MemberID":                "chosen at random",

	"DescribeProducers.Topics.Partitions.ActiveProducers.ProducerID":    "in the order in which they come",
	"DescribeProducers.Topics.Partitions.ActiveProducers.LastTimestamp": "the time",
	"DescribeTransactions.TransactionStates.ProducerID":                 "in the order in which they come",
	"ListTransactions.TransactionStates.ProducerID":                     "in the order in which they come",

	"CreateDelegationToken.TokenID":                        "chosen at random",
	"CreateDelegationToken.HMAC":                           "of the token's id",
	"CreateDelegationToken.IssueTimestamp":                 "the time",
	"CreateDelegationToken.ExpiryTimestamp":                "the time",
	"CreateDelegationToken.MaxTimestamp":                   "the time",
	"RenewDelegationToken.ExpiryTimestamp":                 "the time",
	"ExpireDelegationToken.ExpiryTimestamp":                "the time",
	"DescribeDelegationToken.TokenDetails.TokenID":         "chosen at random",
	"DescribeDelegationToken.TokenDetails.HMAC":            "of the token's id",
	"DescribeDelegationToken.TokenDetails.IssueTimestamp":  "the time",
	"DescribeDelegationToken.TokenDetails.ExpiryTimestamp": "the time",
	"DescribeDelegationToken.TokenDetails.MaxTimestamp":    "the time",
	"DescribeLogDirs.Dirs.Dir":                             "where the broker keeps its data",
	"DescribeLogDirs.Dirs.TotalBytes":                      "of the disk",
	"DescribeLogDirs.Dirs.UsableBytes":                     "of the disk",
	"DescribeLogDirs.Dirs.Topics.Partitions.Size":          "of records that say when they were written",
	"DescribeQuorum.Topics.Partitions.LeaderEpoch":         "elections take what they take",
	"DescribeQuorum.Topics.Partitions.HighWatermark":       "grows by itself",

	"DescribeQuorum.Topics.Partitions.CurrentVoters.LogEndOffset":          "grows by itself",
	"DescribeQuorum.Topics.Partitions.CurrentVoters.LastFetchTimestamp":    "the time",
	"DescribeQuorum.Topics.Partitions.CurrentVoters.LastCaughtUpTimestamp": "the time",
	"DescribeQuorum.Topics.Partitions.CurrentVoters.ReplicaDirectoryID":    "chosen at random",
}

// unordered lists come in the order of the broker's hash tables, or of its own work.
var unordered = map[string]string{
	"AddPartitionsToTxn.Topics":                                             "a map by partition",
	"AddPartitionsToTxn.Topics.Partitions":                                  "a map by partition",
	"AlterClientQuotas.Entries":                                             "the controller's",
	"AlterClientQuotas.Entries.Entity":                                      "the controller's",
	"AlterReplicaLogDirs.Topics":                                            "the broker's",
	"AlterReplicaLogDirs.Topics.Partitions":                                 "the broker's",
	"AlterUserSCRAMCredentials.Results":                                     "the controller's",
	"ConsumerGroupDescribe.Groups.Members.Assignment.TopicPartitions":       "a map by topic id",
	"ConsumerGroupDescribe.Groups.Members.TargetAssignment.TopicPartitions": "a map by topic id",
	"ConsumerGroupHeartbeat.Assignment.Topics":                              "a map by topic id",
	"CreatePartitions.Topics":                                               "a set of names",
	"CreateTopics.Topics":                                                   "a set of names",
	"DeleteACLs.Results.MatchingACLs":                                       "a set",
	"DeleteRecords.Topics":                                                  "the broker's",
	"DeleteRecords.Topics.Partitions":                                       "the broker's",
	"DeleteShareGroupState.Topics":                                          "a map by topic id",
	"DeleteTopics.Topics":                                                   "a set of names",
	"DescribeACLs.Resources":                                                "a map by resource",
	"DescribeACLs.Resources.ACLs":                                           "a set",
	"DescribeDelegationToken.TokenDetails":                                  "the broker's",
	"DescribeLogDirs.Dirs.Topics":                                           "the broker's",
	"DescribeLogDirs.Dirs.Topics.Partitions":                                "the broker's",
	"DeleteShareGroupOffsets.Topics":                                        "a map by topic",
	"DescribeShareGroupOffsets.Groups.Topics":                               "of all topics, a map by topic",
	"DescribeProducers.Topics.Partitions.ActiveProducers":                   "a map by producer",
	"DescribeTopicPartitions.Topics":                                        "refused and unknown ones come from a set",
	"DescribeTransactions.TransactionStates.Topics":                         "a set of partitions",
	"DescribeTransactions.TransactionStates.Topics.Partitions":              "a set of partitions",
	"DescribeUserSCRAMCredentials.Results":                                  "the broker's",
	"DescribeUserSCRAMCredentials.Results.CredentialInfos":                  "a map by mechanism",
	"ElectLeaders.Topics":                                                   "the controller's",
	"ElectLeaders.Topics.Partitions":                                        "the controller's",
	"Fetch.Topics":                                                          "refused ones come from a map by partition",
	"Fetch.Topics.Partitions":                                               "refused ones come from a map by partition",
	"InitializeShareGroupState.Topics":                                      "a map by topic id",
	"ListConfigResources.ConfigResources":                                   "the broker's",
	"ListGroups.Groups":                                                     "a map by name",
	"ListTransactions.TransactionStates":                                    "a map by id",
	"ListTransactions.UnknownStateFilters":                                  "a set",
	"Metadata.Topics":                                                       "a set of names",
	"OffsetCommit.Topics":                                                   "as the broker finds their errors",
	"Produce.Topics":                                                        "a map by partition",
	"Produce.Topics.Partitions":                                             "a map by partition",
	"ReadShareGroupState.Topics":                                            "a map by topic id",
	"ReadShareGroupStateSummary.Topics":                                     "a map by topic id",
	"ShareAcknowledge.Topics":                                               "a map by partition",
	"ShareAcknowledge.Topics.Partitions":                                    "a map by partition",
	"ShareGroupDescribe.Groups.Members.Assignment.TopicPartitions":          "a map by topic id",
	"ShareFetch.Topics":                                                     "a map by partition",
	"ShareFetch.Topics.Partitions":                                          "a map by partition",
	"WriteShareGroupState.Topics":                                           "a map by topic id",
	"WriteTxnMarkers.Markers":                                               "a map by producer",
	"WriteTxnMarkers.Markers.Topics":                                        "a map by partition",
	"WriteTxnMarkers.Markers.Topics.Partitions":                             "a map by partition",
}

// struct fields in the order of the message.
type fields []field

type field struct {
	name  string
	value any
}

// show is an outcome without what has to differ between the sides: ids and addresses go by their names.
func (p *play) show(side int, o outcome) (any, error) {
	if o.answer == nil {
		return o.ended, nil
	}
	v := viewer{play: p, side: side}
	shown := v.view(reflect.ValueOf(o.answer), kmsg.NameForKey(o.answer.Key()))
	return shown, v.err
}

type viewer struct {
	play *play
	side int
	err  error
}

func (w *viewer) view(v reflect.Value, path string) any {
	switch v.Kind() {
	case reflect.Pointer, reflect.Interface:
		if v.IsNil() {
			return nil
		}
		return w.view(v.Elem(), path)
	case reflect.Struct:
		return w.fields(v, path)
	case reflect.Array:
		if name, is := w.kept(textOf(v)); is && !v.IsZero() && !strings.HasSuffix(path, ".TopicID") {
			return name
		}
		name, err := w.play.sides[w.side].named(v.Interface().([16]byte))
		if err != nil {
			w.err = err
		}
		return name
	case reflect.Slice:
		if v.Type().Elem().Kind() == reflect.Uint8 {
			return w.text(string(v.Bytes()), v.IsNil())
		}
		if v.IsNil() {
			return nil
		}
		return w.list(v, path)
	case reflect.String:
		return w.text(v.String(), false)
	default:
		return v.Interface()
	}
}

func (w *viewer) fields(v reflect.Value, path string) fields {
	var all fields
	for i := range v.NumField() {
		f := v.Type().Field(i)
		below := path + "." + f.Name
		switch {
		case f.Type == reflect.TypeFor[kmsg.Tags]() || f.Name == "Version":
			continue
		case isVolatile(below):
			all = append(all, field{f.Name, hazy(below, v.Field(i))})
		case f.Name == "RecordBatches":
			all = append(all, field{f.Name, w.text(string(timeless(v.Field(i).Bytes())), v.Field(i).IsNil())})
		case f.Name == "ErrorCode":
			all = append(all, field{f.Name, errorName(int16(v.Field(i).Int()))})
		default:
			all = append(all, field{f.Name, w.view(v.Field(i), below)})
		}
	}
	return all
}

// timeless is batches without the times of the markers that brokers write, and the checksums of these.
func timeless(batches []byte) []byte {
	const length, crc, attributes, times, timesEnd, isControl = 8, 17, 21, 27, 43, 0x20
	batches = bytes.Clone(batches)
	for b := batches; len(b) > length+4; {
		blank := func(from, to int) { clear(b[min(from, len(b)):min(to, len(b))]) } // the last one may be cut off
		if len(b) <= attributes+1 || b[attributes+1]&isControl != 0 {
			blank(crc, attributes)
			blank(times, timesEnd)
		}
		b = b[min(len(b), int(binary.BigEndian.Uint32(b[length:]))+length+4):]
	}
	return batches
}

func isVolatile(path string) bool {
	_, is := volatile[path]
	_, everywhere := volatile["*"+path[strings.LastIndexByte(path, '.'):]]
	return is || everywhere
}

// hazy is what is compared of a volatile field.
func hazy(path string, v reflect.Value) any {
	switch {
	case strings.HasSuffix(path, ".SessionID"), strings.HasSuffix(path, ".SubscriptionID"): // 0 is none
		return v.Int() != 0
	case v.CanInt() && v.Type().Size() >= 4 && v.Int() < 0:
		return "negative"
	case v.CanInt():
		return "a number"
	default:
		return !v.IsZero()
	}
}

func errorName(code int16) string {
	if e := kerr.TypedErrorForCode(code); e != nil {
		return e.Message
	}
	return "NONE"
}

func (w *viewer) list(v reflect.Value, path string) []any {
	items := make([]any, 0, v.Len())
	for i := range v.Len() {
		items = append(items, w.view(v.Index(i), path))
	}
	if _, is := unordered[path]; is {
		slices.SortFunc(items, func(a, b any) int { return strings.Compare(fmt.Sprint(a), fmt.Sprint(b)) })
	}
	return items
}

// text is a string with what is each side's own by its name.
func (w *viewer) text(s string, null bool) any {
	if null {
		return nil
	}
	s = strings.ReplaceAll(s, w.play.sides[w.side].host, "BROKER")
	if name, is := w.kept(s); is {
		return name
	}
	return s
}

func (w *viewer) kept(s string) (placeholder string, is bool) {
	kept := w.play.kept[w.side]
	for _, name := range slices.Sorted(maps.Keys(kept)) {
		if kept[name] != "" && s == kept[name] {
			return "${" + name + "}", true
		}
	}
	return "", false
}

// difference is where two answers differ.
type difference struct {
	path        string // fields of kmsg, without the places in lists
	place       string // with them
	kafka, ours any
}

func (d difference) String() string {
	return fmt.Sprintf("%s: Kafka %s, klamm %s", d.place, short(d.kafka), short(d.ours))
}

func short(v any) string {
	if f, is := v.(fields); is {
		var parts []string
		for _, f := range f {
			parts = append(parts, f.name+": "+short(f.value))
		}
		return "{" + strings.Join(parts, ", ") + "}"
	}
	if l, is := v.([]any); is {
		var parts []string
		for _, item := range l {
			parts = append(parts, short(item))
		}
		return "[" + strings.Join(parts, ", ") + "]"
	}
	if s, is := v.(string); is {
		return fmt.Sprintf("%q", s)
	}
	if v == nil {
		return "null"
	}
	return fmt.Sprint(v)
}

// differences compares two answers field by field.
func differences(api string, kafka, ours any) []difference {
	return compare(difference{path: api, place: api, kafka: kafka, ours: ours})
}

func compare(d difference) (all []difference) {
	switch kafka := d.kafka.(type) {
	case fields:
		if ours, is := d.ours.(fields); is {
			for i, f := range kafka { // of one type, they have the same fields
				all = append(all, compare(difference{d.path + "." + f.name, d.place + "." + f.name, f.value, ours[i].value})...)
			}
			return all
		}
	case []any:
		if ours, is := d.ours.([]any); is {
			return compareLists(d, kafka, ours)
		}
	}
	if !reflect.DeepEqual(d.kafka, d.ours) {
		return []difference{d}
	}
	return nil
}

// compareLists compares what has the same name at the same place; where names or places differ, that is the difference.
func compareLists(d difference, kafka, ours []any) (all []difference) {
	theirNames, ourNames := names(kafka), names(ours)
	if !slices.Equal(theirNames, ourNames) {
		all = append(all, difference{d.path, d.place, theirNames, ourNames})
	}
	for i, name := range theirNames {
		j := slices.Index(ourNames, name)
		if len(kafka) == len(ours) && ourNames[i] == name {
			j = i
		}
		if j >= 0 {
			all = append(all, compare(difference{d.path, fmt.Sprintf("%s[%s]", d.place, name), kafka[i], ours[j]})...)
		}
	}
	return all
}

// naming fields tell the entries of a list apart.
var naming = []string{
	"Topic", "TopicID", "Partition", "Group", "GroupID", "Name", "ResourceType", "ResourceName", "ApiKey", "NodeID",
	"MemberID", "Key", "TransactionalID", "ProducerID", "ConfigName", "Principal", "Dir", "User", "Operation", "Host",
}

func names(list []any) []string {
	all := make([]string, 0, len(list))
	for _, item := range list {
		f, is := item.(fields)
		if !is {
			all = append(all, short(item))
			continue
		}
		var parts []string
		for _, f := range f {
			if _, list := f.value.([]any); !list && slices.Contains(naming, f.name) && f.value != nil && f.value != "" {
				parts = append(parts, fmt.Sprint(f.value))
			}
		}
		all = append(all, strings.Join(parts, " "))
	}
	return all
}
