package policy

import (
	"net/netip"

	"github.com/twmb/franz-go/pkg/kmsg"
)

// Subject is whose access is decided: everything a rule's scope and principals may look at.
type Subject struct {
	Cluster   string     // name of the configured cluster the connection goes to
	SPIFFE    string     // "spiffe://…", empty when the workload has no SPIFFE ID
	Principal string     // SASL principal as Kafka writes it, "User:alice"; empty before the broker accepted it
	Host      netip.Addr // address the broker would have seen without us
}

// Decision is the outcome for one (resource, operation). The zero value refuses.
type Decision struct {
	Allowed   bool   // let it pass
	WouldDeny bool   // it passes only because the rule set that refuses it is in observe mode
	Rule      string // name of the rule that decided; empty when nothing matched (default deny)
}

// Decide tells whether the view's subject may do op on the resource. It walks the name once, whatever the number of
// rules, and allocates nothing. Implied operations follow Kafka's AclEntry: Read, Write, Delete and Alter imply
// Describe; AlterConfigs implies DescribeConfigs; deny wins over allow.
func (v *View) Decide(t kmsg.ACLResourceType, name string, op kmsg.ACLOperation) Decision {
	panic("contract only")
}

// DecideAny tells whether op is allowed on at least one resource of the type: Kafka's Authorizer.authorizeByResourceType
// (KIP-679), which InitProducerId uses.
func (v *View) DecideAny(t kmsg.ACLResourceType, op kmsg.ACLOperation) Decision {
	panic("contract only")
}

// View is what one subject may do: the rules that name it, compiled. Immutable, shared by connections.
type View struct{}
