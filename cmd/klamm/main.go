// Klamm stands between unmodified Kafka workloads and their brokers: see the README.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"klamm/enforcer/policy/strict"
)

// commands are the subcommands of klamm, each in the file of its name.
var commands = []func() *cobra.Command{
	newDemoCommand,
	newDoctorCommand,
	newHookCommand,
	newNodeCommand,
	newPolicyCommand,
	newStatusCommand,
	newUninstallCommand,
	newVersionCommand,
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// exitCodeError ends a command that has said all there is to say.
type exitCodeError int

func (c exitCodeError) Error() string { return fmt.Sprintf("exit code %d", int(c)) }

const (
	errFailed exitCodeError = 1 // it did not work; what went wrong is on stderr
	errDenied exitCodeError = 3 // policy explain: the access is denied
)

// run executes one command line and returns the exit code.
func run(ctx context.Context, args []string, out, errOut io.Writer) int {
	root := newRootCommand()
	root.SetArgs(args)
	root.SetOut(out)
	root.SetErr(errOut)
	err := root.ExecuteContext(ctx)
	var code exitCodeError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &code):
		return int(code)
	}
	_, _ = fmt.Fprintln(errOut, "klamm:", err) // the exit code still tells when stderr is gone
	return int(errFailed)
}

func newRootCommand() *cobra.Command {
	root := group("klamm", "Policy, identity and audit for unmodified Kafka workloads", commands...)
	root.Long = root.Short + `.

Exit codes: 0 done, 1 failed (one clear line on stderr says why), 3 denied (policy explain).`
	root.SilenceErrors = true
	root.SilenceUsage = true
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return fmt.Errorf("%w; see %s --help", err, cmd.CommandPath())
	})
	return root
}

// group is a command that only has subcommands.
func group(use, short string, subcommands ...func() *cobra.Command) *cobra.Command {
	cmd := &cobra.Command{
		Use:   use,
		Short: short,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return nil
			}
			var names []string
			for _, c := range cmd.Commands() {
				names = append(names, c.Name())
			}
			return errors.New(strict.Unknown("command", args[0], names))
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	for _, sub := range subcommands {
		cmd.AddCommand(sub())
	}
	return cmd
}
