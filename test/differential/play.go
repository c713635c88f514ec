package main

import (
	"fmt"
	"maps"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/twmb/franz-go/pkg/kmsg"
	"go.yaml.in/yaml/v3"

	"klamm/enforcer/kafka/authz"
	"klamm/test/message"
)

// play is a scenario at one version, as one user.
type play struct {
	world   *world
	sides   []*side // the first is the reference
	user    string
	version int16
	run     string
	kept    []map[string]string // by side
	opened  map[[2]string]bool  // named connections, by user
}

// aclKeys are those that a broker without an authorizer refuses.
var aclKeys = []kmsg.Key{kmsg.DescribeACLs, kmsg.CreateACLs, kmsg.DeleteACLs}

func (w *world) newPlay(s *scenario, version int16, user, run string) *play {
	p := &play{world: w, sides: []*side{w.direct, w.through}, user: user, version: version, run: run}
	if s.Plain {
		p.sides[0] = w.plain
	}
	if slices.Contains(aclKeys, kmsg.Key(s.key)) {
		p.sides[1] = w.throughACLs
	}
	return p
}

// finding is a difference between two answers, and what was asked.
type finding struct {
	request kmsg.Request
	differs []difference
	shown   [2]any
}

// step asks both sides. It returns nil where nothing is to be seen.
func (p *play) step(st *step) (*finding, error) {
	if p.kept == nil {
		p.opened = map[[2]string]bool{}
		for range p.sides {
			p.kept = append(p.kept, map[string]string{})
		}
	}
	user := st.As
	if user == "" {
		user = p.user
	}
	if _, known := p.world.users[user]; !known {
		return nil, fmt.Errorf("the world has no user %s", user)
	}
	if st.changes() {
		return &finding{}, p.world.change(st)
	}
	connection := st.Connection
	if connection != "" {
		p.opened[[2]string{user, connection}] = true
	}
	requests, outcomes := make([]kmsg.Request, len(p.sides)), make([]outcome, len(p.sides))
	failures := make([]error, len(p.sides))
	var all sync.WaitGroup
	for i := range p.sides {
		all.Go(func() { requests[i], outcomes[i], failures[i] = p.ask(i, st, user, connection) })
	}
	all.Wait()
	for i, err := range failures {
		if err != nil {
			return nil, fmt.Errorf("ask %s as %s: %w", p.sides[i].addr, user, err)
		}
	}
	if a, is := outcomes[0].answer.(*kmsg.ApiVersionsResponse); is {
		cutToTable(a)
	}
	f := &finding{request: requests[0]}
	if outcomes[0].ended == late {
		return nil, fmt.Errorf("the broker itself gives no answer to\n%s", message.Show(f.request))
	}
	if st.Unseen {
		return f, nil
	}
	for i := range f.shown {
		var err error
		if f.shown[i], err = p.show(i, outcomes[i]); err != nil {
			return nil, err
		}
	}
	f.differs = differences(kmsg.NameForKey(st.key), f.shown[0], f.shown[1])
	return f, nil
}

func (p *play) ask(i int, st *step, user, connection string) (req kmsg.Request, o outcome, err error) {
	side := p.sides[i]
	if req, err = p.request(i, st); err != nil {
		return nil, o, err
	}
	req.SetVersion(p.versionOf(st))
	asked := time.Now()
	for deadline := asked.Add(untilTimeout); ; time.Sleep(30 * time.Millisecond) {
		if o, err = side.exchange(user, connection, st.Anonymous, req); err != nil {
			return req, o, err
		}
		done, err := st.settled(o)
		if err != nil || done {
			break
		}
		if time.Now().After(deadline) {
			return req, o, fmt.Errorf("%s never has what the scenario waits for; its last answer:\n%s",
				kmsg.NameForKey(st.key), message.Show(o.answer))
		}
	}
	if took := time.Since(asked); took < st.Takes {
		return req, o, fmt.Errorf("the answer took %s, less than %s", took, st.Takes)
	}
	if end, is := o.answer.(*kmsg.EndTxnResponse); is && end.ErrorCode == 0 {
		if err := side.settle(req.(*kmsg.EndTxnRequest).TransactionalID); err != nil {
			return req, o, err
		}
	}
	for name, path := range st.Keep {
		v, there := find(o.answer, path)
		if !there {
			return req, o, fmt.Errorf("the answer has no %s to keep:\n%s", path, message.Show(o.answer))
		}
		p.kept[i][name] = textOf(v)
	}
	return req, o, nil
}

