package main

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"klamm/node"
	"klamm/node/truststore"
)

// tlsReport says which mode of clients.tls works for whom.
type tlsReport struct {
	Broker  string   `json:"broker"`
	Names   []string `json:"names"`  // in its certificate
	Issuer  string   `json:"issuer"` // of its certificate
	Expires string   `json:"expires"`
	// Public: this host's own roots vouch for it. A public CA signs for nobody but the broker, so that only passthrough
	// and deny are left.
	Public             bool          `json:"public"`
	ClientCertificates bool          `json:"clientCertificates"` // the broker asks for them
	Cluster            string        `json:"cluster,omitempty"`
	Mode               string        `json:"mode,omitempty"`       // as configured
	NodeIssuer         string        `json:"nodeIssuer,omitempty"` // who signs for the node, as configured
	IssuerError        string        `json:"issuerError,omitempty"`
	Notes              []string      `json:"notes,omitempty"`
	Stores             []storeReport `json:"truststores"`

	chain, leaf []*x509.Certificate
}

// storeReport is what works for the clients with one truststore.
type storeReport struct {
	File         string   `json:"file"`
	Kind         string   `json:"kind,omitempty"`
	Certificates int      `json:"certificates,omitempty"`
	Error        string   `json:"error,omitempty"` // it could not be read
	Works        []string `json:"works"`           // modes
	WhyNot       []string `json:"whyNot,omitempty"`
}

const hostRoots = "the roots of this host"

func newDoctorTLSCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "tls BROKER",
		Short: "Tell which mode of TLS works for which client truststore, and why",
		Long: `Look at the certificate of a broker (host:port), and tell for each truststore whether its clients trust the
broker itself (passthrough) and a certificate for the broker's name by the issuer that is configured (terminate).
Truststores are files in PEM, JKS or PKCS #12; without one, the roots of this host count, and with --pid those found
where a process looks by default.

Where a node runs on this host it may be in between: run the command in a cgroup that is exempt (intercept.exempt).

Exit codes: 0 the configured mode works for each truststore (without -c: some mode does), 1 otherwise.`,
		Example: "  klamm doctor tls broker-1.example:9093 -c /etc/klamm/klamm.yaml --truststore client.truststore.jks",
		Args:    cobra.ExactArgs(1),
	}
	file := cmd.Flags().StringP("config", "c", "", "the configuration with the cluster's issuer")
	cluster := cmd.Flags().String("cluster", "",
		"the cluster in it (default: the one that has the broker in bootstrap, or the only one)")
	stores := cmd.Flags().StringArray("truststore", nil, "a client's truststore; may be given more than once")
	pass := cmd.Flags().String("storepass-file", "",
		"a file with the password of the truststores (default: Java's, or none)")
	pid := cmd.Flags().Int("pid", 0, "look at the truststores of this process, as it sees them")
	wait := cmd.Flags().Duration("wait", 10*time.Second, "how long broker and issuer may take to answer")
	output := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		ctx, cancel := context.WithTimeout(cmd.Context(), *wait)
		defer cancel()
		password, err := storePassword(*pass)
		if err != nil {
			return err
		}
		report, err := probeTLS(ctx, args[0], *file, *cluster)
		if err != nil {
			return err
		}
		report.judge(*stores, *pid, password)
		err = output.print(cmd.OutOrStdout(), report, report.print)
		if err == nil && !report.works() {
			err = errors.New("there are truststores whose clients would be refused")
		}
		return err
	}
	return cmd
}

func storePassword(file string) (string, error) {
	if file == "" {
		return "", nil
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("read the truststores' password: %w", err)
	}
	return strings.TrimRight(string(text), "\r\n"), nil
}

// probeTLS asks the broker, and the issuer where one is configured.
func probeTLS(ctx context.Context, broker, file, cluster string) (*tlsReport, error) {
	seen, err := node.ProbeBrokerTLS(ctx, broker)
	if err != nil {
		return nil, err
	}
	leaf := seen.Chain[0]
	r := &tlsReport{Broker: broker, Names: slices.Clone(leaf.DNSNames), Issuer: leaf.Issuer.String(),
		Expires: leaf.NotAfter.UTC().Format(time.RFC3339), ClientCertificates: seen.Asks, chain: seen.Chain}
	for _, ip := range leaf.IPAddresses {
		r.Names = append(r.Names, ip.String())
	}
	r.Public = node.Trusts(nil, seen.Chain, "") == nil
	if file == "" {
		return r, nil
	}
	config, err := node.Load(file)
	if err != nil {
		return nil, err
	}
	c, err := clusterOf(config, broker, cluster)
	if err != nil {
		return nil, err
	}
	r.Cluster, r.Mode = c.Name, string(cmp.Or(c.Clients.TLS, node.TLSDeny))
	if c.Clients.Issuer == nil {
		return r, nil
	}
	r.askIssuer(ctx, config, c, seen.Name)
	if r.leaf == nil {
		return r, nil
	}
	r.NodeIssuer = r.leaf[0].Issuer.String()
	if c.Clients.ClientCertificates == nil && seen.Asks {
		r.Notes = append(r.Notes, "the broker asks for client certificates, which end at the node: give "+
			"client-certificates, so that they are evidence, and upstream.tls.certificate for the broker")
	}
	if r.NodeIssuer == r.Issuer {
		r.Notes = append(r.Notes, "the certificate may be the node's: one that runs on this host is in between, unless "+
			"this command runs in an exempt cgroup")
	}
	return r, nil
}

