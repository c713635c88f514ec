package main

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"reflect"
	"slices"
	"strings"

	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/kafka/authz"
)

// classes of what is asked and of what comes of it.
var classes = []string{"allowed", "partly", "denied", "name", "id", "unknown", "empty", "null"}

// cell is a version of an API.
type cell struct{ key, version int16 }

// coverage counts answers that were compared, by cell and class.
type coverage map[cell]map[string]int

func (c coverage) add(at cell, classes ...string) {
	if c[at] == nil {
		c[at] = map[string]int{}
	}
	for _, class := range classes {
		c[at][class]++
	}
}

// refusals are the codes by which a broker says that somebody may not.
var refusals = []string{
	"TOPIC_AUTHORIZATION_FAILED", "GROUP_AUTHORIZATION_FAILED", "CLUSTER_AUTHORIZATION_FAILED",
	"TRANSACTIONAL_ID_AUTHORIZATION_FAILED", "DELEGATION_TOKEN_AUTHORIZATION_FAILED", "DELEGATION_TOKEN_OWNER_MISMATCH",
}

// came is the class of an outcome of the reference. What the super user sees tells where an answer leaves out.
func came(shown, toAdmin any) string {
	if shown == closed {
		return "denied"
	}
	refused, passed := 0, 0
	for _, code := range codes(shown) {
		if slices.Contains(refusals, code) {
			refused++
		} else {
			passed++
		}
	}
	switch {
	case refused == 0:
		return leavesOut(shown, toAdmin)
	case passed == 0:
		return "denied"
	default:
		return "partly"
	}
}

// codes are the error codes of an answer; what has entries with codes of their own has none, but where it is refused.
func codes(v any) (all []string) {
	switch v := v.(type) {
	case fields:
		own := ""
		for _, f := range v {
			if f.name == "ErrorCode" {
				own, _ = f.value.(string)
			}
			all = append(all, codes(f.value)...)
		}
		if own != "" && (len(all) == 0 || slices.Contains(refusals, own)) {
			all = append(all, own)
		}
	case []any:
		for _, item := range v {
			all = append(all, codes(item)...)
		}
	}
	return all
}

// leavesOut compares the lists of an answer with what the super user sees.
func leavesOut(shown, toAdmin any) string {
	mine, _ := shown.(fields)
	all, _ := toAdmin.(fields)
	class := "allowed"
	for i, f := range all {
		theirs, is := f.value.([]any)
		if !is || i >= len(mine) {
			continue
		}
		switch ours, _ := mine[i].value.([]any); {
		case len(ours) == 0 && len(theirs) > 0:
			return "denied"
		case len(ours) < len(theirs):
			class = "partly"
		}
	}
	return class
}

// resources are the fields of requests that name what ACLs are about; topics those that name a topic.
var (
	topicFields    = []string{"Topic", "Topics", "TopicNames", "SubscribedTopicNames"}
	resourceFields = append([]string{"Group", "Groups", "GroupID", "CoordinatorKey", "CoordinatorKeys", "ResourceName",
		"TransactionalID", "TransactionID", "TransactionalIDs", "GroupsNames", "SubscribedTopicRegex"}, topicFields...)
)

// asked are the classes of a request.
func asked(req kmsg.Request, s *side) []string {
	found := map[string]bool{}
	(&walker{req, func(name string, v reflect.Value) {
		switch v.Kind() {
		case reflect.Slice:
			class := "null"
			if !v.IsNil() {
				class = "empty"
			}
			found[class] = true
		case reflect.String:
			if v.String() != "" {
				found["name"] = true
				if slices.Contains(topicFields, name) && !s.has(v.String()) {
					found["unknown"] = true
				}
			}
		case reflect.Array:
			if !v.IsZero() {
				found["id"] = true
				if _, known := s.ids[v.Interface().([16]byte)]; !known {
					found["unknown"] = true
				}
			}
		}
	}}).walk(reflect.ValueOf(req).Elem(), "")
	return slices.Collect(maps.Keys(found))
}

// has tells whether the cluster ever had a topic.
func (s *side) has(topic string) bool { return s.topics[topic] }

