package authz

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// streamsGroupHeartbeat (KIP-1071): Group Read, and Topic Describe on every topic of the topology a joining member
// brings; one refused topic refuses the heartbeat.
//
// The topology's internal topics take Create, on the cluster or the topic, when they do not exist: the broker creates
// them in the name of whoever sends a heartbeat, which to it is our principal. A member that lacks the right, and
// brings a topology with topics to create, therefore waits outside of the group: it is told what a broker tells a
// member whose topics it may not create, until they are there. Topics deleted from under a group that has formed are
// created again by its next heartbeat, whose ever it is, as no node can know of that in time.
func streamsGroupHeartbeat(c *Ctx, req *kmsg.StreamsGroupHeartbeatRequest) Verdict {
	if err := c.judgeGroup(req.Group, kmsg.ACLOperationRead); err != nil {
		return Verdict{Answer: Refuse(req, err, "")}
	}
	if req.Topology == nil {
		return c.waitingHeartbeat(req)
	}
	topics := topologyTopics(req.Topology)
	if internal := keep(topics, internalTopic); len(internal) > 0 {
		return Verdict{Answer: Refuse(req, kerr.StreamsInvalidTopology, fmt.Sprintf(
			"Use of Kafka internal topics %s in a Kafka Streams topology is prohibited.", strings.Join(internal, ",")))}
	}
	if illegal := keep(topics, func(t string) bool { return !legalTopic(t) }); len(illegal) > 0 {
		return Verdict{Answer: Refuse(req, kerr.StreamsInvalidTopology, fmt.Sprintf(
			"Topic names %s are not valid topic names.", strings.Join(illegal, ",")))}
	}
	if _, out := sift(topics, func(topic *string) *kerr.Error {
		return c.judgeTopic(false, *topic, TopicID{}, kmsg.ACLOperationDescribe)
	}); len(out) > 0 {
		return Verdict{Answer: Refuse(req, out[0].err, "")}
	}
	return c.joinStreams(req)
}

// topologyTopics are the topics of a topology, each once, in the order Kafka goes through them.
func topologyTopics(t *kmsg.StreamsGroupHeartbeatRequestTopology) (topics []string) {
	seen := map[string]bool{}
	for i := range t.Subtopologies {
		s := &t.Subtopologies[i]
		for _, topic := range slices.Concat(s.SourceTopics, s.RepartitionSinkTopics, namesOf(s.RepartitionSourceTopics),
			namesOf(s.StateChangelogTopics)) {
			if !seen[topic] {
				seen[topic] = true
				topics = append(topics, topic)
			}
		}
	}
	return topics
}

// joinStreams decides what the topology's internal topics take. Only where there is something to refuse does it matter
// which topics there are.
func (c *Ctx) joinStreams(req *kmsg.StreamsGroupHeartbeatRequest) Verdict {
	w := &waiting{}
	for i := range req.Topology.Subtopologies {
		s := &req.Topology.Subtopologies[i]
		w.sources = append(w.sources, s.SourceTopics...)
		w.internal = append(append(w.internal, namesOf(s.RepartitionSourceTopics)...), namesOf(s.StateChangelogTopics)...)
	}
	w.sources, w.internal = sorted(w.sources), sorted(w.internal)
	if len(c.notCreatable(w.internal)) == 0 {
		return c.joins(req)
	}
	if !c.Renewed {
		c.Stale = true // topics may have come or gone since the list was made
		return Verdict{}
	}
	missing, refused := c.toCreate(w)
	if len(refused) == 0 {
		return c.joins(req)
	}
	c.setMember(req.Group, req.MemberID, &Member{waiting: w})
	return Verdict{Answer: w.answer(c, req, missing, refused)}
}

// joins lets the broker have a member, which may have waited before.
func (c *Ctx) joins(req *kmsg.StreamsGroupHeartbeatRequest) Verdict {
	c.setMember(req.Group, req.MemberID, nil)
	return Verdict{}
}

// waiting is a member that waits outside of its streams group, for topics it may not create.
type waiting struct {
	sources, internal []string // sorted
}

