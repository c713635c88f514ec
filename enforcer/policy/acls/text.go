package acls

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/policy"
)

// Words of Kafka's PatternType and AclPermissionType, and what they are in an ACL.
var (
	patterns    = map[string]bool{"LITERAL": false, "PREFIXED": true}
	permissions = map[string]bool{"ALLOW": false, "DENY": true}
)

// The lines of kafka-acls --list. Names are printed as they are, so that each part reaches as far as it can. Kafka 3
// puts a space after each line.
var (
	resourceLine = regexp.MustCompile("^ ?Current ACLs for resource `ResourcePattern\\(" +
		"resourceType=([A-Z_]+), name=(.*), patternType=([A-Z_]+)\\)`: ?$")
	aclLine = regexp.MustCompile(`^ ?\t\((principal=.*, host=.*), operation=([A-Z_]+), permissionType=([A-Z_]+)\) ?$`)
)

const (
	hostKey = ", host="
	// maxLine is the longest line there can be: two names of Kafka's STRING type and the words around them.
	maxLine = 4 * 32767
)

// Parse reads what kafka-acls --list prints. Every line has to be understood, and only in one way.
func Parse(list io.Reader) ([]ACL, error) {
	lines := bufio.NewScanner(list)
	lines.Buffer(nil, maxLine)
	var all []ACL
	var resource *ACL // of the lines that follow
	for n := 1; lines.Scan(); n++ {
		line := lines.Text()
		if strings.TrimSpace(line) == "" {
			continue
		}
		if found := resourceLine.FindStringSubmatch(line); found != nil {
			var err error
			if resource, err = readResource(found); err != nil {
				return nil, fmt.Errorf("line %d: %w", n, err)
			}
			continue
		}
		a, err := readACL(line, resource)
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
		a.Line = n
		if err := a.check(); err != nil {
			return nil, err
		}
		all = append(all, a)
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("read the list of ACLs: %w", err)
	}
	return all, nil
}

func readResource(found []string) (*ACL, error) {
	t, err := kmsg.ParseACLResourceType(found[1])
	prefixed, known := patterns[found[3]]
	switch {
	case err != nil || !slices.Contains(types, t):
		return nil, fmt.Errorf("the resource type %s is not known", found[1])
	case !known:
		return nil, fmt.Errorf("the pattern type %s is not known", found[3])
	}
	return &ACL{Type: t, Name: found[2], Prefixed: prefixed}, nil
}

func readACL(line string, resource *ACL) (ACL, error) {
	found := aclLine.FindStringSubmatch(line)
	switch {
	case strings.HasPrefix(line, "ACLs for principal"):
		return ACL{}, errors.New("this is the list of one principal, and ACLs of others may deny him something: list them " +
			"all, without --principal")
	case found == nil:
		return ACL{}, fmt.Errorf("this is no line of kafka-acls --list: %q; a name with a line break can only be read from "+
			"the cluster itself", cut(line))
	case resource == nil:
		return ACL{}, errors.New(`there is no line "Current ACLs for resource …" before this ACL`)
	case strings.Count(found[1], hostKey) != 1:
		return ACL{}, fmt.Errorf("where the principal ends and the host begins cannot be told: %q; read this ACL from the "+
			"cluster itself", cut(found[1]))
	}
	a := *resource
	principal, host, _ := strings.Cut(found[1], hostKey)
	a.Principal, a.Host = strings.TrimPrefix(principal, "principal="), host
	op, known := operations[found[2]]
	if !known {
		return ACL{}, fmt.Errorf("the operation %s is not known", found[2])
	}
	a.Operation = op
	if a.Deny, known = permissions[found[3]]; !known {
		return ACL{}, fmt.Errorf("the permission type %s is not known", found[3])
	}
	return a, nil
}

// cut is the beginning of a line, which may be of any length.
func cut(line string) string {
	const most = 120
	if len(line) <= most {
		return line
	}
	return strings.ToValidUTF8(line[:most], "") + "…"
}

// check refuses what no broker has.
func (a ACL) check() error {
	switch {
	case !slices.Contains(types, a.Type) || policy.OperationName(a.Operation) == "":
		return fmt.Errorf("%s: resource type %d, operation %d: not known to this version", a, a.Type, a.Operation)
	case a.Name == "":
		return fmt.Errorf("%s: the resource has no name", a)
	case !utf8.ValidString(a.Name) || !utf8.ValidString(a.Principal) || !utf8.ValidString(a.Host):
		return fmt.Errorf("%s: this is not UTF-8", a)
	case !strings.Contains(a.Principal, ":"):
		return fmt.Errorf("%s: the principal is not of the form type:name", a)
	}
	return nil
}
