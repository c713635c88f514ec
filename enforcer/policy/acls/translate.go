package acls

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/policy"
)

// Options say what ACLs do not.
type Options struct {
	Source     string      // where the ACLs are from, for the comment at the head of the policy
	Cluster    string      // the only cluster the policy is for; empty: all configured
	Mode       policy.Mode // of the policy; empty: enforce
	SuperUsers []string    // super.users of the brokers: may do everything, whatever ACLs say
	// Principals says which principals of a policy (spiffe://…, User:…) a principal of the ACLs is; one that is not there
	// is itself.
	Principals map[string][]string
}

// Policy is a translation.
type Policy struct {
	YAML  []byte
	Rules int
	// Idle are the ACLs that never apply to any request, with the reason: they are not in the policy.
	Idle []string
	// Warnings are what to look at before the policy is put in force.
	Warnings []string
}

// Translate makes a policy under which a subject may do what StandardAuthorizer lets it do under the ACLs, and nothing
// else. An ACL that cannot be said in a policy is an error.
func Translate(all []ACL, o Options) (Policy, error) {
	t := translation{Options: o, who: map[string]who{}, rules: map[rule]*body{}}
	if err := t.readPrincipals(all); err != nil {
		return Policy{}, err
	}
	t.superUsers()
	grants := map[grant]hosts{}
	for _, a := range all {
		g, host, idle, err := t.grant(a)
		switch {
		case err != nil:
			return Policy{}, err
		case idle != "":
			t.idle = append(t.idle, fmt.Sprintf("%s: %s", a, idle))
			continue
		case grants[g] == nil:
			grants[g] = hosts{}
		}
		grants[g][host] = true
	}
	for g, from := range grants {
		t.add(g, from)
	}
	p := Policy{Rules: len(t.rules), Idle: t.idle, Warnings: t.warnings(len(all))}
	p.YAML = t.write(len(all), p)
	if _, err := policy.Parse("", p.YAML); err != nil {
		return Policy{}, fmt.Errorf("the translation is no policy: %w", err)
	}
	return p, nil
}

type translation struct {
	Options
	who   map[string]who // by the ACLs' principals
	rules map[rule]*body
	idle  []string
}

// who is a principal of ACLs in the words of a policy: its rules have principals, or a condition.
type who struct {
	principals []string
	when       string
	is         string // the condition that it is him, which can always be told
}

const (
	everyone  = "User:*"
	anonymous = "User:ANONYMOUS" // KafkaPrincipal.ANONYMOUS: neither a login nor a certificate
)

// distinguished is what a certificate's subject begins with (RFC 2253): an attribute's name and an equals sign.
var distinguished = regexp.MustCompile(`^User:(?:[A-Za-z][A-Za-z0-9-]*|[0-9]+(?:\.[0-9]+)+)=`)

func (t *translation) readPrincipals(all []ACL) error {
	for name, of := range t.Principals {
		if name == everyone || len(of) == 0 {
			return fmt.Errorf("principals: %s: want one or more principals of a policy for one of the ACLs", name)
		}
		for _, p := range of {
			if err := policy.CheckPrincipal(p); err != nil {
				return fmt.Errorf("principals: %s: %w", name, err)
			}
			if p == everyone || !strings.Contains(p, ":") {
				return fmt.Errorf("principals: %s: %q is more than one principal", name, p)
			}
		}
	}
	for _, name := range t.SuperUsers {
		if name == everyone || !strings.Contains(name, ":") {
			return fmt.Errorf("super user %q: want one principal, User:name", name)
		}
		w, err := t.identify(name)
		if err != nil {
			return fmt.Errorf("super user %s: %w", name, err)
		}
		t.who[name] = w
	}
	for _, a := range all {
		w, err := t.identify(a.Principal)
		if err != nil {
			return fmt.Errorf("%s: %w", a, err)
		}
		t.who[a.Principal] = w
	}
	return nil
}

