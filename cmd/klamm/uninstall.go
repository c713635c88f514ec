package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"klamm/node"
)

func newUninstallCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "uninstall",
		Short: "Take the interception away: clients connect to their brokers directly again",
		Long: `Remove what outlives the node: its eBPF programs and maps, and the control socket. The end of the node alone
removes nothing. Connections through the node have ended with it. It is no error if there is nothing to remove.

Stop the node first: while it runs this fails, and changes nothing.

Exit codes: 0 nothing is intercepted any more, 1 failed.`,
		Example: "  systemctl disable --now klamm && klamm uninstall",
		Args:    cobra.NoArgs,
	}
	file := cmd.Flags().StringP("config", "c", "/etc/klamm/klamm.yaml", "configuration of the node")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		config, err := node.Load(*file)
		if err != nil {
			return err
		}
		if err := node.Uninstall(config); err != nil {
			if errors.Is(err, node.ErrRunning) {
				return errors.New("a node is running: stop it first (systemctl stop klamm)")
			}
			return err
		}
		_, err = fmt.Fprintln(cmd.OutOrStdout(), "nothing is intercepted any more")
		return err
	}
	return cmd
}
