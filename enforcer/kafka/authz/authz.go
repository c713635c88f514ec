// Package authz decides Kafka requests: one file per API key, each saying what it checks and how a denied part is
// answered. A handler is a pure function of the request and the policy: no sockets, no clock, no locks.
//
// The reference is a broker with StandardAuthorizer: the same error code, at the same level, with the identifier (name
// or topic id) the client used.
package authz

import (
	"encoding/base64"

	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/policy"
)

// TopicID is Kafka's topic id (KIP-516).
type TopicID = [16]byte

// Topics knows topic ids of one cluster. Name answers from memory and never blocks.
type Topics interface {
	Name(id TopicID) (name string, known bool)
	// ID is the other way round. Of a topic on the list it is up to date once the list was renewed.
	ID(name string) (id TopicID, known bool)
}

// Check is one decision taken for a request, for the audit.
type Check struct {
	Type      kmsg.ACLResourceType
	Name      string
	Operation kmsg.ACLOperation
	policy.Decision
}

// Ctx is what a handler may know beside the request, and what it reports beside its verdict.
type Ctx struct {
	View     *policy.View
	Topics   Topics
	Groups   Groups // nil: nothing is known of members, nor which topics there are
	Resolved bool   // ids in Missing have been looked up: what is still unknown, the cluster does not have
	Renewed  bool   // the list of topics was made after the request came, as Stale asked for
	// AutoCreate tells that the cluster's brokers create topics a Metadata request names (auto.create.topics.enable).
	// Only the error for a missing topic depends on it: nothing is created without the right to.
	AutoCreate bool
	// Principal is the client's own at the broker ("User:alice"): that of a SASL login the client made itself. Empty
	// where it made none, where the mechanism does not show it, and in a session that is over. The broker may then know
	// the connection by a principal of the node's, and what it decides by that is not the client's to ask for.
	Principal string
	Fetch     *FetchSession // the connection's fetch session, replaced by the fetch handler; nil without one
	Share     *ShareSession // so for its share session

	Follows *policy.Decision // on Cluster ClusterAction, of a follower's fetch

	Checks  []Check   // every decision, in the order taken
	Missing []TopicID // ids not known, or of topics refused; the session looks them up and calls the handler again
	Stale   bool      // the list of topics must be renewed; the session has that done and calls the handler again
	// Unmet is a member of which nothing is known. The session has it looked up, for its next heartbeat.
	Unmet *MemberName
}

// Allow decides and records one access. In observe mode it answers true for what would be refused.
func (c *Ctx) Allow(t kmsg.ACLResourceType, name string, op kmsg.ACLOperation) bool {
	d := c.View.Decide(t, name, op)
	c.Checks = append(c.Checks, Check{t, name, op, d})
	return d.Allowed
}

// AllowTopic is Allow for a topic.
func (c *Ctx) AllowTopic(name string, op kmsg.ACLOperation) bool {
	return c.Allow(kmsg.ACLResourceTypeTopic, name, op)
}

// AllowGroup is Allow for a consumer group.
func (c *Ctx) AllowGroup(name string, op kmsg.ACLOperation) bool {
	return c.Allow(kmsg.ACLResourceTypeGroup, name, op)
}

// AllowTxn is Allow for a transactional id.
func (c *Ctx) AllowTxn(name string, op kmsg.ACLOperation) bool {
	return c.Allow(kmsg.ACLResourceTypeTransactionalId, name, op)
}

// AllowCluster is Allow for the cluster itself, whose resource name is always "kafka-cluster".
func (c *Ctx) AllowCluster(op kmsg.ACLOperation) bool {
	return c.Allow(kmsg.ACLResourceTypeCluster, clusterName, op)
}

// Visible decides without recording: for filtering lists the client did not name, where a hidden entry is no refusal.
func (c *Ctx) Visible(t kmsg.ACLResourceType, name string, op kmsg.ACLOperation) bool {
	return c.View.Decide(t, name, op).Allowed
}

