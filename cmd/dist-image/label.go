package main

import (
	"cmp"
	"maps"
	"slices"

	"distkit/cmd/internal/cli"
	"distkit/image"

	"github.com/spf13/cobra"
)

// labelRecord is a label as --json shows it.
type labelRecord struct {
	Name  string `json:"name"`
	Key   string `json:"key"`
	Value string `json:"value"`
}

func newLabel() *cobra.Command {
	c := &cobra.Command{
		Use:   "label [flags] NAME|- [KEY=VALUE…]",
		Short: "set labels of an image (KEY= takes one away) and list them all; - reads names from standard input",
		Args:  cobra.MinimumNArgs(1),
	}
	f := newFlags(c)
	records := cli.NewRecords(c, "REF", "KEY", "VALUE")
	c.RunE = func(c *cobra.Command, args []string) error {
		_, names, err := f.open()
		if err != nil {
			return err
		}
		changes, err := cli.Labels(args[1:])
		if err != nil {
			return err
		}
		one := args[0] != "-"
		if one {
			records.Columns("KEY", "VALUE")
		}
		images := map[string]image.Image{}
		do := func(objects []string) ([]error, error) { return label(c, names, objects, changes, images) }
		err = cli.Batch(c, args[:1], do, func(name string) error {
			labels := images[name].Labels
			if records.Quiet() && !one {
				return records.Write(nil, name)
			}
			for _, k := range slices.Sorted(maps.Keys(labels)) {
				cells := []any{name, k, labels[k]}
				if one {
					cells = cells[1:]
				}
				if err := records.Write(labelRecord{name, k, labels[k]}, cells...); err != nil {
					return err
				}
			}
			return nil
		})
		return cmp.Or(err, records.Close())
	}
	return c
}

// label changes labels of names, if there are changes, and puts the names' images with the resulting labels into
// images.
func label(c *cobra.Command, names *image.Names, objects []string, changes map[string]string, images map[string]image.Image) ([]error, error) {
	var all []image.Image
	errs := make([]error, len(objects))
	if len(changes) > 0 {
		var err error
		if all, errs, err = names.UpdateAll(c.Context(), objects, image.Image{Labels: changes}, cli.LabelPaths(changes)...); err != nil {
			return nil, err
		}
	} else {
		listing, err := names.Read()
		if err != nil {
			return nil, err
		}
		all = make([]image.Image, len(objects))
		for i, name := range objects {
			all[i], errs[i] = listing.Lookup(name)
		}
	}
	clear(images)
	for i, name := range objects {
		images[name] = all[i]
	}
	return errs, nil
}
