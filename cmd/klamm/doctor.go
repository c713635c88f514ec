package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/features"
	"github.com/rs/zerolog"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"klamm/node"
)

// finding is the result of one check.
type finding = node.Finding

// hostChecks are what a host needs, each with the way out.
var hostChecks = []struct {
	name   string
	check  func() (detail string, err error)
	remedy string
}{
	{"privileges", checkPrivileges,
		"run as root, or with CAP_SYS_ADMIN, CAP_NET_ADMIN, CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH"},
	{"kernel type information", checkBTF,
		"use a kernel built with CONFIG_DEBUG_INFO_BTF=y (Debian 12, Ubuntu 22.04 and later have it)"},
	{"kernel features", checkFeatures, "use Linux 5.15 or newer, with CONFIG_BPF_SYSCALL and CONFIG_CGROUP_BPF"},
	{"cgroup2", checkCgroup2,
		"mount it: mount -t cgroup2 none /sys/fs/cgroup/unified (or boot with systemd.unified_cgroup_hierarchy=1)"},
	{"bpffs", checkBPFFS, ""},
	{"firewall", checkFirewall,
		"use a kernel with nf_tables (CONFIG_NF_TABLES, _INET, _BRIDGE), or set intercept.firewall to false: what packet" +
			" sockets of containers send then goes out unseen"},
	{"older connections", checkTakeOver,
		"use a kernel with CONFIG_INET_DIAG_DESTROY=y, or restart the clients after the node's first start"},
	{"eBPF programs", checkPrograms,
		"the message says what the kernel lacks, or which program of somebody else is in the way"},
}

func newDoctorCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Tell whether this host and its clusters are fit, and what to do if not",
		Long: `Check privileges, the kernel's features, cgroup2, whether the eBPF programs load and attach (to an empty cgroup
of their own, removed again), whether the kernel takes the firewall and ends connections (in a network namespace of its
own), and, with -c, whether the configuration is valid and its clusters answer.

Exit codes: 0 all checks passed, 1 at least one failed.`,
		Example: "  klamm doctor -c /etc/klamm/klamm.yaml",
		Args:    cobra.NoArgs,
	}
	cmd.AddCommand(newDoctorTLSCommand())
	file := cmd.Flags().StringP("config", "c", "", "also check this configuration and the clusters in it")
	wait := cmd.Flags().Duration("wait", 10*time.Second, "how long a cluster may take to answer")
	output := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		var findings []finding
		for _, c := range hostChecks {
			findings = append(findings, found(c.name, c.remedy)(c.check()))
		}
		if *file != "" {
			findings = append(findings, checkConfig(cmd.Context(), *file, *wait)...)
		}
		return report(cmd, output, findings)
	}
	cmd.AddCommand(newDoctorBrokerCommand())
	return cmd
}

// report prints findings, and fails where one of them did.
func report(cmd *cobra.Command, output *format, findings []finding) error {
	failed := 0
	for _, f := range findings {
		if !f.OK {
			failed++
		}
	}
	err := output.print(cmd.OutOrStdout(), findings, func(out io.Writer) error { return printFindings(out, findings) })
	if err == nil && failed > 0 {
		err = fmt.Errorf("%d of %d checks failed", failed, len(findings))
	}
	return err
}

func found(name, remedy string) func(detail string, err error) finding {
	return func(detail string, err error) finding {
		if err != nil {
			return finding{Check: name, Detail: err.Error(), Remedy: remedy}
		}
		return finding{Check: name, OK: true, Detail: detail}
	}
}

