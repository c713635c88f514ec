package main

import (
	"bufio"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/kafka/authz"
	"klamm/test/kafka"
	"klamm/test/message"
)

// enumerations are types of which a broker reads no other values: it closes the connection, whoever asks.
var enumerations = map[reflect.Type][]int64{
	reflect.TypeFor[kmsg.ACLResourceType]():          {2, 3, 4, 5},
	reflect.TypeFor[kmsg.ACLResourcePatternType]():   {3, 4},
	reflect.TypeFor[kmsg.ACLPermissionType]():        {2, 3},
	reflect.TypeFor[kmsg.ACLOperation]():             {3, 4, 8},
	reflect.TypeFor[kmsg.ConfigResourceType]():       {2, 4, 8},
	reflect.TypeFor[kmsg.IncrementalAlterConfigOp](): {0, 1, 2, 3},
	reflect.TypeFor[kmsg.QuotasMatchType]():          {0, 1, 2},
}

// perSeed is how many random requests of each API a seed gives.
const perSeed = 12

// readSeeds reads the kept seeds, one a line.
func readSeeds(file string) (seeds []uint64, err error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if line, _, _ := strings.Cut(lines.Text(), "#"); strings.TrimSpace(line) != "" {
			seed, err := strconv.ParseUint(strings.TrimSpace(line), 10, 64)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", file, err)
			}
			seeds = append(seeds, seed)
		}
	}
	return seeds, lines.Err()
}

// never are APIs without random requests, and why.
var never = map[kmsg.Key]string{
	kmsg.ApiVersions:      "has nothing to choose",
	kmsg.SASLHandshake:    "begins a login",
	kmsg.SASLAuthenticate: "ends a login",
	kmsg.WriteTxnMarkers:  "a broker never answers those that name no partition or one twice",
	kmsg.ListGroups:       "the members that random requests leave behind end with the time",

	kmsg.GetTelemetrySubscriptions: clientsEnd,
	kmsg.PushTelemetry:             clientsEnd,

	kmsg.CreateDelegationToken:   tokensEnd,
	kmsg.RenewDelegationToken:    tokensEnd,
	kmsg.ExpireDelegationToken:   tokensEnd,
	kmsg.DescribeDelegationToken: tokensEnd,
}

const (
	tokensEnd  = "tokens end with the time, on each cluster at another"
	clientsEnd = "a broker knows a client again, until some time after its connection ended"
)

// mighty are users that may take the world apart, and byOthers the APIs by which they would: random requests of these
// are others'.
var mighty = []string{kafka.Admin, "dave"}

var byOthers = []kmsg.Key{
	kmsg.DeleteTopics, kmsg.DeleteRecords, kmsg.DeleteGroups, kmsg.OffsetDelete, kmsg.AlterPartitionAssignments,
	kmsg.AlterReplicaLogDirs, kmsg.AlterConfigs, kmsg.IncrementalAlterConfigs, kmsg.CreateACLs, kmsg.DeleteACLs,
	kmsg.AlterClientQuotas, kmsg.AlterUserSCRAMCredentials, kmsg.UpdateFeatures, kmsg.UnregisterBroker,
	kmsg.AddRaftVoter, kmsg.RemoveRaftVoter, kmsg.UnregisterController, kmsg.ElectLeaders,
	kmsg.CreateTopics, kmsg.CreatePartitions,
}

// randomPlay is the nth random request of an API by a seed. The same choices are made for each side.
func (w *world) randomPlay(seed uint64, key int16, n int) (*play, *step) {
	r := rand.New(rand.NewPCG(seed, uint64(key)<<32|uint64(n)))
	spoken := w.spoken[key].within(authz.Table[key])
	version := spoken.min + int16(r.IntN(int(spoken.max-spoken.min)+1))
	users := slices.Clone(w.names)
	if slices.Contains(byOthers, kmsg.Key(key)) {
		users = slices.DeleteFunc(users, func(u string) bool { return slices.Contains(mighty, u) })
	}
	p := w.newPlay(&scenario{key: key}, version, users[r.IntN(len(users))], fmt.Sprintf("s%d-%d-%d", seed, key, n))
	choices := r.Uint64()
	made := func(side int) (kmsg.Request, error) {
		m := maker{rand.New(rand.NewPCG(seed, choices)), p.sides[side], p.run, nil}
		req := kmsg.RequestForKey(key)
		m.fill(reflect.ValueOf(req).Elem(), "")
		tame(req, version)
		return req, m.err
	}
	return p, &step{key: key, made: made}
}

