package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/test/kafka"
)

// rights are Topic Read of users, by name: who gets or loses it in the middle of a play.
type rights map[string]string

func (r rights) acls() (acls []kmsg.CreateACLsRequestCreation) {
	for user, topic := range r {
		acl := kmsg.NewCreateACLsRequestCreation()
		acl.ResourceType, acl.ResourceName, acl.ResourcePatternType =
			kmsg.ACLResourceTypeTopic, topic, kmsg.ACLResourcePatternTypeLiteral
		acl.Principal, acl.Host = "User:"+user, "*"
		acl.Operation, acl.PermissionType = kmsg.ACLOperationRead, kmsg.ACLPermissionTypeAllow
		acls = append(acls, acl)
	}
	return acls
}

// change is what a step does in place of a request.
func (w *world) change(st *step) error {
	switch {
	case st.Grant != nil:
		return w.grant(st.Grant)
	case st.Revoke != nil:
		return w.revoke(st.Revoke)
	default:
		return w.restart()
	}
}

// grant gives rights on both sides: by an ACL to the reference, by the policy that says what the ACLs say to the node.
// It returns when both obey. The users must have no other right to see the topics.
func (w *world) grant(r rights) error {
	create := &kmsg.CreateACLsRequest{Version: 3, Creations: r.acls()}
	w.granted = append(w.granted, create.Creations...)
	resp, err := w.direct.ask(create)
	if err != nil {
		return err
	}
	for _, result := range resp.(*kmsg.CreateACLsResponse).Results {
		err = errors.Join(err, kerr.ErrorForCode(result.ErrorCode))
	}
	return errors.Join(err, w.reload(), w.awaitRights(r, true))
}

// revoke takes rights that were granted.
func (w *world) revoke(r rights) error {
	remove := &kmsg.DeleteACLsRequest{Version: 3}
	for _, acl := range r.acls() {
		filter := kmsg.NewDeleteACLsRequestFilter()
		filter.ResourceType, filter.ResourceName, filter.ResourcePatternType =
			acl.ResourceType, &acl.ResourceName, acl.ResourcePatternType
		filter.Principal, filter.Host = &acl.Principal, &acl.Host
		filter.Operation, filter.PermissionType = acl.Operation, acl.PermissionType
		remove.Filters = append(remove.Filters, filter)
		w.granted = slices.DeleteFunc(w.granted, func(g kmsg.CreateACLsRequestCreation) bool {
			return g.ResourceName == acl.ResourceName && g.Principal == acl.Principal
		})
	}
	resp, err := w.direct.ask(remove)
	if err != nil {
		return err
	}
	for _, result := range resp.(*kmsg.DeleteACLsResponse).Results {
		err = errors.Join(err, kerr.ErrorForCode(result.ErrorCode))
	}
	return errors.Join(err, w.reload(), w.awaitRights(r, false))
}

// revokeAll takes what a play has granted and not taken.
func (w *world) revokeAll() (err error) {
	for _, acl := range slices.Clone(w.granted) {
		err = errors.Join(err, w.revoke(rights{strings.TrimPrefix(acl.Principal, "User:"): acl.ResourceName}))
	}
	return err
}

// importACLs writes the policy that says what the ACLs of the world say, and those that are granted.
func (w *world) importACLs() error {
	text, err := os.ReadFile(filepath.Join(worldDir, "acls.txt"))
	if err != nil {
		return err
	}
	for _, acl := range w.granted {
		text = fmt.Appendf(text, "\nCurrent ACLs for resource `ResourcePattern(resourceType=%s, name=%s, "+
			"patternType=%s)`: \n", acl.ResourceType, acl.ResourceName, acl.ResourcePatternType)
		text = fmt.Appendf(text, " \t(principal=%s, host=%s, operation=%s, permissionType=%s)\n",
			acl.Principal, acl.Host, acl.Operation, acl.PermissionType)
	}
	list := filepath.Join(w.dir, "acls.txt")
	if err := os.WriteFile(list, text, 0o600); err != nil {
		return err
	}
	translate := exec.Command(w.klamm, "policy", "import-acls", list, "--super-user", "User:"+kafka.Admin,
		"--to", filepath.Join(w.dir, "acls.yaml"))
	if out, err := translate.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", translate, err, out)
	}
	return nil
}

func (w *world) reload() error {
	if err := os.Remove(filepath.Join(w.dir, "acls.yaml")); err != nil {
		return err
	}
	if err := w.importACLs(); err != nil {
		return err
	}
	return w.node.Cmd.Process.Signal(syscall.SIGHUP)
}

// awaitRights waits until the users see the topics on both sides, or do not.
func (w *world) awaitRights(r rights, are bool) error {
	for _, s := range []*side{w.direct, w.through} {
		for user, topic := range r {
			err := await(func() (bool, error) {
				o, err := s.exchange(user, "", false, &kmsg.MetadataRequest{Version: 9,
					Topics: []kmsg.MetadataRequestTopic{{Topic: &topic}}})
				if err != nil || o.answer == nil {
					return false, errors.Join(err, fmt.Errorf("ask %s: %s", s.addr, o.ended))
				}
				code := o.answer.(*kmsg.MetadataResponse).Topics[0].ErrorCode
				return (code != kerr.TopicAuthorizationFailed.Code) == are, nil
			})
			if err != nil {
				return fmt.Errorf("%s reads %s: %v: %w", user, topic, are, err)
			}
		}
	}
	return nil
}