func printFindings(out io.Writer, findings []finding) error {
	var errs []error
	for _, f := range findings {
		mark := map[bool]string{true: "ok  ", false: "FAIL"}[f.OK]
		_, err := fmt.Fprintf(out, "%s  %-24s %s\n", mark, f.Check, f.Detail)
		errs = append(errs, err)
		if f.Remedy != "" {
			_, err = fmt.Fprintf(out, "      %-24s → %s\n", "", f.Remedy)
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func checkPrivileges() (string, error) {
	return fmt.Sprintf("uid %d has all capabilities the node uses", os.Geteuid()), node.CheckCapabilities()
}

func checkBTF() (string, error) {
	if _, err := btf.LoadKernelSpec(); err != nil {
		return "", err
	}
	return "the kernel describes its types (BTF)", nil
}

// checkFeatures asks for the newest things the programs use; all else is older.
func checkFeatures() (string, error) {
	var uname unix.Utsname
	if err := unix.Uname(&uname); err != nil {
		return "", err
	}
	release := "Linux " + unix.ByteSliceToString(uname.Release[:])
	for _, f := range []struct {
		what string
		err  error
	}{
		{"programs at connect(2) (4.17)", features.HaveProgramType(ebpf.CGroupSockAddr)},
		{"storage in sockets (5.2)", features.HaveMapType(ebpf.SkStorage)},
		{"the network namespace's cookie in socket operations (5.15)",
			features.HaveProgramHelper(ebpf.SockOps, asm.FnGetNetnsCookie)},
		{"a ring buffer (5.8)", features.HaveMapType(ebpf.RingBuf)},
		{"storage in sockets at connect(2) (5.8)", features.HaveProgramHelper(ebpf.CGroupSockAddr, asm.FnSkStorageGet)},
	} {
		if f.err != nil {
			return "", fmt.Errorf("%s has no %s: %w", release, f.what, f.err)
		}
	}
	return release, nil
}

func checkCgroup2() (string, error) {
	path, err := node.Cgroup2Mount()
	if err != nil {
		return "", err
	}
	return "mounted at " + path, nil
}

// checkBPFFS only looks.
func checkBPFFS() (string, error) {
	if !node.HasBPFFS(node.BPFFS) {
		return "not mounted at " + node.BPFFS + "; the node mounts it at start", nil
	}
	return "mounted at " + node.BPFFS, nil
}

func checkFirewall() (string, error) {
	return "nf_tables takes the node's rules (tried in a network namespace)", node.CheckFirewall()
}

func checkTakeOver() (string, error) {
	return "the kernel ends connections on demand (tried in a network namespace)", node.CheckTakeOver()
}

// checkPrograms loads and attaches the real programs to a cgroup that holds no process.
func checkPrograms() (_ string, err error) {
	root, err := node.Cgroup2Mount()
	if err != nil {
		return "", err
	}
	dir, err := os.MkdirTemp(root, "klamm-doctor-")
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, os.Remove(dir)) }()
	r, err := node.OpenRedirect(node.RedirectOptions{CgroupPath: dir})
	if err != nil {
		return "", err
	}
	detail := "they load and attach (tried at " + filepath.Base(dir) + ")"
	if err := r.Unnoticed(); err != nil {
		detail += "; a process that executes another program is noticed up to a second late: " + err.Error()
	}
	return detail, r.Close()
}

// checkConfig reads the configuration and its policies, and asks every cluster with the node's own client.
func checkConfig(ctx context.Context, file string, wait time.Duration) []finding {
	config, err := node.Load(file)
	findings := []finding{found("configuration", "mend "+file)(file+" is valid", err)}
	if err != nil {
		return findings
	}
	_, err = node.LoadPolicy(config.Policies)
	findings = append(findings, found("policies", "klamm policy check shows what is wrong")(
		fmt.Sprintf("%d files are valid", len(config.Policies)), err))
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	if config.SPIRE != nil {
		findings = append(findings, found("SPIRE agent", "klamm status says whether the node that runs can do it: the agent "+
			"knows it by its process, and may not know this one")(checkSPIRE(ctx, config)))
	}
	for _, c := range config.OIDC {
		if c.TrustDomain == "" {
			findings = append(findings, found("issuer "+c.Issuer, "check issuer, jwks, ca and bearer-file, and the route from "+
				"this host")(node.ProbeIssuer(ctx, c)))
		}
	}
	if k := config.Kubernetes; k != nil && k.Review != nil {
		findings = append(findings, found("token reviews", "check kubernetes.review; 403 means that its account may not "+
			"create tokenreviews: bind it to the ClusterRole system:auth-delegator")(node.ProbeReview(ctx, *k)))
	}
	for _, c := range config.Clusters {
		probed := found("cluster "+c.Name, "check bootstrap, tls and credentials, and the route from this host")
		findings = append(findings, probed(node.ProbeCluster(ctx, c, zerolog.Nop())))
	}
	return findings
}

// checkSPIRE asks the node that runs, and the agent itself where there is none.
func checkSPIRE(ctx context.Context, config node.Config) (string, error) {
	var status node.Status
	asked := "the node"
	err := node.Ask(ctx, config.Node.Socket, "/v1/status", &status)
	if err != nil || status.SPIRE == nil {
		asked = "this command"
		spire, err := node.ProbeSPIRE(ctx, *config.SPIRE)
		if err != nil {
			return "", err
		}
		status.SPIRE = &spire
	}
	s := status.SPIRE
	if !s.Serves || s.OwnError != "" {
		return "", errors.New(cmp.Or(s.Error, s.OwnError))
	}
	return fmt.Sprintf("%s is %s until %s, may ask for workloads by the %s API at %s, and can verify SVIDs of %s", asked,
		s.ID, s.Expires.Format(time.RFC3339), s.API, s.Socket, strings.Join(s.TrustOf, ", ")), nil
}