// tame takes from a request what would change the world or take its time, what kmsg writes at versions that do not have
// it (tagged fields of Fetch), and what brokers stumble over and never answer, whoever asks: null lists of users whose
// refusal has no place, a resource that comes twice, partitions and batches that cannot be, two partitions of no topic,
// no groups.
func tame(req kmsg.Request, version int16) {
	v := reflect.ValueOf(req).Elem()
	if f := v.FieldByName("ValidateOnly"); f.IsValid() {
		f.SetBool(true)
	}
	switch req := req.(type) {
	case *kmsg.MetadataRequest:
		req.AllowAutoTopicCreation = false
		if version < 4 { // which cannot say so
			req.Topics = slices.DeleteFunc(req.Topics, func(t kmsg.MetadataRequestTopic) bool {
				return t.Topic == nil || *t.Topic == "nowhere" || *t.Topic == "missing"
			})
		}
	case *kmsg.FetchRequest:
		req.ReplicaState = kmsg.NewFetchRequestReplicaState()
		for i := range req.Topics {
			if req.Topics[i].TopicID == [16]byte{} {
				req.Topics[i].TopicID[15] = 0xff
			}
			for j := range req.Topics[i].Partitions {
				p := &req.Topics[i].Partitions[j]
				p.ReplicaDirectoryID, p.HighWatermark = [16]byte{}, math.MaxInt64
			}
		}
	case *kmsg.DescribeUserSCRAMCredentialsRequest:
		req.Users = append([]kmsg.DescribeUserSCRAMCredentialsRequestUser{}, req.Users...)
	case *kmsg.AlterConfigsRequest:
		req.Resources = req.Resources[:min(len(req.Resources), 1)]
		for i := range req.Resources {
			notBrokers(&req.Resources[i].ResourceType)
		}
	case *kmsg.IncrementalAlterConfigsRequest:
		for i := range req.Resources {
			notBrokers(&req.Resources[i].ResourceType)
		}
	case *kmsg.OffsetFetchRequest:
		if len(req.Groups) == 0 {
			req.Groups = []kmsg.OffsetFetchRequestGroup{{Group: "readers", MemberEpoch: -1}}
		}
	case *kmsg.ProduceRequest:
		for i := range req.Topics {
			for j := range req.Topics[i].Partitions {
				req.Topics[i].Partitions[j].Partition = max(0, req.Topics[i].Partitions[j].Partition)
			}
		}
	}
	for _, name := range []string{"MaxWaitMillis", "RebalanceTimeoutMillis"} {
		if f := v.FieldByName(name); f.IsValid() {
			f.SetInt(5)
		}
	}
	for _, name := range []string{"TimeoutMillis", "SessionTimeoutMillis"} {
		if f := v.FieldByName(name); f.IsValid() {
			f.SetInt(6000)
		}
	}
}

// notBrokers are settings of no broker: the order of checks and the words of their refusal depend on the release.
func notBrokers(t *kmsg.ConfigResourceType) {
	if *t == kmsg.ConfigResourceTypeBroker {
		*t = kmsg.ConfigResourceTypeTopic
	}
}

// maker makes up a message.
type maker struct {
	*rand.Rand
	side *side
	run  string
	err  error
}

