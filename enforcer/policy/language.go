package policy

import (
	"errors"
	"fmt"
	"iter"
	"net/netip"
	"strings"
	"unicode"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/twmb/franz-go/pkg/kmsg"
	"go.yaml.in/yaml/v3"

	"klamm/enforcer/policy/strict"
)

// APIVersion is the version of the policy language this package reads.
const APIVersion = "klamm/v1"

// Mode says what becomes of an access the rule set refuses.
type Mode string

// The modes of a rule set.
const (
	Enforce Mode = "enforce" // it is refused (the default)
	Observe Mode = "observe" // it passes, and the decision says so
)

// UnmarshalText reads a mode.
func (m *Mode) UnmarshalText(text []byte) error {
	switch *m = Mode(text); *m {
	case Enforce, Observe:
		return nil
	}
	return errors.New(strict.Unknown("mode", string(text), []string{string(Enforce), string(Observe)}))
}

// Set is one policy file.
type Set struct {
	File        string
	Mode        Mode
	Cluster     string // the only cluster it speaks of; empty for all
	rules       []rule // nil: it is about connections only
	connections []connection
}

// Rules is the number of rules in the set.
func (s *Set) Rules() int { return len(s.rules) }

// Connections is the number of entries for connections in the set.
func (s *Set) Connections() int { return len(s.connections) }

// Parse reads one policy file. The error is a strict.Errors: all that is wrong in it, with line and column.
func Parse(file string, data []byte) (*Set, error) {
	doc := document{Mode: Enforce}
	if err := strict.Decode(file, data, &doc); err != nil {
		return nil, err
	}
	return &Set{file, doc.Mode, doc.Cluster, doc.Rules, doc.Connections}, nil
}

// document is a policy file.
type document struct {
	APIVersion  version      `yaml:"apiVersion" strict:"required"`
	Mode        Mode         `yaml:"mode"`
	Cluster     string       `yaml:"cluster"`
	Rules       []rule       `yaml:"rules"`
	Connections []connection `yaml:"connections"`
}

// UnmarshalYAML adds the checks that concern several rules.
func (d *document) UnmarshalYAML(node *yaml.Node) error {
	type plain document
	errs := []error{strict.Node(node, (*plain)(d))}
	if errs[0] == nil && d.Rules == nil && d.Connections == nil {
		errs = append(errs, strict.Errorf(node, `there are neither rules nor connections: "rules: []" refuses everything`))
	}
	first := map[string]int{}
	for s := range d.scopes() {
		if line, twice := first[s.Name]; twice && s.Name != "" {
			errs = append(errs, strict.Errorf(s.node, "the name %q is taken in line %d: the audit could not tell them apart",
				s.Name, line))
		} else if s.node != nil {
			first[s.Name] = s.node.Line
		}
	}
	return strict.Join(node, errs...)
}

func (d *document) scopes() iter.Seq[*scope] {
	return func(yield func(*scope) bool) {
		for i := range d.Rules {
			if !yield(&d.Rules[i].scope) {
				return
			}
		}
		for i := range d.Connections {
			if !yield(&d.Connections[i].scope) {
				return
			}
		}
	}
}

type version struct{}

// UnmarshalText accepts the version this package reads.
func (*version) UnmarshalText(text []byte) error {
	if string(text) != APIVersion {
		return fmt.Errorf("apiVersion %q is not supported: this version reads %q", text, APIVersion)
	}
	return nil
}

// rule gives or takes access of the subjects in its scope.
type rule struct {
	scope `yaml:",inline"`
	Allow []entry `yaml:"allow"`
	Deny  []entry `yaml:"deny"`
}

// UnmarshalYAML adds the checks that concern several keys.
func (r *rule) UnmarshalYAML(node *yaml.Node) error {
	type plain rule
	err := strict.Node(node, (*plain)(r))
	r.node = node
	if err != nil {
		return err
	}
	if len(r.Allow)+len(r.Deny) == 0 {
		err = strict.Errorf(node, "the rule neither allows nor denies anything")
	}
	return strict.Join(node, r.check(), err)
}

// scope is whom a rule is about, and its name. It names a subject when its cluster, one of its principals, one of its
// hosts and its condition do.
type scope struct {
	Name       string      `yaml:"name" strict:"required"`
	Cluster    string      `yaml:"cluster"`    // empty: every cluster of the set
	Principals []principal `yaml:"principals"` // nil: whoever the condition names
	Hosts      []host      `yaml:"hosts"`      // empty: every host
	When       *condition  `yaml:"when"`       // nil: it holds

	node *yaml.Node
}

