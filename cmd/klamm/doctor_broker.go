package main

import (
	"context"
	"errors"
	"time"

	"github.com/spf13/cobra"

	"klamm/node"
)

func newDoctorBrokerCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "broker",
		Short: "Tell whether brokers refuse who comes without the node, and as whom they know workloads",
		Long: `Check the brokers of the configured clusters:

  direct      every listener refuses a client that has none of the node's credentials, in plaintext and by TLS without a
              certificate. Nothing is written, and no secret is sent.
  upstream    what klamm.yaml says of the way to the brokers works: name, certificate, login.
  principal   where brokers are shown the workload's X509-SVID: they know the workload by it, and not all workloads as
              one. Every SVID of SPIRE without a DNS name has the subject O=SPIRE,C=US, of which stock Kafka makes one
              principal.

The node that runs checks; where none runs, this command does, which then must be reached by no redirect.

Exit codes: 0 all checks passed, 1 at least one failed.`,
		Example: "  klamm doctor broker -c /etc/klamm/klamm.yaml --cluster payments --pid $(pidof orders)",
		Args:    cobra.NoArgs,
	}
	file := cmd.Flags().StringP("config", "c", "/etc/klamm/klamm.yaml", "configuration of the node")
	cluster := cmd.Flags().String("cluster", "", "check this cluster alone")
	pid := cmd.Flags().Int32("pid", 0, "on behalf of this process, by the SVID it has; default: the node itself")
	wait := cmd.Flags().Duration("wait", time.Minute, "how long all of it may take")
	output := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		config, err := node.Load(*file)
		if err != nil {
			return err
		}
		if *pid < 0 {
			return errors.New("--pid: want a process id")
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), *wait)
		defer cancel()
		findings, err := node.CheckBrokers(ctx, config, node.BrokerCheck{Cluster: *cluster, PID: *pid})
		if err != nil {
			return err
		}
		return report(cmd, output, findings)
	}
	return cmd
}
