package main

import (
	"fmt"
	"os"
	"regexp"
	"strings"

	"github.com/twmb/franz-go/pkg/kmsg"
)

var (
	resourceLine = regexp.MustCompile("^Current ACLs for resource `ResourcePattern\\(resourceType=(\\w+), name=(.*), " +
		"patternType=(\\w+)\\)`: ?$")
	entryLine = regexp.MustCompile(`^\(principal=(.*), host=(.*), operation=(\w+), permissionType=(\w+)\)$`)
)

// readACLs reads what kafka-acls --list prints. This is read here once more, so that a mistake of klamm policy
// import-acls shows.
func readACLs(file string) (acls []kmsg.CreateACLsRequestCreation, err error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	acl := kmsg.NewCreateACLsRequestCreation()
	for i, line := range strings.Split(string(text), "\n") {
		line = strings.TrimRight(strings.TrimLeft(line, " \t"), "\t")
		resource, entry := resourceLine.FindStringSubmatch(line), entryLine.FindStringSubmatch(strings.TrimSpace(line))
		switch {
		case strings.TrimSpace(line) == "":
		case resource != nil:
			acl.ResourceName = resource[2]
			err = acl.ResourceType.UnmarshalText([]byte(resource[1]))
			if err == nil {
				err = acl.ResourcePatternType.UnmarshalText([]byte(resource[3]))
			}
		case entry != nil:
			acl.Principal, acl.Host = entry[1], entry[2]
			if err = acl.Operation.UnmarshalText([]byte(entry[3])); err == nil {
				err = acl.PermissionType.UnmarshalText([]byte(entry[4]))
			}
			acls = append(acls, acl)
		default:
			err = fmt.Errorf("no line of kafka-acls --list")
		}
		if err != nil {
			return nil, fmt.Errorf("%s:%d: %w", file, i+1, err)
		}
	}
	return acls, nil
}
