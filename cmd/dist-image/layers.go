package main

import (
	"distkit/cmd/internal/cli"

	"github.com/spf13/cobra"
)

func newLayers() *cobra.Command {
	c := &cobra.Command{
		Use:   "layers [flags] NAME|DIGEST",
		Short: "list the layers of the platform's manifest, the lowest first",
		Args:  cobra.ExactArgs(1),
	}
	f := newPlatformFlags(c)
	records := cli.NewRecords(c, "DIGEST", "SIZE", "TYPE", "DIFF ID", "CHAIN ID")
	c.RunE = func(c *cobra.Command, args []string) error {
		w, d, err := f.walker(c.Context(), args[0])
		if err != nil {
			return err
		}
		layers, err := w.Layers(c.Context(), d)
		if err != nil {
			return err
		}
		for _, l := range layers {
			if err := records.Write(l, l.Digest, cli.Size(l.Size), cli.MediaType(l.MediaType), l.DiffID, l.ChainID); err != nil {
				return err
			}
		}
		return records.Close()
	}
	return c
}
