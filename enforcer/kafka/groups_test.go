package kafka

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"

	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/kafka/authz"
)

// knownGroups is what a cluster knows of members, and which topics it lists.
type knownGroups struct {
	mu       sync.Mutex
	topics   []string // what the next list has; nil: there is none to be had
	listed   []string
	edition  uint64
	members  map[authz.MemberName]*authz.Member
	recalled []authz.MemberName
}

func (k *knownGroups) TopicNames() ([]string, uint64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.listed, k.edition
}

func (k *knownGroups) Relist(context.Context) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.topics == nil {
		return errors.New("no broker answers")
	}
	k.listed = k.topics
	k.edition++
	return nil
}

func (k *knownGroups) Member(group, id string) *authz.Member {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.members[authz.MemberName{Group: group, ID: id}]
}

func (k *knownGroups) SetMember(group, id string, m *authz.Member) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.members == nil {
		k.members = map[authz.MemberName]*authz.Member{}
	}
	k.members[authz.MemberName{Group: group, ID: id}] = m
}

func (k *knownGroups) Recall(m authz.MemberName) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.recalled = append(k.recalled, m)
}

// lists makes topics what the next list has.
func (k *knownGroups) lists(topics []string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.topics = topics
}

func (k *knownGroups) lookedUp() []authz.MemberName {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Clone(k.recalled)
}

func TestASubscriptionByRegularExpressionReachesTheBrokerAsNames(t *testing.T) {
	rig := newRig(t, ordersOnly)
	rig.cluster.lists([]string{"orders", "orders.paid", "secret"})
	if err := rig.cluster.Relist(t.Context()); err != nil {
		t.Fatal(err)
	}
	client, broker, _ := rig.serveScripted(t)
	beat := func(correlation int32, epoch int32, regex *string) *kmsg.ConsumerGroupHeartbeatRequest {
		t.Helper()
		req := &kmsg.ConsumerGroupHeartbeatRequest{Version: 1, Group: "orders", MemberID: "m-1", MemberEpoch: epoch,
			SubscribedTopicRegex: regex}
		client.write(requestFrame(correlation, req))
		h, got := broker.request()
		broker.answer(h, &kmsg.ConsumerGroupHeartbeatResponse{Version: 1, MemberEpoch: 1})
		client.response(correlation, req)
		return got.(*kmsg.ConsumerGroupHeartbeatRequest)
	}
	regex := ".*"
	if got := beat(1, 0, &regex); len(got.SubscribedTopicNames) > 0 || *got.SubscribedTopicRegex == regex {
		t.Errorf("the broker is asked %+v", got)
	}
	if got := beat(2, 1, nil); !slices.Equal(got.SubscribedTopicNames, []string{"orders", "orders.paid"}) {
		t.Errorf("the broker is told of %q", got.SubscribedTopicNames)
	}
	if got := beat(3, 1, nil); got.SubscribedTopicNames != nil || got.SubscribedTopicRegex != nil {
		t.Errorf("the broker is told again of %q", got.SubscribedTopicNames)
	}
	if got := rig.cluster.lookedUp(); len(got) > 0 {
		t.Errorf("looks up %v", got)
	}
}

func TestAMemberThatNobodyKnowsIsLookedUp(t *testing.T) {
	rig := newRig(t, ordersOnly)
	client, broker, _ := rig.serveScripted(t)
	req := &kmsg.ConsumerGroupHeartbeatRequest{Version: 1, Group: "orders", MemberID: "m-1", MemberEpoch: 5}
	client.write(requestFrame(1, req))
	broker.request()
	if want := []authz.MemberName{{Group: "orders", ID: "m-1"}}; !slices.Equal(rig.cluster.lookedUp(), want) {
		t.Errorf("looks up %v", rig.cluster.lookedUp())
	}
}

func TestWhichTopicsThereAreIsAskedBeforeAStreamsGroupMayCreateThem(t *testing.T) {
	changelog := kmsg.NewTopicInfo()
	changelog.Topic = "orders.changelog"
	join := &kmsg.StreamsGroupHeartbeatRequest{Group: "orders", MemberID: "m-1",
		Topology: new(kmsg.StreamsGroupHeartbeatRequestTopology)}
	part := kmsg.NewStreamsGroupHeartbeatRequestTopologySubtopology()
	part.SourceTopics, part.StateChangelogTopics = []string{"orders"}, []kmsg.TopicInfo{changelog}
	join.Topology.Subtopologies = append(join.Topology.Subtopologies, part)
	rig := newRig(t, ordersOnly)
	rig.cluster.lists([]string{"orders", "orders.changelog"})
	client, broker, _ := rig.serveScripted(t)
	client.write(requestFrame(1, join))
	h, _ := broker.request()
	broker.answer(h, &kmsg.StreamsGroupHeartbeatResponse{MemberEpoch: 7})
	if resp := client.response(1, join).(*kmsg.StreamsGroupHeartbeatResponse); resp.MemberEpoch != 7 {
		t.Errorf("the answer is %+v", resp)
	}

	// What was listed before is no answer to what there is now.
	rig.cluster.lists(nil)
	resp := client.ask(2, join).(*kmsg.StreamsGroupHeartbeatResponse)
	if resp.ErrorCode != 0 || len(resp.Status) != 1 || resp.MemberEpoch == 7 {
		t.Errorf("the answer is %+v", resp)
	}
}
