package main

import (
	"maps"

	"distkit/cmd/internal/cli"
	"distkit/image"
	"distkit/refname"

	"github.com/spf13/cobra"
)

func newConvert() *cobra.Command {
	c := &cobra.Command{
		Use:   "convert [flags] NAME|DIGEST [NEW]",
		Short: "make OCI's documents of docker's, and name them; layers and configs stay",
		Args:  cobra.RangeArgs(1, 2),
	}
	f := newFlags(c)
	f.platform = c.Flags().String("platform", "", "of an index the manifest for `PLATFORM` alone, as linux/amd64")
	replace := c.Flags().Bool("replace", false, "let a NEW that exists point at it from now on")
	c.RunE = func(c *cobra.Command, args []string) error {
		store, names, err := f.open()
		if err != nil {
			return err
		}
		w := image.Walker{Store: store}
		if c.Flags().Changed("platform") {
			if w.Platform, err = image.ParsePlatform(*f.platform); err != nil {
				return err
			}
		}
		put := names.Replace
		if len(args) == 2 && !*replace {
			put = names.Create
		}
		old, err := w.Target(c.Context(), names, args[0])
		if err != nil {
			return err
		}
		name := old.Name
		if len(args) == 2 {
			name = refname.Normalize(args[1])
		} else if name == "" {
			return cli.Usagef("a NEW name is wanted: %s has none", args[0])
		}
		// until this process exits: new objects have no name yet
		if _, err := store.Hold(c.Context()); err != nil {
			return err
		}
		target, err := w.Convert(c.Context(), old.Target)
		if err != nil {
			return err
		}
		target.Platform, target.Annotations = nil, maps.Clone(old.Labels)
		img, err := put(c.Context(), name, target)
		if err != nil {
			return err
		}
		return printTarget(c, img)
	}
	return c
}