func (t *translation) identify(principal string) (who, error) {
	if of := t.Principals[principal]; of != nil {
		is := make([]string, len(of))
		for i, p := range of {
			is[i] = isPrincipal(p)
		}
		return who{principals: of, is: strings.Join(is, " || ")}, nil
	}
	switch {
	case principal == everyone:
		return who{principals: []string{"*", "anonymous"}}, nil
	case principal == anonymous:
		return conditional(principal, "!has(tls.subject)"+t.noWorkload()), nil
	case distinguished.MatchString(principal):
		subject := strings.TrimPrefix(principal, "User:")
		return conditional(principal, "has(tls.subject) && tls.subject == "+strconv.Quote(subject)), nil
	case principal == "User:":
		return who{}, nil
	case policy.CheckPrincipal(principal) != nil:
		return who{}, fmt.Errorf("the principal %s is no User: say which of the policy's principals it is "+
			"(--principals)", printable(principal))
	}
	return who{principals: []string{principal}, is: isPrincipal(principal)}, nil
}

// noWorkload is the condition that a subject is none of the workloads that are principals of the ACLs: they need no
// login.
func (t *translation) noWorkload() (condition string) {
	for _, name := range slices.Sorted(maps.Keys(t.Principals)) {
		for _, p := range t.Principals[name] {
			if strings.HasPrefix(p, spiffeScheme) {
				condition += " && !(" + isPrincipal(p) + ")"
			}
		}
	}
	return condition
}

// conditional is who has a principal either by login or, without one, where the condition holds: brokers look at the
// certificate of a connection only where there is no login. Of some logins the principal cannot be seen.
func conditional(principal, without string) who {
	when := fmt.Sprintf("has(sasl.principal) ? sasl.principal == %q : !has(sasl.mechanism) && %s", principal, without)
	return who{when: when, is: "(" + when + ")"}
}

const spiffeScheme = "spiffe://"

func isPrincipal(p string) string {
	of := "sasl.principal"
	prefix, isPrefix := strings.CutSuffix(p, "*")
	if strings.HasPrefix(p, spiffeScheme) {
		of = "identity.spiffe_id"
		if isPrefix {
			return fmt.Sprintf("has(%s) && %[1]s.startsWith(%q)", of, prefix)
		}
	}
	return fmt.Sprintf("has(%s) && %[1]s == %q", of, p)
}

// grant is an ACL without its host.
type grant struct {
	principal string
	deny      bool
	resource
	op kmsg.ACLOperation
}

type resource struct {
	kind     kmsg.ACLResourceType
	name     string
	prefixed bool
}

const (
	wildcard    = "*"
	clusterName = "kafka-cluster"
)

// grant reads an ACL as StandardAuthorizer does. Idle says why it never applies.
func (t *translation) grant(a ACL) (g grant, host, idle string, err error) {
	g = grant{a.Principal, a.Deny, resource{a.Type, a.Name, a.Prefixed}, a.Operation}
	if a.Type == kmsg.ACLResourceTypeCluster {
		if !g.matches(clusterName) {
			return g, "", "the cluster is named " + clusterName, nil
		}
		g.resource = resource{kind: a.Type, name: clusterName}
	}
	if !policy.Supports(a.Type, a.Operation) {
		if g.op = implied(a); !policy.Supports(a.Type, g.op) {
			return g, "", "nobody asks for this operation there", nil
		}
	}
	switch {
	case slices.Contains(t.SuperUsers, a.Principal):
		return g, "", "no ACL is asked about a super user", nil
	case a.Principal == "User:":
		return g, "", "nobody has this name", nil
	}
	host, err = readHost(a.Host)
	if err != nil {
		return g, "", "", fmt.Errorf("%s: %w", a, err)
	}
	if host == "" {
		return g, "", "brokers compare the host with addresses as Java writes them (1.2.3.4, 2001:db8:0:0:0:0:0:1)", nil
	}
	return g, host, "", nil
}

