// Dist-untag deletes a tag or manifest at a remote.
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
		Use:   "dist-untag [flags] LOCATOR OBJECT",
		Short: "delete a tag or manifest at a remote",
		Args:  cobra.ExactArgs(2),
	}
	options := registry.Flags(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		r, err := remotes.Open(args[0], *options)
		if err != nil {
			return err
		}
		if err := r.Delete(c.Context(), args[1]); err != nil {
			return err
		}
		_, err = fmt.Fprintln(c.OutOrStdout(), args[1])
		return err
	}
	return c
}