// waitingHeartbeat is the heartbeat of a member that has joined, or thinks so.
func (c *Ctx) waitingHeartbeat(req *kmsg.StreamsGroupHeartbeatRequest) Verdict {
	m := c.member(req.Group, req.MemberID)
	if m == nil || m.waiting == nil {
		return Verdict{}
	}
	if req.MemberEpoch < 0 { // it leaves
		c.setMember(req.Group, req.MemberID, nil)
		answer := as[*kmsg.StreamsGroupHeartbeatResponse](req.ResponseKind())
		answer.MemberID, answer.MemberEpoch = req.MemberID, req.MemberEpoch
		answer.Status = []kmsg.StreamsGroupHeartbeatResponseStatus{}
		return Verdict{Answer: answer}
	}
	missing, refused := c.toCreate(m.waiting)
	if len(refused) > 0 {
		return Verdict{Answer: m.waiting.answer(c, req, missing, refused)}
	}
	// The group has never heard of it. It joins anew, with its topology.
	c.setMember(req.Group, req.MemberID, nil)
	return Verdict{Answer: Refuse(req, kerr.UnknownMemberID,
		fmt.Sprintf("Member %s is not a member of group %s.", req.MemberID, req.Group))}
}

// toCreate are the internal topics that do not exist, and those of them that may not be created.
func (c *Ctx) toCreate(w *waiting) (missing, refused []string) {
	missing = keep(w.internal, func(t string) bool { return !c.listed(t) })
	return missing, c.notCreatable(missing)
}

// notCreatable are those the subject has no Create for.
func (c *Ctx) notCreatable(topics []string) []string {
	if c.Visible(kmsg.ACLResourceTypeCluster, clusterName, kmsg.ACLOperationCreate) {
		return nil
	}
	return keep(topics, func(t string) bool {
		return !c.Visible(kmsg.ACLResourceTypeTopic, t, kmsg.ACLOperationCreate)
	})
}

// Of StreamsGroupHeartbeatResponse.Status, and what the coordinator answers by its defaults.
const (
	missingSourceTopics   = 1
	missingInternalTopics = 3

	streamsFirstEpoch         = 2 // of a group's first member, once the initial delay of its first assignment is over
	streamsHeartbeatInterval  = 5_000
	streamsTaskOffsetInterval = 60_000
	streamsRecoveryLag        = 10_000
)

// answer is what a broker answers a member that it may create no topics for.
func (w *waiting) answer(c *Ctx, req *kmsg.StreamsGroupHeartbeatRequest, missing, refused []string) kmsg.Response {
	for _, topic := range refused {
		c.allowTopicOrCluster(topic, kmsg.ACLOperationCreate) // on record
	}
	status := kmsg.StreamsGroupHeartbeatResponseStatus{
		StatusCode: missingInternalTopics,
		StatusDetail: fmt.Sprintf("Internal topics are missing: %s; Unauthorized to CREATE on topics %s.", summary(missing),
			strings.Join(refused, ", ")),
	}
	if sources := keep(w.sources, func(t string) bool { return !c.listed(t) }); len(sources) > 0 {
		status.StatusCode = missingSourceTopics
		status.StatusDetail = fmt.Sprintf("Source topics %s are missing.", summary(sources))
	}
	answer := as[*kmsg.StreamsGroupHeartbeatResponse](req.ResponseKind())
	answer.MemberID, answer.MemberEpoch = req.MemberID, cmp.Or(req.MemberEpoch, streamsFirstEpoch)
	answer.HeartbeatIntervalMillis, answer.TaskOffsetIntervalMillis = streamsHeartbeatInterval, streamsTaskOffsetInterval
	answer.AcceptableRecoveryLag = streamsRecoveryLag
	answer.Status = []kmsg.StreamsGroupHeartbeatResponseStatus{status}
	if req.MemberEpoch == 0 {
		answer.ActiveTasks, answer.StandbyTasks, answer.WarmupTasks = []kmsg.TaskIDs{}, []kmsg.TaskIDs{}, []kmsg.TaskIDs{}
	}
	return answer
}

// summary is InternalTopicManager.summarizeTopics.
func summary(topics []string) string {
	const shown = 3
	if more := len(topics) - shown; more > 0 {
		return fmt.Sprintf("%s and %d additional topics", strings.Join(topics[:shown], ", "), more)
	}
	return strings.Join(topics, ", ")
}

// keep are the names of which f is true.
func keep(names []string, f func(string) bool) (kept []string) {
	for _, name := range names {
		if f(name) {
			kept = append(kept, name)
		}
	}
	return kept
}

// sorted are the names in order, each once.
func sorted(names []string) []string {
	names = slices.Clone(names)
	slices.Sort(names)
	return slices.Compact(names)
}
