package main

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/policy"
)

// resourceFlags name the resource of policy explain; exactly one of them is given.
var resourceFlags = []struct {
	name  string
	kind  kmsg.ACLResourceType
	usage string
}{
	{"topic", kmsg.ACLResourceTypeTopic, "name of the topic"},
	{"group", kmsg.ACLResourceTypeGroup, "name of the consumer group"},
	{"transactional-id", kmsg.ACLResourceTypeTransactionalId, "transactional id"},
	{"delegation-token", kmsg.ACLResourceTypeDelegationToken, "id of the delegation token"},
	{"user", kmsg.ACLResourceTypeUser, "user whose tokens it is about, User:name"},
}

const (
	// clusterFlag is the resource flag without a name: a cluster has one cluster resource.
	clusterFlag = "kafka-cluster"
	// The flags that ask about a connection as a whole.
	loginFlag       = "login"
	passthroughFlag = "passthrough"
)

// explainFlags are the flags of policy explain as given.
type explainFlags struct {
	files                            []string
	cluster, spiffe, principal, host string
	facts, claims, source            string
	operation, login                 string
	resources                        []string // by resourceFlags
}

func newPolicyExplainCommand() *cobra.Command {
	var f explainFlags
	cmd := &cobra.Command{
		Use:   "explain -f FILE… (--operation OPERATION (--topic NAME | --group NAME | …) | --login NAME | --passthrough)",
		Short: "Say whether an access is allowed, which rule decides, and why the others do not",
		Long: `Say whether an access is allowed, which rule decides, and why the others do not. So it does for a login and for
TLS that is to pass unread.

What conditions (when) look at is given by the flags and by a YAML or JSON file of facts, by the names conditions use:

  identity: {source: kubernetes, rule: …}
  claims: {sub: …}
  sources: {kubernetes: {issuer: …, claims: {…}}}
  sasl: {mechanism: OAUTHBEARER, issuer: …, claims: {…}}
  tls: {subject: …, issuer: …}
  process: {exe: …, exe_sha256: …, comm: …, uid: 1000, gid: 1000, cgroup: …, unit: …}
  pod: {namespace: …, name: …, container: …, uid: …}

What is not given is not known.

Exit codes: 0 it passes (also where a file in observe mode would deny it), 3 it is denied, 1 the question or a policy
file is not valid.`,
		Example: `  klamm policy explain -f policy.yaml --cluster payments \
      --spiffe-id spiffe://example.test/ns/shop/sa/orders --topic orders.placed --operation Write`,
		Args: cobra.NoArgs,
	}
	flags := cmd.Flags()
	flags.StringArrayVarP(&f.files, "file", "f", nil, "policy file; repeat it for all that are in force together")
	flags.StringVar(&f.cluster, "cluster", "", "name of the configured cluster the connection goes to")
	flags.StringVar(&f.spiffe, "spiffe-id", "", "SPIFFE ID of the workload")
	flags.StringVar(&f.principal, "principal", "", "SASL principal of the connection, User:name")
	flags.StringVar(&f.host, "host", "", "IP address of the workload")
	flags.StringVar(&f.facts, "facts", "", "file of what else is known of the workload; - is standard input")
	flags.StringVar(&f.claims, "claims", "", "JSON file with the claims of the workload's token; - is standard input")
	flags.StringVar(&f.source, "source", "", "source of identity and claims: static, spire, kubernetes, token-file, …")
	flags.StringVar(&f.operation, "operation", "", "Kafka's name of the operation: Read, Write, Create, …")
	flags.Bool(clusterFlag, false, "ask about the cluster as a resource")
	flags.StringVar(&f.login, loginFlag, "", `ask whether it may log in as this SASL principal, "" is a hidden one`)
	flags.Bool(passthroughFlag, false, "ask whether the workload's TLS may pass unread")
	names := []string{clusterFlag, loginFlag, passthroughFlag}
	f.resources = make([]string, len(resourceFlags))
	for i, r := range resourceFlags {
		flags.StringVar(&f.resources[i], r.name, "", r.usage)
		names = append(names, r.name)
	}
	cmd.MarkFlagsOneRequired(names...)
	cmd.MarkFlagsMutuallyExclusive(names...)
	cmd.MarkFlagsMutuallyExclusive(loginFlag, "operation")
	cmd.MarkFlagsMutuallyExclusive(passthroughFlag, "operation")
	if err := cmd.MarkFlagRequired("file"); err != nil {
		panic(err) // the flag is defined above
	}
	output := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		return explain(cmd, &f, output)
	}
	return cmd
}

