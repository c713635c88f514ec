package acls

import (
	"cmp"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"unicode"

	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/policy"
)

func (t *translation) write(acls int, p Policy) []byte {
	var s strings.Builder
	fmt.Fprintf(&s, "# By klamm policy import-acls from %s, %s.\n", comment(cmp.Or(t.Source, "ACLs")), count(acls, "ACL"))
	for _, w := range p.Warnings {
		fmt.Fprintf(&s, "# %s\n", comment(w))
	}
	if len(p.Idle) > 0 {
		s.WriteString("# Left out, since brokers never apply them either:\n")
		for _, one := range p.Idle {
			fmt.Fprintf(&s, "#   %s\n", comment(one))
		}
	}
	fmt.Fprintf(&s, "apiVersion: %s\n", policy.APIVersion)
	if t.Mode != "" && t.Mode != policy.Enforce {
		fmt.Fprintf(&s, "mode: %s\n", t.Mode)
	}
	if t.Cluster != "" {
		fmt.Fprintf(&s, "cluster: %s\n", scalar(t.Cluster))
	}
	s.WriteString("rules:")
	if len(t.rules) == 0 {
		s.WriteString(" []")
	}
	s.WriteString("\n")
	names := map[string]int{}
	for _, r := range t.sorted() {
		t.writeRule(&s, r, names)
	}
	return []byte(s.String())
}

func (t *translation) writeRule(s *strings.Builder, r rule, names map[string]int) {
	fmt.Fprintf(s, "  - name: %s\n", scalar(unique(r.String(), names)))
	who := t.who[r.principal]
	if who.principals != nil {
		fmt.Fprintf(s, "    principals: %s\n", list(who.principals))
	}
	if r.hosts != "" {
		fmt.Fprintf(s, "    hosts: %s\n", list(strings.Split(r.hosts, ", ")))
	}
	if when := cmp.Or(who.when, t.exempt(r)); when != "" {
		fmt.Fprintf(s, "    when: %s\n", expression(when))
	}
	for i, key := range []string{"allow", "deny"} {
		part := t.rules[r][i]
		if len(part) == 0 {
			continue
		}
		fmt.Fprintf(s, "    %s:\n", key)
		for _, on := range slices.SortedFunc(maps.Keys(part), resource.compare) {
			fmt.Fprintf(s, "      - {%s: %s, operations: %s}\n", policy.ResourceKey(on.kind), on, operationsOf(part[on]))
		}
	}
}

// String is the name of the rule: whose ACLs it holds.
func (r rule) String() string {
	name := printable(r.principal)
	if r.superUsers {
		name = "super user " + name
	}
	if r.hosts != "" {
		name += " from " + r.hosts
	}
	if r.exempting {
		name += ", but super users"
	}
	return name
}

// unique tells principals apart that read alike.
func unique(name string, names map[string]int) string {
	names[name]++
	if n := names[name]; n > 1 {
		return unique(fmt.Sprintf("%s (%d)", name, n), names)
	}
	return name
}

// exempt is the condition that a rule is about no super user: what is denied to everyone is not denied to them.
func (t *translation) exempt(r rule) string {
	if !r.exempting {
		return ""
	}
	var are []string
	for _, name := range t.SuperUsers {
		are = append(are, t.who[name].is)
	}
	return "!(" + strings.Join(are, " || ") + ")"
}

func (r resource) compare(q resource) int {
	return cmp.Or(
		cmp.Compare(slices.Index(types, r.kind), slices.Index(types, q.kind)),
		cmp.Compare(r.name, q.name),
		-first(r.prefixed, q.prefixed),
	)
}

// String is the name as a policy writes it: the short form where that is not ambiguous.
func (r resource) String() string {
	star := strings.Contains(r.name, "*")
	switch {
	case !r.prefixed && r.name == wildcard:
		return `"*"`
	case r.prefixed && star:
		return fmt.Sprintf("{prefix: %s}", scalar(r.name))
	case r.prefixed:
		return quoted(r.name + "*")
	case star:
		return fmt.Sprintf("{literal: %s}", scalar(r.name))
	default:
		return scalar(r.name)
	}
}

func operationsOf(set map[kmsg.ACLOperation]bool) string {
	if set[kmsg.ACLOperationAll] {
		return "[All]"
	}
	names := make([]string, 0, len(set))
	for _, op := range slices.Sorted(maps.Keys(set)) {
		names = append(names, policy.OperationName(op))
	}
	return "[" + strings.Join(names, ", ") + "]"
}

func list(words []string) string {
	all := make([]string, len(words))
	for i, w := range words {
		all[i] = quoted(w)
	}
	return "[" + strings.Join(all, ", ") + "]"
}

var (
	// plain is what YAML takes for a string as it stands, in flow collections too, but for the words it knows.
	plain = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9_.-]*$`)
	words = regexp.MustCompile(`(?i)^(y|n|yes|no|on|off|true|false|null)$`)
)

func scalar(s string) string {
	if plain.MatchString(s) && !words.MatchString(s) {
		return s
	}
	return quoted(s)
}

// expression is a single-quoted scalar where it can be: expressions hold double quotes.
func expression(when string) string {
	if printable(when) != when {
		return quoted(when)
	}
	return "'" + strings.ReplaceAll(when, "'", "''") + "'"
}

// quoted is a double-quoted scalar of YAML 1.2.
func quoted(text string) string {
	var s strings.Builder
	s.WriteByte('"')
	for _, r := range text {
		switch {
		case r == '"' || r == '\\':
			s.WriteByte('\\')
			s.WriteRune(r)
		case unicode.IsPrint(r):
			s.WriteRune(r)
		case r <= 0xff:
			fmt.Fprintf(&s, `\x%02x`, r)
		case r <= 0xffff:
			fmt.Fprintf(&s, `\u%04x`, r)
		default:
			fmt.Fprintf(&s, `\U%08x`, r)
		}
	}
	s.WriteByte('"')
	return s.String()
}

// comment keeps a text on its line.
func comment(s string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '·'
		}
		return r
	}, s)
}

func count(n int, of string) string {
	if n == 1 {
		return "1 " + of
	}
	return fmt.Sprintf("%d %ss", n, of)
}

func (t *translation) warnings(acls int) []string {
	var all []string
	if acls == 0 {
		all = append(all, "There is no ACL: nothing is allowed.")
	}
	if len(t.SuperUsers) == 0 {
		all = append(all, "Super users (super.users of the brokers) are not in ACLs: name them by --super-user, or they may "+
			"do nothing.")
	}
	all = append(all, "Where brokers have allow.everyone.if.no.acl.found=true, what no ACL is about is open to everyone: "+
		"here it is refused.")
	var certificates []string
	for _, name := range slices.Sorted(maps.Keys(t.who)) {
		if t.Principals[name] == nil && distinguished.MatchString(name) {
			certificates = append(certificates, printable(name))
		}
	}
	if len(certificates) > 0 {
		all = append(all, fmt.Sprintf("Known by the subject of a certificate, which klamm sees where it terminates TLS: %s. "+
			"Better say by --principals which SPIFFE IDs they are.", strings.Join(certificates, ", ")))
	}
	for _, name := range slices.Sorted(maps.Keys(t.Principals)) {
		if _, met := t.who[name]; !met {
			all = append(all, fmt.Sprintf("There is no ACL of %s, which --principals names.", printable(name)))
		}
	}
	return all
}
