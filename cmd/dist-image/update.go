package main

import (
	"distkit/cmd/internal/cli"
	"distkit/image"

	"github.com/spf13/cobra"
)

func newUpdate() *cobra.Command {
	c := &cobra.Command{
		Use:   "update [flags] NAME",
		Short: "change what a name points at, or some of its labels, and nothing else",
		Args:  cobra.ExactArgs(1),
	}
	f := newFlags(c)
	to := c.Flags().String("target", "", "point at this `DIGEST`, or at what this name does; - reads a descriptor from standard input")
	labels := c.Flags().StringArray("label", nil, "set the label `KEY=VALUE`; without a value take it away")
	c.RunE = func(c *cobra.Command, args []string) error {
		store, names, err := f.open()
		if err != nil {
			return err
		}
		img := image.Image{Name: args[0]}
		var paths []string
		if *to != "" {
			if img.Target, err = descriptor(c, store, names, *to); err != nil {
				return err
			}
			paths = append(paths, "target")
		}
		if img.Labels, err = cli.Labels(*labels); err != nil {
			return err
		}
		paths = append(paths, cli.LabelPaths(img.Labels)...)
		if len(paths) == 0 {
			return cli.Usagef("nothing to change: give --target or --label")
		}
		if img, err = names.Update(c.Context(), img, paths...); err != nil {
			return err
		}
		return printTarget(c, img)
	}
	return c
}
