package policy

import (
	"net/netip"

	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/spiffe"
)

// Subject is whose access is decided: everything a rule's scope and principals may look at.
type Subject struct {
	Cluster   string     // name of the configured cluster the connection goes to
	SPIFFE    string     // "spiffe://…", empty when the workload has no SPIFFE ID
	Principal string     // SASL principal as Kafka writes it, "User:alice"; empty before the broker accepted it
	Host      netip.Addr // address the broker would have seen without us; the zero Addr is in no network
	// Facts are what conditions (when) look at. The same facts are the same pointer; nil: nothing is known.
	Facts *Facts
}

// Facts are all that is known of who is behind a connection. Immutable.
type Facts struct {
	Identity *spiffe.Identity
	SASL     SASL
}

// SASL is a login that the broker accepted. The zero value is none.
type SASL struct {
	Mechanism string
	Principal string           // "User:alice"; empty where the mechanism does not show it
	Token     *spiffe.Evidence // of OAUTHBEARER, where we verified its token
}

// lost says why nobody is behind the connection any more, who then has no right; nil while somebody is.
func (s *Subject) lost() error { return s.identity().Lost }

// anonymous tells that nothing is known about who the subject is.
func (s *Subject) anonymous() bool { return s.SPIFFE == "" && s.Principal == "" }

// Decision is the outcome for one (resource, operation). The zero value refuses.
type Decision struct {
	Allowed   bool // let it pass
	WouldDeny bool // it passes only because the rule set that refuses it is in observe mode
	// Rule is the name of the rule that decided: the first in the order of the files that denies, else the first that
	// allows. Where WouldDeny is set it is the rule that would deny. Empty when nothing matched (default deny).
	Rule string
}

// View is what one subject may do: the rules that name it, compiled. Immutable, shared by connections. A nil or zero
// View refuses everything.
type View struct {
	trees     [resourceCodes]tree
	decisions []Decision
}

// Decide tells whether the view's subject may do op on the resource. It walks the name once, whatever the number of
// rules, and allocates nothing. Implied operations follow Kafka's AclEntry: Read, Write, Delete and Alter imply
// Describe; AlterConfigs implies DescribeConfigs; deny wins over allow.
func (v *View) Decide(t kmsg.ACLResourceType, name string, op kmsg.ACLOperation) Decision {
	tree := v.tree(t, op)
	if tree == nil {
		return Decision{}
	}
	return v.decisions[tree.rows[tree.find(name)][op]]
}

// DecideAny tells whether op is allowed on at least one resource of the type: authorizeByResourceType of Kafka's
// Authorizer (KIP-679), which InitProducerId uses. As there, an allow counts unless a deny covers its whole pattern,
// and operations that are only implied count for the pattern "*" alone.
func (v *View) DecideAny(t kmsg.ACLResourceType, op kmsg.ACLOperation) Decision {
	tree := v.tree(t, op)
	if tree == nil {
		return Decision{}
	}
	return v.decisions[tree.any[op]]
}

// DecideAll tells whether op is allowed on every resource of the type, those that do not exist yet included. Where it
// is not, the decision is that of one that is refused.
func (v *View) DecideAll(t kmsg.ACLResourceType, op kmsg.ACLOperation) Decision {
	tree := v.tree(t, op)
	if tree == nil {
		return Decision{}
	}
	worst := v.decisions[tree.rows[tree.nodes[0].beyond][op]]
	for i := range tree.rows {
		switch d := v.decisions[tree.rows[i][op]]; {
		case !d.Allowed:
			return d
		case d.WouldDeny:
			worst = d
		}
	}
	return worst
}

// tree is nil where there is nothing to look up.
func (v *View) tree(t kmsg.ACLResourceType, op kmsg.ACLOperation) *tree {
	if v == nil || !concrete(t, op) || v.trees[t].nodes == nil {
		return nil
	}
	return &v.trees[t]
}

// concrete tells whether these are codes of Kafka's a request can be about.
func concrete(t kmsg.ACLResourceType, op kmsg.ACLOperation) bool {
	return t >= kmsg.ACLResourceTypeTopic && t < resourceCodes && op >= kmsg.ACLOperationRead && op < operationCodes
}