// Operations is the authorized-operations bit field (KIP-430) the subject has on a resource, limited to the operations
// Kafka supports for the type; bit n stands for AclOperation code n.
func (c *Ctx) Operations(t kmsg.ACLResourceType, name string) int32 {
	var bits int32
	for _, op := range supportedOperations[t] {
		if c.View.Decide(t, name, op).Allowed {
			bits |= 1 << op
		}
	}
	return bits
}

// supportedOperations is AclEntry.supportedOperations of Apache Kafka.
var supportedOperations = map[kmsg.ACLResourceType][]kmsg.ACLOperation{
	kmsg.ACLResourceTypeTopic: {kmsg.ACLOperationRead, kmsg.ACLOperationWrite, kmsg.ACLOperationCreate,
		kmsg.ACLOperationDescribe, kmsg.ACLOperationDelete, kmsg.ACLOperationAlter, kmsg.ACLOperationDescribeConfigs,
		kmsg.ACLOperationAlterConfigs},
	kmsg.ACLResourceTypeGroup: {kmsg.ACLOperationRead, kmsg.ACLOperationDescribe, kmsg.ACLOperationDelete,
		kmsg.ACLOperationDescribeConfigs, kmsg.ACLOperationAlterConfigs},
	kmsg.ACLResourceTypeCluster: {kmsg.ACLOperationCreate, kmsg.ACLOperationClusterAction,
		kmsg.ACLOperationDescribeConfigs,
		kmsg.ACLOperationAlterConfigs, kmsg.ACLOperationIdempotentWrite, kmsg.ACLOperationAlter, kmsg.ACLOperationDescribe},
}

// Topic is the name of a topic id, recording a miss. An id that stays unknown after the look-up is one the cluster does
// not have: answer UNKNOWN_TOPIC_ID for it. That refusal goes on record under the id.
func (c *Ctx) Topic(id TopicID) (string, bool) {
	name, ok := c.Topics.Name(id)
	switch {
	case ok:
	case c.Resolved || id == TopicID{}: // which Kafka gives to no topic
		named := "id " + base64.RawURLEncoding.EncodeToString(id[:])
		c.Checks = append(c.Checks, Check{Type: kmsg.ACLResourceTypeTopic, Name: named})
	default:
		c.Missing = append(c.Missing, id)
	}
	return name, ok
}

// doubt has the id of a topic that is refused looked up: of one that is no topic's any more a broker says just that, to
// everybody.
func (c *Ctx) doubt(id TopicID) {
	if !c.Resolved {
		c.Missing = append(c.Missing, id)
	}
}

// Verdict is what happens to a request. Exactly one of these forms:
//
//	Verdict{}                          forward the original bytes, relay the answer's bytes
//	Verdict{Edit: f}                   forward the original bytes, change the answer
//	Verdict{Forward: req, Edit: f}     split: forward a re-encoded part, merge the rest into the answer
//	Verdict{Answer: resp}              our answer; the broker never hears of the request
//	Verdict{Close: reason}             close the connection: no answer can say it (acks=0)
//	Verdict{Forward: req, Close: r}    the same, behind a part that is owed no answer
type Verdict struct {
	Forward kmsg.Request
	Edit    func(c *Ctx, broker kmsg.Response)
	Answer  kmsg.Response
	Close   string
	// Barrier keeps later requests of the connection unread until this one is answered: who the client is, or which
	// session it has, depends on the answer.
	Barrier bool
}

// API is one row of the version table: the versions we speak and who decides them.
type API struct {
	Min, Max int16
	Decide   func(c *Ctx, req kmsg.Request) Verdict
}

// handle adapts a typed handler to the table.
func handle[R kmsg.Request](f func(*Ctx, R) Verdict) func(*Ctx, kmsg.Request) Verdict {
	return func(c *Ctx, req kmsg.Request) Verdict { return f(c, as[R](req)) }
}
