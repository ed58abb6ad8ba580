// Dist-logout removes the credentials for a registry.
package main

import (
	"cmp"

	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/registry"
	"distkit/remotes"

	"github.com/spf13/cobra"
)

func main() { cli.Main(newCommand()) }

func newCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "dist-logout [flags] HOST",
		Short: "remove the credentials for a registry",
		Args:  cobra.ExactArgs(1),
	}
	options := registry.Flags(c)
	records := cli.NewRecords(c, "HOST", "PLACE")
	c.RunE = func(c *cobra.Command, args []string) error {
		places, err := remotes.Logout(c.Context(), args[0], *options)
		for _, place := range places {
			if werr := records.Write(map[string]string{"host": args[0], "place": place}, args[0], place); werr != nil {
				return werr
			}
		}
		return cmp.Or(err, records.Close())
	}
	return c
}
