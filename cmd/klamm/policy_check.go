package main

import (
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"klamm/enforcer/policy"
	"klamm/enforcer/policy/strict"
)

// checkedFile is the result of policy check for one file.
type checkedFile struct {
	File        string         `json:"file"`
	OK          bool           `json:"ok"`
	Mode        policy.Mode    `json:"mode,omitempty"`
	Cluster     string         `json:"cluster,omitempty"`
	Rules       int            `json:"rules"`
	Connections int            `json:"connections"`
	Errors      []strict.Error `json:"errors"`
	Warnings    []strict.Error `json:"warnings"`
}

func newPolicyCheckCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "check FILE…",
		Short: "Tell whether policy files are valid",
		Long: `Tell whether policy files are valid. All errors of all files are printed, each with file, line and column.
Warnings point at what is valid but hardly meant; they do not change the exit code.

Exit codes: 0 all files are valid, 1 at least one is not.`,
		Example: "  klamm policy check /etc/klamm/policy/*.yaml",
		Args:    cobra.MinimumNArgs(1),
	}
	output := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, files []string) error {
		checked := make([]checkedFile, len(files))
		result := error(nil)
		for i, file := range files {
			checked[i] = checkPolicy(file)
			if !checked[i].OK {
				result = errFailed
			}
		}
		err := output.print(cmd.OutOrStdout(), checked, func(out io.Writer) error {
			return printChecked(out, cmd.ErrOrStderr(), checked)
		})
		return errors.Join(err, result)
	}
	return cmd
}

func checkPolicy(file string) checkedFile {
	c := checkedFile{File: file, Errors: []strict.Error{}, Warnings: []strict.Error{}}
	set, err := readPolicy(file)
	if err != nil {
		var all strict.Errors
		if !errors.As(err, &all) {
			all = strict.Errors{{File: file, Message: err.Error()}}
		}
		c.Errors = all
		return c
	}
	c.OK, c.Mode, c.Cluster, c.Rules, c.Connections = true, set.Mode, set.Cluster, set.Rules(), set.Connections()
	c.Warnings = append(c.Warnings, set.Warnings()...)
	return c
}

func printChecked(out, errOut io.Writer, checked []checkedFile) error {
	for _, c := range checked {
		for _, e := range c.Errors {
			if _, err := fmt.Fprintln(errOut, e); err != nil {
				return err
			}
		}
		for _, w := range c.Warnings {
			if _, err := fmt.Fprintln(errOut, "warning:", w); err != nil {
				return err
			}
		}
		if !c.OK {
			continue
		}
		scope := "every cluster"
		if c.Cluster != "" {
			scope = fmt.Sprintf("cluster %q", c.Cluster)
		}
		if _, err := fmt.Fprintf(out, "ok: %s: rules %d, connections %d, mode %s, %s\n", c.File, c.Rules, c.Connections,
			c.Mode, scope); err != nil {
			return err
		}
	}
	return nil
}