func (r resource) matches(name string) bool {
	switch {
	case r.prefixed:
		return strings.HasPrefix(name, r.name)
	default:
		return r.name == name || r.name == wildcard
	}
}

// implied is what is left of an ACL whose own operation nobody asks for: StandardAuthorizerData.findResult takes an
// ALLOW of these for one of Describe, on whatever resource.
func implied(a ACL) kmsg.ACLOperation {
	switch a.Operation {
	case kmsg.ACLOperationRead, kmsg.ACLOperationWrite, kmsg.ACLOperationDelete, kmsg.ACLOperationAlter:
		if !a.Deny {
			return kmsg.ACLOperationDescribe
		}
	}
	return kmsg.ACLOperationUnknown
}

// readHost is the host as a policy writes it; empty for one no connection comes from. Brokers compare it with what
// InetAddress.getHostAddress returns, letter by letter.
func readHost(host string) (string, error) {
	addr, err := netip.ParseAddr(host)
	switch {
	case host == wildcard:
		return wildcard, nil
	case addr.Is6() && addr.IsLinkLocalUnicast():
		return "", fmt.Errorf("link-local addresses of the network interface %q cannot be told from those of others in a "+
			"policy", addr.Zone())
	case err == nil && inJava(addr) == host:
		return addr.String(), nil
	}
	return "", nil
}

// inJava is what getHostAddress returns: no zeros are left out of an IPv6 address; one that maps IPv4 is IPv4.
func inJava(addr netip.Addr) string {
	addr = addr.Unmap()
	if addr.Is4() {
		return addr.String()
	}
	bytes := addr.As16()
	groups := make([]string, 8)
	for i := range groups {
		groups[i] = strconv.FormatUint(uint64(bytes[2*i])<<8|uint64(bytes[2*i+1]), 16)
	}
	return strings.Join(groups, ":")
}

type hosts map[string]bool

// rule is what a rule of the policy is about: it has one principal and one set of hosts.
type rule struct {
	superUsers bool
	principal  string
	hosts      string // with a comma and a space between them; empty: all
	exempting  bool   // super users
}

// body is what a rule allows and denies.
type body [2]map[resource]map[kmsg.ACLOperation]bool

func (t *translation) add(g grant, from hosts) {
	r := rule{principal: g.principal, exempting: g.deny && g.principal == everyone && len(t.SuperUsers) > 0}
	if !from[wildcard] {
		r.hosts = strings.Join(slices.SortedFunc(maps.Keys(from), byAddress), ", ")
	}
	t.put(r, g)
}

func byAddress(a, b string) int { return netip.MustParseAddr(a).Compare(netip.MustParseAddr(b)) }

func (t *translation) put(r rule, g grant) {
	b := t.rules[r]
	if b == nil {
		b = &body{{}, {}}
		t.rules[r] = b
	}
	part := b[0]
	if g.deny {
		part = b[1]
	}
	if part[g.resource] == nil {
		part[g.resource] = map[kmsg.ACLOperation]bool{}
	}
	part[g.resource][g.op] = true
}

func (t *translation) superUsers() {
	for _, name := range t.SuperUsers {
		for _, kind := range types {
			r := resource{kind: kind, name: wildcard}
			if kind == kmsg.ACLResourceTypeCluster {
				r.name = clusterName
			}
			t.put(rule{superUsers: true, principal: name}, grant{resource: r, op: kmsg.ACLOperationAll})
		}
	}
}

// sorted are the rules: super users, everyone, the others by name.
func (t *translation) sorted() []rule {
	return slices.SortedFunc(maps.Keys(t.rules), func(a, b rule) int {
		return cmp.Or(
			first(a.superUsers, b.superUsers),
			first(a.principal == everyone, b.principal == everyone),
			cmp.Compare(a.principal, b.principal),
			first(a.exempting, b.exempting),
			cmp.Compare(a.hosts, b.hosts),
		)
	})
}

func first(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return -1
	default:
		return 1
	}
}