func explain(cmd *cobra.Command, f *explainFlags, output *format) error {
	who, err := f.subject(cmd.InOrStdin())
	if err != nil {
		return err
	}
	ask, err := f.question(cmd, who)
	if err != nil {
		return err
	}
	var sets []*policy.Set
	for _, file := range f.files {
		set, err := readPolicy(file)
		if err != nil {
			return err
		}
		sets = append(sets, set)
	}
	e := ask(policy.New(sets...))
	err = output.print(cmd.OutOrStdout(), e, func(out io.Writer) error { return printExplanation(out, e) })
	if err == nil && !e.Allowed {
		return errDenied
	}
	return err
}

// question is what is asked of the policy.
func (f *explainFlags) question(cmd *cobra.Command, who policy.Subject) (
	func(*policy.Policy) policy.Explanation, error) {
	switch {
	case cmd.Flags().Changed(loginFlag):
		if f.login != "" && !strings.Contains(f.login, ":") {
			return nil, fmt.Errorf("--%s %q: write it as Kafka does, User:%s", loginFlag, f.login, f.login)
		}
		return func(p *policy.Policy) policy.Explanation { return p.ExplainLogin(who, f.login) }, nil
	case cmd.Flags().Changed(passthroughFlag):
		return func(p *policy.Policy) policy.Explanation { return p.ExplainPassthrough(who) }, nil
	case f.operation == "":
		return nil, errors.New(`required flag(s) "operation" not set`)
	}
	kind, name := f.resource(cmd)
	op, err := policy.ParseOperation(kind, f.operation)
	if err != nil {
		return nil, fmt.Errorf("--operation: %w", err)
	}
	if op == kmsg.ACLOperationAll {
		return nil, errors.New("--operation: a request asks for one operation at a time, All is for rules")
	}
	return func(p *policy.Policy) policy.Explanation { return p.Explain(who, kind, name, op) }, nil
}

// resource is what the one given resource flag asks about.
func (f *explainFlags) resource(cmd *cobra.Command) (kmsg.ACLResourceType, string) {
	for i, r := range resourceFlags {
		if cmd.Flags().Changed(r.name) {
			return r.kind, f.resources[i]
		}
	}
	return kmsg.ACLResourceTypeCluster, clusterFlag
}

func (f *explainFlags) subject(in io.Reader) (policy.Subject, error) {
	s := policy.Subject{Cluster: f.cluster, SPIFFE: f.spiffe, Principal: f.principal}
	if f.spiffe != "" {
		if _, err := spiffeid.FromString(f.spiffe); err != nil {
			return s, fmt.Errorf("--spiffe-id %q: %w", f.spiffe, err)
		}
	}
	if f.principal != "" && !strings.Contains(f.principal, ":") {
		return s, fmt.Errorf("--principal %q: write it as Kafka does, User:%s", f.principal, f.principal)
	}
	var err error
	if f.host != "" {
		if s.Host, err = netip.ParseAddr(f.host); err != nil {
			return s, fmt.Errorf("--host %q: want an IP address", f.host)
		}
	}
	s.Facts, err = f.readFacts(in)
	return s, err
}

func printExplanation(out io.Writer, e policy.Explanation) error {
	verdict := "deny"
	switch {
	case e.WouldDeny:
		verdict = "would deny"
	case e.Allowed:
		verdict = "allow"
	}
	by := ""
	if e.Rule != "" {
		by = fmt.Sprintf(" (%q)", e.Rule)
	}
	if _, err := fmt.Fprintf(out, "%s: %s%s\n", verdict, e.Why, by); err != nil {
		return err
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	for _, r := range e.Rules {
		mark, observed := " ", ""
		if r.Matched {
			mark = "*"
		}
		if r.Mode == policy.Observe {
			observed = " (observe)"
		}
		if _, err := fmt.Fprintf(w, "%s %s:%d\t%s%s\t%s\n", mark, r.File, r.Line, r.Rule, observed, r.Why); err != nil {
			return err
		}
		if r.When == nil {
			continue
		}
		if _, err := fmt.Fprintf(w, "\t\twhen %s: %s\n", strings.Join(strings.Fields(r.When.Expression), " "),
			outcome(r.When)); err != nil {
			return err
		}
	}
	return w.Flush()
}

// outcome is what a condition comes to.
func outcome(w *policy.When) string {
	if w.Error != "" {
		return "cannot be told: " + w.Error
	}
	return strconv.FormatBool(w.Holds)
}
