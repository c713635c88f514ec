package main

import (
	"errors"
	"io/fs"
	"os"

	"github.com/spf13/cobra"

	"klamm/enforcer/policy"
	"klamm/enforcer/policy/strict"
)

func newPolicyCommand() *cobra.Command {
	return group("policy", "Check policy files, explain decisions, translate Kafka's ACLs",
		newPolicyCheckCommand, newPolicyExplainCommand, newPolicyImportACLsCommand)
}

// readPolicy reads one policy file. The error names the file, and is a strict.Errors like those of policy.Parse.
func readPolicy(file string) (*policy.Set, error) {
	data, err := os.ReadFile(file)
	if err == nil {
		return policy.Parse(file, data)
	}
	var pathErr *fs.PathError
	if errors.As(err, &pathErr) {
		err = pathErr.Err // the file is named by strict.Error
	}
	return nil, strict.Errors{{File: file, Message: "cannot read it: " + err.Error()}}
}