// askIssuer has a certificate made for the broker's name.
func (r *tlsReport) askIssuer(ctx context.Context, config node.Config, c node.ClusterConfig, name string) {
	leaf, err := node.ProbeLeaf(ctx, config, c, name)
	if err != nil {
		r.IssuerError = err.Error()
		return
	}
	r.leaf = leaf
}

func clusterOf(c node.Config, broker, name string) (node.ClusterConfig, error) {
	i := slices.IndexFunc(c.Clusters, func(c node.ClusterConfig) bool {
		if name != "" {
			return c.Name == name
		}
		return slices.Contains(c.Bootstrap, broker)
	})
	switch {
	case i >= 0:
		return c.Clusters[i], nil
	case name != "":
		return node.ClusterConfig{}, fmt.Errorf("there is no cluster %q", name)
	case len(c.Clusters) == 1:
		return c.Clusters[0], nil
	}
	return node.ClusterConfig{}, fmt.Errorf("%s is in no cluster's bootstrap: give --cluster", broker)
}

// judge looks at the truststores.
func (r *tlsReport) judge(files []string, pid int, password string) {
	for _, file := range files {
		r.store(file, func() (*os.File, error) { return os.Open(file) }, password)
	}
	if pid != 0 {
		for _, file := range truststore.Find(pid) {
			f, err := truststore.OpenOf(pid, file)
			if errors.Is(err, os.ErrNotExist) {
				continue
			}
			r.store(fmt.Sprintf("%s of pid %d", file, pid), func() (*os.File, error) { return f, err }, password)
		}
	}
	if len(files) == 0 && pid == 0 {
		r.Stores = append(r.Stores, r.trusted(storeReport{File: hostRoots}, nil))
	}
}

func (r *tlsReport) store(name string, open func() (*os.File, error), password string) {
	report := storeReport{File: name, Works: []string{}}
	f, err := open()
	var store *truststore.Store
	if err == nil {
		store, err = truststore.Read(f, password)
		_ = f.Close() // only read
	}
	if err != nil {
		report.Error = err.Error()
		r.Stores = append(r.Stores, report)
		return
	}
	report.Kind, report.Certificates = store.Kind, len(store.Certificates)
	r.Stores = append(r.Stores, r.trusted(report, store))
}

// trusted tells which modes work for a truststore.
func (r *tlsReport) trusted(report storeReport, store *truststore.Store) storeReport {
	report.Works = []string{}
	name, _, err := net.SplitHostPort(r.Broker)
	if err == nil {
		err = node.Trusts(store, r.chain, name)
	}
	r.verdict(&report, node.TLSPassthrough, "the broker's certificate", err)
	switch {
	case r.leaf != nil:
		r.verdict(&report, node.TLSTerminate, "the issuer's certificate", node.Trusts(store, r.leaf, name))
	case r.IssuerError != "":
		report.WhyNot = append(report.WhyNot, "terminate: the issuer gives no certificate")
	case r.Public:
		report.WhyNot = append(report.WhyNot, "terminate: a public CA signs for nobody but the broker")
	default:
		report.WhyNot = append(report.WhyNot, "terminate: no issuer is configured (-c, clients.issuer)")
	}
	return report
}

func (r *tlsReport) verdict(report *storeReport, mode node.TLSMode, what string, err error) {
	var unknown x509.UnknownAuthorityError
	switch {
	case err == nil:
		report.Works = append(report.Works, string(mode))
	case errors.As(err, &unknown):
		report.WhyNot = append(report.WhyNot, fmt.Sprintf("%s: it has no CA of %s", mode, what))
	default:
		report.WhyNot = append(report.WhyNot, fmt.Sprintf("%s: %s: %v", mode, what, err))
	}
}

// works tells whether nobody is refused.
func (r *tlsReport) works() bool {
	return !slices.ContainsFunc(r.Stores, func(s storeReport) bool {
		if r.Mode == "" {
			return len(s.Works) == 0
		}
		return !slices.Contains(s.Works, r.Mode)
	})
}

func (r *tlsReport) print(out io.Writer) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	kind := map[bool]string{true: "public: this host's roots vouch for it", false: "private"}[r.Public]
	lines := []string{
		"broker\t" + r.Broker,
		"certificate\tfor " + strings.Join(r.Names, ", ") + ", until " + r.Expires,
		"by\t" + r.Issuer + " (" + kind + ")",
	}
	if r.Mode != "" {
		lines = append(lines, "configured\t"+r.Mode+", in cluster "+r.Cluster)
	}
	if r.NodeIssuer != "" {
		lines = append(lines, "node's issuer\t"+r.NodeIssuer)
	}
	if r.IssuerError != "" {
		lines = append(lines, "node's issuer\tfails: "+r.IssuerError)
	}
	for _, note := range r.Notes {
		lines = append(lines, "note\t"+note)
	}
	lines = append(lines, "", "TRUSTSTORE\tKIND\tCERTIFICATES\tWORKS\tWHY NOT")
	for _, s := range r.Stores {
		works := cmp.Or(strings.Join(s.Works, ", "), "nothing")
		why := strings.Join(s.WhyNot, "; ")
		if s.Error != "" {
			works, why = "–", s.Error
		}
		count := "–"
		if s.Certificates > 0 {
			count = fmt.Sprint(s.Certificates)
		}
		lines = append(lines, strings.Join([]string{s.File, cmp.Or(s.Kind, "–"), count, works, why}, "\t"))
	}
	if _, err := io.WriteString(w, strings.Join(lines, "\n")+"\n"); err != nil {
		return err
	}
	return w.Flush()
}
