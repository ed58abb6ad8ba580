package main

import (
	"distkit/cmd/internal/containers"
	"distkit/cmd/internal/create"

	"github.com/spf13/cobra"
)

func newSecret(o *containers.Flags) *cobra.Command {
	c := &cobra.Command{Use: "secret ID NAME=FILE…", Short: "give a container its secrets anew, as after a boot", Args: cobra.MinimumNArgs(2)}
	c.RunE = func(c *cobra.Command, args []string) error {
		t, err := get(o, args[0])
		if err == nil {
			err = containers.BeRoot() // the files must belong to its users
		}
		if err != nil {
			return err
		}
		secrets, err := create.ReadSecrets(args[1:], c.InOrStdin())
		if err != nil {
			return err
		}
		return t.SetSecrets(secrets)
	}
	return c
}
