package policy

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/policy/strict"
)

const (
	operationCodes = 16 // AclOperation codes 0 (UNKNOWN) to 15 (TWO_PHASE_COMMIT)
	resourceCodes  = 8  // ResourceType codes 0 (UNKNOWN) to 7 (USER)
)

// TwoPhaseCommit is AclOperation.TWO_PHASE_COMMIT (KIP-939, Kafka 4.1), which kmsg does not name yet.
const TwoPhaseCommit kmsg.ACLOperation = 15

// operations is a set of AclOperation: bit n stands for code n.
type operations uint16

func setOf(ops ...kmsg.ACLOperation) operations {
	var set operations
	for _, op := range ops {
		set |= 1 << op
	}
	return set
}

func (o operations) has(op kmsg.ACLOperation) bool { return o>>op&1 != 0 }

// operationNames are the names of AclOperation as kafka-acls.sh writes them, by code.
var operationNames = [operationCodes]string{
	kmsg.ACLOperationAll:             "All",
	kmsg.ACLOperationRead:            "Read",
	kmsg.ACLOperationWrite:           "Write",
	kmsg.ACLOperationCreate:          "Create",
	kmsg.ACLOperationDelete:          "Delete",
	kmsg.ACLOperationAlter:           "Alter",
	kmsg.ACLOperationDescribe:        "Describe",
	kmsg.ACLOperationClusterAction:   "ClusterAction",
	kmsg.ACLOperationDescribeConfigs: "DescribeConfigs",
	kmsg.ACLOperationAlterConfigs:    "AlterConfigs",
	kmsg.ACLOperationIdempotentWrite: "IdempotentWrite",
	kmsg.ACLOperationCreateTokens:    "CreateTokens",
	kmsg.ACLOperationDescribeTokens:  "DescribeTokens",
	TwoPhaseCommit:                   "TwoPhaseCommit",
}

// OperationName is the name of an operation as Kafka writes it: "DescribeConfigs". Empty for what is no operation a
// rule can give.
func OperationName(op kmsg.ACLOperation) string {
	if op < 0 || op >= operationCodes {
		return ""
	}
	return operationNames[op]
}

// Supports tells whether Kafka ever asks for the operation on a resource of the type (AclEntry.supportedOperations), or
// it is All.
func Supports(t kmsg.ACLResourceType, op kmsg.ACLOperation) bool {
	return OperationName(op) != "" && resources[t].supported.has(op)
}

// ResourceKey is the key of a resource type (topic to user) in a policy file.
func ResourceKey(t kmsg.ACLResourceType) string { return resources[t].key }

func (o operations) names() []string {
	var names []string
	for op, name := range operationNames {
		if o.has(kmsg.ACLOperation(op)) {
			names = append(names, name)
		}
	}
	return names
}

func (o operations) String() string { return strings.Join(o.names(), ", ") }

const every operations = (1<<operationCodes - 1) &^ 3 // all codes but UNKNOWN and ANY

var impliesDescribe = setOf(kmsg.ACLOperationRead, kmsg.ACLOperationWrite, kmsg.ACLOperationDelete,
	kmsg.ACLOperationAlter)

// effective is what an ACL with these operations applies to: All stands for every operation, and where implied is set
// (ALLOW) Read, Write, Delete and Alter imply Describe, AlterConfigs implies DescribeConfigs. A DENY implies nothing.
// The rule is StandardAuthorizerData.findResult of Apache Kafka 4.
func (o operations) effective(implied bool) operations {
	if o.has(kmsg.ACLOperationAll) {
		return every
	}
	if implied && o&impliesDescribe != 0 {
		o |= setOf(kmsg.ACLOperationDescribe)
	}
	if implied && o.has(kmsg.ACLOperationAlterConfigs) {
		o |= setOf(kmsg.ACLOperationDescribeConfigs)
	}
	return o
}

// resource is what the language knows about a ResourceType.
type resource struct {
	key       string     // in the YAML
	supported operations // AclEntry.supportedOperations, and All
}

var resources = [resourceCodes]resource{
	kmsg.ACLResourceTypeTopic: {"topic", setOf(kmsg.ACLOperationAll, kmsg.ACLOperationRead, kmsg.ACLOperationWrite,
		kmsg.ACLOperationCreate, kmsg.ACLOperationDescribe, kmsg.ACLOperationDelete, kmsg.ACLOperationAlter,
		kmsg.ACLOperationDescribeConfigs, kmsg.ACLOperationAlterConfigs)},
	kmsg.ACLResourceTypeGroup: {"group", setOf(kmsg.ACLOperationAll, kmsg.ACLOperationRead, kmsg.ACLOperationDescribe,
		kmsg.ACLOperationDelete, kmsg.ACLOperationDescribeConfigs, kmsg.ACLOperationAlterConfigs)},
	kmsg.ACLResourceTypeCluster: {"cluster", setOf(kmsg.ACLOperationAll, kmsg.ACLOperationCreate,
		kmsg.ACLOperationClusterAction, kmsg.ACLOperationDescribeConfigs, kmsg.ACLOperationAlterConfigs,
		kmsg.ACLOperationIdempotentWrite, kmsg.ACLOperationAlter, kmsg.ACLOperationDescribe)},
	kmsg.ACLResourceTypeTransactionalId: {"transactional-id", setOf(kmsg.ACLOperationAll, kmsg.ACLOperationDescribe,
		kmsg.ACLOperationWrite, TwoPhaseCommit)},
	kmsg.ACLResourceTypeDelegationToken: {"delegation-token", setOf(kmsg.ACLOperationAll, kmsg.ACLOperationDescribe)},
	kmsg.ACLResourceTypeUser: {"user", setOf(kmsg.ACLOperationAll, kmsg.ACLOperationCreateTokens,
		kmsg.ACLOperationDescribeTokens)},
}

// ParseOperation finds an operation of a resource type (topic to user) by its name as Kafka writes it: "Read",
// "DescribeConfigs", "All".
func ParseOperation(t kmsg.ACLResourceType, name string) (kmsg.ACLOperation, error) {
	op := slices.Index(operationNames[:], name)
	supported := resources[t].supported
	switch {
	case op < 0 || name == "":
		return 0, errors.New(strict.Unknown("operation", name, supported.names()))
	case !supported.has(kmsg.ACLOperation(op)):
		return 0, fmt.Errorf("there is no operation %s on a %s (allowed: %s)", name, resources[t].key, supported)
	}
	return kmsg.ACLOperation(op), nil
}

// clusterName is the only name Kafka gives the cluster resource (Resource.CLUSTER_NAME).
const clusterName = "kafka-cluster"

// pattern matches resource names: the text itself, or every name that starts with it. The empty prefix matches all.
type pattern struct {
	text   string
	prefix bool
}

func (p pattern) matches(name string) bool {
	if p.prefix {
		return strings.HasPrefix(name, p.text)
	}
	return name == p.text
}

// covers tells whether every name q matches is matched by p.
func (p pattern) covers(q pattern) bool {
	if p.prefix {
		return strings.HasPrefix(q.text, p.text)
	}
	return p == q
}

// String is the pattern as a policy file writes it: the short form where that is not ambiguous.
func (p pattern) String() string {
	switch {
	case p.prefix && strings.Contains(p.text, "*"):
		return fmt.Sprintf("{prefix: %q}", p.text)
	case p.prefix:
		return strconv.Quote(p.text + "*")
	case strings.Contains(p.text, "*"):
		return fmt.Sprintf("{literal: %q}", p.text)
	default:
		return strconv.Quote(p.text)
	}
}