// names are the pools that strings are drawn from, by field. Groups that a request would add a member to are the play's
// own: how long members stay depends on the time.
func (m *maker) names(field string) []string {
	switch field {
	case "Topic", "Topics", "TopicNames", "SubscribedTopicNames":
		return []string{"orders", "logs", "secret", "shop.items", "shop.private", "public", "nowhere", "missing", ""}
	case "Group", "Groups", "GroupID", "CoordinatorKey", "CoordinatorKeys":
		return []string{"readers", "own-1", "own-group", "locked-1", "locked-2", "nowhere", ""}
	case "joins":
		return []string{"own-" + m.run, "locked-" + m.run, "none-" + m.run}
	case "TransactionalID", "TransactionID", "TransactionalIDs":
		return []string{"tx", "own-tx", "locked-x", "locked-open", ""}
	case "ResourceName":
		return []string{"orders", "secret", "logs", "nowhere", "1", "2", "", "readers", "kafka-cluster"}
	case "Principal", "PrincipalName", "Name", "User":
		return []string{"User:alice", "alice", "nobody", "retention.ms", ""}
	}
	return []string{"", "a", "m-" + m.run, "1"}
}

func (m *maker) fill(v reflect.Value, field string) {
	if d, is := v.Addr().Interface().(interface{ Default() }); is {
		d.Default()
	}
	if v.CanInt() && v.Int() == -1 && m.IntN(4) > 0 {
		return
	}
	if values, is := enumerations[v.Type()]; is {
		v.SetInt(values[m.IntN(len(values))])
		return
	}
	switch kind := v.Kind(); {
	case v.Type() == reflect.TypeFor[kmsg.Tags]():
	case kind == reflect.Struct:
		m.fillStruct(v)
	case kind == reflect.Pointer:
		if m.IntN(4) > 0 {
			v.Set(reflect.New(v.Type().Elem()))
			m.fill(v.Elem(), field)
		}
	case v.Type() == reflect.TypeFor[[]byte]():
		v.SetBytes(m.bytes(field))
	case kind == reflect.Slice:
		if n := m.IntN(5) - 1; n >= 0 {
			v.Set(reflect.MakeSlice(v.Type(), n, n))
		}
		for i := range v.Len() {
			m.fill(v.Index(i), field)
		}
	case kind == reflect.Array:
		m.id(v)
	case kind == reflect.String:
		names := m.names(field)
		v.SetString(names[m.IntN(len(names))])
	case field == "IsolationLevel":
		v.SetInt(m.Int64N(2))
	case kind == reflect.Bool:
		v.SetBool(m.IntN(2) > 0)
	case v.CanInt():
		v.SetInt(int64([]int8{-1, 0, 0, 0, 1, 1, 2, 5}[m.IntN(8)]))
	case v.CanUint():
		v.SetUint(m.Uint64N(3))
	case v.CanFloat():
		v.SetFloat(float64(m.IntN(3)))
	}
}

// fillStruct leaves out what kmsg gives a default, half of the time.
func (m *maker) fillStruct(v reflect.Value) {
	joins := v.FieldByName("RebalanceTimeoutMillis").IsValid() || v.FieldByName("SubscribedTopicNames").IsValid()
	for i := range v.NumField() {
		name := v.Type().Field(i).Name
		switch {
		case name == "Version":
			continue
		case name == "Group" && joins:
			name = "joins"
		}
		m.fill(v.Field(i), name)
	}
}

func (m *maker) bytes(field string) []byte {
	if field != "Records" {
		return [][]byte{nil, {}, []byte("x")}[m.IntN(3)]
	}
	b := message.Batch{}
	b.Default()
	b.Values, b.Timestamp = []string{"random"}, 1_700_000_003_000
	b.Transactional, b.Corrupt = m.IntN(8) == 0, m.IntN(8) == 0
	return b.AppendTo(nil)
}

func (m *maker) id(v reflect.Value) {
	switch topics := []string{"orders", "logs", "secret", "shop.private", "public"}; m.IntN(4) {
	case 0:
		v.SetZero()
	case 1:
		v.Index(v.Len() - 1).SetUint(m.Uint64N(200) + 1)
	default:
		id, err := m.side.id(topics[m.IntN(len(topics))])
		if err != nil {
			m.err = err
		}
		v.Set(reflect.ValueOf(id))
	}
}
