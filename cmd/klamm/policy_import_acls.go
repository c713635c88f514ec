package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"klamm/enforcer/policy"
	"klamm/enforcer/policy/acls"
	"klamm/enforcer/policy/strict"
	"klamm/node"
)

// importFlags are the flags of policy import-acls as given.
type importFlags struct {
	config, cluster, principals, to string
	superUsers                      []string
	mode                            policy.Mode
	wait                            time.Duration
}

// imported is the result of policy import-acls.
type imported struct {
	ACLs     int      `json:"acls"`
	Rules    int      `json:"rules"`
	File     string   `json:"file,omitempty"`
	Policy   string   `json:"policy,omitempty"` // where it went to no file
	Idle     []string `json:"left_out"`
	Warnings []string `json:"warnings"`
}

func newPolicyImportACLsCommand() *cobra.Command {
	var f importFlags
	cmd := &cobra.Command{
		Use:   "import-acls [LIST]",
		Short: "Write the policy that allows what a cluster's ACLs allow",
		Long: `Write the policy that allows what a cluster's ACLs allow, and nothing else: it decides as Kafka's
StandardAuthorizer does with them.

The ACLs are read from the cluster by the node's own client, which needs Describe on the cluster, or from LIST, a file
with the output of kafka-acls --list; - is standard input. The policy goes to standard output, or to a new file (--to).
What ACLs do not say is said on standard error, and in the policy's first lines.

Super users are no ACLs: name them by --super-user. The file of --principals says which SPIFFE IDs the ACLs' principals
are; others stay SASL principals:

  principals:
    "User:CN=orders,O=shop": ["spiffe://example.test/ns/shop/sa/orders"]

Exit codes: 0 done, 1 the ACLs could not be read, or one of them cannot be said in a policy.`,
		Example: `  klamm policy import-acls --cluster payments --super-user User:admin --to payments.yaml
  kafka-acls.sh --bootstrap-server broker:9092 --list | klamm policy import-acls - --cluster payments`,
		Args: cobra.MaximumNArgs(1),
	}
	flags := cmd.Flags()
	flags.StringVarP(&f.config, "config", "c", "/etc/klamm/klamm.yaml", "configuration of the node, without LIST")
	flags.StringVar(&f.cluster, "cluster", "", "the configured cluster to read, and the only one the policy is for")
	flags.StringArrayVar(&f.superUsers, "super-user", nil,
		"principal of super.users of the brokers, such as User:admin; repeat it for each")
	flags.StringVar(&f.principals, "principals", "", "file that says which SPIFFE IDs the ACLs' principals are")
	mode := flags.String("mode", string(policy.Enforce), "mode of the policy: enforce or observe")
	flags.StringVar(&f.to, "to", "", "file to write the policy to, which must not be there yet")
	flags.DurationVar(&f.wait, "wait", 30*time.Second, "how long brokers have to answer")
	output := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, list []string) error {
		if err := f.mode.UnmarshalText([]byte(*mode)); err != nil {
			return fmt.Errorf("--mode: %w", err)
		}
		return importACLs(cmd, &f, list, output)
	}
	return cmd
}

func importACLs(cmd *cobra.Command, f *importFlags, list []string, output *format) error {
	principals, err := readPrincipals(f.principals)
	if err != nil {
		return err
	}
	all, source, err := f.read(cmd, list)
	if err != nil {
		return err
	}
	translated, err := acls.Translate(all, acls.Options{Source: source, Cluster: f.cluster, Mode: f.mode,
		SuperUsers: f.superUsers, Principals: principals})
	if err != nil {
		return err
	}
	result := imported{ACLs: len(all), Rules: translated.Rules, File: f.to, Idle: append([]string{}, translated.Idle...),
		Warnings: append([]string{}, translated.Warnings...)}
	if f.to != "" {
		err = writeNew(f.to, translated.YAML)
	} else {
		result.Policy = string(translated.YAML)
	}
	if err != nil {
		return err
	}
	return output.print(cmd.OutOrStdout(), result, func(out io.Writer) error {
		return printImported(out, cmd.ErrOrStderr(), result)
	})
}

// read returns the ACLs and where they are from.
func (f *importFlags) read(cmd *cobra.Command, list []string) ([]acls.ACL, string, error) {
	switch {
	case len(list) == 0:
		return f.readCluster(cmd.Context())
	case list[0] == "-":
		all, err := acls.Parse(cmd.InOrStdin())
		return all, "standard input", err
	}
	file, err := os.Open(list[0])
	if err != nil {
		return nil, "", err
	}
	defer func() { _ = file.Close() }()
	all, err := acls.Parse(file)
	if err != nil {
		return nil, "", fmt.Errorf("%s: %w", list[0], err)
	}
	return all, list[0], nil
}

func (f *importFlags) readCluster(ctx context.Context) ([]acls.ACL, string, error) {
	config, err := node.Load(f.config)
	if err != nil {
		return nil, "", err
	}
	if f.cluster == "" && len(config.Clusters) == 1 {
		f.cluster = config.Clusters[0].Name
	}
	if f.cluster == "" {
		return nil, "", errors.New("several clusters are configured: say by --cluster which one to read")
	}
	ctx, cancel := context.WithTimeout(ctx, f.wait)
	defer cancel()
	all, err := node.ACLs(ctx, config, f.cluster)
	return all, "cluster " + f.cluster, err
}

func readPrincipals(file string) (map[string][]string, error) {
	if file == "" {
		return nil, nil
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("--principals: %w", err)
	}
	var given struct {
		Principals map[string][]string `yaml:"principals" strict:"required"`
	}
	if err := strict.Decode(file, data, &given); err != nil {
		return nil, err
	}
	return given.Principals, nil
}

// writeNew keeps what a person may have made of an earlier translation.
func writeNew(name string, data []byte) error {
	file, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if errors.Is(err, os.ErrExist) {
		return fmt.Errorf("--to: %s is there already: remove it, or take another name", name)
	}
	if err != nil {
		return fmt.Errorf("--to: %w", err)
	}
	_, err = file.Write(data)
	if err = errors.Join(err, file.Close()); err != nil {
		return errors.Join(fmt.Errorf("--to: %w", err), os.Remove(name))
	}
	return nil
}

func printImported(out, errOut io.Writer, r imported) error {
	for _, w := range r.Warnings {
		if _, err := fmt.Fprintln(errOut, "warning:", w); err != nil {
			return err
		}
	}
	for _, one := range r.Idle {
		if _, err := fmt.Fprintln(errOut, "left out, since brokers never apply it either:", one); err != nil {
			return err
		}
	}
	if r.File == "" {
		_, err := io.WriteString(out, r.Policy)
		return err
	}
	_, err := fmt.Fprintf(out, "%s: rules %d, from ACLs %d\n", r.File, r.Rules, r.ACLs)
	return err
}