// walker visits the lists and the names and ids of resources in a request, as far as its version has them: those whose
// change changes the bytes. A null list is visited where the version can say it.
type walker struct {
	req   kmsg.Request
	visit func(name string, v reflect.Value)
}

func (w *walker) walk(v reflect.Value, name string) {
	switch kind := v.Kind(); {
	case v.Type() == reflect.TypeFor[kmsg.Tags](), v.Type() == reflect.TypeFor[[]byte]():
	case kind == reflect.Struct:
		for i := range v.NumField() {
			w.walk(v.Field(i), v.Type().Field(i).Name)
		}
	case kind == reflect.Slice:
		w.list(v, name)
	case kind == reflect.Pointer && !v.IsNil():
		w.walk(v.Elem(), name)
	case kind == reflect.String:
		if slices.Contains(resourceFields, name) && w.matters(v, reflect.ValueOf(v.String()+"x")) {
			w.visit(name, v)
		}
	case kind == reflect.Array:
		if name == "TopicID" && w.matters(v, reflect.ValueOf([16]byte{15: v.Index(15).Interface().(uint8) + 1})) {
			w.visit(name, v)
		}
	}
}

func (w *walker) list(v reflect.Value, name string) {
	null, empty, one := reflect.Zero(v.Type()), reflect.MakeSlice(v.Type(), 0, 0), reflect.MakeSlice(v.Type(), 1, 1)
	switch {
	case v.Len() > 0:
		for i := range v.Len() {
			w.walk(v.Index(i), name)
		}
	case v.IsNil() && w.matters(v, empty), w.matters(v, one) && !v.IsNil():
		w.visit(name, v)
	case v.IsNil() && w.matters(v, one): // this version cannot tell null from empty
		v.Set(empty)
		w.visit(name, v)
		v.Set(null)
	}
}

// matters tells whether another value makes other bytes.
func (w *walker) matters(v, other reflect.Value) bool {
	is := reflect.New(v.Type()).Elem()
	is.Set(v)
	before := w.req.AppendTo(nil)
	v.Set(other.Convert(v.Type()))
	after := w.req.AppendTo(nil)
	v.Set(is)
	return !bytes.Equal(before, after)
}

// exceptions is coverage.yaml: classes that an API does not have, and why: "denied", or at some versions "denied 1-2".
type exceptions map[string]map[string]string

// has tells whether a class of a version is excepted.
func (e exceptions) has(at cell, class string) bool {
	for key := range e[kmsg.NameForKey(at.key)] {
		name, versions, _ := strings.Cut(key, " ")
		of, err := (&scenario{Versions: versions}).versions(versionRange{at.version, at.version})
		if name == class && err == nil && len(of) > 0 {
			return true
		}
	}
	return false
}

// applies tells whether a version of an API has a class, as far as its request tells.
func applies(at cell, class string) bool {
	return class == "allowed" || class == "denied" || shapeOf(at)[class]
}

// shapeOf tells what a version of a request can say, by walking one that has something everywhere, one that is empty
// and one that is null.
func shapeOf(at cell) map[string]bool {
	found := map[string]bool{}
	full := kmsg.RequestForKey(at.key)
	full.SetVersion(at.version)
	stuff(reflect.ValueOf(full).Elem())
	(&walker{full, func(name string, v reflect.Value) {
		class := "name"
		if v.Kind() == reflect.Array {
			class = "id"
		}
		found[class] = true
		if slices.Contains(topicFields, name) || class == "id" {
			found["unknown"] = true
		}
	}}).walk(reflect.ValueOf(full).Elem(), "")
	hollow(full, reflect.ValueOf(full).Elem(), "", found)
	return found
}

// hollow empties one list after the other.
func hollow(req kmsg.Request, v reflect.Value, name string, found map[string]bool) {
	switch {
	case v.Kind() == reflect.Struct:
		for i := range v.NumField() {
			hollow(req, v.Field(i), v.Type().Field(i).Name, found)
		}
	case v.Kind() == reflect.Slice && v.Type().Elem().Kind() != reflect.Uint8:
		hollow(req, v.Index(0), name, found)
		w := walker{req: req}
		full, null, empty := reflect.New(v.Type()).Elem(), reflect.Zero(v.Type()), reflect.MakeSlice(v.Type(), 0, 0)
		full.Set(v)
		found["empty"] = found["empty"] || w.matters(v, empty)
		found["partly"] = found["partly"] || w.matters(v, empty) && namesResources(v.Index(0), name)
		v.Set(empty)
		found["null"] = found["null"] || w.matters(v, null)
		v.Set(full)
	}
}

