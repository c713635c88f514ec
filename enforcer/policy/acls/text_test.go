package acls

import (
	"bytes"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/test/bounds"
)

// listed prints ACLs as kafka-acls --list of Kafka 4 does.
func listed(all []ACL) string {
	var s strings.Builder
	for _, a := range all {
		pattern, permission := "LITERAL", "ALLOW"
		if a.Prefixed {
			pattern = "PREFIXED"
		}
		if a.Deny {
			permission = "DENY"
		}
		operation := ""
		for name, op := range operations {
			if op == a.Operation {
				operation = name
			}
		}
		fmt.Fprintf(&s, "Current ACLs for resource `ResourcePattern(resourceType=%s, name=%s, patternType=%s)`:\n"+
			"\t(principal=%s, host=%s, operation=%s, permissionType=%s)\n\n", a.Type, a.Name, pattern, a.Principal, a.Host,
			operation, permission)
	}
	return s.String()
}

func withoutLines(all []ACL) []ACL {
	all = slices.Clone(all)
	for i := range all {
		all[i].Line = 0
	}
	return all
}

func mustRead(t testing.TB, file string) []ACL {
	t.Helper()
	list, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = list.Close() }()
	all, err := Parse(list)
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func TestListsOfBothFormatsAreReadWholeAndAsTheyAre(t *testing.T) {
	for file, want := range map[string]int{"testdata/shop.acls": 11, "testdata/odd-3.9.acls": 14} {
		all := mustRead(t, file)
		if len(all) != want {
			t.Errorf("%s: %d ACLs, want %d", file, len(all), want)
		}
		again, err := Parse(strings.NewReader(listed(all)))
		if err != nil || !slices.Equal(withoutLines(again), withoutLines(all)) {
			t.Errorf("%s: %v\n%v is not\n%v", file, err, again, all)
		}
	}
}

func TestNamesAreReadAsTheyAre(t *testing.T) {
	for _, name := range []string{
		" leading", "trailing ", "a, patternType=LITERAL)`: x", "`", `"quoted" 'twice'`, `back\slash`, "(a)[b]{c}, d", "*",
		"x*", "*x", "ü\u2028\u00a0", "tab\t", "name=x", "# no comment", "\U0001f600",
	} {
		want := ACL{Type: kmsg.ACLResourceTypeGroup, Name: name, Principal: "User:" + name, Host: "*",
			Operation: kmsg.ACLOperationRead}
		for _, prefixed := range []bool{false, true} {
			want.Prefixed = prefixed
			got, err := Parse(strings.NewReader(listed([]ACL{want})))
			if err != nil || len(got) != 1 || withoutLines(got)[0] != want {
				t.Errorf("%q: %v, %+v", name, err, got)
			}
		}
	}
}

func TestWhatIsNotUnderstoodIsAnErrorThatNamesItsLine(t *testing.T) {
	const orders = "Current ACLs for resource `ResourcePattern(resourceType=TOPIC, name=orders, patternType=LITERAL)`:\n"
	acl := func(principal, host, operation, permission string) string {
		return fmt.Sprintf("\t(principal=%s, host=%s, operation=%s, permissionType=%s)\n", principal, host, operation,
			permission)
	}
	read := func(principal string) string { return acl(principal, "*", "READ", "ALLOW") }
	but := func(old, now string) string { return strings.Replace(orders, old, now, 1) }
	for list, want := range map[string]string{
		"hello\n":               `line 1: this is no line of kafka-acls --list: "hello"`,
		read("User:a"):          `line 1: there is no line "Current ACLs for resource …" before`,
		but("or", "\n"):         `line 1: this is no line of kafka-acls --list`,
		but("TOPIC", "DRAWER"):  `line 1: the resource type DRAWER is not known`,
		but("TOPIC", "ANY"):     `line 1: the resource type ANY is not known`,
		but("LITERAL", "MATCH"): `line 1: the pattern type MATCH is not known`,
		orders + acl("User:a", "*", "FLY", "ALLOW"):  `line 2: the operation FLY is not known`,
		orders + acl("User:a", "*", "ANY", "ALLOW"):  `line 2: the operation ANY is not known`,
		orders + acl("User:a", "*", "READ", "MAYBE"): `line 2: the permission type MAYBE is not known`,
		orders + read("alice"):                       `line 2: ALLOW READ of LITERAL TOPIC "orders" by alice from *: the pr`,
		orders + read("User:\xff"):                   `line 2: ALLOW READ of LITERAL TOPIC "orders" by "User:\xff" fr`,
		orders + read("User:a, host=b"):              `line 2: where the principal ends and the host begins`,
		but("=orders", "=") + read("User:a"):         `line 2: ALLOW READ of LITERAL TOPIC "" by User:a from *: the reso`,
		"ACLs for principal `User:a`\n" + orders:     `line 1: this is the list of one principal`,
		strings.Repeat("x", maxLine+1):               `read the list of ACLs: bufio.Scanner: token too long`,
	} {
		if _, err := Parse(strings.NewReader(list)); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%.200q:\n%v, want\n%s", list, err, want)
		}
	}
}

