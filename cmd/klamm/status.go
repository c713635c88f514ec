package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"klamm/node"
	"klamm/spiffe"
)

// askTimeout bounds the wait for a node that hangs.
const askTimeout = 3 * time.Second

func newStatusCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Tell what is intercepted on this host, and what is exempt",
		Long: `Ask the node that runs what it intercepts: where it listens, which processes are exempt and how often they
connected to a broker, how the clusters are, and what the kernel has counted. Where no node runs, tell what is still in
force in the kernel, and what becomes of broker-bound connects meanwhile.

Exit codes: 0 a node runs and everything broker-bound is enforced, 1 otherwise.`,
		Example: "  klamm status -o json | jq .namespaces",
		Args:    cobra.NoArgs,
	}
	file := cmd.Flags().StringP("config", "c", "/etc/klamm/klamm.yaml", "configuration of the node")
	output := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		config, err := node.Load(*file)
		if err != nil {
			return err
		}
		status, err := askStatus(cmd.Context(), config)
		if err != nil {
			return err
		}
		err = output.print(cmd.OutOrStdout(), status, func(out io.Writer) error { return printStatus(out, status) })
		if err != nil || status.Running && status.Kernel.Attached() && status.Kernel.Up {
			return err
		}
		return errFailed
	}
	return cmd
}

// askStatus asks the node, and the pins where there is none.
func askStatus(ctx context.Context, config node.Config) (status node.Status, err error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	err = node.Ask(ctx, config.Node.Socket, "/v1/status", &status)
	if !errors.Is(err, node.ErrNobody) {
		return status, err
	}
	pinned, perr := node.PinnedStatus(config.Node.Pins)
	if errors.Is(perr, fs.ErrNotExist) {
		return status, fmt.Errorf("nothing is intercepted: no node runs, and %w", perr)
	}
	return pinned, perr
}

func printStatus(out io.Writer, s node.Status) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	line := func(what, format string, args ...any) { fmt.Fprintf(w, what+"\t"+format+"\n", args...) }
	k := s.Kernel
	if s.Running {
		line("node", "%s, up since %s, %d connections", s.Node, s.Since.Format(time.RFC3339), s.Connections)
	} else {
		line("node", "does not run, or does not answer; the following is what is in force without it")
	}
	line("kernel", "%s", hooks(s))
	line("enforcer down", "%s", mode(k.FailModes.PassDown))
	line("not enrolled", "%s", mode(k.FailModes.PassUnenrolled))
	line("older connections", "%s", map[bool]string{true: "cut", false: "left"}[k.Cut])
	line("broker ports", "%s", strings.Trim(fmt.Sprint(k.Ports), "[]"))
	for _, n := range s.Namespaces {
		line("namespace", "net:[%d] port %d%s", n.Inode, n.Port, map[bool]string{true: " (host)"}[n.Host])
	}
	if r := s.NRI; r != nil {
		line("runtime", "%s", cmp.Or(r.Error, fmt.Sprintf("tells of %d pods", r.Pods)))
	}
	if a := s.SPIRE; a != nil {
		line("SPIRE agent", "%s", cmp.Or(a.Error,
			fmt.Sprintf("tells of %d processes, %d have an SVID", a.Followed, a.Identified)))
		line("node's identity", "%s", cmp.Or(a.OwnError, fmt.Sprintf("%s until %s", a.ID, a.Expires.Format(time.RFC3339))))
	}
	if a := s.Attestation; a != nil {
		line("identity", "%s", attestation(a))
		for _, source := range slices.Sorted(maps.Keys(a.Why)) {
			line("", "%s: %s", source, a.Why[source])
		}
	}
	if why := cmp.Or(k.Unnoticed, unseen(s)); why != "" {
		line("", "WHAT PROCESSES BECOME IS NOTICED LATE: %s", why)
	}
	for _, i := range s.Issuers {
		line("issuer", "%s: %s", i.Issuer, cmp.Or(i.Error, fmt.Sprintf("%d keys", i.Keys)))
	}
	for _, e := range s.Exempt {
		line("exempt", "%s, %d connects", cmp.Or(e.Unit, e.Cgroup, fmt.Sprintf("cgroup %d", e.ID)), e.Connects)
	}
	for _, c := range s.Clusters {
		line("cluster", "%s: %s", c.Name, cmp.Or(c.Error, strings.Join(c.Brokers, ", ")))
	}
	for _, name := range slices.Sorted(maps.Keys(s.Counters)) {
		if n := s.Counters[name]; n > 0 {
			line(name, "%d", n)
		}
	}
	return w.Flush()
}

func attestation(a *spiffe.State) string {
	text := fmt.Sprintf("%d processes (%d lingering)", a.Processes, a.Lingering)
	for _, source := range slices.Sorted(maps.Keys(a.Evidence)) {
		text += fmt.Sprintf(", %d by %s", a.Evidence[source], source)
	}
	return text + fmt.Sprintf(", %d unidentified", a.Identified[""])
}

func unseen(s node.Status) string {
	if s.Attestation == nil {
		return ""
	}
	return s.Attestation.BlindWhy
}

func hooks(s node.Status) string {
	var off []string
	for _, h := range s.Kernel.Hooks {
		if !h.Attached {
			off = append(off, h.Name)
		}
	}
	switch {
	case len(off) > 0:
		return "SEVERED at " + strings.Join(off, ", ")
	case !s.Kernel.Up:
		return "attached; the enforcer counts as down"
	}
	return "attached"
}

func mode(pass bool) string {
	if pass {
		return "PASS, unseen"
	}
	return "refuse"
}
