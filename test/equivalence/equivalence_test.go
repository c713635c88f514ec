// Package equivalence compares our decisions with those of a real broker: the same request goes to Kafka with
// StandardAuthorizer as a user with ACLs, and through the handlers, with the same rights as a policy, to the same
// broker as its super user. The client must see the same answer.
package equivalence

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/kafka/authz"
	"klamm/enforcer/policy"
	"klamm/test/kafka"
)

// right is an ACL of alice, and the same in a policy.
type right struct {
	resource  kmsg.ACLResourceType
	name      string
	operation kmsg.ACLOperation
}

const (
	topic   = kmsg.ACLResourceTypeTopic
	group   = kmsg.ACLResourceTypeGroup
	txn     = kmsg.ACLResourceTypeTransactionalId
	cluster = kmsg.ACLResourceTypeCluster
)

var rights = []right{
	{topic, "orders", kmsg.ACLOperationRead},
	{topic, "orders", kmsg.ACLOperationWrite},
	{topic, "logs", kmsg.ACLOperationDescribe},
	{topic, "gone", kmsg.ACLOperationDelete},
	{topic, "new", kmsg.ACLOperationCreate},
	{topic, "new-open", kmsg.ACLOperationCreate},
	{topic, "new-open", kmsg.ACLOperationDescribeConfigs},
	{topic, "missing", kmsg.ACLOperationRead},
	{topic, "orders", kmsg.ACLOperationAlter},
	{topic, "orders", kmsg.ACLOperationDescribeConfigs},
	{group, "readers", kmsg.ACLOperationRead},
	{txn, "tx", kmsg.ACLOperationWrite},
}

// inPolicy are the rights as a policy file.
func inPolicy(rights []right) string {
	var s strings.Builder
	s.WriteString("apiVersion: klamm/v1\nrules:\n  - name: rights\n    principals: [\"User:alice\"]\n    allow:\n")
	for _, r := range rights {
		resource := strings.ReplaceAll(strings.ToLower(r.resource.String()), "_", "-")
		operation := ""
		for _, word := range strings.Split(r.operation.String(), "_") {
			operation += word[:1] + strings.ToLower(word[1:])
		}
		fmt.Fprintf(&s, "      - {%s: %q, operations: [%s]}\n", resource, r.name, operation)
	}
	return s.String()
}

// mutation is a right no ACL gives: with MUTATE=1 it is in the policy, and the comparison must fail.
var mutation = right{topic, "secret", kmsg.ACLOperationDescribe}

type ids map[authz.TopicID]string

func (m ids) ID(string) (authz.TopicID, bool) { return authz.TopicID{}, false }

func (m ids) Name(id authz.TopicID) (string, bool) { name, ok := m[id]; return name, ok }

func (m ids) of(name string) (id authz.TopicID) {
	for id, n := range m {
		if n == name {
			return id
		}
	}
	return id
}

func TestAnswersAreThoseOfABrokerWithTheSameACLs(t *testing.T) {
	for _, version := range []string{kafka.Newest, kafka.Previous} {
		for _, autoCreate := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, auto-creation %v", version, autoCreate), func(t *testing.T) {
				compare(t, version,
					autoCreate)
			})
		}
	}
}

func compare(t *testing.T, version string, autoCreate bool) {
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	defer cancel()
	c := kafka.Start(t, kafka.Options{Version: version, Authorizer: true, Users: map[string]string{"alice": "wonder"},
		Config: map[string]string{"auto.create.topics.enable": strconv.FormatBool(autoCreate)}})
	for _, name := range []string{"orders", "logs", "secret"} {
		if err := c.CreateTopic(ctx, name, 2); err != nil {
			t.Fatal(err)
		}
	}
	for _, r := range rights {
		if err := c.Allow(ctx, "User:alice", r.resource, r.name, r.operation); err != nil {
			t.Fatal(err)
		}
	}
	ours := rights
	if os.Getenv("MUTATE") == "1" {
		ours = append(slices.Clone(rights), mutation)
	}
	set, err := policy.Parse("rights", []byte(inPolicy(ours)))
	if err != nil {
		t.Fatal(err)
	}
	view := policy.New(set).For(policy.Subject{Principal: "User:alice"})

	alice := dial(t, c.SASLAddrs()[0], "alice", "wonder")
	admin := dial(t, c.SASLAddrs()[0], kafka.Admin, kafka.AdminPassword)
	known := ids{}
	all := ask[*kmsg.MetadataResponse](t, admin, &kmsg.MetadataRequest{Version: 12})
	for _, t := range all.Topics {
		known[t.TopicID] = *t.Topic
	}
	spoken := map[int16]int16{}
	for _, k := range ask[*kmsg.ApiVersionsResponse](t, admin, &kmsg.ApiVersionsRequest{}).ApiKeys {
		spoken[k.ApiKey] = k.MaxVersion
	}

	awaitCoordinator(t, admin)
	for _, q := range questions(known) {
		if q.newest && version != kafka.Newest {
			continue
		}
		row := authz.Table[q.req.Key()]
		from, to := row.Min, min(row.Max, spoken[q.req.Key()])
		if q.from > 0 {
			from = q.from
		}
		if q.to > 0 {
			to = min(to, q.to)
		}
		for v := from; v <= to; v++ {
			t.Run(fmt.Sprintf("%s v%d/%s", kmsg.NameForKey(q.req.Key()), v, q.what), func(t *testing.T) {
				q.req.SetVersion(v)
				theirs := alice.ask(t, q.req)
				ours, seen := through(t, &authz.Ctx{View: view, Topics: known, Resolved: true, AutoCreate: autoCreate},
					q.req, admin), q.req.ResponseKind()
				if err := seen.ReadFrom(ours.AppendTo(nil)); err != nil {
					t.Fatal(err)
				}
				if want, got := shown(theirs), shown(seen); got != want {
					t.Errorf("we answer\n%s\nKafka answers\n%s", got, want)
				}
			})
		}
	}
}