func (r *scope) check() error {
	var errs []error
	for _, c := range []struct {
		broken bool
		say    string
	}{
		{strings.TrimSpace(r.Name) == "", "the name is empty: the audit names rules by it"},
		{strings.ContainsFunc(r.Name, unicode.IsControl),
			"the name holds control characters, which would garble what is printed"},
		{r.Principals == nil && r.When == nil, `the key "principals" is missing`},
		{r.Principals != nil && len(r.Principals) == 0,
			`principals is empty: list who the rule is about, ["*"] for everyone identified`},
		{r.Hosts != nil && len(r.Hosts) == 0, "hosts is empty: leave the key out for every host"},
	} {
		if c.broken {
			errs = append(errs, strict.Errorf(r.node, "%s", c.say))
		}
	}
	return strict.Join(r.node, errs...)
}

// entry is operations on the resources of one type that a pattern matches.
type entry struct {
	kind       kmsg.ACLResourceType
	pattern    pattern
	operations operations
	node       *yaml.Node
}

func (e entry) String() string {
	return fmt.Sprintf("%s %s: %s", resources[e.kind].key, e.pattern, e.operations)
}

// UnmarshalYAML reads one resource key and the operations.
func (e *entry) UnmarshalYAML(node *yaml.Node) error {
	var doc struct {
		Topic           *resourceName       `yaml:"topic"`
		Group           *resourceName       `yaml:"group"`
		TransactionalID *resourceName       `yaml:"transactional-id"`
		Cluster         *clusterResource    `yaml:"cluster"`
		DelegationToken *resourceName       `yaml:"delegation-token"`
		User            *resourceName       `yaml:"user"`
		Operations      []strict.At[string] `yaml:"operations" strict:"required"`
	}
	if err := strict.Node(node, &doc); err != nil {
		return err
	}
	e.node = node
	given := 0
	for kind, name := range map[kmsg.ACLResourceType]*resourceName{
		kmsg.ACLResourceTypeTopic:           doc.Topic,
		kmsg.ACLResourceTypeGroup:           doc.Group,
		kmsg.ACLResourceTypeTransactionalId: doc.TransactionalID,
		kmsg.ACLResourceTypeCluster:         (*resourceName)(doc.Cluster),
		kmsg.ACLResourceTypeDelegationToken: doc.DelegationToken,
		kmsg.ACLResourceTypeUser:            doc.User,
	} {
		if name != nil {
			e.kind, e.pattern = kind, name.pattern
			given++
		}
	}
	if given != 1 {
		return strict.Errorf(node, "%d resources in one entry: want exactly one of %s",
			given, strings.Join(resourceKeys(), ", "))
	}
	return e.readOperations(node, doc.Operations)
}

func (e *entry) readOperations(node *yaml.Node, names []strict.At[string]) error {
	if len(names) == 0 {
		return strict.Errorf(node, "operations is empty: list what the entry is about, [All] for every operation")
	}
	var errs []error
	for _, name := range names {
		op, err := ParseOperation(e.kind, name.V)
		if err != nil {
			errs = append(errs, strict.Errorf(name.Node, "%s", err))
			continue
		}
		e.operations |= setOf(op)
	}
	return strict.Join(node, errs...)
}

func resourceKeys() []string {
	var keys []string
	for _, r := range resources {
		if r.key != "" {
			keys = append(keys, r.key)
		}
	}
	return keys
}

// resourceName is a pattern, spelled out or in its short form: "orders.*" is a prefix, "*" any, else the name itself.
type resourceName struct{ pattern }

// UnmarshalYAML reads either form.
func (n *resourceName) UnmarshalYAML(node *yaml.Node) error {
	if node.Kind == yaml.ScalarNode {
		var short string
		if err := strict.Node(node, &short); err != nil {
			return err
		}
		n.text, n.prefix = strings.CutSuffix(short, "*")
		switch {
		case short == "":
			return strict.Errorf(node, `the name is empty: write "*" for any`)
		case strings.Contains(n.text, "*"):
			return strict.Errorf(node, "%q: a * stands for the rest of a name and only at the end; where it is part of the "+
				"name write {literal: …} or {prefix: …}", short)
		}
		return nil
	}
	var long struct {
		Literal *string `yaml:"literal"`
		Prefix  *string `yaml:"prefix"`
	}
	if err := strict.Node(node, &long); err != nil {
		return err
	}
	switch {
	case (long.Literal == nil) == (long.Prefix == nil):
		return strict.Errorf(node, "want exactly one of literal, prefix")
	case long.Literal != nil:
		n.pattern = pattern{text: *long.Literal}
	default:
		n.pattern = pattern{text: *long.Prefix, prefix: true}
	}
	switch {
	case n.text == "":
		return strict.Errorf(node, `the name is empty: write "*" for any`)
	case n.text == "*" && !n.prefix:
		return strict.Errorf(node, `{literal: "*"} means any name in Kafka's ACLs: write "*" for that`)
	}
	return nil
}

