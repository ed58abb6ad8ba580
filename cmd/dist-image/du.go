package main

import (
	"cmp"
	"fmt"

	"distkit/cmd/internal/cli"
	"distkit/image"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
)

func newDu() *cobra.Command {
	c := &cobra.Command{
		Use:   "du [flags] [NAME…|-]",
		Short: "list how much of the store each image takes, and how much goes with its name",
		Args:  cobra.ArbitraryArgs,
	}
	f := newFlags(c)
	records := cli.NewRecords(c, "REF", "SIZE", "SHARED", "EXCLUSIVE")
	c.RunE = func(c *cobra.Command, args []string) error {
		_, names, err := f.open()
		if err != nil {
			return err
		}
		all, err := names.Usage(c.Context())
		if err != nil {
			return err
		}
		write := func(u image.Usage) error {
			return records.Write(u, cmp.Or(u.Name, string(u.Target)), cli.Size(u.Size), cli.Size(u.Shared), cli.Size(u.Exclusive))
		}
		of := make(map[string]image.Usage, len(all))
		for _, u := range all {
			of[cmp.Or(u.Name, string(u.Target))] = u
			if len(args) == 0 {
				if err := write(u); err != nil {
					return err
				}
			}
		}
		err = cli.Each(c, args, func(ref string) error {
			u, ok := of[ref]
			if !ok {
				return fmt.Errorf("image %s: %w", ref, errdefs.ErrNotFound)
			}
			return write(u)
		})
		return cmp.Or(err, records.Close())
	}
	return c
}