// awaitCoordinator returns when groups and transactions have their coordinator: until then brokers answer for that
// rather than for the request.
func awaitCoordinator(t *testing.T, admin *conn) {
	for keyType := range int8(2) {
		req := &kmsg.FindCoordinatorRequest{Version: 4, CoordinatorType: keyType, CoordinatorKeys: []string{"tx"}}
		for deadline := time.Now().Add(time.Minute); ; {
			code := ask[*kmsg.FindCoordinatorResponse](t, admin, req).Coordinators[0].ErrorCode
			if code == 0 {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("no coordinator of type %d: error %d", keyType, code)
			}
		}
	}
}

// through is what a client of ours gets.
func through(t *testing.T, c *authz.Ctx, req kmsg.Request, admin *conn) kmsg.Response {
	t.Helper()
	v := authz.Table[req.Key()].Decide(c, req)
	switch {
	case v.Close != "":
		t.Fatalf("closes: %s", v.Close)
	case v.Answer != nil:
		return v.Answer
	case v.Forward != nil:
		req = v.Forward
	}
	resp := admin.ask(t, req)
	if v.Edit != nil {
		v.Edit(c, resp)
	}
	return resp
}

// conn is a logged-in connection to a broker.
type conn struct {
	net.Conn
	in   *bufio.Reader
	last int32
}

func dial(t *testing.T, addr, user, password string) *conn {
	t.Helper()
	raw, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = raw.Close() })
	c := &conn{Conn: raw, in: bufio.NewReader(raw)}
	c.ask(t, &kmsg.SASLHandshakeRequest{Version: 1, Mechanism: "PLAIN"})
	token := []byte("\x00" + user + "\x00" + password)
	resp := ask[*kmsg.SASLAuthenticateResponse](t, c, &kmsg.SASLAuthenticateRequest{SASLAuthBytes: token})
	if code := resp.ErrorCode; code != 0 {
		t.Fatalf("log in as %s: error %d", user, code)
	}
	return c
}

func ask[R kmsg.Response](t *testing.T, c *conn, req kmsg.Request) R {
	t.Helper()
	resp, ok := c.ask(t, req).(R)
	if !ok {
		t.Fatalf("the answer to a %T is no %T", req, resp)
	}
	return resp
}

func (c *conn) ask(t *testing.T, req kmsg.Request) kmsg.Response {
	t.Helper()
	if err := c.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	c.last++
	formatter := kmsg.NewRequestFormatter(kmsg.FormatterClientID("equivalence"))
	if _, err := c.Write(formatter.AppendRequest(nil, req, c.last)); err != nil {
		t.Fatal(err)
	}
	var head [4]byte
	if _, err := io.ReadFull(c.in, head[:]); err != nil {
		t.Fatalf("%T v%d: %v", req, req.GetVersion(), err)
	}
	body := make([]byte, binary.BigEndian.Uint32(head[:]))
	if _, err := io.ReadFull(c.in, body); err != nil {
		t.Fatal(err)
	}
	body = body[4:]
	resp := req.ResponseKind()
	if resp.IsFlexible() && resp.Key() != int16(kmsg.ApiVersions) {
		body = body[1:]
	}
	if err := resp.ReadFrom(body); err != nil {
		t.Fatal(err)
	}
	return resp
}

// shown is a response as text, without what differs between any two runs, its lists in one order.
func shown(resp kmsg.Response) string {
	text, err := json.MarshalIndent(plain(reflect.ValueOf(resp)), "", " ")
	if err != nil {
		return err.Error()
	}
	return string(text)
}

// volatile fields differ between two brokers that do the same.
var volatile = []string{"ThrottleMillis", "BaseOffset", "LogAppendTime", "ProducerID", "UnknownTags", "ControllerID"}

func plain(v reflect.Value) any {
	switch v.Kind() {
	case reflect.Pointer, reflect.Interface:
		if v.IsNil() {
			return nil
		}
		return plain(v.Elem())
	case reflect.Array:
		return fmt.Sprintf("%x", v.Interface())
	case reflect.Struct:
		m := map[string]any{}
		created := v.Type() == reflect.TypeFor[kmsg.CreateTopicsResponseTopic]()
		for i := range v.NumField() {
			field := v.Type().Field(i)
			if created && field.Name == "TopicID" {
				continue // every dry run invents one
			}
			if !slices.Contains(volatile, field.Name) {
				m[field.Name] = plain(v.Field(i))
			} else if v.Field(i).CanInt() {
				m[field.Name] = v.Field(i).Int() < 0
			}
		}
		return m
	case reflect.Slice:
		items := []any{}
		for i := range v.Len() {
			items = append(items, plain(v.Index(i)))
		}
		slices.SortFunc(items, func(a, b any) int { return strings.Compare(fmt.Sprint(a), fmt.Sprint(b)) })
		return items
	default:
		return v.Interface()
	}
}