// clusterResource is the cluster itself, as a resource.
type clusterResource resourceName

// UnmarshalText accepts the one name there is.
func (c *clusterResource) UnmarshalText(text []byte) error {
	if string(text) != clusterName {
		return fmt.Errorf("the cluster as a resource is always named %q; which cluster a rule is about is said by the "+
			"rule's own key cluster, beside its name", clusterName)
	}
	c.pattern = pattern{text: clusterName}
	return nil
}

// principal is who a rule is about.
type principal struct {
	kind    evidence
	pattern pattern
}

// evidence is what a principal is compared with.
type evidence int

const (
	anyone    evidence = iota // "*"
	anonymous                 // "anonymous": neither SPIFFE ID nor SASL principal
	workload                  // Subject.SPIFFE
	login                     // Subject.Principal
)

// UnmarshalText reads "*", "anonymous", "spiffe://domain/path", "spiffe://domain/path*", "User:name" or "User:*".
func (p *principal) UnmarshalText(text []byte) error {
	word := string(text)
	switch {
	case word == "*":
		p.kind = anyone
		return nil
	case word == "anonymous":
		p.kind = anonymous
		return nil
	case strings.HasPrefix(word, "spiffe://"):
		p.kind = workload
		return p.readSPIFFE(word)
	case word == "User:*":
		*p = principal{login, pattern{"User:", true}}
		return nil
	case strings.HasPrefix(word, "User:") && word != "User:":
		*p = principal{login, pattern{text: word}}
		return nil
	}
	return fmt.Errorf(`%q is no principal: want "spiffe://domain/path" (a * at the end stands for any rest), `+
		`"User:name", "User:*", "*" or "anonymous"`, word)
}

// readSPIFFE keeps a * out of the trust domain: "spiffe://example*" would trust the domain example.evil.
func (p *principal) readSPIFFE(word string) error {
	p.pattern.text, p.pattern.prefix = strings.CutSuffix(word, "*")
	example := p.pattern.text
	if p.pattern.prefix {
		if !strings.Contains(strings.TrimPrefix(example, "spiffe://"), "/") {
			return fmt.Errorf("%q: write the trust domain out, the * can only stand in the path: spiffe://domain/*", word)
		}
		example += "x"
	}
	if strings.Contains(example, "*") {
		return fmt.Errorf("%q: a * stands for any rest and only at the end", word)
	}
	if _, err := spiffeid.FromString(example); err != nil {
		return fmt.Errorf("%q is no SPIFFE ID: %w", word, err)
	}
	return nil
}

// CheckPrincipal tells what is wrong with a principal of a rule.
func CheckPrincipal(text string) error { return new(principal).UnmarshalText([]byte(text)) }

func (p principal) names(s *Subject) bool {
	switch p.kind {
	case anyone:
		return true
	case anonymous:
		return s.anonymous()
	case workload:
		return s.SPIFFE != "" && p.pattern.matches(s.SPIFFE)
	default:
		return s.Principal != "" && p.pattern.matches(s.Principal)
	}
}

// host is an address or a network.
type host struct{ netip.Prefix }

// UnmarshalText reads an address, a network in CIDR notation, or "*". Kafka's ACLs know addresses and "*" only.
func (h *host) UnmarshalText(text []byte) error {
	word := string(text)
	if word == "*" {
		return nil // the zero prefix
	}
	if addr, err := netip.ParseAddr(word); err == nil {
		if addr.Zone() != "" {
			return fmt.Errorf("%q: leave the zone (%%%s) out", word, addr.Zone())
		}
		addr = addr.Unmap()
		h.Prefix = netip.PrefixFrom(addr, addr.BitLen())
		return nil
	}
	network, err := netip.ParsePrefix(word)
	switch {
	case err != nil:
		return fmt.Errorf(`%q is no host: want an IP address, a network like 10.1.0.0/16, or "*" (names are not resolved)`,
			word)
	case network.Addr().Is4In6():
		return errors.New("write an IPv4 network as one, not mapped into IPv6")
	case network.Masked() != network:
		return fmt.Errorf("%q has bits set beyond its length: did you mean %s?", word, network.Masked())
	}
	h.Prefix = network
	return nil
}

func (h host) names(s *Subject) bool {
	return !h.IsValid() || h.Contains(s.Host.Unmap().WithZone(""))
}
