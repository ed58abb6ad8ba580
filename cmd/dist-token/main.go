// Dist-token prints the header with which a registry can be asked by another program.
package main

import (
	"fmt"

	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/registry"
	"distkit/remotes"

	"github.com/spf13/cobra"
)

func main() { cli.Main(newCommand()) }

func newCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "dist-token [flags] LOCATOR [SCOPE…]",
		Short: "print the Authorization header for a registry",
		Args:  cobra.MinimumNArgs(1),
	}
	options := registry.Flags(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		value, err := remotes.Authorization(c.Context(), args[0], *options, args[1:]...)
		if err != nil || value == "" {
			return err
		}
		_, err = fmt.Fprintf(c.OutOrStdout(), "Authorization: %s\n", value)
		return err
	}
	return c
}
