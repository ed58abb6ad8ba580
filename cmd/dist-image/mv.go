package main

import (
	"distkit/image"
	"distkit/refname"

	"github.com/spf13/cobra"
)

func newMv() *cobra.Command {
	c := &cobra.Command{
		Use:   "mv [flags] OLD NEW",
		Short: "rename: give what OLD points at the name NEW, with its labels, and take OLD away",
		Args:  cobra.ExactArgs(2),
	}
	f := newFlags(c)
	namespace := c.Flags().String("to-namespace", "", "NEW is a name of this `NAMESPACE`")
	replace := c.Flags().Bool("replace", false, "take the place of a name NEW that exists")
	c.RunE = func(c *cobra.Command, args []string) error {
		store, names, err := f.open()
		if err != nil {
			return err
		}
		to := names
		if *namespace != "" {
			if to, err = image.OpenNames(store, *namespace); err != nil {
				return err
			}
		}
		img, err := names.Rename(c.Context(), args[0], to, refname.Normalize(args[1]), *replace)
		if err != nil {
			return err
		}
		return printTarget(c, img)
	}
	return c
}