func namesResources(v reflect.Value, name string) bool {
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			if namesResources(v.Field(i), v.Type().Field(i).Name) {
				return true
			}
		}
		return false
	default:
		return slices.Contains(resourceFields, name) || name == "TopicID"
	}
}

// stuff puts one entry into each list and something into each field.
func stuff(v reflect.Value) {
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			if f := v.Type().Field(i); f.Name != "Version" && f.Type != reflect.TypeFor[kmsg.Tags]() {
				stuff(v.Field(i))
			}
		}
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		stuff(v.Elem())
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 1, 1))
		stuff(v.Index(0))
	case reflect.String:
		v.SetString("x")
	case reflect.Array:
		v.Index(0).SetUint(1)
	}
}

// blanks are cells that should have been asked and were not.
func (c coverage) blanks(spoken func(key, version int16) bool, except exceptions) (blank []string) {
	for key := range int16(kmsg.MaxKey + 1) {
		row := authz.Table[key]
		if row.Decide == nil {
			continue
		}
		name := kmsg.NameForKey(key)
		for v := row.Min; v <= row.Max; v++ {
			var missing []string
			for _, class := range classes {
				at := cell{key, v}
				if spoken(key, v) && !except.has(at, class) && c.lacks(at, class) {
					missing = append(missing, class)
				}
			}
			if at := (cell{key, v}); !spoken(key, v) && !except.has(at, unspoken) {
				missing = []string{"a broker that speaks it"}
			}
			if missing != nil {
				blank = append(blank, fmt.Sprintf("%s version %d: %s", name, v, strings.Join(missing, ", ")))
			}
		}
	}
	return blank
}

// unspoken is the class of what no broker here speaks.
const unspoken = "unspoken"

func (c coverage) lacks(at cell, class string) bool { return applies(at, class) && c[at][class] == 0 }

// idle are exceptions of which nothing is the reason: the class was asked, or cannot be.
func (e exceptions) idle(c coverage, spoken func(key, version int16) bool) (idle []string) {
	for key := range int16(kmsg.MaxKey + 1) {
		name := kmsg.NameForKey(key)
		for text, why := range e[name] {
			class, _, _ := strings.Cut(text, " ")
			needed := false
			for v := authz.Table[key].Min; v <= authz.Table[key].Max; v++ {
				at := cell{key, v}
				of := exceptions{name: {text: why}}
				blank := spoken(key, v) && c.lacks(at, class) || class == unspoken && !spoken(key, v)
				needed = needed || of.has(at, class) && blank
			}
			if !needed {
				idle = append(idle, name+": "+text)
			}
		}
	}
	return idle
}

// print prints the table.
func (c coverage) print(out io.Writer, spoken func(key, version int16) bool, except exceptions) {
	fmt.Fprintf(out, "%-32s", "")
	for _, class := range classes {
		fmt.Fprintf(out, "%9s", class)
	}
	fmt.Fprintln(out)
	for key := range int16(kmsg.MaxKey + 1) {
		row := authz.Table[key]
		for v := row.Min; row.Decide != nil && v <= row.Max; v++ {
			fmt.Fprintf(out, "%-28s v%-2d", kmsg.NameForKey(key), v)
			if !spoken(key, v) {
				fmt.Fprintln(out, "  no broker here speaks it")
				continue
			}
			for _, class := range classes {
				at := cell{key, v}
				switch n := c[at][class]; {
				case n > 0:
					fmt.Fprintf(out, "%9d", n)
				case except.has(at, class) || !applies(at, class):
					fmt.Fprintf(out, "%9s", "-")
				default:
					fmt.Fprintf(out, "%9s", "BLANK")
				}
			}
			fmt.Fprintln(out)
		}
	}
}