// cutToTable leaves of what a broker offers what klamm knows. Clients conclude from version 0 of two APIs what a broker
// can (KAFKA-18659, librdkafka's rdkafka_feature.c), and go on seeing it.
func cutToTable(resp *kmsg.ApiVersionsResponse) {
	var offered []kmsg.ApiVersionsResponseApiKey
	for _, k := range resp.ApiKeys {
		both := versionRange{k.MinVersion, k.MaxVersion}.within(authz.Table[k.ApiKey])
		if both.max < both.min {
			continue
		}
		if k.ApiKey != int16(kmsg.Produce) && k.ApiKey != int16(kmsg.SASLHandshake) {
			k.MinVersion = both.min
		}
		k.MaxVersion = both.max
		offered = append(offered, k)
	}
	resp.ApiKeys = offered
}

func (p *play) request(side int, st *step) (kmsg.Request, error) {
	if st.made != nil {
		return st.made(side)
	}
	text, err := p.fillIn(side, &st.Request)
	if err != nil {
		return nil, err
	}
	req := kmsg.RequestForKey(st.key)
	return req, message.Fill(text, req)
}

func (p *play) versionOf(st *step) int16 {
	switch {
	case st.Version != nil:
		return *st.Version
	case st.API == "":
		return p.version
	default:
		return p.world.spoken[st.key].within(authz.Table[st.key]).max
	}
}

// settled tells whether the answer has what the step waits for.
func (st *step) settled(o outcome) (bool, error) {
	for _, path := range slices.Sorted(maps.Keys(st.Until)) {
		v, there := find(o.answer, path)
		if !there {
			return false, nil
		}
		want := reflect.New(v.Type())
		node := st.Until[path]
		if err := message.Fill(&node, want.Interface()); err != nil {
			return false, err
		}
		if !reflect.DeepEqual(v.Interface(), want.Elem().Interface()) {
			return false, nil
		}
	}
	return true, nil
}

// find finds a field of an answer: Groups.0.MemberID.
func find(answer kmsg.Response, path string) (v reflect.Value, found bool) {
	v = reflect.ValueOf(answer)
	for name := range strings.SplitSeq(path, ".") {
		for v.Kind() == reflect.Pointer || v.Kind() == reflect.Interface {
			v = v.Elem()
		}
		i, err := strconv.Atoi(name)
		switch {
		case v.Kind() == reflect.Slice && err == nil && i < v.Len():
			v = v.Index(i)
		case v.Kind() == reflect.Struct && v.FieldByName(name).IsValid():
			v = v.FieldByName(name)
		default:
			return v, false
		}
	}
	for v.Kind() == reflect.Pointer && !v.IsNil() {
		v = v.Elem()
	}
	return v, true
}

// textOf is a value as a scenario writes it.
func textOf(v reflect.Value) string {
	switch {
	case v.Kind() == reflect.Array:
		return fmt.Sprintf("%x", v.Interface())
	case v.Kind() == reflect.Slice:
		return string(v.Bytes())
	}
	return fmt.Sprint(v.Interface())
}

var placeholder = regexp.MustCompile(`\$\{[^}]*\}`)

// fillIn is a copy of a request's text with what its placeholders stand for on one side.
func (p *play) fillIn(side int, n *yaml.Node) (*yaml.Node, error) {
	filled := *n
	filled.Content = nil
	for _, below := range n.Content {
		c, err := p.fillIn(side, below)
		if err != nil {
			return nil, err
		}
		filled.Content = append(filled.Content, c)
	}
	if n.Kind != yaml.ScalarNode || !strings.Contains(n.Value, "${") {
		return &filled, nil
	}
	var unknown error
	text := strings.ReplaceAll(n.Value, "${run}", p.run) // which may stand in others
	filled.Value = placeholder.ReplaceAllStringFunc(text, func(text string) string {
		value, err := p.value(side, text[2:len(text)-1])
		if err != nil {
			unknown = fmt.Errorf("line %d: %w", n.Line, err)
		}
		return value
	})
	if _, err := strconv.ParseInt(filled.Value, 10, 64); err == nil && placeholder.FindString(n.Value) == n.Value {
		filled.Tag, filled.Style = "!!int", 0
	}
	return &filled, unknown
}

func (p *play) value(side int, name string) (string, error) {
	if name == "side" {
		return strconv.Itoa(side), nil
	}
	if topic, is := strings.CutPrefix(name, "id:"); is {
		id, err := p.sides[side].id(topic)
		return fmt.Sprintf("%x", id), err
	}
	value, known := p.kept[side][name]
	if !known {
		return "", fmt.Errorf("nothing was kept as %s", name)
	}
	return value, nil
}

// end closes the play's own connections.
func (p *play) end() {
	for c := range p.opened {
		for _, s := range p.sides {
			s.drop(c[0], c[1])
		}
	}
}
