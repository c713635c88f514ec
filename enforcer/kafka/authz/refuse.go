package authz

import (
	"bytes"
	"reflect"
	"slices"
	"strings"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// Refuse is the answer that refuses a whole request with err, in the API's own format and at the request's version:
// what AbstractRequest.getErrorResponse is in Apache Kafka. The code goes to the top level where this version has one
// there, else to every topic, partition, group or resource the request named. An empty msg leaves the error message
// null, as brokers do. It is nil for a produce request with acks=0, which has no answer: close the connection.
//
// An ApiVersions request refused with UNSUPPORTED_VERSION gets version 0 of the answer, which lists only ApiVersions
// itself (KIP-511). A request that names nothing, of an API that has no top-level error, gets an empty answer.
func Refuse(req kmsg.Request, err *kerr.Error, msg string) kmsg.Response {
	if p, ok := req.(*kmsg.ProduceRequest); ok && p.Acks == 0 {
		return nil
	}
	resp := req.ResponseKind()
	if v, ok := resp.(*kmsg.ApiVersionsResponse); ok && err == kerr.UnsupportedVersion {
		row := Table[kmsg.ApiVersions]
		v.Version = 0
		v.ApiKeys = []kmsg.ApiVersionsResponseApiKey{
			{ApiKey: int16(kmsg.ApiVersions), MinVersion: row.Min, MaxVersion: row.Max},
		}
	}
	r := refuser{code: err.Code}
	if msg != "" {
		r.msg = &msg
	}
	top := reflect.ValueOf(resp).Elem()
	r.void(top)
	if session := top.FieldByName("SessionID"); session.IsValid() && session.CanInt() {
		session.Set(reflect.ValueOf(req).Elem().FieldByName("SessionID"))
	}
	if !r.fits(top, resp) || listsBelow(req) {
		r.lists(top, reflect.ValueOf(req).Elem())
	}
	return resp
}

// Unsupported refuses a request we do not decode: its key has no row in the table, or its version lies outside of the
// row. It is nil where no answer could be written, because kmsg knows no such key or version: close the connection, as
// Kafka does.
func Unsupported(key, version int16) kmsg.Response {
	req := kmsg.RequestForKey(key)
	if req == nil || version < 0 || version > req.MaxVersion() && key != int16(kmsg.ApiVersions) {
		return nil
	}
	req.SetVersion(version)
	if p, ok := req.(*kmsg.ProduceRequest); ok {
		p.Acks = -1
	}
	return Refuse(req, kerr.UnsupportedVersion, "")
}

// listsBelow tells the APIs whose getErrorResponse fills the lists although there is a top-level code.
func listsBelow(req kmsg.Request) bool {
	switch kmsg.Key(req.Key()) {
	case kmsg.Metadata, kmsg.ElectLeaders, kmsg.AlterPartitionAssignments, kmsg.ListPartitionReassignments:
		return true
	case kmsg.Fetch:
		return req.GetVersion() < 13
	default:
		return false
	}
}

// refuser writes one error into a response, following the names kmsg gives to fields.
type refuser struct {
	code int16
	msg  *string
}

// listSources says which lists of the request name the entries of a list in the answer, by the answer's field. A list
// not mentioned comes from the request's list of the same name.
var listSources = map[string][]string{
	"Coordinators":      {"CoordinatorKeys"},
	"Groups":            {"Groups", "GroupIDs"},
	"Results":           {"Creations", "Filters", "Deletions", "Upsertions", "Users", "FeatureUpdates"},
	"Topics":            {"Topics", "TopicNames", "Dirs.Topics"},
	"TransactionStates": {"TransactionalIDs"},
}

// identifiers are the fields that name an entry, and are therefore repeated in the answer, by the answer's field. An
// entry of the request that is a bare string or number is its own name.
var identifiers = map[string][]string{
	"Feature":         {"Feature"},
	"Group":           {"Group"},
	"GroupID":         {"GroupID"},
	"Key":             nil,
	"Partition":       {"Partition"},
	"ProducerID":      {"ProducerID"},
	"ResourceName":    {"ResourceName"},
	"ResourceType":    {"ResourceType"},
	"Topic":           {"Topic"},
	"TopicID":         {"TopicID"},
	"TransactionalID": {"TransactionalID"},
	"User":            {"Name"},
}

// noValue are the fields in which -1 says "none", where kmsg's default is 0.
var noValue = []string{
	"BaseOffset", "CommittedOffset", "HighWatermark", "LowWatermark", "NodeID", "Offset", "Port", "ProducerEpoch",
}

// nullLists are the lists that are null when nothing is said, by Kafka's schema.
var nullLists = []string{"ActiveTasks", "PartitionsByUserEndpoint", "StandbyTasks", "WarmupTasks"}

// void makes a struct of the answer say "nothing": -1 where that is the convention, and empty lists rather than null
// ones but for nullLists, which is what Kafka's generated code starts from.
func (r *refuser) void(v reflect.Value) {
	for i := range v.NumField() {
		field := v.Field(i)
		switch {
		case field.CanInt() && slices.Contains(noValue, v.Type().Field(i).Name):
			field.SetInt(-1)
		case field.Kind() == reflect.Slice && field.IsNil() && !slices.Contains(nullLists, v.Type().Field(i).Name):
			field.Set(reflect.MakeSlice(field.Type(), 0, 0))
		}
	}
}

// set writes the error into a struct that has a place for it.
func (r *refuser) set(v reflect.Value) bool {
	code := v.FieldByName("ErrorCode")
	if !code.IsValid() {
		return false
	}
	code.SetInt(int64(r.code))
	if msg := v.FieldByName("ErrorMessage"); msg.IsValid() && msg.Type() == reflect.TypeFor[*string]() {
		msg.Set(reflect.ValueOf(r.msg))
	}
	return true
}

// fits writes the error into the top level if the response's version carries it there.
func (r *refuser) fits(top reflect.Value, resp kmsg.Response) bool {
	without := resp.AppendTo(nil)
	if !r.set(top) {
		return false
	}
	if bytes.Equal(resp.AppendTo(nil), without) {
		(&refuser{}).set(top)
		return false
	}
	return true
}

// lists answers every entry the request has with the error. Below an entry that carries it, nothing is said.
func (r *refuser) lists(to, from reflect.Value) {
	for i := range to.NumField() {
		list := to.Field(i)
		if list.Kind() != reflect.Slice || list.Type().Elem().Kind() != reflect.Struct {
			continue
		}
		sources, ok := listSources[to.Type().Field(i).Name]
		if !ok {
			sources = []string{to.Type().Field(i).Name}
		}
		for _, source := range sources {
			path := strings.Split(source, ".")
			walk(from, path, func(entry reflect.Value) { list.Set(reflect.Append(list, r.entry(list.Type().Elem(), entry))) })
		}
	}
}

// walk calls f for each item of the list that path leads to.
func walk(v reflect.Value, path []string, f func(reflect.Value)) {
	if len(path) == 0 {
		f(v)
		return
	}
	list := v.FieldByName(path[0])
	if !list.IsValid() || list.Kind() != reflect.Slice {
		return
	}
	for i := range list.Len() {
		walk(list.Index(i), path[1:], f)
	}
}

func (r *refuser) entry(t reflect.Type, from reflect.Value) reflect.Value {
	to := reflect.New(t)
	if d, ok := to.Interface().(interface{ Default() }); ok {
		d.Default()
	}
	v := to.Elem()
	r.void(v)
	for i := range v.NumField() {
		names, ok := identifiers[v.Type().Field(i).Name]
		if !ok {
			continue
		}
		if from.Kind() != reflect.Struct {
			assign(v.Field(i), from)
			continue
		}
		for _, name := range names {
			assign(v.Field(i), from.FieldByName(name))
		}
	}
	if !r.set(v) && from.Kind() == reflect.Struct {
		r.lists(v, from)
	}
	return v
}

// assign copies an identifier between fields of one type, or from a string to a nullable one.
func assign(to, from reflect.Value) {
	switch {
	case !from.IsValid():
	case from.Type() == to.Type():
		to.Set(from)
	case to.Type() == reflect.TypeFor[*string]() && from.Kind() == reflect.String:
		s := from.String()
		to.Set(reflect.ValueOf(&s))
	}
}
