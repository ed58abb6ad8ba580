package main

import (
	"distkit/cmd/internal/cli"
	"distkit/image"

	"github.com/spf13/cobra"
)

func newLabel() *cobra.Command {
	c := &cobra.Command{
		Use:   "label [flags] NAME [KEY=VALUE…]",
		Short: "Set labels of an image (KEY= takes one away) and list them all",
		Args:  cobra.MinimumNArgs(1),
	}
	f := newFlags(c)
	records := cli.NewRecords(c, "KEY", "VALUE")
	c.RunE = func(c *cobra.Command, args []string) error {
		_, names, err := f.open()
		if err != nil {
			return err
		}
		changes, err := cli.Labels(args[1:])
		if err != nil {
			return err
		}
		var img image.Image
		if len(changes) == 0 {
			img, err = names.Get(args[0])
		} else {
			img, err = names.Update(c.Context(), image.Image{Name: args[0], Labels: changes}, cli.LabelPaths(changes)...)
		}
		if err != nil {
			return err
		}
		return records.WriteLabels(img.Labels)
	}
	return c
}