func TestAnAnswerIsReadAsItsListIs(t *testing.T) {
	want := withoutLines(mustRead(t, "testdata/shop.acls"))
	resp := kmsg.NewPtrDescribeACLsResponse()
	for _, a := range want {
		r := kmsg.NewDescribeACLsResponseResource()
		r.ResourceType, r.ResourceName, r.ResourcePatternType = a.Type, a.Name, kmsg.ACLResourcePatternTypeLiteral
		if a.Prefixed {
			r.ResourcePatternType = kmsg.ACLResourcePatternTypePrefixed
		}
		one := kmsg.NewDescribeACLsResponseResourceACL()
		one.Principal, one.Host, one.Operation, one.PermissionType = a.Principal, a.Host, a.Operation,
			kmsg.ACLPermissionTypeAllow
		if a.Deny {
			one.PermissionType = kmsg.ACLPermissionTypeDeny
		}
		r.ACLs = append(r.ACLs, one)
		resp.Resources = append(resp.Resources, r)
	}
	got, err := Answered(resp)
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%v: %v is not %v", err, got, want)
	}
	for name, spoil := range map[string]func(*kmsg.DescribeACLsResponseResource){
		"a resource type":  func(r *kmsg.DescribeACLsResponseResource) { r.ResourceType = 8 },
		"a pattern type":   func(r *kmsg.DescribeACLsResponseResource) { r.ResourcePatternType = 9 },
		"an operation":     func(r *kmsg.DescribeACLsResponseResource) { r.ACLs[0].Operation = 16 },
		"a permission":     func(r *kmsg.DescribeACLsResponseResource) { r.ACLs[0].PermissionType = 4 },
		"a negative one":   func(r *kmsg.DescribeACLsResponseResource) { r.ACLs[0].Operation = -1 },
		"a missing colon":  func(r *kmsg.DescribeACLsResponseResource) { r.ACLs[0].Principal = "a" },
		"a name of others": func(r *kmsg.DescribeACLsResponseResource) { r.ResourceName = "\xff" },
	} {
		spoilt := *resp
		spoilt.Resources = slices.Clone(resp.Resources[:1])
		spoilt.Resources[0].ACLs = slices.Clone(resp.Resources[0].ACLs)
		spoil(&spoilt.Resources[0])
		if got, err := Answered(&spoilt); err == nil {
			t.Errorf("%s that Kafka does not have is taken: %v", name, got)
		}
	}
}

// What is understood is printed and understood again as the same, and is either translated or refused.
func FuzzParse(f *testing.F) {
	for _, file := range []string{"testdata/shop.acls", "testdata/odd-3.9.acls"} {
		text, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		var all []ACL
		var err error
		bounds.Check(t, len(text), 1<<10, func() { all, err = Parse(bytes.NewReader(text)) })
		if err != nil {
			return
		}
		again, err := Parse(strings.NewReader(listed(all)))
		if err != nil || !slices.Equal(withoutLines(again), withoutLines(all)) {
			t.Fatalf("%v: %q is read again as %q", err, all, again)
		}
		bounds.Check(t, len(text), 1<<14, func() { _, err = Translate(all, Options{}) })
		if err != nil && strings.HasPrefix(err.Error(), "the translation is no policy") {
			t.Fatal(err)
		}
	})
}
