package main

import (
	"fmt"
	"strings"

	"github.com/twmb/franz-go/pkg/kmsg"
)

// translate is the policy that says what the ACLs say.
func translate(file, _ string) (string, error) {
	acls, err := readACLs(file)
	if err != nil {
		return "", err
	}
	var s strings.Builder
	s.WriteString("apiVersion: klamm/v1\nrules:\n")
	for i, a := range acls {
		principal, name := a.Principal, fmt.Sprintf("{literal: %q}", a.ResourceName)
		switch {
		case a.ResourcePatternType == kmsg.ACLResourcePatternTypePrefixed:
			name = fmt.Sprintf("{prefix: %q}", a.ResourceName)
		case a.ResourceName == "*":
			name = `"*"`
		case a.ResourceType == kmsg.ACLResourceTypeCluster:
			name = a.ResourceName
		}
		fmt.Fprintf(&s, "  - name: acl %d\n    principals: [%q]\n", i+1, principal)
		if a.Host != "*" {
			fmt.Fprintf(&s, "    hosts: [%q]\n", a.Host)
		}
		operation := ""
		for word := range strings.SplitSeq(a.Operation.String(), "_") {
			operation += word[:1] + strings.ToLower(word[1:])
		}
		fmt.Fprintf(&s, "    %s: [{%s: %s, operations: [%s]}]\n", strings.ToLower(a.PermissionType.String()),
			strings.ReplaceAll(strings.ToLower(a.ResourceType.String()), "_", "-"), name, operation)
	}
	return s.String(), nil
}
