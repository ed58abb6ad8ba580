package main

import (
	"distkit/cmd/internal/cli"

	"github.com/spf13/cobra"
)

func newTarget() *cobra.Command {
	c := &cobra.Command{
		Use:   "target [flags] NAME|DIGEST",
		Short: "print digest, size and media type of what a name points at",
		Args:  cobra.ExactArgs(1),
	}
	f := newFlags(c)
	f.platform = c.Flags().String("platform", "", "of an index the manifest for `PLATFORM`, as linux/amd64")
	records := cli.NewRecords(c, "DIGEST", "SIZE", "TYPE")
	c.RunE = func(c *cobra.Command, args []string) error {
		w, d, err := f.walker(c.Context(), args[0])
		if err == nil && c.Flags().Changed("platform") {
			d, err = w.Manifest(c.Context(), d)
		}
		if err != nil {
			return err
		}
		if err := records.Write(d, d.Digest, cli.Size(d.Size), cli.MediaType(d.MediaType)); err != nil {
			return err
		}
		return records.Close()
	}
	return c
}
