package node

import (
	"context"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/kafka/authz"
)

func TestAMemberIsReadFromTheBrokers(t *testing.T) {
	k := fake(t, kfake.NumBrokers(1), kfake.SeedTopics(1, "orders"))
	client, err := kgo.NewClient(kgo.SeedBrokers(k.ListenAddrs()...))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	join := kmsg.NewPtrConsumerGroupHeartbeatRequest()
	join.Group, join.MemberID, join.RebalanceTimeoutMillis = "billing", "m-1", 60_000
	join.SubscribedTopicNames, join.Topics = []string{"orders"}, []kmsg.ConsumerGroupHeartbeatRequestTopic{}
	if resp, err := join.RequestWith(t.Context(), client); err != nil || resp.ErrorCode != 0 {
		t.Fatal(resp, err)
	}
	c := open(t, ClusterConfig{Bootstrap: k.ListenAddrs()}, ClusterOptions{})
	m1, m2 := authz.MemberName{Group: "billing", ID: "m-1"}, authz.MemberName{Group: "billing", ID: "m-2"}
	if c.Member(m1.Group, m1.ID) != nil {
		t.Fatal("known before it was looked up")
	}
	c.Recall(m2)
	c.Recall(m1)
	for deadline := time.Now().Add(10 * time.Second); c.Member(m1.Group, m1.ID) == nil; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("not found")
		}
	}
	if c.Member(m2.Group, m2.ID) != nil {
		t.Error("found a member that the group does not have")
	}
}

func TestMembersAreForgottenThatWereNotHeardOfForLongest(t *testing.T) {
	m := newMembers(patient, zerolog.New(zerolog.NewTestWriter(t)))
	const many = 200_000
	for i := range many {
		m.SetMember("g", strconv.Itoa(i), &authz.Member{})
		if m.Member("g", "0") == nil {
			t.Fatalf("a member that is in use was forgotten after %d others", i)
		}
	}
	if m.Member("g", strconv.Itoa(many-1)) == nil {
		t.Error("the last one is forgotten")
	}
	perMember := new(authz.Member).Size()
	if kept := (len(m.young) + len(m.old)) * perMember; kept > maxMemberSize {
		t.Errorf("%d bytes of members are kept", kept)
	}
	m.SetMember("g", "0", nil)
	if m.Member("g", "0") != nil {
		t.Error("a member that has left is known")
	}
}

func TestMembersThatClientsInventTakeNoMoreThanOthers(t *testing.T) {
	m := newMembers(patient, zerolog.New(zerolog.NewTestWriter(t)))
	const long = 1 << 20
	for i := range 2 * maxMemberSize / long {
		m.SetMember("g", strconv.Itoa(i)+strings.Repeat("x", long), &authz.Member{})
	}
	if n := len(m.young) + len(m.old); n*long > maxMemberSize {
		t.Errorf("%d members of 1 MiB are kept", n)
	}
	look := func(func(context.Context)) {}
	m.want(authz.MemberName{Group: "g", ID: strings.Repeat("x", maxMemberName)}, look, nil)
	for i := range maxWanted + 1 {
		m.want(authz.MemberName{Group: "g", ID: strconv.Itoa(i)}, look, nil)
		m.want(authz.MemberName{Group: "g", ID: strconv.Itoa(i)}, look, nil)
	}
	if n := len(m.wanted["g"]); n != maxWanted {
		t.Errorf("%d members are to be looked up", n)
	}
	if m.some(); m.wants != 0 || len(m.wanted) != 0 {
		t.Errorf("%d are left, %d are counted", len(m.wanted), m.wants)
	}
}
