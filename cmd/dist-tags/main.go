// Dist-tags lists the tags of a remote.
package main

import (
	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/registry"
	"distkit/remotes"

	"github.com/spf13/cobra"
)

func main() { cli.Main(newCommand()) }

func newCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "dist-tags [flags] LOCATOR",
		Short: "list the tags of a remote",
		Args:  cobra.ExactArgs(1),
	}
	options := registry.Flags(c)
	records := cli.NewRecords(c, "TAG")
	c.RunE = func(c *cobra.Command, args []string) error {
		r, err := remotes.Open(args[0], *options)
		if err != nil {
			return err
		}
		for tag, err := range r.Tags(c.Context()) {
			if err != nil {
				return err
			}
			value := struct {
				Tag string `json:"tag"`
			}{tag}
			if err := records.Write(value, tag); err != nil {
				return err
			}
		}
		return records.Close()
	}
	return c
}
