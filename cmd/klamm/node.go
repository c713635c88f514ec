package main

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"syscall"

	"github.com/rs/zerolog"
	"github.com/spf13/cobra"

	"klamm/node"
)

func newNodeCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "node",
		Short: "Run the agent on this host",
		Long: `Redirect every broker-bound connection of this host's workloads, tell who connects, enforce the policy and
write the audit. Needs root, a kernel with the features of Linux 5.15 and BTF, and cgroup2; klamm doctor tells whether
this host is fit.

SIGHUP reads the policy files again; a bad file keeps the policy that is in force. SIGINT and SIGTERM end the node: open
connections are drained, and from then on intercept.on-enforcer-down says what becomes of broker-bound connects, until
the node runs again or klamm uninstall takes the interception away.

Under systemd the listeners are kept while the node restarts (FileDescriptorStoreMax=), so clients wait instead of being
refused. Elsewhere --replace does the same: it takes over from the node that runs.

The audit goes to standard output or to the file that audit.file names; the node's own log to standard error.

Exit codes: 0 ended by a signal, 1 could not start or go on.`,
		Example: "  klamm node -c /etc/klamm/klamm.yaml",
		Args:    cobra.NoArgs,
	}
	file := cmd.Flags().StringP("config", "c", "/etc/klamm/klamm.yaml", "configuration file")
	replace := cmd.Flags().Bool("replace", false, "take over from the node that runs: it drains once this one is up")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		config, err := node.Load(*file)
		if err != nil {
			return err
		}
		log := zerolog.New(cmd.ErrOrStderr()).With().Timestamp().Logger()
		var n *node.Node
		if *replace {
			n, err = node.Replace(cmd.Context(), config, log)
		} else {
			n, err = node.Open(config, log)
		}
		if err != nil {
			return err
		}
		return runNode(cmd.Context(), n, config, log)
	}
	return cmd
}

func runNode(ctx context.Context, n *node.Node, config node.Config, log zerolog.Logger) error {
	// When nobody reads the audit any more, writing it must fail, and connections with it, and not this process.
	signal.Ignore(syscall.SIGPIPE)
	hangup := make(chan os.Signal, 1)
	defer close(hangup)
	signal.Notify(hangup, syscall.SIGHUP)
	defer signal.Stop(hangup)
	go func() {
		for range hangup {
			if err := n.ReloadPolicy(); err != nil {
				log.Error().Err(err).Msg("the policy was not reloaded")
				continue
			}
			log.Info().Strs("files", config.Policies).Msg("policy reloaded")
		}
	}()
	err := n.Run(ctx, func() {
		log.Info().Str("node", config.Node.Name).Strs("policies", config.Policies).Msg("redirecting")
	})
	return errors.Join(err, n.Close())
}
