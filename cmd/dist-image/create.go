package main

import (
	"maps"

	"distkit/cmd/internal/cli"
	"distkit/image"
	"distkit/refname"

	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"
)

func newCreate() *cobra.Command {
	c := &cobra.Command{
		Use:   "create [flags] NAME DIGEST|OLD|-",
		Short: "name a manifest or index of the store, by its digest or another name; - reads its descriptor from standard input",
		Args:  cobra.ExactArgs(2),
	}
	f := newFlags(c)
	from := c.Flags().String("from-namespace", "", "OLD is a name of this `NAMESPACE`")
	replace := c.Flags().Bool("replace", false, "let a name that exists point at it from now on")
	labels := c.Flags().StringArray("label", nil, "set the label `KEY=VALUE`; without a value take it away")
	c.RunE = func(c *cobra.Command, args []string) error {
		store, names, err := f.open()
		if err != nil {
			return err
		}
		source := names
		if *from != "" {
			if _, err := digest.Parse(args[1]); err == nil || args[1] == "-" {
				return cli.Usagef("--from-namespace is for an OLD name, not for %s", args[1])
			}
			if source, err = image.OpenNames(store, *from); err != nil {
				return err
			}
		}
		target, err := descriptor(c, store, source, args[1])
		if err != nil {
			return err
		}
		set, err := cli.Labels(*labels)
		if err != nil {
			return err
		}
		if target.Annotations == nil {
			target.Annotations = map[string]string{}
		}
		maps.Copy(target.Annotations, set)
		put := names.Create
		if *replace {
			put = names.Replace
		}
		img, err := put(c.Context(), refname.Normalize(args[0]), target)
		if err != nil {
			return err
		}
		return printTarget(c, img)
	}
	return c
}
