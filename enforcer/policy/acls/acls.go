// Package acls translates Kafka's ACLs into a policy that decides as StandardAuthorizer does with them.
package acls

import (
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/policy"
)

// ACL is one ACL: an AclBinding of Kafka's.
type ACL struct {
	Line      int // in the list it was read from; 0: from a cluster
	Type      kmsg.ACLResourceType
	Name      string
	Prefixed  bool   // PatternType PREFIXED, else LITERAL
	Principal string // type:name, "User:*" for everyone
	Host      string // an address as Java writes it, "*" for all
	Operation kmsg.ACLOperation
	Deny      bool
}

// String is the ACL in the words of kafka-acls, on one line, and where it stands.
func (a ACL) String() string {
	permission, pattern := "ALLOW", "LITERAL"
	if a.Deny {
		permission = "DENY"
	}
	if a.Prefixed {
		pattern = "PREFIXED"
	}
	at := ""
	if a.Line > 0 {
		at = fmt.Sprintf("line %d: ", a.Line)
	}
	return fmt.Sprintf("%s%s %s of %s by %s from %s", at, permission, kafkaName(policy.OperationName(a.Operation)),
		fmt.Sprintf("%s %s %q", pattern, a.Type, a.Name), printable(a.Principal), printable(a.Host))
}

// printable quotes what would garble a line.
func printable(s string) string {
	if s == "" || !utf8.ValidString(s) || strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return fmt.Sprintf("%q", s)
	}
	return s
}

// kafkaName is the name of Kafka's constant: CLUSTER_ACTION for ClusterAction.
func kafkaName(name string) string {
	var s strings.Builder
	for i, r := range name {
		if i > 0 && unicode.IsUpper(r) {
			s.WriteByte('_')
		}
		s.WriteRune(unicode.ToUpper(r))
	}
	return s.String()
}

// operations by the names of Kafka's constants.
var operations = func() map[string]kmsg.ACLOperation {
	all := map[string]kmsg.ACLOperation{}
	for op := kmsg.ACLOperationAll; policy.OperationName(op) != ""; op++ {
		all[kafkaName(policy.OperationName(op))] = op
	}
	return all
}()

// types are the resource types there are, in the order policies list them.
var types = []kmsg.ACLResourceType{
	kmsg.ACLResourceTypeTopic, kmsg.ACLResourceTypeGroup, kmsg.ACLResourceTypeTransactionalId,
	kmsg.ACLResourceTypeCluster, kmsg.ACLResourceTypeDelegationToken, kmsg.ACLResourceTypeUser,
}

// Request asks a broker for all its ACLs.
func Request() *kmsg.DescribeACLsRequest {
	req := kmsg.NewPtrDescribeACLsRequest()
	req.ResourceType, req.ResourcePatternType = kmsg.ACLResourceTypeAny, kmsg.ACLResourcePatternTypeAny
	req.Operation, req.PermissionType = kmsg.ACLOperationAny, kmsg.ACLPermissionTypeAny
	return req
}

// Answered reads the answer to Request.
func Answered(resp *kmsg.DescribeACLsResponse) ([]ACL, error) {
	var all []ACL
	for _, r := range resp.Resources {
		for _, one := range r.ACLs {
			a := ACL{Type: r.ResourceType, Name: r.ResourceName, Principal: one.Principal, Host: one.Host,
				Operation: one.Operation}
			var known [2]bool
			a.Prefixed, known[0] = patterns[r.ResourcePatternType.String()]
			a.Deny, known[1] = permissions[one.PermissionType.String()]
			if err := a.check(); err != nil {
				return nil, err
			}
			if !known[0] || !known[1] {
				return nil, fmt.Errorf("%s: pattern type %d, permission type %d: not known to this version", a,
					r.ResourcePatternType, one.PermissionType)
			}
			all = append(all, a)
		}
	}
	return all, nil
}
